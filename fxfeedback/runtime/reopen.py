"""How what was opened from a file is pickled and copied: its pickle names the file, which is opened again."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxfeedback.errors import CheckpointError, OptionError


@dataclass
class Opened:
    """A file that was opened, and how.

    path: absolute, for a process in another directory. providers, options, more: what it was opened with.
    """

    path: str
    providers: Any
    options: Any
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = str(Path(self.path).absolute())
        self._stamp = self._stamped()

    def reduced(self, kind: type, state: Any = None) -> tuple[Any, ...]:
        """What `__reduce__` of a `kind` returns; its `__setstate__` is given the state.

        Raises:
            OptionError: it was opened with options=.
            CheckpointError: the file is gone or has changed since.
        """
        if self.options is not None:
            raise OptionError(
                f"a {kind.__name__} with options= cannot be pickled or copied, as ONNX Runtime's SessionOptions "
                "cannot: open the file where it is needed"
            )
        if self._stamped() != self._stamp:
            raise CheckpointError(
                f"{self.path!r} is gone or has changed since it was opened, and a pickle or a copy of this "
                f"{kind.__name__} would open it again: open the file that is there now, or put the old one back"
            )
        return reopen, (kind, self.path, _digest(self.path), self.providers, dict(self.more)), state

    def _stamped(self) -> tuple[int, ...]:
        try:
            about = Path(self.path).stat()
        except OSError:
            return ()
        return about.st_ino, about.st_size, about.st_mtime_ns


def reopen(kind: Callable[..., Any], path: str, digest: str, providers: Any, more: Mapping[str, Any]) -> Any:
    """What was pickled, opened from its file.

    Raises:
        CheckpointError: the file is gone, or is another one.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path!r}, which this was opened from before it was pickled")
    if _digest(path) != digest:
        raise CheckpointError(f"{path!r} is not the file any more that this was opened from before it was pickled")
    return kind(path, providers, **more)


def _digest(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
