"""Checkpoints: weights, the optimizer's state and how far the run is, in one file that is never half there."""

import json
import math
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

ADAM = {"step", "exp_avg", "exp_avg_sq"}
KEPT = {"Adam": ADAM, "AdamW": ADAM, "SGD": {"momentum_buffer"}}
"""Class of optimizer -> what it keeps for a parameter, which is the parameter's size, but for the number of steps."""


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
    if not path.is_file():
        raise UserError(f"{path} is no checkpoint of this program: it is no file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path} is no checkpoint of this program: {error}") from error


def check(path: Path, about: dict[str, Any], steps: int) -> None:
    """Refuse what no run writes whose epochs have this many steps. Raises `UserError` that says what it is."""

    def wrong(field: str, wanted: str) -> UserError:
        return UserError(f"{path} is no checkpoint of this program, or damaged: {field} is not {wanted}")

    for field, kind in (("settings", dict), ("position", dict), ("log", list)):
        if field not in about:
            raise UserError(f"{path} is no checkpoint of this program: it has no {field!r}")
        if not isinstance(about[field], kind):
            raise wrong(field, f"a {kind.__name__}")
    epoch, step, loss = (about["position"].get(name) for name in ("epoch", "step", "loss"))
    if type(epoch) is not int or epoch < 0:
        raise wrong("the position's epoch", "a whole number from 0 on")
    if type(step) is not int or not 0 <= step < steps:
        raise wrong("the position's step", f"a whole number from 0 to {steps - 1}")
    if not _is_number(loss) or math.isnan(loss):
        raise wrong("the position's loss", "a number")
    for number, row in enumerate(about["log"], 1):
        same = isinstance(row, dict) and row.keys() == about["log"][0].keys() and row.get("epoch") == number
        if not same or not {"loss", "seconds"} <= row.keys():
            raise wrong(f"row {number} of the log", "that of an epoch")
        if not all(map(_is_number, row.values())) or math.isnan(row["loss"]):
            raise wrong(f"row {number} of the log", "one of numbers")
    if len(about["log"]) != epoch:
        raise wrong("the log", f"one of {epoch} epochs")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not abs(value) > 1e300


def restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, begun: bool = True) -> None:
    """Fill the model and the optimizer with what `load` returned. Raises `UserError` when it does not fit."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    own = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in places}
    there, kept = model.state_dict(), KEPT[type(optimizer).__name__]
    weights, state = dict[str, Tensor](), optimizer.state_dict()
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        what, _, of = name.partition(".")
        if kind == "model" and name in there:
            _check_fits(key, tensor, there[name].shape, there[name].dtype)
            weights[name] = tensor
        elif kind == "optimizer" and what in kept and of in own:
            _check_fits(key, tensor, torch.Size([]) if what == "step" else own[of].shape, own[of].dtype)
            state["state"].setdefault(places[id(own[of])], {})[what] = tensor
        else:
            raise UserError(f"the checkpoint does not fit this model: it has {key!r}, which nothing here has")
    missing = [f"model.{name}" for name in there if name not in weights]
    missing += ["the optimizer's state"] * any(kept - each.keys() for each in state["state"].values())
    missing += ["the optimizer's state"] * (begun and kept is ADAM and not state["state"])
    if missing:
        raise UserError(f"the checkpoint does not fit this model: it has no {missing[0]}")
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)


def _check_fits(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise UserError(
            f"the checkpoint does not fit this model: {name!r} is {tuple(tensor.shape)}, {tensor.dtype}, not "
            f"{tuple(shape)}, {dtype}"
        )
