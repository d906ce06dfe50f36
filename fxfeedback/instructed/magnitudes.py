"""The magnitudes of TD's signs: those that are kept, and those that a call draws."""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fxfeedback.errors import InputError, OptionError
from fxfeedback.instructed.graphs import Graphs


@dataclass
class Drawn:
    """What calls draw.

    given: magnitudes by weight name that the user has set. last: those of the last call. always: also in evaluation
    mode.
    """

    given: dict[str, torch.Tensor] = field(default_factory=dict)
    last: dict[str, torch.Tensor] = field(default_factory=dict)
    always: bool = False

    def draw(self, name: str, b: float, weight: torch.Tensor) -> torch.Tensor:
        """|U(-b, b)| in the weight's shape, or what is given."""
        if name in self.given:
            drawn = self.given[name].to(weight)
        else:
            drawn = torch.empty_like(weight, requires_grad=False).uniform_(0, b)
        self.last[name] = drawn
        return drawn


class Magnitudes(MutableMapping[str, torch.Tensor]):
    """Weight name -> magnitudes; empty for a network whose TD reads no signs."""

    def __init__(self, graphs: Graphs, drawn: Drawn) -> None:
        self._graphs, self._options, self._drawn = graphs, graphs.options, drawn

    def __iter__(self) -> Iterator[str]:
        return iter(self._graphs.weights if self._options.weights == "sign" else ())

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in list(self):
            raise KeyError(name)
        if self._options.td_magnitude == "fixed":
            return self._graphs.owner.fetch(f"td_magnitudes.{name}")
        weight = self._graphs.owner.fetch(name)
        present = self._drawn.given.get(name, self._drawn.last.get(name)) if self._graphs.draws else None
        return torch.full_like(weight, self._graphs.magnitude(name)) if present is None else present.to(weight)

    def __setitem__(self, name: str, value: Any) -> None:
        if self._options.weights != "sign" or self._options.td_magnitude not in ("batch", "fixed"):
            raise OptionError('magnitudes can be set with weights="sign" and td_magnitude="batch" or "fixed"')
        if name not in list(self):
            raise InputError(f"no weight is called {name!r}: the weights are {', '.join(map(repr, self))}")
        weight = self._graphs.owner.fetch(name)
        value = torch.as_tensor(value, dtype=weight.dtype, device=weight.device).detach().abs()
        if value.shape != weight.shape:
            raise InputError(f"the magnitudes of {name!r} have shape {tuple(weight.shape)}, not {tuple(value.shape)}")
        if self._options.td_magnitude == "fixed":
            with torch.no_grad():
                self[name].copy_(value)
        else:
            self._drawn.given[name] = value

    def __delitem__(self, name: str) -> None:
        """Let calls draw them again."""
        if name not in list(self):
            raise KeyError(name)
        self._drawn.given.pop(name, None)
