"""Train an instructed network on Multi-MNIST by Counter-Hebb learning.

Each image shows two overlapping digits, and the instruction, "left" or "right", says which one to read. The network is
an ordinary torch.nn model; `fxfeedback.to_butd` derives the top-down network that turns the instruction into gates, and
the error into weight updates.

    python examples/train_multi_mnist.py                                # the best small network we know, 5 minutes
    python examples/train_multi_mnist.py --model published              # the published network and settings
    python examples/train_multi_mnist.py --model resnet18 --epochs 2    # any torchvision classifier
"""

import argparse
import json
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
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
from tqdm import tqdm

import fxfeedback
from jobs import UserError, exit_code, make_folder, number, usable_device, write_whole
from multi_mnist import SIDE, SPLIT_SEED, TASKS, Composites, DataError, draw_composites, embedded_digits, mnist_digits
from multi_mnist_plots import figures

EMBEDDING = 50  # size of the instruction's embedding, as published
EVALUATION_BATCH = 500
WARM_UP = 0.15  # of a run, where the rate rises to its highest before it falls along a cosine


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, where the command line does not say otherwise."""

    epochs: int
    batch_size: int
    lr: float
    lr_decay: float | None  # factor per epoch; None: one cycle of warm-up and cosine decay over the whole run
    weight_decay: float
    augment: bool  # new composites of slightly distorted digits at every epoch

    def described(self) -> str:
        """The recipe as the help shows it."""
        settings = {name.replace("_", "-"): value for name, value in asdict(self).items() if value is not None}
        return ", ".join(f"{name} {value}" for name, value in settings.items())


RECIPES = {
    "convnet": Recipe(epochs=36, batch_size=128, lr=1e-3, lr_decay=None, weight_decay=0.0, augment=True),
    "published": Recipe(epochs=30, batch_size=64, lr=5e-4, lr_decay=0.95, weight_decay=0.0, augment=False),
}
TORCHVISION_RECIPE = Recipe(epochs=5, batch_size=64, lr=5e-4, lr_decay=None, weight_decay=0.0, augment=True)


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


@torch.no_grad()
def sub_networks(butd: fxfeedback.BUTD, device: torch.device) -> dict[str, Any]:
    """What part of the network each task uses, as metrics.json has it.

    `active_share`: task -> site -> share of its units with a positive counter neuron. `active_share_total`: the same
    over all sites. `overlap`: site -> cosine between the two tasks' 0/1 vectors of active units, 0 where one is empty.
    """
    butd.eval()
    active = {
        task: {site: value[0] > 0 for site, value in butd.counter_neurons(torch.tensor([i], device=device)).items()}
        for i, task in enumerate(TASKS)
    }
    left, right = (active[task] for task in TASKS)
    return {
        "active_share": {
            task: {site: units.float().mean().item() for site, units in sites.items()} for task, sites in active.items()
        },
        "active_share_total": {
            task: torch.cat([units.flatten() for units in sites.values()]).float().mean().item()
            for task, sites in active.items()
        },
        "overlap": {
            site: F.cosine_similarity(left[site].flatten().float(), right[site].flatten().float(), dim=0).item()
            for site in left
        },
    }


@torch.no_grad()
def twin_angles(butd: fxfeedback.BUTD) -> dict[str, float]:
    """Weight name -> the angle in degrees between the weight and its TD twin."""
    weights, twins = butd.state_dict(), butd.td_weights
    cosines = {
        name: F.cosine_similarity(weights[name].flatten().double(), twins[name].flatten().double(), dim=0)
        for name in twins
    }
    return {name: math.degrees(math.acos(max(-1, min(1, cosine.item())))) for name, cosine in cosines.items()}


class Run:
    """One training run: the network, its data and its results so far.

    Creating it trains nothing, but raises `UserError`, `DataError` or one of fxfeedback's errors when something in
    `args` cannot be used.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = usable_device(args.device)
        make_folder(args.out)
        torch.manual_seed(args.seed)
        self.generator = torch.Generator().manual_seed(args.seed)
        model, self.shape = build_model(args.model)

        self.digits, test_digits = mnist_digits(args.data_root, args.download) if args.data_root else embedded_digits()
        test = draw_composites(test_digits, args.test_size, torch.Generator().manual_seed(SPLIT_SEED))
        self.test = test.to(self.device)
        self.data = self.training_data()

        butd = fxfeedback.to_butd(
            model,
            n_tasks=len(TASKS),
            embedding=EMBEDDING,
            input_size=self.shape,
            weights=args.weights,
            learning=args.learning.replace("-", "_"),
        )
        self.butd = butd.to(self.device)
        learned = [parameter for parameter in self.butd.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=args.lr, weight_decay=args.weight_decay)
        self.steps = math.ceil(args.train_size / args.batch_size)  # per epoch
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.epochs: list[dict[str, Any]] = []

    def training_data(self) -> Composites:
        """The composites of one epoch, on the run's device."""
        data = draw_composites(self.digits, self.args.train_size, self.generator, jitter=self.args.augment)
        return data.to(self.device)

    def rate(self, step: int) -> float:
        """The learning rate at `step`, as a share of --lr."""
        if self.args.lr_decay is not None:
            return self.args.lr_decay ** (step // self.steps)
        done = (step + 0.5) / (self.args.epochs * self.steps)
        return done / WARM_UP if done < WARM_UP else (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2

    def train(self) -> bool:
        """Train, and keep the results after every epoch; False when Ctrl-C ended it early.

        Raises `UserError` when the loss is no longer a finite number; the results of the epochs before stay.
        """
        with tqdm(total=self.args.epochs * self.steps, unit="step", dynamic_ncols=True) as bar:
            try:
                for epoch in range(1, self.args.epochs + 1):
                    self.train_epoch(epoch, bar)
            except KeyboardInterrupt:
                return False
        return True

    def train_epoch(self, epoch: int, bar: tqdm) -> None:
        """Train for one epoch and keep the results; on Ctrl-C keep those of the steps so far and raise it again."""
        bar.set_description(f"epoch {epoch}/{self.args.epochs}")
        start, lr, losses = time.perf_counter(), float(self.schedule.get_last_lr()[0]), list[float]()
        try:
            if self.args.augment and epoch > 1:
                self.data = self.training_data()
            for loss in self.learn():
                if not math.isfinite(loss):
                    raise UserError(f"the loss became {loss} in epoch {epoch}; a lower --lr may help")
                losses.append(loss)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            if losses:
                self.keep(epoch, losses, lr, time.perf_counter() - start)
            raise
        self.keep(epoch, losses, lr, time.perf_counter() - start)

    def learn(self) -> Iterator[float]:
        """One epoch, step by step: each image once, with one random instruction; yields each step's loss."""
        self.butd.train()
        for batch in torch.randperm(self.args.train_size, generator=self.generator).split(self.args.batch_size):
            task = torch.randint(len(TASKS), batch.shape, generator=self.generator)
            batch, task = batch.to(self.device), task.to(self.device)
            logits = self.butd(fitted(self.data.images[batch], self.shape), task)
            loss = F.cross_entropy(logits, self.data.labels[batch, task])
            self.optimizer.zero_grad()
            loss.backward()  # fxfeedback puts the Counter-Hebb updates where gradients go
            self.optimizer.step()
            self.schedule.step()
            yield loss.item()

    def keep(self, epoch: int, losses: list[float], lr: float, seconds: float) -> None:
        """Test the network, add the epoch to the results, and write metrics.json and model.safetensors."""
        loss, accuracy = fmean(losses), accuracies(self.butd, self.test, self.shape)
        self.epochs.append(
            {
                "epoch": epoch,
                "steps": len(losses),  # fewer than in the other epochs after Ctrl-C
                "loss": loss,
                "accuracy": accuracy,
                "lr": lr,
                "seconds": seconds,
            }
        )
        if self.args.weights == "separate":
            angles = twin_angles(self.butd)
            self.epochs[-1] |= {"angle": fmean(angles.values()), "angles": angles}
        weights = safetensors.torch.save(self.butd.state_dict())
        write_whole(self.args.out / "model.safetensors", lambda path: path.write_bytes(weights))
        text = json.dumps(self.metrics(), indent=2) + "\n"
        write_whole(self.args.out / "metrics.json", lambda path: path.write_text(text))
        tqdm.write(f"epoch {epoch}: loss {loss:.4f}, accuracy {percents(accuracy)}")

    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds: accuracies and shares in 0..1, angles in degrees, times in seconds."""
        config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.args).items()}
        return {
            "accuracy": self.epochs[-1]["accuracy"],
            "epochs": self.epochs,
            "config": config,
            **sub_networks(self.butd, self.device),
        }

    def report(self) -> None:
        """Draw the plots, and print what was reached and where it lies."""
        if not self.epochs:
            print("no step was finished: there are no results")
            return
        metrics = self.metrics()
        for name, figure in figures(metrics).items():
            write_whole(self.args.out / name, partial(figure.savefig, format="png", dpi=120))
        print(f"accuracy:     {percents(metrics['accuracy'])}")
        print(f"active units: {percents(metrics['active_share_total'])}")
        print(f"results:      {self.args.out} (metrics.json, model.safetensors, plots)")


def percents(shares: dict[str, float]) -> str:
    """Task name -> share, as people read it: "left 91.2 %, right 89.0 %"."""
    return ", ".join(f"{task} {share:.1%}".replace("%", " %") for task, share in shares.items())


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the model's own recipe where it is silent. Exits with a message when it is wrong."""
    parser = argparse.ArgumentParser(
        description="Train an instructed network on Multi-MNIST by Counter-Hebb learning.",
        epilog="Flags without a default take the model's own: "
        + "; ".join(f"{name}: {recipe.described()}" for name, recipe in RECIPES.items())
        + f"; torchvision's classifiers: {TORCHVISION_RECIPE.described()}.",
    )
    add, size = parser.add_argument, number(int, 1, 10_000_000)
    add("--epochs", type=size, help="passes over the training composites")
    add("--train-size", type=size, default=20_000, help="training composites per epoch (default %(default)s)")
    add("--test-size", type=size, default=4000, help="test composites (default %(default)s)")
    add("--batch-size", type=size, help="images per step")
    add("--lr", type=number(float, 0, 1000), help="highest learning rate, of AdamW")
    add("--lr-decay", type=number(float, 0, 1), help="factor of the rate per epoch, instead of a warm-up and cosine")
    add("--weight-decay", type=number(float, 0, 1000), help="of AdamW")
    add("--augment", action=argparse.BooleanOptionalAction, help="new, slightly distorted composites at every epoch")
    add("--learning", choices=["counter-hebb", "backprop"], default="counter-hebb", help="(default %(default)s)")
    add("--weights", choices=["shared", "separate"], default="shared", help="of BU and TD (default %(default)s)")
    add("--model", default="convnet", help="convnet, published or a torchvision classifier (default %(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of weights and training (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default here: %(default)s)")
    add("--data-root", type=Path, help="folder with torchvision's MNIST files, instead of 5,000 embedded digits")
    add("--download", action="store_true", help="fetch the MNIST files into --data-root where they are missing")
    add("--out", type=Path, default=Path("runs/multi_mnist"), help="folder for the results (default %(default)s)")
    args = parser.parse_args(argv)
    if args.download and args.data_root is None:
        parser.error("--download needs --data-root, the folder to fetch into")
    for name, value in asdict(RECIPES.get(args.model, TORCHVISION_RECIPE)).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code: 0, 1 after an error, 130 after Ctrl-C (argparse exits by itself, with 2)."""
    args = parse_arguments(argv)

    def job() -> int:
        run = Run(args)
        finished = run.train()
        if not finished:
            print("interrupted: keeping the results so far", file=sys.stderr)
        run.report()
        return 0 if finished else 130

    return exit_code(job, DataError, fxfeedback.Error)


if __name__ == "__main__":
    sys.exit(main())
