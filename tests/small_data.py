"""Small data sets in the real formats, written for tests."""

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.datasets import CIFAR10, CelebA

from multi_mnist import Digits


def random_digits(count: int, seed: int = 0) -> Digits:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 28, 28), generator=generator).float()
    return Digits(images, torch.randint(10, (count,), generator=generator))


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write `array` (uint8, float32 or float64) in MNIST's own file format."""
    kind = {"uint8": 0x08, "float32": 0x0D, "float64": 0x0E}[str(array.dtype)]
    header = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(array.dtype.newbyteorder(">")).tobytes())


def write_mnist(root: Path, kind: str = "MNIST", sizes: tuple[int, int] = (30, 12)) -> None:
    """A small MNIST, as torchvision lays it out."""
    raw = root / kind / "raw"
    raw.mkdir(parents=True)
    for split, count in zip(("train", "t10k"), sizes, strict=True):
        digits = random_digits(count)
        write_idx(raw / f"{split}-images-idx3-ubyte", digits.images.numpy().astype(np.uint8))
        write_idx(raw / f"{split}-labels-idx1-ubyte", digits.labels.numpy().astype(np.uint8))


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small CIFAR-10: five pickles for training and one for testing; torchvision is told their checksums."""
    folder, random = root / CIFAR10.base_folder, np.random.default_rng(0)
    folder.mkdir(parents=True)

    def pickled(name: str, content: dict[str, object]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def pictures() -> dict[str, object]:
        labels = random.integers(0, 10, 8)
        data = np.clip(random.normal(25 * labels[:, None], 30, (8, 3072)), 0, 255).astype(np.uint8)
        return {"data": data, "labels": labels.tolist()}

    monkeypatch.setattr(CIFAR10, "train_list", [pickled(f"data_batch_{i}", pictures()) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [pickled("test_batch", pictures())])
    name, md5 = pickled("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})


def write_celeba(root: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int] = (60, 4, 6)) -> Path:
    """A small CelebA, whose first attribute is whether the picture is bright; returns the folder of pictures."""
    folder, random, total = root / "celeba", np.random.default_rng(0), sum(sizes)
    (folder / "img_align_celeba").mkdir(parents=True)
    names, attributes = [f"{i + 1:06}.jpg" for i in range(total)], random.choice([-1, 1], (total, 40))
    for name, row in zip(names, attributes, strict=True):
        pixels = np.clip(random.normal(128 + 60 * row[0], 30, (24, 20, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "img_align_celeba" / name)
    split = np.repeat([0, 1, 2], sizes)

    def table(rows: object, header: str | None = None) -> str:
        lines = [f"{name} {' '.join(map(str, row))}" for name, row in zip(names, rows, strict=True)]
        return "\n".join(([str(total), header] if header is not None else []) + lines) + "\n"

    files = {
        "list_attr_celeba.txt": table(attributes, " ".join(f"attribute_{i}" for i in range(40)) + " "),
        "identity_CelebA.txt": table([[1]] * total),
        "list_bbox_celeba.txt": table([[0, 0, 20, 24]] * total, "image_id x_1 y_1 width height"),
        "list_landmarks_align_celeba.txt": table([[1] * 10] * total, " ".join(f"p{i}" for i in range(10))),
        "list_eval_partition.txt": table(split[:, None]),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    checked = [("", hashlib.md5(text.encode()).hexdigest(), name) for name, text in files.items()]
    monkeypatch.setattr(CelebA, "file_list", checked)
    return folder / "img_align_celeba"


def write_pictures(folder: Path, sizes: tuple[int, int] = (8, 4)) -> None:
    """Red discs, green squares and blue triangles, here and there on grey, in one folder per class."""
    generator = torch.Generator().manual_seed(0)
    for split, count in zip(("train", "val"), sizes, strict=True):
        for name, colour in (("disc", "red"), ("square", "green"), ("triangle", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                x, y, grey = torch.randint(0, 6, (3,), generator=generator).tolist()
                picture = Image.new("RGB", (24, 24), (100 + 10 * grey,) * 3)
                draw = ImageDraw.Draw(picture)
                if name == "disc":
                    draw.ellipse((x, y, x + 18, y + 18), fill=colour)
                elif name == "square":
                    draw.rectangle((x, y, x + 18, y + 18), fill=colour)
                else:
                    draw.polygon([(x, y + 18), (x + 18, y + 18), (x + 9, y)], fill=colour)
                picture.save(folder / split / name / f"{i}.png")


def write_classes(root: Path, classes: list[str], count: int = 2) -> Path:
    """A folder of small pictures for each class; returns their folder."""
    random = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root
