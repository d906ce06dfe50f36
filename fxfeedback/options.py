"""The options of a BU-TD network, checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxfeedback.errors import OptionError

Lateral = Callable[[Any, Any], Any]

LATERALS: dict[str, Lateral] = {
    "galu": lambda value, counter: value * (counter > 0),
    "multiply": lambda value, counter: value * counter,
    "add": lambda value, counter: value + counter,
}
CHOICES = {
    "weights": ("shared", "separate"),
    "td_learning": ("mirror", "fixed"),
    "td_init": ("kaiming", "symmetric"),
    "norm": ("shared", "separate"),
    "gating": ("unit", "channel"),
    "heads": ("shared", "per_task"),
    "learning": ("counter_hebb", "backprop"),
}


@dataclass(frozen=True)
class Options:
    """The arguments of `to_butd`; there they are explained."""

    n_tasks: int | None
    embedding: int | Sequence[int] | nn.Module | None
    head: str | None
    sites: Sequence[str] | None
    instruction_size: int | None
    weights: str
    td_learning: str
    td_init: str
    td_noise: float
    update_noise: float
    td_bias: bool
    norm: str
    lateral: str | Lateral
    gating: str
    heads: str
    learning: str

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, choices))}")
        if isinstance(self.lateral, str) and self.lateral not in LATERALS:
            raise OptionError(
                f"lateral={self.lateral!r}: choose one of {', '.join(map(repr, LATERALS))}, or pass a function"
            )
        if self.n_tasks is not None and (not isinstance(self.n_tasks, int) or self.n_tasks < 1):
            raise OptionError(f"n_tasks={self.n_tasks!r}: give the number of tasks, or None for class instructions")
        if self.n_tasks is None and (self.embedding is not None or self.instruction_size is not None):
            raise OptionError("embedding= and instruction_size= belong to an instruction head: pass n_tasks=, too")
        if self.n_tasks is None and self.heads == "per_task":
            raise OptionError('heads="per_task" needs n_tasks=')
        if self.instruction_size is not None and self.heads == "per_task":
            raise OptionError(
                'heads="per_task" needs instructions that are one-hot over tasks: leave out instruction_size='
            )

    @property
    def exact(self) -> bool:
        """Whether the lateral is GaLU, for which updates equal gradients."""
        return self.lateral == "galu"

    @property
    def lateral_function(self) -> Lateral:
        return LATERALS[self.lateral] if isinstance(self.lateral, str) else self.lateral
