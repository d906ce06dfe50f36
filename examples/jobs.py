"""What the example scripts share: reading the command line, writing files atomically, and their exit codes."""

import argparse
import csv
import io
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class UserError(Exception):
    """An error that the user can correct; the message says how."""


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table with their keys above, numbers with six digits."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return lines.getvalue()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write the file `path` atomically: `write` fills a temporary file, which is then renamed."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def usable_device(name: str) -> "torch.device":
    """The device called `name`. Raises `UserError` when this machine, or this torch, has none."""
    import torch  # here, because some jobs run without it

    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (AssertionError, AttributeError, ImportError, RuntimeError) as error:
        raise UserError(f"cannot use the device {name!r}: {str(error).split('. ')[0]}") from error


def make_folder(path: Path) -> None:
    """Create the folder `path` unless it exists. Raises `UserError` when files cannot be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write results to {path}: {error.strerror}") from error


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """A reader of command-line numbers of this `kind` from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} does not lie between {low:g} and {high:g}")
        return value

    return read


def exit_code(job: Callable[[], int], *errors: type[Exception]) -> int:
    """What `job` returns; 1 after one of `errors` or `UserError`, with its message printed; 130 after Ctrl-C."""
    try:
        return job()
    except (UserError, OSError, *errors) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
