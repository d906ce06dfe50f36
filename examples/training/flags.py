"""The command line that the training scripts share: flags, and files of settings that flags override."""

import argparse
import sys
import tomllib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from jobs import number
from training.schedules import SCHEDULES

CONFIGS = Path(__file__).parents[1] / "configs"
OPTIMIZERS = ("adam", "adamw", "sgd")
MAY_CHANGE = (
    "config",
    "device",
    "out",
    "repeat",
    "resume",
    "stop_after",
    "workers",
    "data",
    "download",
    "checkpoint_steps",
)
"""What may be another when a run goes on."""


def training_flags(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the flags of every training script; the defaults are the script's own, by `set_defaults`."""
    size, rate = number(int, 1, 10_000_000), number(float, 0, 1000)
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--config", metavar="NAME", help=f"settings from a file, or one of {', '.join(published())}; flags override it")
    add("--epochs", type=size, help="passes over the training samples")
    add("--batch-size", type=size, help="samples per step, of all processes together")
    add("--accumulate", type=size, default=1, help="parts of a batch, one after the other (default %(default)s)")
    add("--optimizer", choices=OPTIMIZERS, help="(default here: %(default)s)")
    add("--lr", "--learning-rate", type=rate, help="highest learning rate")
    add("--schedule", choices=list(SCHEDULES), help="of the learning rate (default here: %(default)s)")
    add("--lr-decay", type=number(float, 0, 1), default=0.95, help="factor, for decay and step (default %(default)s)")
    add("--lr-step", type=size, default=30, help="epochs, for step and cyclic-plateau (default %(default)s)")
    add("--warm-up", type=rate, default=2.0, help="epochs in which the rate rises (default here: %(default)s)")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of sgd (default %(default)s)")
    add("--weight-decay", type=rate, default=0.0, help="(default here: %(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, default=False, help="bfloat16 where that is safe (autocast)")
    add(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="store weights and images pixel by pixel (channels last), which is faster for convolutions (default)",
    )
    add("--sync-norms", action=argparse.BooleanOptionalAction, default=False, help="batch statistics of all processes")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of weights and training (default %(default)s)")
    group = parser.add_argument_group("running")
    add = group.add_argument
    add("--repeat", type=size, default=1, help="runs with seeds of their own, for means and their confidence intervals")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default here: %(default)s)")
    add("--workers", type=number(int, 0, 1000), default=0, help="processes that read data (default here: %(default)s)")
    add("--out", type=Path, default=Path("runs", out), help="folder for the results (default %(default)s)")
    add("--resume", action="store_true", help="continue from the checkpoint in --out, if there is one")
    add(
        "--checkpoint-steps",
        type=size,
        default=1000,
        help="a checkpoint is written after so many (default %(default)s)",
    )
    add("--stop-after", type=size, help="steps, after which the run ends as if it were interrupted")


def published() -> list[str]:
    """The names of the settings that come with the scripts."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, after the settings of its --config. Exits with a message where either is wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    chosen = config.parse_known_args(argv)[0].config
    return parser.parse_args([*(as_flags(parser, chosen) if chosen else ()), *argv])


def as_flags(parser: argparse.ArgumentParser, config: str) -> Iterator[str]:
    """The settings of a file as the flags that they stand for."""
    path = CONFIGS / f"{config}.toml" if config in published() else Path(config)
    try:
        settings = tomllib.loads(path.read_text())
    except FileNotFoundError:
        parser.error(f"--config {config}: there is no such file, and the names are {', '.join(published())}")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        parser.error(f"--config {path}: {error}")
    known = {option.removeprefix("--").replace("-", "_") for option in parser._option_string_actions}
    for key, value in settings.items():
        if key not in known:
            nearest = get_close_matches(key, known, n=1)
            parser.error(
                f"--config {path}: unknown key {key!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else "")
            )
        yield from as_flag(key.replace("_", "-"), value)


def as_flag(name: str, value: Any) -> list[str]:
    """One setting as the words that argparse takes; a list is the flag several times."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [word for one in (value if isinstance(value, list) else [value]) for word in (f"--{name}", str(one))]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What makes a run the run that it is, for JSON: all but what may be another when it goes on."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in MAY_CHANGE
    }
