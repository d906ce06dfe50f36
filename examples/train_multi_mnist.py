"""Train an instructed network on Multi-MNIST by Counter-Hebb learning.

Each image shows two overlapping digits, and the instruction, "left" or "right", says which one to read. The network is
an ordinary torch.nn model; `fxfeedback.to_butd` derives the top-down network that turns the instruction into gates, and
the error into weight updates.

    python examples/train_multi_mnist.py                                # the best small network we know, 5 minutes
    python examples/train_multi_mnist.py --config multi_mnist           # the published network and settings
    python examples/train_multi_mnist.py --model resnet18 --epochs 2    # any torchvision classifier
"""

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fxfeedback
from jobs import UserError, number, write_whole
from multi_mnist import SIDE, SPLIT_SEED, TASKS, Composites, Digits, draw_composites, embedded_digits, mnist_digits
from multi_mnist_plots import figures
from training.data import generator
from training.flags import parse, settings, training_flags
from training.instructed import Instructed
from training.job import job
from training.loop import Run
from training.measures import sub_networks, twin_angles
from training.processes import with_synced_norms

EMBEDDING = 50  # size of the instruction's embedding, as published
EVALUATION_BATCH = 500


def convnet() -> nn.Module:
    """The default network, for images (B, 1, 28, 28).

    Every rectifier is a layer of gates, and a gate that learning closes rarely opens again. So there are few of them:
    the first convolution, whose features both tasks want, gets its nonlinearity from max-pooling, which has no gates.
    """
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 32, 5, bias=False)),
        ("norm1", nn.BatchNorm2d(32)),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(32, 48, 5, bias=False)),
        ("norm2", nn.BatchNorm2d(48)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.AvgPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(48 * 4 * 4, 256)),
        ("relu3", nn.ReLU()),
        ("head", nn.Linear(256, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


def published() -> nn.Module:
    """The published network, for images (B, 1, 28, 28); its pooling layers are learned depthwise convolutions."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 32, 5)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.Conv2d(32, 32, 2, stride=2, groups=32)),
        ("relu2", nn.ReLU()),
        ("conv2", nn.Conv2d(32, 32, 5)),
        ("relu3", nn.ReLU()),
        ("pool2", nn.Conv2d(32, 32, 3, stride=2, groups=32)),
        ("relu4", nn.ReLU()),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(32 * 3 * 3, 50)),
        ("relu5", nn.ReLU()),
        ("head", nn.Linear(50, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


OWN_MODELS: dict[str, Callable[[], nn.Module]] = {"convnet": convnet, "published": published}


def build_model(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network called `name` with ten classes, and the image shape (channels, height, width) that it takes.

    Raises `UserError`, naming the nearest names, when there is no such network.
    """
    if name in OWN_MODELS:
        return OWN_MODELS[name](), (1, SIDE, SIDE)
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


class MultiMNIST:
    """Composites as training data: the same at every epoch, or new and slightly distorted ones.

    Args:
        digits: what they are made of.
        size: composites per epoch.
        shape: (channels, height, width) of the images.
        seed: of the draws; of the composites' random tasks, too.
        augment: whether every epoch has composites of its own.
    """

    def __init__(self, digits: Digits, size: int, shape: tuple[int, int, int], seed: int, augment: bool) -> None:
        self.digits, self.size, self.shape, self.seed, self.augment = digits, size, shape, seed, augment
        self.drawn: int | None = None  # the epoch of the composites at hand

    def __len__(self) -> int:
        return self.size

    def batch(self, indices: Sequence[int], epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, *shape), labels (B, 2), and the task that each is to be asked, (B,)."""
        if self.drawn != epoch:
            if self.augment or self.drawn is None:
                random = generator(self.seed, "composites", epoch if self.augment else 0)
                self.composites = draw_composites(self.digits, self.size, random, jitter=self.augment)
            self.tasks = torch.randint(len(TASKS), (self.size,), generator=generator(self.seed, "tasks", epoch))
            self.drawn = epoch
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
        butd = fxfeedback.to_butd(
            with_synced_norms(net) if args.sync_norms else net,
            n_tasks=len(TASKS),
            embedding=EMBEDDING,
            input_size=shape,
            weights=args.weights,
            heads=args.heads.replace("-", "_"),
            learning=args.learning.replace("-", "_"),
        )
        super().__init__(butd, TASKS, args.all_tasks)

    def notes(self) -> dict[str, float]:
        return twin_angles(self.model)


def report(run: Run) -> None:
    """Write metrics.json and the plots, and print what was reached and where it lies."""
    butd, last, folder = run.experiment.model, run.rows[-1], run.folder
    metrics = {
        "accuracy": {task: last[f"accuracy_{task}"] for task in TASKS},
        "epochs": run.rows,
        "config": settings(run.args),
        **sub_networks(butd, TASKS),
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
    add("--model", default="convnet", help="convnet, published or a torchvision classifier (default %(default)s)")
    add("--learning", choices=["counter-hebb", "backprop"], default="counter-hebb", help="(default %(default)s)")
    add("--weights", choices=["shared", "separate"], default="shared", help="of BU and TD (default %(default)s)")
    add("--heads", choices=["shared", "per-task"], default="shared", help="for the answers (default %(default)s)")
    add(
        "--all-tasks", action=argparse.BooleanOptionalAction, default=False, help="every step asks every image for both"
    )
    add("--train-size", type=size, default=20_000, help="training composites per epoch (default %(default)s)")
    add("--test-size", type=size, default=4000, help="test composites (default %(default)s)")
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="new, slightly distorted composites at every epoch (default %(default)s)",
    )
    add("--data-root", type=Path, help="folder with torchvision's MNIST files, instead of 5,000 embedded digits")
    add("--download", action="store_true", help="fetch the MNIST files into --data-root where they are missing")
    training_flags(parser, "multi_mnist")
    parser.set_defaults(epochs=36, batch_size=128, optimizer="adamw", lr=1e-3, schedule="cosine", warm_up=5.4)
    return parser


def build(args: argparse.Namespace) -> ReadADigit:
    """The experiment that the flags ask for."""
    if args.download and args.data_root is None:
        raise UserError("--download needs --data-root, the folder to fetch into")
    return ReadADigit(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code: 0, 1 after an error, 130 after Ctrl-C (argparse exits by itself, with 2)."""
    return job(parse(flags(), argv), build, report)


if __name__ == "__main__":
    sys.exit(main())
