"""What the graphs of a BU-TD network need to know of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fxfeedback.instructed.options import Options
from fxfeedback.instructed.task_heads import TaskHeads
from fxfeedback.instructed.td_state import ByName


@dataclass(frozen=True)
class Owner:
    """The network that graphs belong to.

    net: the user's model. root: a module with the network's tensors and modules, TD's own among them.
    fetch: qualified name -> parameter or buffer. options: of the network.
    always_draws: whether calls draw magnitudes in evaluation mode, too.
    """

    net: nn.Module
    root: nn.Module
    fetch: Callable[[str], torch.Tensor]
    options: Options
    always_draws: bool = False

    @property
    def task_heads(self) -> TaskHeads | None:
        """The heads per task, where there are some."""
        heads = self.root._modules.get("task_heads")
        return heads if isinstance(heads, TaskHeads) else None

    def td_part(self, kind: str) -> ByName | None:
        """TD's own state, "td_weights", "td_magnitudes", "td_biases" or "td_norms", where there is some."""
        part = self.root._modules.get(kind)
        return part if isinstance(part, ByName) else None
