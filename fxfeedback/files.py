"""Files that are replaced atomically: a crash leaves the old one or the new one."""

import contextlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from fxfeedback.errors import OptionError

LARGEST = 2**31 - 2**24
"""Bytes of weights beyond which they lie beside an ONNX graph: a graph with its weights holds less than 2 GB."""
BESIDE, FORMERLY = ".saving-", ".exporting-"
"""How the names of folders begin in which files are made; in earlier versions also."""
LOCK = "owner"
"""The file in such a folder that is locked while a process writes there, with the name of the machine."""
ABANDONED = 24 * 3600
"""Seconds after which a folder counts as abandoned where no lock tells: of an earlier version or another machine."""


def as_path(given: str | os.PathLike[str], name: str = "path") -> Path:
    """A path that a user gave as the argument of this name.

    Raises:
        OptionError: it is not a path.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise OptionError(f"{name}={given!r}: give a string or a pathlib.Path")
    return Path(given)


def replace_whole(path: Path, write: Callable[[str], None]) -> None:
    """Let `write` make a file beside `path`, then put it in its place in one step.

    Raises:
        OSError: the file cannot be written; what was there before still is.
    """
    with beside(path) as new:
        try:
            write(str(new))
        except Exception as error:
            if type(error).__name__ == "SafetensorError":  # a full disk is not an OSError to safetensors
                raise OSError(f"{path} cannot be written: {error}") from error
            raise
        sync(new).replace(path)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """The same name in a new folder beside it; folders that killed processes left there are removed."""
    for pattern in (f"{BESIDE}*", f"{FORMERLY}*"):
        for left in path.parent.glob(pattern):
            if left.is_dir() and not left.is_symlink() and _is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
    made = tempfile.TemporaryDirectory(dir=path.parent, prefix=BESIDE)
    with made as folder, Path(folder, LOCK).open("x") as lock:
        _locked(lock)
        lock.write(platform.node())
        lock.flush()
        yield Path(folder, path.name)


def _is_abandoned(folder: Path) -> bool:
    """Whether no process writes in a folder: who does holds the lock, also where several machines share a disk."""
    with contextlib.suppress(OSError), Path(folder, LOCK).open("r+") as lock:
        locked = _locked(lock) if lock.read() == platform.node() else None
        if locked is not None:
            return locked
    with contextlib.suppress(OSError):
        return time.time() - folder.stat().st_mtime > ABANDONED
    return False


def _locked(file: IO[Any]) -> bool | None:
    """Lock a file until it is closed: whether no other process has; None where the system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sync(path: Path) -> Path:
    """Wait until the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path
