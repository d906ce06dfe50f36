"""Checkpoints: weights, the optimizer's state and how far the run is, in one file that is never half there."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from jobs import UserError, write_whole

FILE = "checkpoint.safetensors"
BEFORE = "checkpoint-before.safetensors"
"""That of an earlier run in the same folder."""


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, about: dict[str, Any]) -> None:
    """Replace the checkpoint at `path`. Raises `UserError`, with the old one in place, when it cannot be written."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {
            f"optimizer.{key}.{names[id(parameter)]}": value for key, value in state.items() if value is not None
        }
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = safetensors.torch.save(copies, {key: json.dumps(value) for key, value in about.items()})
    try:
        write_whole(path, lambda part: part.write_bytes(content))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was saved before is still there") from error


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save` was told about the run, and the tensors. Raises `UserError` when this is no such file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is no checkpoint of this program: {error}") from error


def restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill the model and the optimizer with what `load` returned. Raises `UserError` when it does not fit."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    own = dict(model.named_parameters())
    weights, state = dict[str, Tensor](), optimizer.state_dict()
    try:
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "model":
                weights[name] = tensor
            else:
                what, _, name = name.partition(".")
                state["state"].setdefault(places[id(own[name])], {})[what] = tensor
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"the checkpoint does not fit this model: {error}") from error
