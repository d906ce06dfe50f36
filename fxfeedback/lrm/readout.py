"""What `FeedbackModel.readout` returns."""

from typing import NamedTuple

import torch


class Readout(NamedTuple):
    """A node's value in one pass; at a destination also its value before and after the modulation, and Σ m between.

    modulation is None in a pass in which no connection has a signal.
    """

    value: torch.Tensor
    before: torch.Tensor | None = None
    modulation: torch.Tensor | None = None
    after: torch.Tensor | None = None
