"""Train an instructed network to tell the attributes of faces: forty attributes are forty instructions.

Without a folder of faces a small network learns traits of the embedded digits: is it even, is it a 3, does it have a
loop?

    python examples/train_celeba.py                               # on the embedded digits, a minute
    python examples/train_celeba.py --data-root data              # torchvision's files in data/celeba
    python examples/train_celeba.py --data-root data --config celeba --learning counter-hebb
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy
from torchvision import models
from torchvision import transforms as T
from torchvision.datasets import CelebA

import fxfeedback
from jobs import UserError, number
from multi_mnist import Digits, embedded_digits
from train_multi_mnist import convnet
from training.data import Items
from training.flags import parse, training_flags
from training.instructed import Instructed
from training.job import job
from training.loop import Run
from training.losses import bce
from training.measures import sub_networks
from training.processes import with_synced_norms

ATTRIBUTES = 40
TRAITS = {
    "even": {0, 2, 4, 6, 8},
    "prime": {2, 3, 5, 7},
    "above four": {5, 6, 7, 8, 9},
    "with a loop": {0, 6, 8, 9},
    **{f"a {digit}": {digit} for digit in range(10)},
}
ON_DIGITS = ["--model", "convnet", "--epochs", "30", "--lr", "1e-3", "--schedule", "cosine", "--workers", "0"]
"""The settings for digits, which flags override."""


class Faces(Dataset[Any]):
    """Index -> image (3, H, W), labels (40,) of 0 and 1, and one random attribute to ask for."""

    def __init__(self, root: Path, split: str, side: int | None, download: bool) -> None:
        resize = [] if side is None else [T.Resize(side), T.CenterCrop(side)]
        transform = T.Compose([*resize, T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)])
        try:
            self.faces = CelebA(str(root), split, "attr", transform, download=download)
        except (ImportError, OSError, RuntimeError) as error:
            raise UserError(
                f"cannot read CelebA from {root / 'celeba'}: {error}\n--download fetches it (pip install gdown); or "
                "put there what its own page offers: the folder img_align_celeba and the files identity_CelebA.txt and "
                "list_{attr,bbox,landmarks_align}_celeba.txt, list_eval_partition.txt"
            ) from error

        self.tasks = self.faces.attr_names[:ATTRIBUTES]

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, labels = self.faces[index]
        return image, labels, torch.randint(len(self.tasks), ())

    def name(self, index: int) -> str:
        """What to call a face that cannot be read."""
        return f"the picture {self.faces.filename[index]}"


class Traits(Dataset[Any]):
    """Index -> digit (1, 28, 28), the traits that it has, (14,), of 0 and 1, and a random one to ask for."""

    def __init__(self, digits: Digits) -> None:
        self.tasks = list(TRAITS)
        self.images = (digits.images.unsqueeze(1) / 255 - 0.5) / 0.5
        self.labels = torch.stack([torch.isin(digits.labels, torch.tensor([*having])) for having in TRAITS.values()], 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.images[index], self.labels[index].long(), torch.randint(len(TRAITS), ())

    def name(self, index: int) -> str:
        """What to call a digit that cannot be read."""
        return f"the digit {index}"


class TellAttributes(Instructed):
    """Telling the attribute that the instruction asks for."""

    evaluation_batch = 64

    def __init__(self, args: argparse.Namespace) -> None:
        sets: Iterator[Faces | Traits]
        if args.data_root is None:
            sets = (Traits(digits) for digits in embedded_digits())
        else:
            sets = (
                Faces(args.data_root, split, args.image_size, args.download) for split in ("train", args.test_split)
            )
        train, test = sets
        self.train, self.test = Items(train, args.seed, train.name), Items(test, args.seed, test.name)
        net = classifier(args.model)
        butd = fxfeedback.to_butd(
            with_synced_norms(net) if args.sync_norms else net,
            n_tasks=len(train.tasks),
            embedding=args.embedding,
            input_size=tuple(train[0][0].shape),
            norm=args.td_norms,
            weights=args.weights,
            heads=args.heads.replace("-", "_"),
            learning=args.learning.replace("-", "_"),
        )
        super().__init__(butd, train.tasks, bce, args.all_tasks, args.only)

    def accuracy(self) -> Metric:
        return BinaryAccuracy()


def classifier(name: str) -> nn.Module:
    """A torchvision classifier with a single logit; "published" is ResNet-18 for small pictures, "convnet" for digits.

    The stem of the published network is one 3x3 convolution with stride 1. Here the last maps are averaged.
    """
    if name == "convnet":
        return convnet(classes=1)
    known = models.list_models(module=models)
    if name not in ("published", *known):
        raise UserError(f"unknown model {name!r}: published, convnet, or a torchvision classifier")
    net = models.get_model("resnet18" if name == "published" else name, weights=None, num_classes=1)
    if name == "published":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def report(run: Run) -> None:
    """Save the network, and print the accuracy and what part of the network the tasks use."""
    butd, last, tasks = run.experiment.model, run.rows[-1], run.experiment.tasks
    fxfeedback.save(butd, run.folder / "model")
    scores = {task: last[f"accuracy_{task}"] for task in run.experiment.asked.values()}
    shares = sub_networks(butd, tasks)["active_share_total"]
    for task in sorted(scores, key=scores.__getitem__):
        print(f"{task:22}{100 * scores[task]:6.1f} %, with {100 * shares[task]:3.0f} % of the units")
    print(f"\nmean accuracy: {100 * fmean(scores.values()):.2f} %")
    print(f"results: {run.folder} (model, log.csv, tensorboard)")


def flags() -> argparse.ArgumentParser:
    """The command line; the defaults are the published settings, except for the stem of the network."""
    parser = argparse.ArgumentParser(description="Train an instructed network to tell the attributes of faces.")
    add = parser.add_argument
    add("--data-root", type=Path, help="folder with, or for, torchvision's folder celeba (none: digits)")
    add("--download", action="store_true", help="fetch the files into --data-root where they are missing")
    add("--image-size", type=number(int, 8, 10_000), help="height and width (default: the pictures' own, 218 by 178)")
    add("--test-split", choices=["valid", "test"], default="test", help="(default %(default)s)")
    add(
        "--model",
        default="resnet18",
        help="published, convnet (for digits) or a torchvision classifier (default %(default)s)",
    )
    add("--embedding", type=number(int, 1, 1_000_000), default=200, help="of the instruction (default %(default)s)")
    add(
        "--td-norms", choices=["shared", "separate"], default="separate", help="batch norms of TD (default %(default)s)"
    )
    add("--weights", choices=["shared", "separate"], default="shared", help="of BU and TD (default %(default)s)")
    add("--heads", choices=["shared", "per-task"], default="shared", help="for the answers (default %(default)s)")
    add("--learning", choices=["counter-hebb", "backprop"], default="counter-hebb", help="(default %(default)s)")
    add("--all-tasks", action=argparse.BooleanOptionalAction, default=False, help="every step asks for all attributes")
    add("--only", metavar="ATTRIBUTE", help="learn and test this one alone")
    training_flags(parser, "celeba")
    parser.set_defaults(epochs=50, batch_size=64, optimizer="adam", lr=5e-4, schedule="decay", workers=2)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(flags(), words)
    if args.data_root is None:
        args = parse(flags(), [*ON_DIGITS, *words])
    return job(args, TellAttributes, report)


if __name__ == "__main__":
    sys.exit(main())
