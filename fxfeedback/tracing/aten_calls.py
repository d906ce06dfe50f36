"""An aten op of an exported graph as a call of the torch function or method that has a rule."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from fxfeedback.errors import TraceError
from fxfeedback.rules.core import CONSTANT, RULES
from fxfeedback.rules.draws import drawn_like, dropped
from fxfeedback.rules.ops import put_at, same, without_gradient
from fxfeedback.tracing.aten import function_of

Operator: Any = type(torch.ops.aten.add.Tensor)
"""The class of aten's operators."""
PLACES = ("device", "layout", "pin_memory", "non_blocking", "copy")
"""Keywords that say where a tensor lies: the graph's constants and inputs say it."""
NO_END = 2**63 - 1
"""What aten writes for the end of x[2:]."""
NOTHING = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size"}
"""Ops that check what was true in tracing."""
INTERPOLATIONS = ("zeros", "border", "reflection"), ("bilinear", "nearest", "bicubic")


IN_PLACE_ONLY = {"normal", "uniform", "exponential", "random", "geometric", "cauchy", "log_normal"}
"""Draws into a tensor, which have no twin out of place."""


ALIASING = {"dropout", "feature_dropout", "alpha_dropout"}
"""Ops that may return their argument itself, which their schema does not say."""


class Call(NamedTuple):
    """A function, or a method by its name; and its arguments, in which there are nodes."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012  (nothing writes into it)


def base_name(op: Any) -> str:
    """aten.add_.Tensor -> 'add'"""
    name = getattr(op, "overloadpacket", op).__name__
    return name if name.startswith("__") else name.rstrip("_") or name


def may_share(node: fx.Node) -> bool:
    """Whether the value may lie in the memory of the first argument."""
    op = node.target
    if isinstance(op, Operator):
        return any(value.alias_info is not None for value in op._schema.returns) or base_name(op) in ALIASING
    return op in (operator.getitem, without_gradient)


def writes(node: fx.Node) -> bool:
    """Whether the node is an op in place."""
    return isinstance(node.target, Operator) and node.target._schema.is_mutable


def torch_call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """What the op of an exported graph's node is in torch's own functions.

    Args:
        node: calls an aten op.
        args, kwargs: of the new call.

    Raises:
        TraceError: an op that no graph could call.
    """
    op: Any = node.target
    name = base_name(op)
    kwargs = {key: value for key, value in kwargs.items() if key not in PLACES}
    if name in IN_PLACE_ONLY and op._schema.is_mutable:
        return Call(f"{name}_", args, kwargs)
    spelled = SPELLED.get(op.overloadpacket.__name__, SPELLED.get(name))
    if spelled is not None:
        return spelled(*args, **kwargs)
    if op._schema.is_mutable:
        op = getattr(getattr(torch.ops.aten, name), str(op).split(".")[-1])  # its twin out of place
    function = function_of(op)
    if function not in RULES and function not in CONSTANT:
        written = getattr(F, name, None)  # in Python, with aten's arguments but for those in SPELLED
        function = written if written in RULES else function
    return Call(function or op, args, kwargs)


# -- ops whose arguments aten orders in another way --------------------------------------------------------------------


def _batch_norm(x, weight, bias, mean, var, training, momentum, eps, *_) -> Call:  # type: ignore[no-untyped-def]
    return Call(F.batch_norm, (x, mean, var, weight, bias, training, momentum, eps))


def _instance_norm(x, weight, bias, mean, var, *rest) -> Call:  # type: ignore[no-untyped-def]
    return Call(F.instance_norm, (x, mean, var, weight, bias, *rest[:3]))


def _first(function: Any, n: int) -> Callable[..., Call]:
    """The function takes the first n arguments; others say which kernel runs."""
    return lambda *args, **kwargs: Call(function, args[:n], {k: v for k, v in kwargs.items() if k != "cudnn_enable"})


def _pool(function: Any) -> Callable[..., Call]:
    """No stride is an empty list in aten."""
    return lambda x, kernel, stride=(), *args, **kwargs: Call(
        function, (x, kernel, list(stride) or kernel, *args), kwargs
    )


def _interpolate(mode: str, aligns: bool) -> Callable[..., Call]:
    def spelled(x: Any, size: Any, *args: Any) -> Call:
        align, scale = (*args, None)[:2] if aligns else (None, *args, None)[:2]
        return Call(F.interpolate, (x, size, scale, mode, align))

    return spelled


def _hardtanh(x: Any, low: float = -1, high: float = 1) -> Call:
    return Call(F.relu6, (x,)) if (low, high) == (0, 6) else Call(F.hardtanh, (x, low, high))


def _slice(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Call:
    part = slice(start or None, None if isinstance(end, int) and end == NO_END else end, None if step == 1 else step)
    if part == slice(None):
        return Call(same, (x,))
    return Call(operator.getitem, (x, (slice(None),) * dim + (part,))) if dim >= 0 else _from_last(x, dim, part)


def _from_last(x: Any, dim: int, part: slice) -> Call:
    return Call(operator.getitem, (x, (..., part, *(slice(None),) * (-dim - 1))))


def _select(x: Any, dim: int, index: Any) -> Call:
    return Call(torch.select, (x, dim, index))


def _index(x: Any, indices: list[Any]) -> Call:
    return Call(operator.getitem, (x, tuple(slice(None) if i is None else i for i in indices)))


def _index_put(x: Any, indices: list[Any], value: Any, accumulate: bool = False) -> Call:
    if accumulate:
        raise TraceError("it adds at an index with index_put(accumulate=True): use index_add or scatter_add")
    return Call(put_at, (x, _index(x, indices).args[1], value))


def _view(x: Any, size: Any) -> Call:
    """Other strides than at export, as an opened attention's, are no fault."""
    return Call("view" if isinstance(size, torch.dtype) else torch.reshape, (x, size))


def _bernoulli(x: Any, p: Any = None, **kwargs: Any) -> Call:
    return Call(torch.bernoulli, (x,)) if p is None else Call(drawn_like, (x, p))


def _to(x: Any, *args: Any, **kwargs: Any) -> Call:
    dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, (torch.dtype, fx.Node))), None)
    return Call(same, (x,)) if dtype is None else Call("to", (x, dtype))


def _embedding(weight: Any, ids: Any, padding: int = -1, by_frequency: bool = False, sparse: bool = False) -> Call:
    return Call(F.embedding, (ids, weight, None if padding < 0 else padding, None, 2.0, by_frequency, sparse))


def _grid_sample(x: Any, grid: Any, mode: int = 0, padding: int = 0, align: bool = False) -> Call:
    paddings, modes = INTERPOLATIONS
    return Call(F.grid_sample, (x, grid, modes[mode], paddings[padding], align))


SPELLED: dict[str, Callable[..., Call]] = {
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _first(F.layer_norm, 5),
    "group_norm": _first(F.group_norm, 5),
    "elu": _first(F.elu, 2),
    "embedding": _embedding,
    "hardtanh": _hardtanh,
    "dropout": lambda *args: Call(F.dropout, args),
    "dropout_": lambda *args: Call(dropped, args),
    "copy": lambda x, value, *_: Call(put_at, (x, (...,), value)),
    "fill": lambda x, value: Call(put_at, (x, (...,), value)),
    "zero": lambda x: Call(torch.zeros_like, (x,)),
    "bernoulli": _bernoulli,
    "bernoulli_": lambda x, p=0.5, **_: Call(drawn_like, (x, p)),  # torch.export leaves out what is the default
    "index_put": _index_put,
    "alias": lambda x: Call(same, (x,)),
    "lift_fresh": lambda x: Call(same, (x,)),
    "lift_fresh_copy": lambda x: Call(same, (x,)),
    "slice": _slice,
    "select": _select,
    "index": _index,
    "to": _to,
    "_to_copy": _to,
    "view": _view,
    "sym_size": lambda x, dim: Call("size", (x, dim)),
    "sym_numel": lambda x: Call("numel", (x,)),
    "numpy_T": lambda x: Call(getattr, (x, "T")),
    "mT": lambda x: Call(getattr, (x, "mT")),
    "pad": lambda x, pad, mode="constant", value=None: Call(F.pad, (x, pad, mode, value)),
    "constant_pad_nd": lambda x, pad, value=0: Call(F.pad, (x, pad, "constant", value)),
    "einsum": lambda equation, tensors, **_: Call(torch.einsum, (equation, *tensors)),
    "meshgrid": lambda tensors, **kwargs: Call(torch.meshgrid, tuple(tensors), kwargs),
    "silu": lambda x: Call(F.silu, (x,)),
    "grid_sampler": _grid_sample,
    "affine_grid_generator": lambda theta, size, align: Call(F.affine_grid, (theta, size, align)),
    "im2col": lambda *args: Call(F.unfold, args),
    "col2im": lambda *args: Call(F.fold, args),
    **{f"{kind}_pool{n}d": _pool(getattr(F, f"{kind}_pool{n}d")) for kind in ("avg", "max") for n in (1, 2, 3)},
    **{f"upsample_nearest{n}d": _interpolate("nearest", False) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": _interpolate("nearest-exact", False) for n in (1, 2, 3)},
    "upsample_linear1d": _interpolate("linear", True),
    "upsample_bilinear2d": _interpolate("bilinear", True),
    "upsample_trilinear3d": _interpolate("trilinear", True),
    "upsample_bicubic2d": _interpolate("bicubic", True),
}
"""Ops that torch's functions spell in another way than aten does: base name -> the call with aten's arguments."""
