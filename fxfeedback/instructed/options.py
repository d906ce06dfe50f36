"""The options of a BU-TD network, checked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn

from fxfeedback.checks import is_count
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


def _is_deviation(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(fits, value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n_tasks": (lambda n: n is None or is_count(n), "give the number of tasks, or None for class instructions"),
    "embedding": (
        lambda e: e is None or is_count(e) or isinstance(e, nn.Module) or _is_list(e, is_count),
        "give a hidden size, a list of several, a torch.nn.Module, or None",
    ),
    "head": (lambda h: h is None or _is_name(h), "give the name of a node, or None"),
    "sites": (lambda s: s is None or _is_list(s, _is_name), "give a list of names of nodes, or None"),
    "instruction_size": (lambda n: n is None or is_count(n), "give the length of an instruction vector, or None"),
    "td_noise": (_is_deviation, "give a standard deviation, a number from 0 on"),
    "update_noise": (_is_deviation, "give a standard deviation, a number from 0 on"),
    "td_bias": (lambda b: isinstance(b, bool), "give True or False"),
    "lateral": (
        lambda f: f in LATERALS if isinstance(f, str) else callable(f),
        f"choose one of {', '.join(map(repr, LATERALS))}, or pass a function",
    ),
}
"""Option -> what it may be, and what the error for anything else advises."""


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
        for name, (fits, wanted) in KINDS.items():
            if not fits(getattr(self, name)):
                raise OptionError(f"{name}={getattr(self, name)!r}: {wanted}")
        if self.n_tasks is None and (self.embedding is not None or self.instruction_size is not None):
            raise OptionError("embedding= and instruction_size= belong to an instruction head: pass n_tasks= as well")
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
    def inexact(self) -> str:
        """The option with which updates are not gradients; empty where they are."""
        for name, exact in (("weights", "shared"), ("lateral", "galu"), ("update_noise", 0)):
            value = getattr(self, name)
            if value != exact:
                return f"{name}={getattr(value, '__name__', repr(value))}"
        return ""

    @property
    def lateral_function(self) -> Lateral:
        return LATERALS[self.lateral] if isinstance(self.lateral, str) else self.lateral
