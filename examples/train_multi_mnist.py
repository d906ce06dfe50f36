"""Train an instructed network on Multi-MNIST by Counter-Hebb learning.

Each image shows two overlapping digits, and the instruction, "left" or "right", says which one to read. The network is
an ordinary torch.nn model; `fxfeedback.to_butd` derives the top-down network that turns the instruction into gates, and
the error into weight updates.

    python examples/train_multi_mnist.py                                # a small network, under two minutes
    python examples/train_multi_mnist.py --config multi_mnist           # the published network and settings
    python examples/train_multi_mnist.py --task neighbour               # which digit is to the left of the 3?
    python examples/train_multi_mnist.py --model resnet18 --epochs 2    # any torchvision classifier
"""

import argparse
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

import fxfeedback
from digit_networks import convnet, published
from jobs import UserError, number, write_whole
from multi_mnist import (
    HALF,
    SIDE,
    SPLIT_SEED,
    TASKS,
    Composites,
    Digits,
    draw_composites,
    draw_rows,
    embedded_digits,
    mnist_digits,
)
from multi_mnist_plots import figures
from training.data import generator
from training.flags import parse, settings, training_flags
from training.instructed import Instructed
from training.job import job
from training.loop import Experiment, Run
from training.losses import LOSSES
from training.measures import angles, sub_networks
from training.processes import with_synced_norms

EMBEDDING = 50  # size of the instruction's embedding, as published
EVALUATION_BATCH = 500
SIDES = ("left_of", "right_of")  # what may be asked about a digit in a row


OWN_MODELS: dict[str, Callable[..., nn.Module]] = {"convnet": convnet, "published": published}


def build_model(name: str, width: int = SIDE) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network called `name` with ten classes, and the image shape (channels, height, width) that it takes.

    `width` is that of the images, for our own networks; torchvision's take squares.

    Raises `UserError`, naming the nearest names, when there is no such network.
    """
    if name in OWN_MODELS:
        return OWN_MODELS[name](width), (1, SIDE, width)
    known = [*OWN_MODELS, *torchvision.models.list_models(module=torchvision.models)]
    if name not in known:
        nearest = get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        raise UserError(f"unknown model {name!r}: neither {', '.join(OWN_MODELS)} nor a torchvision classifier{hint}")
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    return model, (3, *smallest_image(model))


def smallest_image(model: nn.Module) -> tuple[int, int]:
    """The first (height, width) of a few that `model` can take. Raises `UserError` when it takes none of them."""
    training = model.training
    model.eval()
    try:
        for side in (64, 128, 224):
            try:
                with torch.no_grad():
                    model(torch.zeros(1, 3, side, side))
                return side, side
            except (AssertionError, RuntimeError, ValueError) as error:
                refusal = error
        raise UserError(f"the model takes no image of 64, 128 or 224 pixels: {refusal}")
    finally:
        model.train(training)


def fitted(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """`images` (B, 1, 28, 28) enlarged and repeated to (B, *shape)."""
    if images.shape[2:] != shape[1:]:
        images = F.interpolate(images, size=shape[1:], mode="bilinear")
    return images.expand(-1, shape[0], -1, -1)


@torch.no_grad()
def accuracies(butd: fxfeedback.BUTD, test: Composites, shape: tuple[int, int, int]) -> dict[str, float]:
    """Task name -> the share of the test composites that the network in evaluation mode reads right."""
    butd.eval()
    result = {}
    for column, task in enumerate(TASKS):
        right = 0
        batches = zip(test.images.split(EVALUATION_BATCH), test.labels[:, column].split(EVALUATION_BATCH), strict=True)
        for images, labels in batches:
            logits = butd(fitted(images, shape), torch.full_like(labels, column))
            right += int((logits.argmax(1) == labels).sum())
        result[task] = right / len(test.labels)
    return result


class Drawn(ABC):
    """Images of several digits as training data: the same at every epoch, or new and slightly distorted ones.

    Args:
        digits: what they are made of.
        size: images per epoch.
        shape: (channels, height, width) of the images.
        seed: of the draws.
        augment: whether every epoch has images of its own.
    """

    composites: Composites

    def __init__(self, digits: Digits, size: int, shape: tuple[int, int, int], seed: int, augment: bool) -> None:
        self.digits, self.size, self.shape, self.seed, self.augment = digits, size, shape, seed, augment
        self.drawn: int | None = None  # the epoch of what is at hand

    def __len__(self) -> int:
        return self.size

    def at(self, epoch: int) -> None:
        """Have the images and the questions of this epoch at hand."""
        if self.drawn == epoch:
            return
        if self.augment or self.drawn is None:
            self.composites = self.draw(epoch if self.augment else 0)
        self.ask(epoch)
        self.drawn = epoch

    @abstractmethod
    def draw(self, epoch: int) -> Composites:
        """The images."""

    @abstractmethod
    def ask(self, epoch: int) -> None:
        """Draw what each image is asked."""


class MultiMNIST(Drawn):
    """Composites, each with the task of reading one of its digits."""

    def draw(self, epoch: int) -> Composites:
        return draw_composites(self.digits, self.size, generator(self.seed, "composites", epoch), jitter=self.augment)

    def ask(self, epoch: int) -> None:
        self.tasks = torch.randint(len(TASKS), (self.size,), generator=generator(self.seed, "tasks", epoch))

    def batch(self, indices: Sequence[int], epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, *shape), labels (B, 2), and the task that each is to be asked, (B,)."""
        self.at(epoch)
        chosen = torch.as_tensor(indices)
        images = fitted(self.composites.images[chosen], self.shape)
        return images, self.composites.labels[chosen], self.tasks[chosen]


class ReadADigit(Instructed):
    """Reading the left or the right digit of a composite."""

    evaluation_batch = EVALUATION_BATCH

    def __init__(self, args: argparse.Namespace) -> None:
        net, shape = build_model(args.model)
        digits, test_digits = mnist_digits(args.data_root, args.download) if args.data_root else embedded_digits()
        self.train = MultiMNIST(digits, args.train_size, shape, args.seed, args.augment)
        self.test = MultiMNIST(test_digits, args.test_size, shape, SPLIT_SEED, augment=False)
        butd = instructed(net, shape, args, n_tasks=len(TASKS))
        super().__init__(butd, TASKS, LOSSES[args.loss], args.all_tasks, args.only)

    def notes(self) -> dict[str, float]:
        used = sub_networks(self.model, TASKS)
        shares = {f"active_{task}": share for task, share in used["active_share_total"].items()}
        return {**shares, "overlap": fmean(used["overlap"].values()), **angles(self.model)}


class Rows(Drawn):
    """Rows of so many digits with a question each: which digit is to the left, or to the right, of this one?"""

    def __init__(
        self, digits: Digits, size: int, length: int, shape: tuple[int, int, int], seed: int, augment: bool
    ) -> None:
        super().__init__(digits, size, shape, seed, augment)
        self.length = length

    def draw(self, epoch: int) -> Composites:
        return draw_rows(self.digits, self.size, self.length, generator(self.seed, "rows", epoch), jitter=self.augment)

    def ask(self, epoch: int) -> None:
        random = generator(self.seed, "questions", epoch)
        self.side = torch.randint(len(SIDES), (self.size,), generator=random)
        self.left = torch.randint(self.length - 1, (self.size,), generator=random)  # place of the pair's left one

    def batch(self, indices: Sequence[int], epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, *shape), instructions (B, 12): the side and the digit asked about, one-hot; answers (B,)."""
        self.at(epoch)
        chosen = torch.as_tensor(indices)
        side, left, labels = self.side[chosen], self.left[chosen], self.composites.labels[chosen]
        pair = torch.stack([left + 1 - side, left + side], 1)  # places of the digit asked about, and of the answer
        asked, answer = labels.gather(1, pair).T
        instruction = torch.cat([F.one_hot(side, len(SIDES)), F.one_hot(asked, 10)], 1).float()
        return fitted(self.composites.images[chosen], self.shape), instruction, answer


class FindANeighbour(Experiment):
    """Telling which digit stands to the left or to the right of a given one."""

    evaluation_batch = EVALUATION_BATCH

    def __init__(self, args: argparse.Namespace) -> None:
        net, shape = build_model(args.model, width=HALF * (args.digits + 1))
        train, test = mnist_digits(args.data_root, args.download) if args.data_root else embedded_digits()
        self.train = Rows(train, args.train_size, args.digits, shape, args.seed, args.augment)
        self.test = Rows(test, args.test_size, args.digits, shape, SPLIT_SEED, augment=False)
        self.loss = LOSSES[args.loss]
        self.model = instructed(net, shape, args, n_tasks=len(SIDES), instruction_size=len(SIDES) + 10)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        images, instruction, answer = batch
        return self.loss(model(images, instruction), answer)

    def metrics(self) -> Mapping[str, Metric]:
        return {"test_loss": MeanMetric()} | {f"accuracy_{side}": MeanMetric() for side in SIDES}

    def judge(self, batch: Any, metrics: Mapping[str, Metric]) -> None:
        images, instruction, answer = batch
        logits = self.model(images, instruction)
        metrics["test_loss"].update(self.loss(logits, answer))
        right = (logits.argmax(1) == answer).float()
        for column, side in enumerate(SIDES):
            metrics[f"accuracy_{side}"].update(right, weight=instruction[:, column])

    def notes(self) -> dict[str, float]:
        return angles(self.model)


def instructed(
    net: nn.Module, shape: tuple[int, int, int], args: argparse.Namespace, **instruction: int
) -> fxfeedback.BUTD:
    """The BU-TD network of the flags; `instruction` says what it is told."""
    return fxfeedback.to_butd(
        with_synced_norms(net) if args.sync_norms else net,
        embedding=EMBEDDING,
        input_size=shape,
        weights=args.weights,
        heads=args.heads.replace("-", "_"),
        learning=args.learning.replace("-", "_"),
        **instruction,
    )


def report(run: Run) -> None:
    """Write metrics.json and the plots, and print the results and where they are."""
    butd, last, folder = run.experiment.model, run.rows[-1], run.folder
    read = run.args.task == "read"
    questions = None if read else torch.eye(len(SIDES), len(SIDES) + 10)  # a side, and no digit
    metrics = {
        "accuracy": {k.removeprefix("accuracy_"): share for k, share in last.items() if k.startswith("accuracy_")},
        "epochs": run.rows,
        "config": settings(run.args),
        **sub_networks(butd, TASKS if read else SIDES, questions),
    }
    text = json.dumps(metrics, indent=2) + "\n"
    write_whole(folder / "metrics.json", lambda path: path.write_text(text))
    weights = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in butd.state_dict().items()})
    write_whole(folder / "model.safetensors", lambda path: path.write_bytes(weights))
    for name, figure in figures(metrics).items():
        write_whole(folder / name, partial(figure.savefig, format="png", dpi=120))
    print(f"accuracy:     {percents(metrics['accuracy'])}")
    print(f"active units: {percents(metrics['active_share_total'])}")
    print(f"results:      {folder} (metrics.json, model.safetensors, plots, log.csv, tensorboard)")


def percents(shares: dict[str, float]) -> str:
    """Task name -> share, as people read it: "left 91.2 %, right 89.0 %"."""
    return ", ".join(f"{task} {share:.1%}".replace("%", " %") for task, share in shares.items())


def flags() -> argparse.ArgumentParser:
    """The command line; the defaults are the best small network we know."""
    parser = argparse.ArgumentParser(description="Train an instructed network on Multi-MNIST by Counter-Hebb learning.")
    add, size = parser.add_argument, number(int, 1, 10_000_000)
    add(
        "--task",
        choices=["read", "neighbour"],
        default="read",
        help="read the left or the right digit, or name the left or right neighbour of a digit (default %(default)s)",
    )
    add("--digits", type=number(int, 2, 10), default=3, help="in a row, for neighbours (default %(default)s)")
    add("--model", default="convnet", help="convnet, published or a torchvision classifier (default %(default)s)")
    add("--loss", choices=list(LOSSES), default="cross-entropy", help="(default %(default)s)")
    add("--learning", choices=["counter-hebb", "backprop"], default="counter-hebb", help="(default %(default)s)")
    add("--weights", choices=["shared", "separate"], default="shared", help="of BU and TD (default %(default)s)")
    add("--heads", choices=["shared", "per-task"], default="shared", help="for the answers (default %(default)s)")
    add(
        "--all-tasks", action=argparse.BooleanOptionalAction, default=False, help="every step asks every image for both"
    )
    add("--train-size", type=size, default=20_000, help="training composites per epoch (default %(default)s)")
    add("--test-size", type=size, default=4000, help="test composites (default %(default)s)")
    add("--only", choices=TASKS, help="learn and test this one alone")
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="new, slightly distorted composites at every epoch (default %(default)s)",
    )
    add("--data-root", type=Path, help="folder with torchvision's MNIST files, instead of 5,000 embedded digits")
    add("--download", action="store_true", help="fetch the MNIST files into --data-root where they are missing")
    training_flags(parser, "multi_mnist")
    parser.set_defaults(epochs=20, batch_size=128, optimizer="adamw", lr=1e-3, schedule="cosine", warm_up=3.0)
    return parser


def build(args: argparse.Namespace) -> Experiment:
    """The experiment that the flags ask for."""
    if args.download and args.data_root is None:
        raise UserError("--download needs --data-root, the folder to fetch into")
    if args.task == "neighbour" and (args.heads == "per-task" or args.all_tasks or args.only):
        raise UserError("--heads per-task, --all-tasks and --only belong to --task read")
    return ReadADigit(args) if args.task == "read" else FindANeighbour(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code: 0, 1 after an error, 130 after Ctrl-C (argparse exits by itself, with 2)."""
    return job(parse(flags(), argv), build, report)


if __name__ == "__main__":
    sys.exit(main())
