"""The studies of the BU-TD paper: several ways to train, with several seeds each, as a table and a figure.

    python examples/studies.py                             # a first look: the first one below, short, a minute
    python examples/studies.py feedback                    # TD weights of every kind, against backpropagation
    python examples/studies.py kinds-linear kinds-convnet  # nine kinds of feedback: accuracy and alignment
    python examples/studies.py alignment                   # how far TD weights are from BU weights while they learn
    python examples/studies.py noise decay                 # noise on the updates; weight decay
    python examples/studies.py sub-networks --seeds 3      # what part of the network each task uses
    python examples/studies.py instruction                 # Multi-MNIST: Counter-Hebb learning beside backpropagation
    python examples/studies.py feedback -- --data cifar10 --data-root data --hidden 1000    # flags for every run

Abel and Ullman, "Biologically Inspired Learning Model for Instructed Vision", NeurIPS 2024. A study that was
interrupted continues where it stopped.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure

import train_multi_mnist
import train_uninstructed
from jobs import number, write_whole
from training.results import Interval, as_csv, interval


class Study(NamedTuple):
    """What is compared.

    train: a training script's main.
    variants: what each way to train is called, and its flags.
    columns: of the log, what is shown; the first is the study's result.
    """

    train: Callable[[Sequence[str]], int]
    variants: dict[str, list[str]]
    columns: list[str]


KINDS = {
    "shared": ["--feedback", "shared"],
    "mirrored": ["--feedback", "mirrored"],
    "fixed": ["--feedback", "fixed"],
    "symmetric, noisy": ["--feedback", "symmetric", "--td-noise", "0.1", "--update-noise", "0.1"],
    "backpropagation": ["--feedback", "backprop"],
}
EVERY_KIND = {
    "backpropagation": "shared",
    "FA": "fixed",
    "mirror": "mirrored",
    "Kolen-Pollack": "kolen-pollack",
    "weight mirror": "weight-mirror",
    "uSF": "usf",
    "brSF": "brsf",
    "frSF": "frsf",
    "DFA": "dfa",
}
"""What TD reads: name -> the training script's name for it."""
SGD = ["--optimizer", "sgd", "--lr", "0.05", "--batch-size", "50", "--schedule", "constant"]
ON = {
    "linear": [*SGD, "--epochs", "10"],
    "convnet": [*SGD, "--epochs", "4", "--model", "convnet"],
}
"""Network -> flags: SGD, as Adam would normalise what Kolen and Pollack subtract."""
STUDIES = {
    "feedback": Study(train_uninstructed.main, KINDS, ["accuracy", "loss"]),
    "alignment": Study(
        train_uninstructed.main,
        {
            f"{kind}, decay {decay}": ["--feedback", kind, "--optimizer", "adamw", "--weight-decay", decay]
            for kind in ("mirrored", "fixed")
            for decay in ("0", "1")
        },
        ["angle", "accuracy"],
    ),
    **{
        f"kinds-{model}": Study(
            train_uninstructed.main,
            {name: [*flags, "--feedback", kind] for name, kind in EVERY_KIND.items()},
            ["accuracy", "angle"],
        )
        for model, flags in ON.items()
    },
    "noise": Study(
        train_uninstructed.main,
        {
            f"{kind}, noise {noise}": ["--feedback", kind, "--td-noise", "0", "--update-noise", noise]
            for kind in ("shared", "symmetric")
            for noise in ("0", "0.5", "2", "8")
        },
        ["accuracy", "loss"],
    ),
    "decay": Study(
        train_uninstructed.main,
        {
            f"mirrored, decay {decay}": ["--feedback", "mirrored", "--optimizer", "adamw", "--weight-decay", decay]
            for decay in ("0", "0.01", "0.1", "1", "10")
        },
        ["accuracy", "angle"],
    ),
    "sub-networks": Study(
        train_multi_mnist.main,
        {
            "one task per image": ["--model", "published", "--lr", "5e-4"],
            "all tasks": ["--model", "published", "--lr", "5e-4", "--all-tasks"],
        },
        ["overlap", "active_left", "active_right", "accuracy_left", "accuracy_right"],
    ),
    "instruction": Study(
        train_multi_mnist.main,
        {"Counter-Hebb": ["--learning", "counter-hebb"], "backpropagation": ["--learning", "backprop"]},
        ["accuracy_left", "accuracy_right"],
    ),
}

FIRST_LOOK = ["feedback", "--seeds=2", "--out=runs/first-look", "--", "--lr=1e-3", "--epochs=3"]

Logs = dict[str, list[list[dict[str, float]]]]
"""Variant -> for every seed, the rows of its log."""


def run(name: str, study: Study, args: argparse.Namespace) -> int:
    """Train all variants with all seeds, and write what they gave; returns the exit code."""
    folder, logs = args.out / name, Logs()
    for variant, flags in study.variants.items():
        logs[variant] = []
        for seed in range(args.seeds):
            out = folder / variant.replace(", ", "_").replace(" ", "-") / f"seed-{seed}"
            print(f"\n{name}: {variant}, seed {seed}", flush=True)
            code = study.train([*flags, *args.flags, "--seed", str(seed), "--out", str(out), "--resume"])
            if code:
                return code
            with (out / "log.csv").open(newline="") as file:
                rows = [{column: float(value) for column, value in row.items()} for row in csv.DictReader(file)]
            logs[variant].append(rows)
    write(folder, study, logs)
    print(f"\n{name}, {args.seeds} seeds, after the last epoch, mean ± half of the 95 % confidence interval\n")
    print(f"{'':24}" + "".join(f"{column:>22}" for column in study.columns))
    for variant in logs:
        values = (last(logs[variant], column) for column in study.columns)
        print(f"{variant:24}" + "".join(f"{value!s:>22}" for value in values))
    print(f"\nresults: {folder} (results.csv, curves.csv, curves.png)")
    return 0


def last(seeds: list[list[dict[str, float]]], column: str) -> Interval | str:
    """What a variant ended with; a dash where its log has no such column."""
    return interval([rows[-1][column] for rows in seeds]) if column in seeds[0][-1] else "-"


def write(folder: Path, study: Study, logs: Logs) -> None:
    """The figure, and the numbers behind it and behind the table."""
    epochs = [
        {"variant": variant, "seed": seed, **{column: row.get(column, "") for column in ["epoch", *study.columns]}}
        for variant, seeds in logs.items()
        for seed, rows in enumerate(seeds)
        for row in rows
    ]
    final = max(row["epoch"] for row in epochs)
    ends = [row for row in epochs if row["epoch"] == final]
    write_whole(folder / "curves.csv", lambda path: path.write_text(as_csv(epochs)))
    write_whole(folder / "results.csv", lambda path: path.write_text(as_csv(ends)))
    drawn = curves(study, logs)
    write_whole(folder / "curves.png", partial(drawn.savefig, format="png", dpi=120))


def curves(study: Study, logs: Logs) -> Figure:
    """Every column over the epochs: the mean over the seeds, and the range between the lowest and the highest."""
    figure = Figure(figsize=(4.5 * len(study.columns), 3.6), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(study.columns), squeeze=False)[0], study.columns, strict=True):
        for variant, seeds in logs.items():
            if column in seeds[0][-1]:
                by_epoch = list(zip(*[[row[column] for row in rows] for rows in seeds], strict=True))
                numbers = range(1, len(by_epoch) + 1)
                [line] = axes.plot(numbers, [fmean(values) for values in by_epoch], label=variant)
                ends = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
                axes.fill_between(numbers, *ends, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel="epoch", ylabel=column.replace("_", " "))
    figure.axes[0].legend(fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the studies; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv) or FIRST_LOOK
    own, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(
        description="The studies of the BU-TD paper.", epilog="What follows -- are flags for every run."
    )
    parser.add_argument("studies", nargs="+", choices=list(STUDIES), help="which")
    parser.add_argument("--seeds", type=number(int, 1, 1000), default=5, help="runs of each kind (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="folder (default %(default)s)")
    args = parser.parse_args(own)
    args.flags = flags
    for name in args.studies:
        if code := run(name, STUDIES[name], args):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
