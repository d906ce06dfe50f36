"""What `FeedbackModel.readout` takes and returns."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fxfeedback.errors import NodeNameError


class Readout(NamedTuple):
    """A node's value in one pass; at a destination also its value before and after the modulation, and Σ m between.

    modulation is None in a pass in which no connection has a signal.
    """

    value: torch.Tensor
    before: torch.Tensor | None = None
    modulation: torch.Tensor | None = None
    after: torch.Tensor | None = None


def without_names(inputs: Sequence[Any]) -> tuple[Sequence[Any], list[str]]:
    """A model's inputs, and the names of nodes after them.

    Raises:
        NodeNameError: there are no names.
    """

    def is_names(given: Any) -> bool:
        is_list = isinstance(given, (list, tuple)) and all(isinstance(name, str) for name in given)
        return isinstance(given, str) or is_list

    number = sum(1 for _ in itertools.takewhile(is_names, reversed(inputs)))
    own, names = inputs[: len(inputs) - number], inputs[len(inputs) - number :]
    if not number:
        raise NodeNameError("no node is named: readout(x, 'layer3', 'layer4') reads two, after the model's inputs")
    return own, [name for given in names for name in ([given] if isinstance(given, str) else given)]
