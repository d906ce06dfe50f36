"""A safetensors file that the library wrote: its tensors, and what it says of itself as JSON in the metadata."""

import json
from pathlib import Path
from typing import Any

import safetensors
import torch

from fxfeedback.errors import CheckpointError


def read_tensor_file(
    path: Path, key: str, newest: int, writer: str, given: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(what it says of itself, its tensors).

    Args:
        path: the file.
        key: of the metadata's entry.
        newest: the format that is read.
        writer: what writes such files; given: what the user should give, with an article.

    Raises:
        CheckpointError: there is no such file, it is damaged, or something else or a later version wrote it.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: give {given} that {writer} wrote")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(key, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is not a dict
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or cannot be read: {error}") from error
    if not isinstance(about, dict) or "format" not in about:
        raise CheckpointError(f"{path} was not written by {writer}")
    if about["format"] != newest:
        raise CheckpointError(
            f"{path} was written by fxfeedback {about.get('fxfeedback')!r}: a later version is needed"
        )
    return about, tensors
