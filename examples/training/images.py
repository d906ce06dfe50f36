"""Small pictures of ten classes, in memory: the embedded digits, torchvision's MNIST, Fashion-MNIST and CIFAR-10."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

from jobs import UserError
from multi_mnist import DEVIATION, MEAN, Digits, embedded_digits, read_split

HALF = 0.5  # mean and deviation of CIFAR-10's pixels, as published


class Pictures(NamedTuple):
    """All samples of a split: `images` (N, C, H, W), float, normalised; `labels` (N,), int64, 0..9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int], epoch: int) -> tuple[Tensor, Tensor]:
        """Samples by number, the same at every epoch."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]


def pictures(name: str, root: Path | None, download: bool) -> tuple[Pictures, Pictures]:
    """The training and the test samples of one of `SETS`.

    Args:
        name: which.
        root: the folder with torchvision's files; not looked at for the embedded digits.
        download: whether to fetch the files that are missing.

    Raises:
        UserError: there is no root, files are missing or damaged, or cannot be fetched.
    """
    if name != "embedded" and root is None:
        raise UserError(f"--data {name} needs --data-root, the folder with its files; --download fetches them there")
    return SETS[name](root or Path(), download)


def embedded(root: Path, download: bool) -> tuple[Pictures, Pictures]:
    """The digits that come inside a package: 4,000 for training, 1,000 for testing."""
    train, test = embedded_digits()
    return normalised(train), normalised(test)


def idx_files(kind: type[MNIST]) -> Callable[[Path, bool], tuple[Pictures, Pictures]]:
    """A reader of MNIST's files, or of those of a data set that looks like it."""

    def read(root: Path, download: bool) -> tuple[Pictures, Pictures]:
        raw = root / kind.__name__ / "raw"
        try:
            if download:
                kind(root, download=True)
            return normalised(read_split(raw, "train")), normalised(read_split(raw, "t10k"))
        except FileNotFoundError as error:
            raise UserError(f"no file {error.filename}; --download fetches it") from error
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot get {kind.__name__} into {raw}: {error}") from error

    return read


def cifar10(root: Path, download: bool) -> tuple[Pictures, Pictures]:
    """CIFAR-10; torchvision compares the files' checksums with the published ones before it reads them."""
    try:
        splits = [CIFAR10(root, train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot get CIFAR-10 from {root}: {error}; --download fetches what is missing") from error
    train, test = (
        Pictures(
            (torch.from_numpy(split.data).permute(0, 3, 1, 2).float() / 255 - HALF) / HALF, torch.tensor(split.targets)
        )
        for split in splits
    )
    return train, test


def normalised(digits: Digits) -> Pictures:
    """Digits with pixels in 0..255 as the published networks see them."""
    return Pictures((digits.images.unsqueeze(1) / 255 - MEAN) / DEVIATION, digits.labels)


SETS: dict[str, Callable[[Path, bool], tuple[Pictures, Pictures]]] = {
    "embedded": embedded,
    "mnist": idx_files(MNIST),
    "fashion-mnist": idx_files(FashionMNIST),
    "cifar10": cifar10,
}
