"""What several commands ask of networks: sizes, numbers of parameters, operations."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fxfeedback.tracing.wrapper import Wrapper, stand_ins_of


def input_shapes(wrapper: Wrapper) -> list[list[int | None]]:
    """Of each input, with None for the batch."""
    return [[None, *x.shape[1:]] for x in stand_ins_of(wrapper)]


def part_with(model: nn.Module, kind: type[Any]) -> tuple[str, Any]:
    """Where in a model the first module of this kind is, "" for the model itself, and the module."""
    return next((path, module) for path, module in model.named_modules() if isinstance(module, kind))


def parameters(module: nn.Module, own: Sequence[str] = ()) -> int:
    """How many numbers the parameters are, of the children called `own` alone if there are some."""
    children = [getattr(module, name) for name in own if name in module._modules] if own else [module]
    return sum(parameter.numel() for child in children for parameter in child.parameters())
