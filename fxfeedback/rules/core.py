"""What a rule is, and the table of all rules. This file knows no op: those are in the other files of this folder.

For a BU op  y = f(x, w, ...)  a rule is a function of the op's output and operands. It returns a table: operand name ->
what the TD graph does to bring the counter neuron of y to that operand.

    @rule(F.linear, weight="weight", examples=[call(F.linear, T(4, 3), T(2, 3), T(2))])
    def linear(y, input, weight, bias=None):
        "y = x Wᵀ + b"
        return {
            "input": transpose(lambda t: t @ weight),           # linear in x: one counterpart serves both TD roles
            "weight": update(lambda e: outer(e, input)),        # the Counter-Hebb rule: post- times pre-synaptic
            "bias": update(lambda e: sum_to(e, bias, y)),
        }

The lambdas are plain tensor code. They run on `torch.fx` proxies (the framework turns them into graph nodes) or on
tensors. Each operand has `shape`, `ndim` and `dtype`; sizes are ints except for batch dimensions, which are known only
when the graph runs. In the instruction pass no BU value exists yet: operands that depend on the model's input then have
a shape and nothing else (see `known`).
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxfeedback.rules.examples import Example
from fxfeedback.rules.ops import applying, is_recorded, one_node

Counter = Any
"""A counter neuron: the TD value at the place of a BU value."""


@dataclass(frozen=True)
class Roles:
    """How a counter neuron passes to one operand, in the instruction pass and in the error pass."""

    instruct: Callable[[Counter], Counter]
    error: Callable[[Counter], Counter]


def transpose(way: Callable[[Counter], Counter]) -> Roles:
    """For an op that is linear in this operand: its transpose, in both roles."""
    return Roles(way, way)


def roles(*, instruct: Callable[[Counter], Counter], error: Callable[[Counter], Counter]) -> Roles:
    """For an op where the two roles differ."""
    return Roles(instruct, error)


def update(way: Callable[[Counter], Counter]) -> Roles:
    """For a parameter: what Counter-Hebb learning adds to its `.grad`. Instructions do not pass through it."""
    return Roles(nothing, way)


def as_is(t: Counter) -> Counter:
    """The counter neuron itself."""
    return t


def nothing(t: Counter) -> None:
    """No counter neuron for this operand in this role."""
    return


@dataclass
class Fused:
    """PyTorch's fused kernels for an op: faster than its rule in eager mode, equal to it, and not exportable.

    `forward(*operands)` replaces the BU op where learning follows; it returns the op's output and a tuple of values for
    the error pass. `error(e, y, saved, wanted, *operands)` returns a table operand -> counter neuron; `wanted`
    names the operands that need one.
    """

    error: Callable[..., dict[str, Any]]
    forward: Callable[..., tuple[Any, tuple[Any, ...]]] | None = None
    applies: Callable[..., bool] = lambda *operands, **options: True


@dataclass(eq=False)
class Rule:
    """The TD counterpart of one BU op. Every rule is equal to itself only, so that it may be the key of a table.

    table: (y, *operands) -> {operand: Roles}; its signature after y is the op's own signature.
    weight: the operand that gets a TD twin when weights are separate, and that TD biases and norms follow; or None.
    rectifies: whether the op's output is a gating site.
    step: whether f' is 1 where y lies in some range without 0, and 0 elsewhere, as ReLU's is.
    channels: the dimension of the channels in its input and output, where the op fixes it.
    examples: calls that the law is tried on (rules/examples.py).
    """

    name: str
    table: Callable[..., dict[str, Roles]]
    weight: str | None = None
    rectifies: bool = False
    step: bool = False
    channels: int | None = None
    fused: Fused | None = None
    targets: list[Any] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def operands(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by operand name.

        Raises:
            TypeError: the call has an argument that the rule's signature does not have.
        """
        bound = inspect.signature(self.table).bind(None, *args, **kwargs).arguments
        return {name: operand for name, operand in bound.items() if name != "y"}


RULES: dict[Any, Rule] = {}
"""BU op -> its rule."""


def rule(
    *targets: Any,
    weight: str | None = None,
    rectifies: bool = False,
    step: bool = False,
    channels: int | None = None,
    examples: Sequence[Example] = (),
    name: str | None = None,
) -> Callable[[Callable], Rule]:
    """Register the decorated table as the rule of the functions `targets`, which are spellings of one op (see `Rule`).

    A torch.autograd.Function is given as its class.
    A tensor method of the same name goes with a function of torch: torch.mul brings torch.Tensor.mul.
    The rule has the table's name, unless `name` is given.
    """

    def register(table: Callable[..., dict[str, Roles]]) -> Rule:
        made = Rule(name or table.__name__, table, weight, rectifies, step, channels, examples=list(examples))
        made.targets = [*map(applying, targets), *filter(None, map(_tensor_method, targets))]
        RULES.update(dict.fromkeys(made.targets, made))
        return made

    return register


def _tensor_method(function: Any) -> Any:
    """torch.mul -> torch.Tensor.mul; None for a function that is not torch's or has no such method."""
    name = getattr(function, "__name__", "")
    method = getattr(torch.Tensor, name, None) if getattr(torch, name, None) is function else None
    return method if callable(method) else None  # Tensor.real is an attribute


def fused(of: Rule, *, forward: Callable | None = None, applies: Callable[..., bool] | None = None) -> Callable:
    """Name the decorated function as the fused error pass of the rule `of` (see `Fused`)."""

    def register(error: Callable[..., dict[str, Any]]) -> Callable:
        of.fused = Fused(error, forward, *([applies] if applies else []))
        return error

    return register


def without_derivative(kernel: Callable[..., Any], formula: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, which torch cannot differentiate, as one node; where autograd records the call, `formula` runs."""

    @one_node
    def run(*args: Any) -> Any:
        return formula(*args) if is_recorded() else kernel(*args)

    return run


CONSTANT: set[Any] = set()
"""Ops whose output no counter neuron passes through: comparisons, sizes, random numbers."""


def constant(*targets: Any) -> None:
    """Declare that no counter neuron passes through the functions `targets`, nor the tensor methods of their names."""
    CONSTANT.update(targets, filter(None, map(_tensor_method, targets)))


# -- the small words that rules are written in ----------------------------------------------------------------------


def known(operand: Any) -> bool:
    """Whether the operand has a value in this role: always in the error pass; weights and numbers in both."""
    return getattr(operand, "has_value", True)


def shape_of(x: Any) -> tuple[Any, ...]:
    """The shape of a tensor; a shape is returned as it is."""
    return getattr(x, "shape", x)


def stretched(like: Any, y: Any) -> list[int]:
    """The dimensions of y along which an operand of `like`'s shape was broadcast. Each may be given as a shape."""
    narrow, wide = shape_of(like), shape_of(y)
    extra = len(wide) - len(narrow)
    ones = [i + extra for i, size in enumerate(narrow) if is_one(size) and not is_one(wide[i + extra])]
    return [*range(extra), *ones]


def sum_to(t: Counter, like: Any, y: Any) -> Counter:
    """The transpose of broadcasting: `t`, of y's shape, summed over the dimensions that `like` was stretched along."""
    dims = stretched(like, y)
    if dims == list(range(len(shape_of(y)) - len(shape_of(like)))):
        return t.sum(dims) if dims else t
    return t.sum(dims, keepdim=True).reshape(shape_of(like))


def mean_to(t: Counter, like: Any, y: Any) -> Counter:
    """`t`, of y's shape, averaged over the dimensions that `like` was stretched along."""
    dims = stretched(like, y)
    return t.mean(dims, keepdim=True).reshape(like.shape) if dims else t


def after(way: Roles, change: Callable[[Counter], Counter]) -> Roles:
    """`change` first, then `way`: the transpose of an op that is followed by a linear one."""
    return Roles(lambda t: way.instruct(change(t)), lambda e: way.error(change(e)))


def dtype_of(x: Any) -> Any:
    """A tensor's dtype, as far as tracing knows it; None for what is not a tensor."""
    return getattr(getattr(x, "spec", x), "dtype", None)


def listed(numbers: Sequence[Any], named: Any = None) -> list[Any]:
    """The numbers of a call like x.permute(0, 2, 1), x.permute((0, 2, 1)) or x.permute(dims=(0, 2, 1))."""
    numbers = numbers if named is None else [named]
    one = numbers[0] if len(numbers) == 1 else numbers
    return list(one) if isinstance(one, (tuple, list)) else [one]


def is_one(size: Any) -> bool:
    """Whether a size is 1 for every batch size."""
    return isinstance(size, int) and size == 1


def outer(e: Counter, x: Any) -> Counter:
    """Σ over batch and positions of e xᵀ: the Counter-Hebb rule of a linear map on the last dimension."""
    e, x = (t.flatten(0, -2) if t.ndim > 2 else t.reshape(1, -1) if t.ndim == 1 else t for t in (e, x))
    return e.t() @ x


def channelwise(w: Any, ndim: int) -> Any:
    """A vector over channels, shaped to multiply a (N, C, ...) tensor of `ndim` dimensions."""
    return w.reshape((1, -1) + (1,) * (ndim - 2))


def as_tuple(value: Any, length: int) -> tuple[Any, ...]:
    """3 -> (3, 3) and (3,) -> (3, 3), as torch's spatial arguments have it."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * length if len(values) == 1 else values


def spatial(x: Any) -> range:
    """The dimensions of an (N, C, ...) tensor after the channels."""
    return range(2, x.ndim)


def along(t: Counter, matrices: dict[int, Any]) -> Counter:
    """t with each dimension d in `matrices` multiplied by its matrix M_d (size after, size before)."""
    for dim, matrix in matrices.items():
        t = (t.movedim(dim, -1) @ matrix.t()).movedim(-1, dim)
    return t


def eye_like(t: Counter, size: int) -> Counter:
    """The identity matrix in t's dtype, on t's device. A linear map run on it gives the map's matrix."""
    return torch.eye(size, dtype=t.dtype, device=t.device)
