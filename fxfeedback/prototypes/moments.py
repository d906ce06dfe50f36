"""Count, mean and squared deviations of what came by: exact for any number of samples, and mergeable."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

Label = int | str


@dataclass(frozen=True)
class Moments:
    """Of one class, at every source.

    count: how many samples. mean: source -> (...), float64. squares: source -> Σ (x - mean)², (...), float64.
    """

    count: int
    mean: dict[str, torch.Tensor]
    squares: dict[str, torch.Tensor]

    @classmethod
    def of(cls, values: Mapping[str, torch.Tensor]) -> Self:
        """Of at least one sample: source -> (samples, ...)."""
        doubles = {source: (x.cpu() if x.device.type == "mps" else x).double() for source, x in values.items()}
        means = {source: x.mean(0) for source, x in doubles.items()}
        squares = {source: (x - means[source]).square().sum(0) for source, x in doubles.items()}
        return cls(len(next(iter(values.values()))), _on_cpu(means), _on_cpu(squares))

    def __add__(self, other: Self) -> Self:
        """Of both's samples, by Welford's update for groups: no sum of squares that could cancel."""
        count = self.count + other.count
        if not (self.count and other.count):
            return self if self.count else other
        apart = {source: other.mean[source] - mean for source, mean in self.mean.items()}
        weight = self.count * other.count / count
        return type(self)(
            count,
            {source: mean + apart[source] * (other.count / count) for source, mean in self.mean.items()},
            {s: one + other.squares[s] + apart[s].square() * weight for s, one in self.squares.items()},
        )

    def deviation(self, source: str) -> torch.Tensor:
        """The standard deviation at a source over the samples, (...), float64."""
        return (self.squares[source] / max(self.count, 1)).sqrt()


def by_class(
    values: Mapping[str, torch.Tensor], labels: Sequence[Label]
) -> Iterator[tuple[Label, dict[str, torch.Tensor]]]:
    """Each label of a batch, with its samples: source -> (samples, ...)."""
    rows: dict[Label, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    for label, own in rows.items():
        yield label, {source: x[own] for source, x in values.items()}


def _on_cpu(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {source: x.cpu() for source, x in tensors.items()}
