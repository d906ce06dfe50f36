"""The composite challenge: two images of different classes in one, and a third class that is not there."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fxfeedback.errors import InputError, OptionError

Combine = Callable[[Tensor, Tensor, np.random.Generator], Tensor]


class Triplet(NamedTuple):
    """A composite of two classes that are present, and a third that is absent; `DataLoader` batches it field by field.

    `image` (C, H, W), or (C, H, 2 W) side by side; `present`: the classes of the first and of the second image;
    `absent`: a class of neither.
    """

    image: Tensor
    present: tuple[int, int]
    absent: int


def overlay(first: Tensor, second: Tensor, random: np.random.Generator) -> Tensor:
    """Two images (..., H, W) on top of each other: their mean."""
    return (first + second) / 2


def side_by_side(first: Tensor, second: Tensor, random: np.random.Generator) -> Tensor:
    """Two images (..., H, W) next to each other, (..., H, 2 W): the first on the left, as published."""
    return torch.cat([first, second], -1)


def cut_mix(first: Tensor, second: Tensor, random: np.random.Generator) -> Tensor:
    """The first image (..., H, W), with the second in a rectangle of half the area at a random place."""
    height, width = first.shape[-2:]
    rows, columns = round(height * math.sqrt(0.5)), round(width * math.sqrt(0.5))
    top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
    window = (..., slice(top, top + rows), slice(left, left + columns))
    mixed = first.clone()
    mixed[window] = second[window]
    return mixed


KINDS: dict[str, Combine] = {"overlay": overlay, "side-by-side": side_by_side, "cut-mix": cut_mix}


class TripletDataset(Dataset[Triplet]):
    """`Triplet`s from any data set of (image, label), drawn anew by seed and index alone.

    The kind changes how two images are combined, not which two: the same index shows the same ones in every kind.

    Args:
        dataset: (image, label) for 0 <= index < len(dataset). Images are floating-point tensors (C, H, W), labels
            whole numbers; at least three classes.
        size: how many triplets.
        kind: "overlay" (the mean), "side-by-side", or "cut-mix" (the second in a rectangle in the first).
        seed: 0 or more; another seed, other triplets.
        labels: all labels of the data set; default: its `targets`, as torchvision's data sets have, or, where there
            are none, the labels of all items, each read once.

    Raises:
        OptionError: an unknown kind, fewer than three classes, or `labels` of another length than the data set.
    """

    def __init__(
        self, dataset: Any, size: int, kind: str = "overlay", seed: int = 0, labels: Sequence[int] | None = None
    ) -> None:
        if kind not in KINDS:
            raise OptionError(f"kind={kind!r}: choose one of {', '.join(map(repr, KINDS))}")
        labels = _labels(dataset) if labels is None else labels
        if len(labels) != len(dataset):
            raise OptionError(f"{len(labels)} labels for {len(dataset)} images")
        every_label = np.array([int(label) for label in labels])
        self.dataset, self.size, self.kind, self.seed = dataset, size, kind, seed
        self.members = {int(label): np.flatnonzero(every_label == label) for label in np.unique(every_label)}
        if len(self.members) < 3:
            raise OptionError(f"a triplet needs three classes, the data set has {len(self.members)}")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Triplet:
        """The triplet at `index`.

        Raises:
            InputError: an image is no floating-point tensor, or the two have different sizes.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} of {self.size} triplets")
        random = np.random.default_rng([self.seed, index])
        first, second, absent = (int(label) for label in random.choice(list(self.members), 3, replace=False))
        images = [self.dataset[int(random.choice(self.members[label]))][0] for label in (first, second)]
        for image in images:
            if not (isinstance(image, Tensor) and image.is_floating_point()):
                raise InputError(f"images must be floating-point tensors, not {type(image).__name__}: use a transform")
        if images[0].shape != images[1].shape:
            sizes = " and ".join(str(tuple(image.shape)) for image in images)
            raise InputError(f"images of sizes {sizes} make no composite: use a transform that resizes and crops")
        return Triplet(KINDS[self.kind](images[0], images[1], random), (first, second), absent)


def _labels(dataset: Any) -> Sequence[int]:
    targets = getattr(dataset, "targets", None)
    if targets is not None and getattr(dataset, "target_transform", None) is None:
        return targets
    return [dataset[i][1] for i in range(len(dataset))]
