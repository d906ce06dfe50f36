"""Steer a network with feedback toward one of two digits in one image: the composite challenge, on real digits.

A small convnet with long-range modulatory (LRM) connections learns to read digits, the loss averaged over its passes,
nothing steered. Then two held-out digits are put into one image, and the feedback is replaced by the prototype of one
class. Steered toward a class that is there, the network should name it; toward one that is not, it should not.

    python examples/steer_composites.py                     # trained with mixup: the best we know, a minute
    python examples/steer_composites.py --training plain    # trained on single digits only, as published
    python examples/steer_composites.py --repeat 5          # means and 95 % confidence intervals over five seeds

On pictures, with a published network and its published prototypes, which are downloaded:

    python examples/steer_composites.py --data DIR --model alexnet_lrm3 --prototypes published
"""

import argparse
import csv
import io
import json
import math
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.stats import t as student
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fxfeedback
import picture_composites
from fxfeedback.composites import KINDS, Row, TripletDataset, steerability, table
from jobs import UserError, exit_code, make_folder, number, usable_device, write_whole
from multi_mnist import (
    DEVIATION,
    MEAN,
    SIDE,
    SPLIT_SEED,
    DataError,
    Digits,
    embedded_digits,
    jittered,
    mnist_digits,
)

CLASSES = 10
SOURCE = "head"  # the logits: what is looked for is named where the classes are
PASSES = 2
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
WARM_UP = 0.15  # of the steps, in which the rate rises to its highest before it falls along a cosine
EVALUATION_BATCH = 500
CONFIDENCE = 0.95
COLUMNS = ("training", "seed", "kind", "strength", "unsteered", "steered", "gain", "absent_unsteered", "hallucinated")


def network() -> nn.Module:
    """A convnet for images (B, 1, H, W), of any size: (B, 10).

    A feature counts wherever it is, by its maximum over the image, so that digits may stand side by side.
    """
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False)),
        ("norm1", nn.BatchNorm2d(16)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(16, 32, 3, padding=1, bias=False)),
        ("norm2", nn.BatchNorm2d(32)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.MaxPool2d(2)),
        ("conv3", nn.Conv2d(32, 64, 5, padding=2, bias=False)),
        ("norm3", nn.BatchNorm2d(64)),
        ("relu3", nn.ReLU()),
        ("pool3", nn.AdaptiveMaxPool2d(1)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(64, 64)),
        ("relu4", nn.ReLU()),
        (SOURCE, nn.Linear(64, CLASSES)),
    ]
    return nn.Sequential(OrderedDict(layers))


def normalised(images: Tensor) -> Tensor:
    """Digits (N, 28, 28) in 0..255 as the network takes them: (N, 1, 28, 28)."""
    return ((images / 255 - MEAN) / DEVIATION).unsqueeze(1)


def mixed_up(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (alpha 1): every image (N, ...) blended with another, in random shares, and so its target (N, classes).

    The network thus sees two digits at once and is told both. In training it is never told which one to look for.
    """
    order = torch.randperm(len(images), generator=generator)
    share = torch.rand(len(images), generator=generator)
    of_image, of_target = share.view(-1, *[1] * (images.ndim - 1)), share.unsqueeze(1)
    return images.lerp(images[order], of_image), targets.lerp(targets[order], of_target)


def train(digits: Digits, args: argparse.Namespace, seed: int) -> fxfeedback.FeedbackModel:
    """A network with feedback, trained on single digits by `args`' recipe, the loss averaged over its passes.

    Raises `UserError` when the loss is no longer a finite number, and `fxfeedback.Error` for an unknown destination.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    connections = [(SOURCE, destination) for destination in args.destinations]
    model = fxfeedback.add_feedback(network(), connections, PASSES, input_size=(1, SIDE, SIDE)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=WARM_UP)
    model.train()
    bar = tqdm(range(1, args.steps + 1), f"seed {seed}", unit="step", dynamic_ncols=True, disable=None)
    for step in bar:
        batch = torch.randint(len(digits.labels), (args.batch_size,), generator=generator)
        images = normalised(jittered(digits.images[batch], generator))
        targets = F.one_hot(digits.labels[batch], CLASSES).float()
        if args.training == "mixup":
            images, targets = mixed_up(images, targets, generator)
        targets = targets.to(args.device)
        outputs = model(images.to(args.device))
        loss = sum(F.cross_entropy(output, targets) for output in outputs) / len(outputs)
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss became {loss.item()} in step {step}; a lower --lr may help")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return model.eval()


def prototypes(model: fxfeedback.FeedbackModel, digits: Digits) -> fxfeedback.Prototypes:
    """The mean activation of the source, after the last pass, over the clean digits of every class."""
    dataset = TensorDataset(normalised(digits.images), digits.labels)
    return fxfeedback.Prototypes.compute(model, DataLoader(dataset, EVALUATION_BATCH), [SOURCE], progress=False)


@torch.no_grad()
def accuracy(model: fxfeedback.FeedbackModel, digits: Digits) -> float:
    """The share of single digits that the last pass names, unsteered."""
    device = next(model.parameters()).device
    batches = zip(digits.images.split(EVALUATION_BATCH), digits.labels.split(EVALUATION_BATCH), strict=True)
    right = sum(
        int((model(normalised(images).to(device))[-1].argmax(1).cpu() == labels).sum()) for images, labels in batches
    )
    return right / len(digits.labels)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % confidence interval (t distribution); None for a single value."""
    if len(values) < 2:
        return fmean(values), None
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


def summary(rows: Iterable[Row]) -> list[Row]:
    """Means over the seeds, one row per kind and strength; NAME_ci is half the 95 % interval of NAME."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["strength"]), []).append(row)
    result = []
    for (kind, strength), group in groups.items():
        line: Row = {"kind": kind, "strength": strength, "seeds": len(group)}
        for name in ("unsteered", "steered", "gain", "absent_unsteered", "hallucinated"):
            line[name], line[f"{name}_ci"] = mean_and_interval([row[name] for row in group])
        result.append(line)
    return result


def figure(lines: Sequence[Row], examples: dict[str, tuple[Tensor, str]], title: str) -> Figure:
    """One column per kind: an example, and below it what is named over the strength of steering, with its intervals."""
    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    drawn = Figure(figsize=(4 * len(kinds), 5.5), layout="constrained")
    drawn.suptitle(title)
    axes = drawn.subplots(2, len(kinds), squeeze=False, height_ratios=(1, 2), sharey="row")
    for column, kind in enumerate(kinds):
        image, caption = examples[kind]
        axes[0, column].imshow(image.numpy(), cmap="gray", extent=(0, image.shape[1], image.shape[0], 0))
        axes[0, column].set(title=f"{kind}: {caption}", xticks=[], yticks=[])
        group = [line for line in lines if line["kind"] == kind]
        strengths = [line["strength"] for line in group]
        for name, label in (
            ("steered", "target, steered toward it"),
            ("unsteered", "target, unsteered"),
            ("hallucinated", "absent class, steered toward it"),
        ):
            spread = [100 * (line[f"{name}_ci"] or 0) for line in group]
            style = "--" if name == "unsteered" else "-"
            axes[1, column].errorbar(
                strengths, [100 * line[name] for line in group], spread, label=label, fmt=style, marker=".", capsize=2
            )
        axes[1, column].set(xlabel="strength", ylim=(0, 100))
    axes[1, 0].set_ylabel("named first (%)")
    axes[1, 0].legend(fontsize="small")
    return drawn


def as_csv(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """These columns of the rows, numbers with six digits."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()} for row in rows
    )
    return lines.getvalue()


class Run:
    """The challenge for every seed, and its results so far.

    Creating it trains nothing, but raises `UserError` or `DataError` when something in `args` cannot be used.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        usable_device(args.device)
        make_folder(args.out)
        self.digits, self.held_out = (
            mnist_digits(args.data_root, args.download) if args.data_root else embedded_digits()
        )
        held_out = TensorDataset(normalised(self.held_out.images), self.held_out.labels)
        # the same triplets for every seed, which is of weights and training: so that results compare
        self.triplets = {
            kind: TripletDataset(held_out, args.test_size, kind, SPLIT_SEED, self.held_out.labels.tolist())
            for kind in KINDS
        }
        self.rows: list[Row] = []
        self.clean: dict[int, float] = {}  # seed -> accuracy on single digits

    def repeat(self) -> bool:
        """Train and test for every seed, and keep the results after each; False when Ctrl-C ended it early."""
        try:
            for seed in range(self.args.seed, self.args.seed + self.args.repeat):
                self.run(seed)
        except KeyboardInterrupt:
            return False
        return True

    def run(self, seed: int) -> None:
        """Train and test one network, and keep its results."""
        model = train(self.digits, self.args, seed)
        seen, rows = prototypes(model, self.digits), list[Row]()
        for kind in tqdm(KINDS, f"seed {seed}", unit="kind", dynamic_ncols=True, disable=None):
            rows += steerability(model, self.triplets[kind], seen, self.args.strengths, progress=False)
        self.clean[seed] = accuracy(model, self.held_out)
        self.rows += [{"training": self.args.training, "seed": seed, **row} for row in rows]
        self.keep(seed, model, seen)
        tqdm.write(f"seed {seed}: {self.clean[seed]:.1%} of single digits right")

    def keep(self, seed: int, model: nn.Module, seen: fxfeedback.Prototypes) -> None:
        """Write the network with its prototypes, results.csv, results.json and steering.png."""
        means = torch.stack([seen.mean(k).float() for k in range(CLASSES)])
        weights = safetensors.torch.save({**model.state_dict(), "prototypes": means})
        write_whole(self.args.out / f"model-{seed}.safetensors", lambda path: path.write_bytes(weights))
        lines = as_csv(self.rows, COLUMNS)
        write_whole(self.args.out / "results.csv", lambda path: path.write_text(lines))
        text = json.dumps(self.results(), indent=2) + "\n"
        write_whole(self.args.out / "results.json", lambda path: path.write_text(text))
        drawn = figure(summary(self.rows), self.examples(), self.title())
        write_whole(self.args.out / "steering.png", partial(drawn.savefig, format="png", dpi=120))

    def results(self) -> dict[str, Any]:
        """What results.json holds: shares in 0..1."""
        config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.args).items()}
        return {
            "summary": summary(self.rows),
            "accuracy": [{"seed": seed, "clean": share} for seed, share in self.clean.items()],
            "config": {**config, "source": SOURCE, "passes": PASSES},
        }

    def title(self) -> str:
        """The figure's."""
        seeds = f"{len(self.clean)} seeds, bars: 95 % confidence" if len(self.clean) > 1 else "1 seed"
        return f"Steering on composites of held-out digits (training: {self.args.training}; {seeds})"

    def examples(self) -> dict[str, tuple[Tensor, str]]:
        """Kind -> the first composite, (H, W), and what it shows."""
        result = {}
        for kind, triplets in self.triplets.items():
            image, (first, second), absent = triplets[0]
            result[kind] = image.squeeze(0), f"{first} and {second}, no {absent}"
        return result

    def report(self) -> None:
        """Print the results and where they are."""
        if not self.rows:
            print("no network was finished: there are no results")
            return
        print(table(summary(self.rows)))
        print(f"in %, of {self.args.test_size} composites; single digits: {fmean(self.clean.values()):.1%} right")
        print(f"results: {self.args.out} (results.csv, results.json, steering.png, model-SEED.safetensors)")


def parse_arguments(
    argv: Sequence[str] | None, parser: argparse.ArgumentParser | None = None, out: str = "runs/steer_composites"
) -> argparse.Namespace:
    """The command line, with what `parser` has already. Exits with a message when it is wrong."""
    parser = parser or argparse.ArgumentParser(description="Steer a network with feedback on composites of two digits.")
    add, size, rate = parser.add_argument, number(int, 1, 10_000_000), number(float, 0, 1000)
    add(
        "--training",
        choices=["mixup", "plain"],
        default="mixup",
        help="images blended in pairs, or single digits (default %(default)s)",
    )
    add("--destinations", nargs="+", default=["relu1"], help="nodes that the logits modulate (default relu1)")
    add("--steps", type=number(int, 2, 10_000_000), default=600, help="of training (default %(default)s)")
    add("--batch-size", type=number(int, 2, 100_000), default=128, help="images per step (default %(default)s)")
    add("--lr", type=rate, default=3e-3, help="highest learning rate, of AdamW (default %(default)s)")
    add("--strengths", type=rate, nargs="+", default=STRENGTHS, help="of steering (default 0.5 to 5)")
    add("--test-size", type=size, default=1000, help="composites of each kind (default %(default)s)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of weights and training (default %(default)s)")
    add("--repeat", type=size, default=1, help="how many seeds, from --seed on (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default here: %(default)s)")
    add("--data-root", type=Path, help="folder with torchvision's MNIST files, instead of 5,000 embedded digits")
    add("--download", action="store_true", help="fetch the MNIST files into --data-root where they are missing")
    add("--data", type=Path, help="folder of pictures, a folder per class: the challenge with a published network")
    add("--model", choices=picture_composites.MODELS, default="alexnet_lrm3", help="on --data (default %(default)s)")
    add("--weights", default="published", help="of --model: published, none, or a file (default %(default)s)")
    add(
        "--prototypes",
        default="published",
        help="for --model: published, words (from CLIP), a file, or a folder of pictures (default %(default)s)",
    )
    add("--workers", type=number(int, 0, 1000), default=0, help="processes that read --data (default %(default)s)")
    add("--out", type=Path, default=Path(out), help="folder for the results (default %(default)s)")
    args = parser.parse_args(argv)
    if args.download and args.data_root is None:
        parser.error("--download needs --data-root, the folder to fetch into")
    return args


def pictures(args: argparse.Namespace) -> int:
    """The challenge on a folder of pictures; returns the exit code."""
    usable_device(args.device)
    make_folder(args.out)
    rows = picture_composites.challenge(args)
    text = as_csv(rows, list(rows[0]))
    write_whole(args.out / "pictures.csv", lambda path: path.write_text(text))
    print(table(rows))
    print(f"in %, of {args.test_size} composites, with 95 % confidence intervals; results: {args.out / 'pictures.csv'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code: 0, 1 after an error, 130 after Ctrl-C (argparse exits by itself, with 2)."""
    args = parse_arguments(argv)

    def job() -> int:
        if args.data:
            return pictures(args)
        run = Run(args)
        finished = run.repeat()
        if not finished:
            print("interrupted: keeping the results of the seeds that were finished", file=sys.stderr)
        run.report()
        return 0 if finished else 130

    return exit_code(job, DataError, fxfeedback.Error)


if __name__ == "__main__":
    sys.exit(main())
