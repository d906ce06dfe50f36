"""What tracing knows of a tensor: a `Spec`. Examples are tensors without data that have a size and a dtype."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

EXAMPLE_BATCH = 2
"""Batch size of the shapes in a `Spec`; no broadcasting can hide in it, as it could in 1."""


Sizes = tuple[tuple[tuple[int, ...] | None, torch.dtype], ...]
"""Of each input its size without the batch (see `size_of`), and its dtype."""


@dataclass(frozen=True)
class Spec:
    """What tracing knows of a tensor: its shape at batch size `EXAMPLE_BATCH`, and how each size grows with the batch.

    `per_sample[i]` is what one more sample adds to `shape[i]`: 0 where the batch does not matter, 1 for a batch
    dimension, 64 where 64 windows of an image lie in the batch dimension.
    """

    shape: tuple[int, ...]
    per_sample: tuple[int, ...]
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """The shape with None where it depends on the batch."""
        return tuple(None if slope else size for size, slope in zip(self.shape, self.per_sample, strict=True))


class NamedSpecs(tuple):
    """The specs of several tensors; `fields` has their names where they are a named tuple, as torch.max returns."""

    fields: tuple[str, ...]

    def __new__(cls, specs: Iterable[Any], fields: Iterable[str] = ()) -> "NamedSpecs":
        made = super().__new__(cls, specs)
        made.fields = tuple(fields)
        return made


def at_batch(batch: int, x: torch.Tensor) -> torch.Tensor:
    """A tensor without data like the input `x`, at this batch size; a tensor of one number, (), has no batch."""
    return torch.empty((batch, *x.shape[1:]) if x.ndim else (), dtype=x.dtype, device="meta")


def size_of(x: torch.Tensor) -> tuple[int, ...] | None:
    """The size of an input without its batch; None for a tensor of one number, (), which has no batch."""
    return tuple([operator.index(n) for n in x.shape[1:]]) if x.ndim else None  # under torch.compile, numbers


def sizes_of(inputs: Iterable[torch.Tensor]) -> Sizes:
    """Of each input its size without the batch, and its dtype."""
    return tuple([(size_of(x), x.dtype) for x in inputs])


def of_size(size: tuple[int, ...] | None, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without data with batch 1 of what `size_of` says."""
    return torch.empty(() if size is None else (1, *size), dtype=dtype, device="meta")
