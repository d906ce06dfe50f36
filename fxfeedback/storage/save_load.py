"""`save` and `load`: a converted model in one file, with its connections, options and weights.

The directory holds `model.safetensors`: all tensors by name, and in the file's metadata, as JSON, how the model was
made. `describing.py` describes the plain model in it, so that `load` needs nothing else; no code is stored and none
is run. Every field is checked before it is used, as a file may come from anybody (saved.py). The file is replaced as a
whole: a crash leaves the old one or the new one.
"""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fxfeedback.butd import BUTD
from fxfeedback.errors import CheckpointError, Error, OptionError
from fxfeedback.feedback import FeedbackModel
from fxfeedback.files import as_path, replace_whole
from fxfeedback.instructed.options import Options
from fxfeedback.predictive.predictive_model import PredictiveModel, given_predictions
from fxfeedback.storage.building import build
from fxfeedback.storage.describing import NotDescribed, check_levels, describe, encode
from fxfeedback.storage.saved import Saved, check_passes, read_saved, read_wrapper
from fxfeedback.storage.tensor_file import read_tensor_file
from fxfeedback.tracing.saved import SAVED
from fxfeedback.tracing.share import put, share
from fxfeedback.tracing.wrapper import Wrapper, example_of, net_of, wanted_door_of
from fxfeedback.version import __version__

FILE = "model.safetensors"
FORMAT = 1
WRAPPERS: dict[str, type[Wrapper]] = {kind.__name__: kind for kind in (FeedbackModel, PredictiveModel, BUTD)}
"""What makes a wrapper of each kind."""


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Save a model that `add_feedback`, `add_prediction` or `to_butd` returned, for `load`.

    Args:
        model: on any device; with connections, predictions or options, weights, buffers, modes and what is frozen.
        directory: made where it does not exist; a model saved there before is replaced atomically.

    Raises:
        OptionError: none of the three made the model, an option or a predictor cannot be stored, or `directory` is not
            a path.
    """
    path = as_path(directory, "directory") / FILE
    if not isinstance(model, nn.Module):
        raise OptionError(f"model={model!r}: give what add_feedback, add_prediction or to_butd returned")
    plain, wrappers = unwrap(model)
    if not wrappers:
        raise OptionError(
            f"a {type(model).__name__} has no connections, predictions or instructions: save its state_dict()"
        )
    tensors, names = _tensors(model)
    try:
        net, reason = describe(plain, names), ""
        check_levels(net, type(plain).__name__)
        build(net, tensors, "the model")  # what is saved can be loaded
    except (NotDescribed, CheckpointError) as error:
        net, reason = None, str(error)
        warnings.warn(
            f"{reason}: the weights are saved, the architecture is not; fxfeedback.load will also need the plain model",
            stacklevel=2,
        )
    about = {
        "format": FORMAT,
        "fxfeedback": __version__,
        "wrappers": [_described(*wrapper, names, tensors) for wrapper in wrappers],
        "net": net,
        "reason": reason,
        "names": {name: names[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()},
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "training": [name for name, module in model.named_modules() if module.training],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_whole(path, lambda new: save_file(tensors, new, {"fxfeedback": json.dumps(about)}))


def load(directory: str | os.PathLike[str], model: nn.Module | None = None) -> Any:
    """The model that `save` wrote, on the CPU.

    Args:
        directory: as given to `save`.
        model: the plain model, where its architecture was not saved (its class is not importable, or the saving process
            said so); the saved weights are copied into it. Classes from outside torch, torchvision and timm are found
            only in modules that are imported already.

    Raises:
        OptionError: `directory` is not a path, or `model` not a module.
        CheckpointError: there is no such file; it is damaged, not ours or of a later version, and the message says
            which field; it does not fit `model`, which then is as it was.
    """
    path = as_path(directory, "directory") / FILE
    if not isinstance(model, (nn.Module, type(None))):
        raise OptionError(f"model={model!r}: give the plain model, a torch.nn.Module, or None")
    about, tensors = _read(path)
    try:
        return _made(about, tensors, model, path)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a model's own code makes of values that no model has
        message = str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path} is damaged, or does not fit: the model cannot be made of it: {message}"
        ) from error


def _made(about: Saved, tensors: dict[str, torch.Tensor], model: nn.Module | None, path: Path) -> Any:
    """The model that a file, whose fields are checked, describes."""
    if model is not None:
        plain = share(model)
    elif about.net is None:
        raise CheckpointError(f"{path}: {about.reason}: pass the plain model, load(directory, model)")
    else:
        plain = build(about.net, tensors, path)
    state = {name: tensors[kept] for name, kept in about.names.items()}
    own = plain.state_dict()
    _check_fit(own, {name: tensor for name, tensor in state.items() if name in own}, path)
    with torch.random.fork_rng(devices=[]):  # what the wrappers draw at random is overwritten
        made = _wrap(plain, about, tensors, path)
    _check_fit(made.state_dict(), state, path)
    for field, known in (("frozen", made.named_parameters()), ("training", made.named_modules())):
        unknown = sorted(getattr(about, field) - {name for name, _ in known})
        if unknown:
            raise CheckpointError(f"{path}: the field {field!r} names {unknown[0]!r}, which the model does not have")
    made.load_state_dict(state)
    for name, parameter in made.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(name not in about.frozen)
    for name, module in made.named_modules():
        module.training = name in about.training
    return made


# -- wrappers ---------------------------------------------------------------------------------------------------------


def unwrap(model: nn.Module) -> tuple[nn.Module, list[tuple[str, str, dict[str, Any]]]]:
    """The plain model, and the wrappers in it, outermost first: where, which kind, made how."""
    wrappers: list[tuple[str, str, dict[str, Any]]] = []
    while True:
        found = next(((path, module) for path, module in model.named_modules() if isinstance(module, Wrapper)), None)
        if found is None:
            return model, wrappers
        path, wrapper = found
        example = example_of(wrapper)
        how: dict[str, Any] = {"examples": [(tuple(x.shape), x.dtype) for x in example.inputs]}
        if example.names:
            how["names"] = example.names
        elif not example.form.is_positional:
            raise OptionError(
                "example_inputs= with other values than tensors cannot be saved: make the model with a tuple or a dict "
                "of tensors"
            )
        if wanted_door_of(wrapper) is not None:
            how["door"] = wanted_door_of(wrapper)
        if isinstance(wrapper, FeedbackModel):
            connections = [asdict(connection) for connection in wrapper.connections]
            how |= {"connections": connections, "passes": wrapper.passes, "return_all": wrapper.return_all}
            how |= {"checkpoint": wrapper.checkpoint}
        elif isinstance(wrapper, PredictiveModel):
            how |= {"predictions": [vars(one) for one in given_predictions(wrapper)], "steps": wrapper.steps}
            how |= {"learn_multipliers": wrapper.learn_multipliers, "detach_error": wrapper.detach_error}
        elif isinstance(wrapper, BUTD):
            how |= {field.name: getattr(wrapper.options, field.name) for field in fields(Options)}
        kind = next(
            name for name, kind in WRAPPERS.items() if isinstance(wrapper, kind)
        )  # of published classes as well
        wrappers.append((path, kind, how))
        model = put(model, path, net_of(wrapper))


def _described(
    path: str, kind: str, how: dict[str, Any], names: Mapping[int, str], tensors: Mapping[str, torch.Tensor]
) -> list[Any]:
    """A wrapper as `load` takes it."""
    try:
        described = encode(how, names)
        check_levels(described, kind)
        read_wrapper(kind, described, tensors, "the model", path)
    except (NotDescribed, CheckpointError) as error:
        raise OptionError(f"an option of the {kind} cannot be saved: {error}") from None
    return [path, kind, described]


def _wrap(model: nn.Module, about: Saved, tensors: Mapping[str, torch.Tensor], where: Path) -> Any:
    shapes = {name: tensors[kept].shape for name, kept in about.names.items()}
    hows = [
        read_wrapper(kind, what, tensors, where, f"wrappers[{i}]") for i, (_, kind, what) in enumerate(about.wrappers)
    ]
    check_passes(hows, where)
    for number, ((path, kind, _), how) in reversed(list(enumerate(zip(about.wrappers, hows, strict=True)))):
        at, inside = f"wrappers[{number}]", f"{path}." if path else ""
        try:
            part = model.get_submodule(path)
        except AttributeError:
            raise CheckpointError(f"{where}: {at} is at {path!r}, where the model has no module") from None
        below = {name.removeprefix(inside): shape for name, shape in shapes.items() if name.startswith(inside)}
        token = SAVED.set(below)
        try:
            made: Wrapper = WRAPPERS[kind](part, **how)
        except Error as error:
            raise CheckpointError(f"{where}: {at}: {error}") from error
        finally:
            SAVED.reset(token)
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


def _read(path: Path) -> tuple[Saved, dict[str, torch.Tensor]]:
    about, tensors = read_tensor_file(path, "fxfeedback", FORMAT, "fxfeedback.save", "the directory")
    check_levels(about, path)
    return read_saved(about, tensors, path), tensors


def _check_fit(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], path: Path) -> None:
    def shape(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
        return tuple(tensors[name].shape) if name in tensors else None

    misfits = [name for name in {**own, **state} if shape(own, name) != shape(state, name)]
    if misfits:
        shown = ", ".join(f"{name}: {shape(state, name)} saved, {shape(own, name)} here" for name in misfits[:5])
        raise CheckpointError(f"{path} does not fit the model, which stays as it was; {shown}")
