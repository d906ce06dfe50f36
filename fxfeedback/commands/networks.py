"""What several commands ask of networks: sizes, numbers of parameters, operations."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxfeedback.feedback import FeedbackModel
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


def operations_of_passes(model: FeedbackModel) -> list[int]:
    """The floating-point operations of each pass for one image, a multiplication and an addition as two; no data."""
    empty = copy.deepcopy(model).to("meta")
    inputs = stand_ins_of(empty)
    totals = [0]
    for number in range(1, model.passes + 1):
        empty(*inputs, passes=number)  # makes its graph, which is not to be counted
        with FlopCounterMode(display=False) as counter:
            empty(*inputs, passes=number)
        totals.append(counter.get_total_flops())
    return [after - before for before, after in itertools.pairwise(totals)]
