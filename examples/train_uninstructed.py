"""Train a plain classifier by Counter-Hebb learning, with several kinds of TD weights, or by backpropagation.

Without an instruction there is one TD pass, from the error. With the BU weights it computes the gradients. With
separate TD weights that receive the same updates, it comes close to them; signs and broadcast errors learn, too.

    python examples/train_uninstructed.py                                      # on 4,000 embedded digits, a minute
    python examples/train_uninstructed.py --feedback fixed --repeat 5          # feedback alignment, mean of five runs
    python examples/train_uninstructed.py --config cifar10 --data-root data --download
"""

import argparse
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

import fxfeedback
from jobs import number
from train_multi_mnist import OWN_MODELS, build_model, fitted
from training.flags import parse, training_flags
from training.images import SETS, pictures
from training.job import job
from training.loop import Experiment, Run
from training.losses import LOSSES
from training.measures import angles
from training.processes import with_synced_norms

FEEDBACK: dict[str, dict[str, Any]] = {
    "shared": {},
    "mirrored": {"weights": "separate", "td_learning": "mirror", "td_init": "kaiming"},
    "fixed": {"weights": "separate", "td_learning": "fixed", "td_init": "kaiming"},
    "symmetric": {"weights": "separate", "td_learning": "mirror", "td_init": "symmetric"},
    "kolen-pollack": {"weights": "separate", "td_decay": 0.01},
    "weight-mirror": {"weights": "separate", "td_learning": "weight_mirror"},
    "usf": {"weights": "sign"},
    "brsf": {"weights": "sign", "td_magnitude": "batch"},
    "frsf": {"weights": "sign", "td_magnitude": "fixed"},
    "dfa": {"weights": "direct"},
    "backprop": {"learning": "backprop"},
}

MIRROR = 512
"""Samples of noise per step of a weight mirror: with few, the estimates of wide layers are noisy."""


class Classify(Experiment):
    """Telling a picture's class, with `feedback` as the network's TD weights."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.loss = LOSSES[args.loss]
        self.train, self.test = pictures(args.data, args.data_root, args.download)
        shape = tuple(self.train.images.shape[1:])
        if args.model == "published":
            net, self.shape = two_layers(shape, args.hidden), shape
        else:
            net, self.shape = build_model(args.model)
        noise = {"td_noise": args.td_noise} if args.feedback == "symmetric" else {}
        if args.feedback != "backprop":
            noise["update_noise"] = args.update_noise
        net = with_synced_norms(net) if args.sync_norms else net
        self.model = fxfeedback.to_butd(net, input_size=self.shape, **FEEDBACK[args.feedback], **noise)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        images, labels = batch
        if self.model.options.td_learning == "weight_mirror":
            self.model.mirror_step(batch=MIRROR)
        return self.loss(model(fitted(images, self.shape)), labels)

    def metrics(self) -> Mapping[str, Metric]:
        return {"test_loss": MeanMetric(), "accuracy": MulticlassAccuracy(10, average="micro")}

    def judge(self, batch: Any, metrics: Mapping[str, Metric]) -> None:
        images, labels = batch
        logits = self.model(fitted(images, self.shape))
        metrics["test_loss"].update(self.loss(logits, labels))
        metrics["accuracy"].update(logits, labels)

    def notes(self) -> dict[str, float]:
        return angles(self.model)


def two_layers(shape: Sequence[int], hidden: int) -> nn.Module:
    """The published network: two linear layers."""
    channels, height, width = shape
    layers: list[tuple[str, nn.Module]] = [
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(channels * height * width, hidden)),
        ("relu", nn.ReLU()),
        ("head", nn.Linear(hidden, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


def report(run: Run) -> None:
    """Save the network, and print the accuracy."""
    fxfeedback.save(run.experiment.model, run.folder / "model")
    print(f"accuracy: {100 * run.rows[-1]['accuracy']:.2f} %")
    print(f"results:  {run.folder} (model, log.csv, tensorboard)")


def flags() -> argparse.ArgumentParser:
    """The command line; the defaults are the published settings."""
    parser = argparse.ArgumentParser(description="Train a classifier by Counter-Hebb learning without instructions.")
    add = parser.add_argument
    add("--feedback", choices=list(FEEDBACK), default="shared", help="TD weights, or backprop (default %(default)s)")
    add("--td-noise", type=number(float, 0, 100), default=0.1, help="of symmetric weights' start (default %(default)s)")
    add("--update-noise", type=number(float, 0, 100), default=0.0, help="on weights' updates (default %(default)s)")
    add("--loss", choices=list(LOSSES), default="cross-entropy", help="(default %(default)s)")
    add("--data", choices=list(SETS), default="embedded", help="(default %(default)s)")
    add("--data-root", type=Path, help="folder with torchvision's files")
    add("--download", action="store_true", help="fetch the files into --data-root where they are missing")
    own = ", ".join(OWN_MODELS)
    add("--model", default="published", help=f"published (two layers), {own} or torchvision's (default %(default)s)")
    add(
        "--hidden", type=number(int, 1, 1_000_000), default=500, help="units of the published one (default %(default)s)"
    )
    training_flags(parser, "uninstructed")
    parser.set_defaults(epochs=50, batch_size=20, optimizer="adam", lr=1e-4, schedule="decay")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    return job(parse(flags(), argv), Classify, report)


if __name__ == "__main__":
    sys.exit(main())
