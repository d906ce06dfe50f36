"""The composite challenge on a folder of pictures, with published networks and prototypes: for steer_composites.py."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import fxfeedback
from fxfeedback.composites import KINDS, Row, TripletDataset, steerability
from jobs import UserError

OUTPUTS = 1000  # classes of ImageNet, in the order of its folders' names
SOURCE = "classifier.6"
MODELS = ("alexnet_lrm1", "alexnet_lrm2", "alexnet_lrm3")


class Pictures(ImageFolder):
    """A folder with a folder of pictures per class: all 1,000 of ImageNet, or some, named by their number (`497`).

    Raises `UserError` when the folders' names do not say which classes they are.
    """

    def __init__(self, root: Path, transform: Callable[[Any], Any]) -> None:
        try:
            super().__init__(root, transform, loader=lambda path: Image.open(path).convert("RGB"))
        except (FileNotFoundError, OSError) as error:
            raise UserError(f"no pictures in {root}: {error}") from error
        if all(re.fullmatch(r"\d{1,3}", name) for name in self.classes):
            numbers = [int(name) for name in self.classes]
        elif len(self.classes) == OUTPUTS:
            numbers = list(range(OUTPUTS))
        else:
            raise UserError(
                f"{root} has {len(self.classes)} folders: give all {OUTPUTS} of ImageNet, or name them by their "
                "classes' numbers, 0 to 999"
            )
        self.targets = [numbers[target] for target in self.targets]
        self.samples = self.imgs = [(path, numbers[target]) for path, target in self.samples]


def network(args: argparse.Namespace) -> fxfeedback.FeedbackModel:
    """The published network that `args` names, with its weights."""
    weights = {"published": fxfeedback.models.WEIGHTS[args.model], "none": None}.get(args.weights, args.weights)
    torch.manual_seed(args.seed)
    return getattr(fxfeedback.models, args.model)(weights).to(args.device).eval()


def looked_for(args: argparse.Namespace, model: fxfeedback.FeedbackModel) -> fxfeedback.Prototypes:
    """The prototypes that `args` names: published ones, a file's, or those of the pictures in a folder."""
    if args.prototypes in ("published", "words"):
        made_from = "words" if args.prototypes == "words" else "pictures"
        return fxfeedback.Prototypes.published(args.model, made_from)
    path = Path(args.prototypes)
    if path.is_dir():
        pictures = Pictures(path, fxfeedback.models.transforms()["val_transform"])
        loader = DataLoader(pictures, args.batch_size, num_workers=args.workers)
        return fxfeedback.Prototypes.compute(model, loader, [SOURCE])
    return fxfeedback.Prototypes.load(path, SOURCE if path.suffix == ".pth" else None)


def challenge(args: argparse.Namespace) -> list[Row]:
    """The table of every kind of composite."""
    model = network(args)
    prototypes = looked_for(args, model)
    pictures = Pictures(args.data, fxfeedback.models.transforms()["val_transform"])
    rows: list[Row] = []
    for kind in KINDS:
        triplets = TripletDataset(pictures, args.test_size, kind, args.seed)
        loader = DataLoader(triplets, args.batch_size, num_workers=args.workers)
        rows += steerability(model, loader, prototypes, args.strengths, source=SOURCE)
    return rows
