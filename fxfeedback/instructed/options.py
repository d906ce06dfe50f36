"""The options of a BU-TD network, checked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn

from fxfeedback.checks import is_count
from fxfeedback.errors import OptionError
from fxfeedback.rules.gating import of_unit_size

Lateral = Callable[[Any, Any], Any]

LATERALS: dict[str, Lateral] = {
    "galu": lambda value, counter: value * (counter > 0),
    "multiply": lambda value, counter: value * counter,
    "add": lambda value, counter: value + counter,
}
CHOICES = {
    "weights": ("shared", "separate", "sign", "direct"),
    "td_learning": ("mirror", "fixed", "weight_mirror"),
    "td_init": ("kaiming", "symmetric"),
    "td_magnitude": ("uniform", "batch", "fixed"),
    "direct": ("op", "unit"),
    "norm": ("shared", "separate"),
    "gating": ("unit", "channel"),
    "learning": ("counter_hebb", "backprop"),
    "instruction_learning": ("fixed", "straight-through"),
}
EXACT = {"weights": "shared", "lateral": "galu", "update_noise": 0, "td_clip": None, "instruction_learning": "fixed"}
"""Options with which updates are gradients."""
UNSAID = ("td_learning", "td_init", "td_magnitude", "td_scale", "direct")
"""Options that are None where the user does not give them: not every kind of weights has them."""
BELONGS = {
    "td_magnitude": ("sign",),
    "td_scale": ("sign",),
    "direct": ("direct",),
    "td_learning": ("shared", "separate"),
    "td_init": ("shared", "separate"),
}
"""Option -> the kinds of weights that have it."""


def _is_deviation(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf


def _is_scale(value: Any) -> bool:
    return value in (None, "xavier", "kaiming") or (_is_deviation(value) and value > 0)


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
    "counter_scale": (
        lambda s: s is None or (isinstance(s, str) and s == "unit"),
        "give 'unit', or None for counter values as they are",
    ),
    "heads": (
        lambda h: h in ("shared", "per_task") if isinstance(h, str) else bool(h) and _is_list(h, is_count),
        "choose one of 'shared', 'per_task', or give a list with each task's number of outputs",
    ),
    "td_noise": (_is_deviation, "give a standard deviation, a number from 0 on"),
    "update_noise": (_is_deviation, "give a standard deviation, a number from 0 on"),
    "td_scale": (_is_scale, "choose 'xavier' or 'kaiming', or give a number above 0"),
    "td_decay": (_is_deviation, "give a number from 0 on, the part of a weight that is added to its update"),
    "td_clip": (
        lambda c: c is None or (_is_deviation(c) and c > 0),
        "give a number above 0, the largest absolute value that a layer hands on, or None",
    ),
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
    td_learning: str | None
    td_init: str | None
    td_noise: float
    update_noise: float
    td_bias: bool
    norm: str
    lateral: str | Lateral
    gating: str
    heads: str | Sequence[int]
    learning: str
    td_magnitude: str | None = None
    td_scale: str | float | None = None
    td_decay: float = 0.0
    td_clip: float | None = None
    direct: str | None = None
    counter_scale: str | None = None
    instruction_learning: str = "fixed"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in (choices if name not in UNSAID else (*choices, None)):
                raise OptionError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, choices))}")
        for name, (fits, wanted) in KINDS.items():
            if not fits(getattr(self, name)):
                raise OptionError(f"{name}={getattr(self, name)!r}: {wanted}")
        self._check_feedback()
        if self.n_tasks is None and (self.embedding is not None or self.instruction_size is not None):
            raise OptionError("embedding= and instruction_size= belong to an instruction head: pass n_tasks= as well")
        self._check_heads()
        if self.counter_scale is not None and self.exact:
            raise OptionError(f'counter_scale={self.counter_scale!r}: lateral="galu" reads only signs; leave it out')

    def _check_heads(self) -> None:
        """Whether heads and tasks go together."""
        if self.heads == "shared":
            return
        given = f"heads={self.heads!r}".replace("'", '"')
        if self.n_tasks is None:
            raise OptionError(f"{given} needs n_tasks=")
        if len(self.head_sizes(1)) != self.n_tasks:
            raise OptionError(f"{given} is for {len(self.heads)} tasks, and n_tasks={self.n_tasks}: give one for each")
        if self.instruction_size is not None:
            raise OptionError(f"{given} needs instructions that are one-hot over tasks: leave out instruction_size=")

    def head_sizes(self, outputs: int) -> list[int]:
        """Of heads per task, how many outputs each has; `outputs`: the model's own."""
        return [outputs] * (self.n_tasks or 0) if isinstance(self.heads, str) else list(map(int, self.heads))

    def _check_feedback(self) -> None:
        """Whether what is said of TD's weights goes together."""
        for name, kinds in BELONGS.items():
            if getattr(self, name) is not None and self.weights not in kinds:
                given = f"{name}={getattr(self, name)!r}"
                raise OptionError(f"{given}: weights={self.weights!r} has no {name}; {' and '.join(kinds)} have")
        if self.td_learning == "weight_mirror" and self.weights != "separate":
            raise OptionError('td_learning="weight_mirror" needs weights="separate": shared weights mirror themselves')
        if self.td_decay and not self.mirrors:
            raise OptionError('td_decay belongs to weights="separate" with td_learning="mirror": TD learns by no other')
        if self.instruction_learning != "fixed":
            self._check_instruction_learning()
        acting = {
            "td_clip": self.td_clip is not None,
            "td_decay": self.td_decay != 0,
            'weights="direct"': self.weights == "direct",
        }
        for option in (option for option, given in acting.items() if given and self.learning == "backprop"):
            raise OptionError(f'{option} acts in the error pass, which learning="backprop" does not run: leave it out')

    def _check_instruction_learning(self) -> None:
        """Whether there is a head that can learn, from gates that are hard."""
        needed = {
            "n_tasks=, an instruction head": self.n_tasks is not None,
            'learning="counter_hebb"': self.learning == "counter_hebb",
            'lateral="galu", whose gates are hard': self.lateral == "galu",
            'td_magnitude="uniform" or "fixed"': not self.draws,
        }
        missing = next((what for what, given in needed.items() if not given), None)
        if missing:
            raise OptionError(f"instruction_learning={self.instruction_learning!r} needs {missing}")

    @property
    def mirrors(self) -> bool:
        """Whether TD's own weights get the updates of the BU weights."""
        return self.weights == "separate" and self.td_learning in (None, "mirror")

    @property
    def feedback(self) -> tuple[str, str]:
        """What TD reads in place of BU weights, in a word or two, and as the end of a sentence."""
        own = {"fixed": "fixed weights", "weight_mirror": "weight mirror"}.get(self.td_learning or "", "own weights")
        return {
            "shared": ("", "the same weights"),
            "separate": (own, "weights of its own"),
            "sign": (f"signs, {self.td_magnitude or 'uniform'}", "the signs of the same weights"),
            "direct": ("direct error", "the error at the logits, broadcast by random weights"),
        }[self.weights]

    @property
    def draws(self) -> bool:
        """Whether every training call draws magnitudes."""
        return self.weights == "sign" and self.td_magnitude == "batch"

    @property
    def exact(self) -> bool:
        """Whether the lateral is GaLU, for which updates equal gradients."""
        return self.lateral == "galu"

    @property
    def inexact(self) -> str:
        """The option with which updates are not gradients; empty where they are."""
        for name, exact in (
            ("weights", "shared"),
            ("lateral", "galu"),
            ("update_noise", 0),
            ("td_clip", None),
            ("instruction_learning", "fixed"),
        ):
            value = getattr(self, name)
            if value != exact:
                return f"{name}={getattr(value, '__name__', repr(value))}"
        return ""

    @property
    def lateral_function(self) -> Lateral:
        """(value, counter value) -> what goes on; see `to_butd`."""
        lateral = LATERALS[self.lateral] if isinstance(self.lateral, str) else self.lateral
        return lateral if self.counter_scale is None else _OfUnitSize(lateral)


@dataclass(frozen=True)
class _OfUnitSize:
    """A lateral of counter values that are first divided by their root mean square at the site."""

    lateral: Lateral

    def __call__(self, value: Any, counter: Any) -> Any:
        return self.lateral(value, of_unit_size(counter))

    @property
    def __name__(self) -> str:
        return "lateral_of_unit_size"
