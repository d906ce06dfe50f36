"""Files that are replaced whole: a crash leaves the old one or the new one."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from fxfeedback.errors import OptionError

LARGEST = 2**31 - 2**24
"""Bytes of weights beyond which they lie beside an ONNX graph: a graph with its weights holds less than 2 GB."""


def as_path(given: str | os.PathLike[str]) -> Path:
    """A path that a user gave.

    Raises:
        OptionError: it is not a path.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise OptionError(f"path={given!r}: give a string or a pathlib.Path")
    return Path(given)


def replace_whole(path: Path, write: Callable[[str], None]) -> None:
    """Let `write` make a file beside `path`, then put it in its place in one step."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as beside:
        new = Path(beside, path.name)
        write(str(new))
        sync(new).replace(path)


def sync(path: Path) -> Path:
    """Wait until the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path
