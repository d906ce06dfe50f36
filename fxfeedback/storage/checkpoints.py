"""Read the tensors of a checkpoint, a file's or a URL's: only data, never code."""

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors.torch
import torch

from fxfeedback.errors import CheckpointError

HASH_DIGITS = 8
"""How many digits of its SHA-256 a URL's file name has at the end, at least: torch.hub takes any number, even none."""


def read_checkpoint(where: str, unsafe_without_hash: bool = False) -> Any:
    """What the file or URL holds, on the CPU: what `torch.save` wrote, or a .safetensors file.

    Args:
        where: a path; or a URL whose file name ends in the file's hash.
        unsafe_without_hash: take a URL without one, whatever it holds.

    Raises:
        CheckpointError: it is not there, is damaged, or is not plain data; a URL without a hash.
    """
    if "://" in where:
        _check_url(where, unsafe_without_hash)
    elif Path(where).is_dir():
        raise CheckpointError(f"{where} cannot be read: it is a directory, give the file in it")
    elif Path(where).exists() and not Path(where).is_file():
        raise CheckpointError(f"{where} cannot be read: it is not a regular file")
    try:
        if "://" in where:
            return torch.hub.load_state_dict_from_url(where, map_location="cpu", check_hash=True, weights_only=True)
        if where.endswith(".safetensors"):
            return safetensors.torch.load_file(where)
        return torch.load(where, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {where}: give a path, or a URL of fxfeedback.models.WEIGHTS") from None
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error
    except pickle.UnpicklingError as error:  # its message advises to load without weights_only: not passed on
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"refers to {code[1]}: save a model's state_dict() only" if code else "holds other things or is damaged"
        )
        raise CheckpointError(
            f"{_file(where)} was not loaded: it is not a plain file of tensors, it {reason}"
        ) from None
    except Exception as error:  # a damaged file can raise nearly anything
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise CheckpointError(f"{_file(where)} is damaged or no checkpoint: {reason}; get it again") from error


def _check_url(url: str, unsafe_without_hash: bool) -> None:
    """Refuse a URL whose content could not be checked, and a cached file of its name that is another."""
    parts = urlparse(url)
    if parts.scheme not in ("http", "https"):
        raise CheckpointError(f"{url} is not read: give a path, or a URL that begins with https://")
    found = torch.hub.HASH_REGEX.search(Path(parts.path).name)
    expected = found[1] if found else ""
    if len(expected) < HASH_DIGITS:
        if unsafe_without_hash:
            return
        raise CheckpointError(
            f"{url} is not read: its file's name does not end in the file's hash, as in weights-40b29a3427.pth, so "
            "there is no telling whether it is the file that was meant. Download it yourself and give its path, or "
            "pass unsafe_without_hash=True"
        )
    cached = _cached(url)
    if cached.is_file():
        with cached.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(expected):
            raise CheckpointError(f"{_file(url)} is damaged, or another file: its hash is {digest[: len(expected)]}")


def _cached(url: str) -> Path:
    """Where torch.hub keeps what a URL holds."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)


def named_tensors(content: Any, where: str) -> Mapping[str, Any]:
    """Name -> tensor, from a checkpoint's content: at top level, or under "model" or "state_dict".

    Raises:
        CheckpointError: the content maps no names to anything.
    """
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{where} holds no state dict: it must map names to tensors")
    return content


def _file(where: str) -> str:
    """The path or URL; of a URL also the file in torch.hub's cache, which has to go before it is read anew."""
    cached = "://" in where and _cached(where)
    return f"{where} (remove {cached} to download it again)" if cached and cached.exists() else where
