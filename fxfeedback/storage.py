"""`save` and `load`: a converted model in one file, with its connections, options and weights.

The directory holds `model.safetensors`: all tensors by name, and in the file's metadata, as JSON, how the model was
made. `architecture.py` describes the plain model in it, so that `load` needs nothing else; no code is stored and none
is run. The file is replaced as a whole: a crash leaves the old one or the new one.
"""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from fxfeedback.architecture import NotDescribed, build, decode, describe, encode
from fxfeedback.butd import BUTD
from fxfeedback.errors import CheckpointError, OptionError
from fxfeedback.feedback import Connection, FeedbackModel
from fxfeedback.files import replace_whole
from fxfeedback.options import Options
from fxfeedback.share import put, share
from fxfeedback.version import __version__
from fxfeedback.wrapper import Wrapper

FILE = "model.safetensors"
FORMAT = 1


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Save a model that `add_feedback` or `to_butd` returned, for `load`.

    Args:
        model: on any device; with connections or options, weights, buffers, modes and what is frozen.
        directory: made where it does not exist; a model saved there before is replaced, whole or not at all.

    Raises:
        OptionError: neither `add_feedback` nor `to_butd` made the model, or an option cannot be stored.
    """
    plain, wrappers = _unwrap(model)
    if not wrappers:
        raise OptionError(f"a {type(model).__name__} has neither connections nor instructions: save its state_dict()")
    tensors, names = _tensors(model)
    try:
        net, reason = describe(plain, names), ""
    except NotDescribed as error:
        net, reason = None, str(error)
        warnings.warn(
            f"{reason}: the weights are saved, the architecture is not; fxfeedback.load will need the plain model, too",
            stacklevel=2,
        )
    about = {
        "format": FORMAT,
        "fxfeedback": __version__,
        "wrappers": [[path, kind, encode(what, names)] for path, kind, what in wrappers],
        "net": net,
        "reason": reason,
        "names": {name: names[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()},
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "training": [name for name, module in model.named_modules() if module.training],
    }
    Path(directory).mkdir(parents=True, exist_ok=True)
    replace_whole(Path(directory, FILE), lambda path: save_file(tensors, path, {"fxfeedback": json.dumps(about)}))


def load(directory: str | os.PathLike[str], model: nn.Module | None = None) -> Any:
    """The model that `save` wrote, on the CPU.

    Args:
        directory: as given to `save`.
        model: the plain model, where its architecture was not saved (its class is not importable, or the saving process
            said so); the saved weights are copied into it. Classes from outside torch, torchvision and timm are found
            only in modules that are imported already.

    Raises:
        CheckpointError: there is no such file; it is damaged, not ours or of a later version; it does not fit `model`,
            which then is as it was.
    """
    path = Path(directory, FILE)
    about, tensors = _read(path)
    if model is None:
        if about["net"] is None:
            raise CheckpointError(f"{path}: {about['reason']}: pass the plain model, load(directory, model)")
        plain = build(about["net"], tensors, path)
    else:
        plain = share(model)
    with torch.random.fork_rng(devices=[]):  # what the wrappers draw at random is overwritten
        made = _wrap(plain, [(at, kind, decode(what, tensors, path)) for at, kind, what in about["wrappers"]])
    state = {name: tensors[kept] for name, kept in about["names"].items()}
    own = made.state_dict()
    misfits = [name for name in {**own, **state} if _shape(own, name) != _shape(state, name)]
    if misfits:
        shown = ", ".join(f"{name}: {_shape(state, name)} saved, {_shape(own, name)} here" for name in misfits[:5])
        raise CheckpointError(f"{path} does not fit the model, which stays as it was; {shown}")
    made.load_state_dict(state)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name not in about["frozen"])
    for name, module in made.named_modules():
        module.training = name in about["training"]
    return made


# -- wrappers ---------------------------------------------------------------------------------------------------------


def _unwrap(model: nn.Module) -> tuple[nn.Module, list[tuple[str, str, dict[str, Any]]]]:
    """The plain model, and the wrappers in it, outermost first: where, which kind, made how."""
    wrappers: list[tuple[str, str, dict[str, Any]]] = []
    while True:
        found = next(((path, module) for path, module in model.named_modules() if isinstance(module, Wrapper)), None)
        if found is None:
            return model, wrappers
        path, wrapper = found
        how: dict[str, Any] = {"examples": [(tuple(x.shape), x.dtype) for x in wrapper._examples]}
        if wrapper._example_names:
            how["names"] = wrapper._example_names
        elif not wrapper._form.is_positional:
            raise OptionError(
                "example_inputs= with other values than tensors cannot be saved: make the model with a tuple or a dict "
                "of tensors"
            )
        if isinstance(wrapper, FeedbackModel):
            connections = [asdict(connection) for connection in wrapper.connections]
            how |= {"connections": connections, "passes": wrapper.passes, "return_all": wrapper.return_all}
            how |= {"checkpoint": wrapper.checkpoint}
        elif isinstance(wrapper, BUTD):
            how |= {field.name: getattr(wrapper.options, field.name) for field in fields(Options)}
        wrappers.append((path, type(wrapper).__name__, how))
        model = put(model, path, wrapper._net)


def _wrap(model: nn.Module, wrappers: list[tuple[str, str, dict[str, Any]]]) -> Any:
    for path, kind, how in reversed(wrappers):
        part = model.get_submodule(path) if path else model
        examples = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in how.pop("examples")]
        names = how.pop("names", None)
        given: Any = dict(zip(names, examples, strict=True)) if names else examples
        if kind == "FeedbackModel":
            connections = [Connection(**connection) for connection in how["connections"]]
            checkpoint = how.get("checkpoint", False)  # which older files do not have
            made: Wrapper = FeedbackModel(part, connections, how["passes"], given, how["return_all"], checkpoint)
        else:
            made = BUTD(part, Options(**how), given)
        model = put(model, path, made)
    return model


# -- the file ---------------------------------------------------------------------------------------------------------


def _tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
    """All parameters and buffers by name, a tied one once; and their names by identity."""
    names: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    memory: set[int] = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        names[id(tensor)] = name
        data = tensor.detach().cpu().contiguous()
        where = data.untyped_storage().data_ptr()
        tensors[name] = data.clone() if where in memory else data  # the format knows no views
        memory.add(where)
    return tensors, names


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("fxfeedback", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path}: give the directory that fxfeedback.save wrote") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cannot be read: {error}") from error
    if not isinstance(about, dict) or "format" not in about:
        raise CheckpointError(f"{path} was not written by fxfeedback.save")
    if about["format"] != FORMAT:
        raise CheckpointError(f"{path} was written by fxfeedback {about.get('fxfeedback')}: a later version is needed")
    return about, tensors


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
