"""Which samples a step sees, and what is random in them: functions of the seed and of numbers alone.

So a run is the same however many processes and workers share its work, and goes on exactly where it was stopped.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from jobs import UserError


def number(*numbers: int | str) -> int:
    """One seed made of several numbers, such as a run's seed, an epoch and a sample's index."""
    return random.Random(repr(numbers)).getrandbits(63)


def generator(*numbers: int | str) -> torch.Generator:
    """A generator of random numbers that starts from these."""
    return torch.Generator().manual_seed(number(*numbers))


class Data(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], epoch: int) -> Any:
        """The samples of these indices as a tuple of tensors, each (B, ...).

        What is random in a sample depends on the data's seed, on `epoch` and on its index, not on its neighbours.
        """


class Items:
    """A data set of torch's as `Data`: item by item, with a random state of each one's own.

    Args:
        dataset: index -> a tuple of tensors and numbers; its transforms draw from torch's global random state.
        seed: of what they draw.
        name: index -> what to call a sample that cannot be read.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, name: Callable[[int], object] = "sample {}".format) -> None:
        self.dataset, self.seed, self.name = dataset, seed, name

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def batch(self, indices: Sequence[int], epoch: int) -> Any:
        return default_collate([self.item(index, epoch) for index in indices])

    def item(self, index: int, epoch: int) -> Any:
        """One sample. Raises `UserError` where it cannot be read."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(number(self.seed, epoch, index))
            try:
                return self.dataset[index]
            except (OSError, SyntaxError, ValueError) as error:  # Pillow has all of these for damaged files
                raise UserError(f"cannot read {self.name(index)}: {error}") from None


class Part(NamedTuple):
    """What one process computes at once of a step: indices, and the share of the step's mean that they weigh."""

    indices: list[int]
    weight: float


class Steps(NamedTuple):
    """The steps of every epoch: `size` samples in batches of `batch`, in an order of each epoch's own.

    parts: into how many a batch is divided, processes times accumulated parts; the first may be larger by one.
    drop_last: whether a last batch that is not full is left out.
    """

    size: int
    batch: int
    seed: int
    parts: int = 1
    drop_last: bool = False

    def __len__(self) -> int:
        whole = self.size // self.batch
        return max(whole, 1) if self.drop_last else -(-self.size // self.batch)

    def of(self, epoch: int, start: int = 0) -> Iterator[list[Part]]:
        """The parts of each step of an epoch, from step `start` on."""
        order = torch.randperm(self.size, generator=generator(self.seed, "order", epoch))
        for step in range(start, len(self)):
            yield divide(order[step * self.batch : (step + 1) * self.batch], self.parts)


def divide(indices: Tensor, parts: int) -> list[Part]:
    """Parts of nearly equal size; one that would be empty takes the first index, and weighs nothing."""
    return [
        Part(part.tolist(), 1 / len(indices)) if len(part) else Part(indices[:1].tolist(), 0.0)
        for part in indices.tensor_split(parts)
    ]


class Reading(Dataset[Any]):
    """Hands a loader's worker the batches that it is told to read."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __getitem__(self, what: tuple[int, list[Part]]) -> list[tuple[Any, float]]:
        epoch, parts = what
        return [(self.data.batch(part.indices, epoch), part.weight) for part in parts]


def read(data: Data, epoch: int, steps: Iterator[list[Part]], workers: int = 0, pin: bool = False) -> DataLoader[Any]:
    """Step by step, a list of (batch, weight): read ahead by so many worker processes."""
    sampler = [(epoch, parts) for parts in steps]
    return DataLoader(Reading(data), batch_size=None, sampler=sampler, num_workers=workers, pin_memory=pin)
