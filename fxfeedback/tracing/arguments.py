"""How a model is called: the tensors among its arguments are the inputs of a graph, and the others choose the graph."""

import enum
import inspect
import keyword
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxfeedback.errors import InputError, TraceError
from fxfeedback.graph.nodes import identifier

PLAIN = (bool, str, bytes, enum.Enum, numbers.Integral, torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Values that are the same where they are equal and of one type. Floating-point numbers are so where they are written
the same: 0.0 is not -0.0, and nan is nan."""
TAKEN = ("instruction", "rows", "error", "gate", "state", "activation", "alpha", "strength", "target", "lr")
"""What graphs and files call inputs of their own, alone or before a `_`."""


class Form(NamedTuple):
    """A call without its tensors: plain data that can be compared and hashed.

    call: (args, kwargs) as `_frozen` makes it.
    names: of its inputs, as a graph calls them.
    """

    call: Any
    names: tuple[str, ...]

    def fill(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with these inputs."""
        return _thawed(self.call, inputs)

    @property
    def n_positional(self) -> int:
        """How many arguments are positional."""
        return len(self.call[1]) - 1

    @property
    def is_positional(self) -> bool:
        """Whether the call has nothing but positional tensors."""
        (_, *args), (_, *named) = self.call[1:]
        return not named and all(kind is _Input for kind, _ in args)


class _Input:
    """Marks the place of an input in frozen data."""


def bind(
    model: nn.Module, args: Sequence[Any], named: Mapping[str, Any], tensors: Any = torch.Tensor
) -> tuple[Form, list[Any]]:
    """The form of a call of `model`, and its inputs. Calls that mean the same by the signature have one form.

    Args:
        model: its forward is asked for its signature, and not called.
        args, named: of the call.
        tensors: classes of what is an input.

    Raises:
        InputError: forward does not take these arguments, or one is neither a tensor nor a plain value.
    """
    signature = inspect.signature(model.forward, follow_wrapped=False)  # a decorator takes what it says itself
    try:
        call = signature.bind(*args, **named)
    except TypeError as error:
        raise InputError(f"{error}; {describe(model)}") from None
    _leave_out_defaults(call)
    names, inputs = _names(model, call), _Inputs(tensors)
    positional = [inputs.frozen(value, name) for value, name in zip(call.args, names, strict=False)]
    by_name = [((str, name), inputs.frozen(value, name)) for name, value in call.kwargs.items()]
    return Form((tuple, (tuple, *positional), (dict, *by_name)), tuple(inputs.values)), list(inputs.values.values())


def describe(model: nn.Module) -> str:
    """'the model is called as forward(x, flag=False)'"""
    signature = inspect.signature(model.forward)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return f"the model is called as forward{inspect.Signature(bare)}"


def arguments_of(model: nn.Module) -> set[str]:
    """The names of forward's arguments, also of one that is decorated."""
    both = (inspect.signature(model.forward, follow_wrapped=follow) for follow in (True, False))
    return {name for signature in both for name in signature.parameters}


def form_of(model: nn.Module, n_inputs: int) -> Form:
    """The form of a call with this many positional tensors.

    Raises:
        TraceError: the model cannot be called so.
    """
    return example_form(model, [torch.empty(0)] * n_inputs)[0]


def example_form(model: nn.Module, examples: Sequence[Any] | Mapping[str, Any]) -> tuple[Form, list[torch.Tensor]]:
    """The form of the call that the example inputs make, positional or by name, and the tensors in them.

    Raises:
        TraceError: the model cannot be called so.
    """
    if isinstance(examples, Mapping):
        try:
            return bind(model, (), examples)
        except InputError as error:
            raise TraceError(
                f"example_inputs= by these names is not a call of {type(model).__name__}: {error}"
            ) from None
    try:
        return bind(model, examples, {})
    except InputError as error:
        takes = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(model.forward).parameters.values()
        wanted = len([p for p in parameters if p.default is p.empty and p.kind in takes])
        raise TraceError(
            f"{type(model).__name__} takes {wanted} inputs, not {len(examples)}: pass example_inputs= with a tensor "
            f"for each ({error})"
        ) from None


def _leave_out_defaults(call: inspect.BoundArguments) -> None:
    parameters = call.signature.parameters
    if any(p.kind is p.VAR_POSITIONAL and name in call.arguments for name, p in parameters.items()):
        return
    for name, value in list(call.arguments.items()):
        if value is parameters[name].default and parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY:
            del call.arguments[name]


def _names(model: nn.Module, call: inspect.BoundArguments) -> list[str]:
    """Of the positional arguments; those of a decorated forward where it has them."""
    try:
        signature = inspect.signature(model.forward)
        signature.bind_partial(*call.args)
    except TypeError:
        signature = call.signature
    names = [name for name, p in signature.parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_POSITIONAL), "input")
    return [names[i] if i < len(names) else f"{rest}_{i - len(names)}" for i in range(len(call.args))]


class _Inputs:
    """The inputs of a call by name, collected while its arguments are frozen."""

    def __init__(self, tensors: Any) -> None:
        self.tensors = tensors
        self.values: dict[str, Any] = {}

    def frozen(self, value: Any, name: str) -> Any:
        """(type, value), (type, *parts), or for a tensor its place among the inputs."""
        kind = type(value)
        if isinstance(value, self.tensors):
            self.values[self.free(name)] = value
            return _Input, len(self.values) - 1
        if value is None or isinstance(value, PLAIN):
            return kind, value
        if isinstance(value, (float, complex)):
            return kind, (float if isinstance(value, float) else complex).__repr__(value)  # type: ignore[operator]
        if kind in (tuple, list, torch.Size) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            return kind, *(self.frozen(part, f"{name}_{i}") for i, part in enumerate(value))
        if kind is dict:
            return kind, *((self.frozen(k, name), self.frozen(part, f"{name}_{k}")) for k, part in value.items())
        raise InputError(
            f"{name}: a graph takes tensors, not a {kind.__name__}; what chooses a graph is None, a bool, a number, a "
            "string, a dtype, a device, an enum, or a tuple, list or dict of such and of tensors"
        )

    def free(self, name: str) -> str:
        name = identifier(name)
        while keyword.iskeyword(name) or name in self.values or name.split("_")[0] in TAKEN:
            name = f"{name}_" if name.split("_")[0] not in TAKEN else f"own_{name}"
        return name


def _thawed(data: Any, inputs: Sequence[Any]) -> Any:
    kind, *parts = data
    if kind is _Input:
        return inputs[parts[0]]
    if kind is dict:
        return {_thawed(key, inputs): _thawed(part, inputs) for key, part in parts}
    if issubclass(kind, enum.Enum):
        return parts[0]
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return kind(*(_thawed(part, inputs) for part in parts))
    if issubclass(kind, (tuple, list)):
        return kind([_thawed(part, inputs) for part in parts])
    return kind(parts[0]) if issubclass(kind, (float, complex)) else parts[0]


PROXIES = (torch.Tensor, fx.Proxy)
"""What is an input where a call is traced."""
