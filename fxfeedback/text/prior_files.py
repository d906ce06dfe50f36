"""A prior on disk, a safetensors file; what it says is checked before it is used."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fxfeedback.errors import CheckpointError, OptionError
from fxfeedback.files import as_path, replace_whole
from fxfeedback.storage.tensor_file import read_tensor_file
from fxfeedback.text.denoiser import Denoiser
from fxfeedback.text.ridge import Ridge
from fxfeedback.version import __version__

FORMAT = 1
ABOUT = "fxfeedback_prior"  # in the file's metadata
MOST = 2**31
"""Of values in an activation or an embedding."""


def write_prior(given: str | os.PathLike[str], about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a .safetensors file, atomically.

    Raises:
        OptionError: another ending.
    """
    path = as_path(given)
    if path.suffix != ".safetensors":
        raise OptionError(f"{path}: a prior is written to a .safetensors file")
    told = {"format": FORMAT, "fxfeedback": __version__, **about}
    state = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace_whole(path, lambda new: save_file(state, new, {ABOUT: json.dumps(told)}))


def read_prior(given: str | os.PathLike[str]) -> tuple[str, str, tuple[int, ...], int, nn.Module]:
    """(kind, source, shape, size, network) of a file.

    Raises:
        CheckpointError: see `TextPrior.load`.
    """
    path = as_path(given)
    about, tensors = read_tensor_file(path, ABOUT, FORMAT, "TextPrior.save", "a file")
    return *_described(about, path), _network(about, tensors, path)


def _described(about: Mapping[str, Any], path: Path) -> tuple[str, str, tuple[int, ...], int]:
    kind, source, shape, size = (about.get(name) for name in ("kind", "source", "shape", "size"))
    if kind not in ("ridge", "diffusion") or not isinstance(source, str):
        raise CheckpointError(f"{path} is damaged: its kind and source are not what save writes")
    if not (isinstance(shape, list) and all(map(_is_size, [*shape, size])) and math.prod(shape) <= MOST):
        raise CheckpointError(f"{path} is damaged: its sizes are not what save writes")
    return str(kind), source, tuple(shape), int(size or 0)


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST


def _network(about: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The network whose tensors these are, of the sizes that the file says."""
    size, outputs = about["size"], math.prod(about["shape"])
    width = len(tensors.get("enter.bias", ()))
    with torch.device("meta"):  # no memory is taken before the tensors are known to have these sizes
        network = Ridge(size, outputs) if about["kind"] == "ridge" else Denoiser(size, outputs, max(width, 1))
    own = network.state_dict()
    if own.keys() != tensors.keys():
        raise CheckpointError(f"{path} is damaged: its tensors are not those that save writes")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype or not tensor.isfinite().all():
            raise CheckpointError(f"{path} is damaged: {name!r} is not what save writes")
    network.load_state_dict(tensors, assign=True)
    return network.requires_grad_(False).eval()
