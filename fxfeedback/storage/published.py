"""Checkpoints of the published LRM models: their tensors' names, older and newer."""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from fxfeedback.errors import CheckpointError, OptionError
from fxfeedback.feedback import FeedbackModel
from fxfeedback.storage.checkpoints import named_tensors, read_checkpoint

SHOWN = 10  # names of one kind that an error lists


def load_lrm_steering(
    model: FeedbackModel,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    unsafe_without_hash: bool = False,
) -> None:
    """Load a checkpoint of the published LRM models into `model`: all of it or, with an error, nothing.

    The tensors may be at top level or under "model" or "state_dict", with `module.` or `_orig_mod.` before their names,
    and named as in the older releases (`backbone.` for `feedforward.`, `features8` for `features_8`); so may those of
    our own `state_dict()`. Only tensors are read from a file, never code.

    Args:
        model: made by `add_feedback`, with the checkpoint's connections and the input size it was made for.
        path_or_state_dict: a file, a URL (kept in torch.hub's cache; what is downloaded is checked against the hash in
            the file's name), or what `torch.load` gave.
        unsafe_without_hash: take a URL whose file's name has no hash, whatever it holds.

    Raises:
        CheckpointError: a file that is not there, is damaged or holds more than data; a URL that cannot be read or
            whose hash is wrong or missing; tensors that are missing, extra or misshapen.
        OptionError: a model that `add_feedback` did not make; neither a path nor a state dict.
    """
    if not isinstance(model, FeedbackModel):
        raise OptionError(f"a {type(model).__name__} has no LRM connections: pass the model that add_feedback returned")
    if isinstance(path_or_state_dict, Mapping):
        where, content = "the state dict", path_or_state_dict
    elif isinstance(path_or_state_dict, (str, os.PathLike)):
        where = os.fspath(path_or_state_dict)
        content = read_checkpoint(where, unsafe_without_hash)
    else:
        raise OptionError(f"give a path, a URL or a state dict, not a {type(path_or_state_dict).__name__}")
    model.load_state_dict(_match(model, named_tensors(content, where), where))


def _match(model: FeedbackModel, tensors: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    """The tensors under our names; CheckpointError unless they are exactly the model's."""
    own = model.state_dict()
    published = _published_names(model)
    ours = {name: name for name in own}
    ours |= {_squeezed(name): our_name for our_name, name in published.items()}
    ours |= {name: our_name for our_name, name in published.items()}
    matched, extra, misfits = {}, [], []
    for name, value in tensors.items():
        present = re.sub(r"^backbone\.", "feedforward.", re.sub(r"^((module|_orig_mod)\.)+", "", name))
        our_name = ours.get(present) or ours.get(_squeezed(present))
        if our_name is None or our_name in matched:
            extra.append(name)
        else:
            matched[our_name] = value
            if misfit := _misfit(value, own[our_name]):
                misfits.append(f"{name} {misfit}")
    missing = [name for our_name, name in published.items() if our_name not in matched]
    kinds = {"missing": missing, "extra": extra, "misshapen": misfits}
    wrong = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if wrong:
        raise CheckpointError(f"{where} does not fit the model, which stays as it was; {'; '.join(wrong)}")
    return matched


def _published_names(model: FeedbackModel) -> dict[str, str]:
    """Our name of every tensor -> its name in a published checkpoint."""
    blocks = {}
    for connection, block in zip(model.connections, model.modulations, strict=True):
        source, destination = (name.replace(".", "_") for name in (connection.source, connection.destination))
        blocks[block] = f"lrm.{destination}_modulation.from_{source}_to_{destination}"
    names = {}
    for name in model.state_dict():
        if name.startswith("modulations."):
            _, block, leaf = name.split(".", 2)
            names[name] = f"{blocks[block]}.{re.sub(r'^norm[.]', 'rescale.norm.', leaf)}"
        else:
            names[name] = f"feedforward.{name}"
    return names


def _squeezed(name: str) -> str:
    """A published name without the underscores of its modulation, which older releases leave out in part."""
    return re.sub(r"^lrm\.\w+\.\w+", lambda block: block[0].replace("_", ""), name)


def _misfit(value: Any, own: torch.Tensor) -> str | None:
    """What keeps `value` from being copied into `own`."""
    if not isinstance(value, torch.Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if value.shape != own.shape:
        return f"has shape {tuple(value.shape)}, the model's {tuple(own.shape)}"
    if value.is_floating_point() != own.is_floating_point() or value.layout != own.layout or value.is_meta:
        return f"is {value.dtype}, {value.layout}, on {value.device}; the model's is {own.dtype}, {own.layout}"
    return None


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
