"""Read the tensors of a checkpoint, a file's or a URL's: only data, never code."""

import copy
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors.torch
import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from fxfeedback.errors import CheckpointError


def read_checkpoint(where: str) -> Any:
    """What the file or URL holds, on the CPU: what `torch.save` wrote, or a .safetensors file.

    Raises:
        CheckpointError: it is not there, is damaged, or is not plain data.
    """
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
        raise CheckpointError(f"{_file(where)} was not loaded: it is no plain file of tensors, it {reason}") from None
    except Exception as error:  # a damaged file can raise nearly anything
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise CheckpointError(f"{_file(where)} is damaged or no checkpoint: {reason}; get it again") from error


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


def without_prefixes(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """The tensors without the prefixes that a compiled or a wrapped model has before all of its names."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # compiled and then wrapped, or the other way round
        own = prefix.removesuffix(".") in model._modules
        if state and not own and all(name.startswith(prefix) for name in state):
            state = copy.copy(state)
            consume_prefix_in_state_dict_if_present(state, prefix)  # type: ignore[arg-type]
    return state


def _file(where: str) -> str:
    """The path or URL; of a URL also the file in torch.hub's cache, which has to go before it is read anew."""
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(where).path).name)
    return f"{where} (remove {cached} to download it again)" if "://" in where and cached.exists() else where
