"""The model that a command line names, and what it says of the network to make of it."""

import argparse
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import itertools
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxfeedback.commands.feedback_weights import OF_BUTD, add_feedback_weights
from fxfeedback.errors import CheckpointError, Error, OptionError

if TYPE_CHECKING:
    from torch import nn

OF_CONNECTION = ("mode", "init", "norm")
"""Flags that say how connections are made."""
SEED = 0
"""Random weights are drawn with it: the same command gives the same numbers."""


# -- arguments --------------------------------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, its weights and the size of its input."""
    model = parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model of torchvision; PACKAGE.MODULE:NAME, a module or a function that returns one (the current "
        "directory is also searched); or a directory that fxfeedback.save wrote",
    )
    model.completer = lambda **_: torchvision_names()  # type: ignore[attr-defined]
    parser.add_argument(
        "--weights",
        metavar="NAME|FILE",
        help="a name of torchvision's weights, such as DEFAULT, which are downloaded; or a file with a state_dict: "
        "torch.save's or .safetensors. Only tensors are read, no code. Default: random weights",
    )
    parser.add_argument(
        "--input-size",
        metavar="CxHxW",
        type=size,
        help="of one input without its batch (default: 224 by 224 with the first convolution's channels)",
    )


def add_connections(parser: argparse.ArgumentParser) -> None:
    """What `add_feedback` takes."""
    parser.add_argument(
        "--connect",
        metavar="SOURCE:DESTINATION",
        type=connection,
        nargs="+",
        action="extend",
        help="connections between nodes; `fxfeedback nodes MODEL` lists their names",
    )
    parser.add_argument(
        "--suggest", type=positive, metavar="N", help="instead of --connect: N of fxfeedback.suggest_connections"
    )
    parser.add_argument("--passes", type=positive, metavar="N", help="how many passes (default 2)")
    parser.add_argument(
        "--mode", choices=["multiply", "add"], help="what --connect does to a destination (default multiply)"
    )
    parser.add_argument(
        "--init",
        choices=["random", "identity"],
        help="whether new connections change anything at once (default random)",
    )
    parser.add_argument("--norm", choices=["layer", "channel"], help="of a connection's block (default layer)")


def add_tasks(parser: argparse.ArgumentParser, read: Callable[[str], Any] | None = None) -> None:
    """What `to_butd` takes; `read`: what else --tasks may say."""
    parser.add_argument(
        "--tasks",
        metavar="N|classes" if read is None else "N|classes|I,J",
        type=read or tasks,
        help="how many tasks an instruction chooses from; classes: it is a vector over the model's own outputs",
    )
    parser.add_argument("--embedding", type=positive, nargs="+", metavar="N", help="instruction head: hidden sizes")
    parser.add_argument("--head", metavar="NODE", help="prediction head (default: the last layer all paths cross)")
    parser.add_argument(
        "--lateral", choices=["galu", "multiply", "add"], help="how sites gate each other (default galu)"
    )
    parser.add_argument("--gating", choices=["unit", "channel"], help="what a gate opens (default unit)")
    add_feedback_weights(parser)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def size(text: str) -> tuple[int, ...]:
    """3x224x224"""
    return tuple(positive(part) for part in re.split("[x,]", text))


def connection(text: str) -> tuple[str, str]:
    """layer4:layer1"""
    source, colon, destination = text.partition(":")
    if not (source and colon and destination) or ":" in destination:
        raise argparse.ArgumentTypeError(f"{text!r} is not a connection: give SOURCE:DESTINATION, as in layer4:layer1")
    return source, destination


def tasks(text: str) -> int | str:
    """A number of tasks, or "classes"."""
    return text if text == "classes" else positive(text)


# -- models -----------------------------------------------------------------------------------------------------------


def _example_of(model: Any) -> Any:
    """The example inputs of a model of ours, without data, by name where they were given so."""
    from fxfeedback.tracing.wrapper import example_of, stand_ins_of

    inputs, names = stand_ins_of(model), example_of(model).names
    return dict(zip(names, inputs, strict=True)) if names else inputs


def read_network(arguments: argparse.Namespace, *kinds: type[Any]) -> Any:
    """The model, with the connections and the tasks that the arguments ask for, in evaluation mode.

    Args:
        arguments: parsed.
        kinds: FeedbackModel, PredictiveModel or BUTD, what it or a part of it must be; none: a plain model will do.

    Raises:
        OptionError: it is none of these kinds.
        Error: as `read_model`, `add_feedback` and `to_butd`.
    """
    import fxfeedback
    from fxfeedback.tracing.wrapper import Wrapper

    asked = {name: value for name, value in vars(arguments).items() if value is not None}
    model: Any = read_model(arguments.model, arguments.weights)
    if "connect" in asked or "suggest" in asked:
        if {"connect", "suggest"} <= asked.keys():
            raise OptionError("give --connect or --suggest, not both")
        size, form = arguments.input_size, {name: asked[name] for name in OF_CONNECTION if name in asked}
        pairs = [fxfeedback.Connection(*ends) for ends in asked.get("connect", ())]
        chosen = pairs or fxfeedback.suggest_connections(model, arguments.suggest, input_size=size)
        connections = [dataclasses.replace(one, **form) for one in chosen]
        model = fxfeedback.add_feedback(model, connections, arguments.passes or 2, input_size=size)
    elif names := [name for name in OF_CONNECTION if name in asked]:
        raise OptionError(f"--{names[0]} belongs to --connect")
    elif "passes" in asked:
        if not isinstance(model, fxfeedback.FeedbackModel):
            raise OptionError("--passes belongs to a model with connections: also give --connect")
        vars(model)["passes"] = arguments.passes
    how: dict[str, Any] = {OF_BUTD[name]: asked[name] for name in OF_BUTD if name in asked}
    if "tasks" in asked:
        saved = isinstance(model, Wrapper) and "input_size" not in asked
        how |= {"example_inputs": _example_of(model)} if saved else {"input_size": arguments.input_size}
        model = fxfeedback.to_butd(model, None if arguments.tasks == "classes" else arguments.tasks, **how)
    elif how:
        flag = next(name for name in OF_BUTD if name in asked)
        raise OptionError(f"--{flag.replace('_', '-')} belongs to --tasks")
    if kinds and not any(isinstance(part, kinds) for part in model.modules()):
        flags = {fxfeedback.FeedbackModel: "--connect SOURCE:DESTINATION", fxfeedback.BUTD: "--tasks N"}
        raise OptionError(
            f"{arguments.model} is a plain model: give {' or '.join(flags[kind] for kind in kinds if kind in flags)}"
        )
    return model.eval()


def read_model(name: str, weights: str | None = None) -> "nn.Module":
    """The model that MODEL and --weights name, in evaluation mode.

    Raises:
        OptionError: a name that torchvision does not have, or that no module has.
        CheckpointError: a directory or a file that cannot be read, or weights of another model.
        Error: the code that makes the model does not run.
    """
    import torch
    from torchvision.models import list_models

    import fxfeedback
    from fxfeedback.graph.nodes import nearest

    torch.manual_seed(SEED)
    if ":" in name:
        model = _from_code(name)
    elif name in list_models():
        if weights and not _is_path(weights):
            return _from_torchvision(name, weights).eval()
        model = _from_torchvision(name)
    elif _is_path(name):
        model = fxfeedback.load(name)
    else:
        hint = nearest(name, list_models()) or ";"
        raise OptionError(f"torchvision has no model {name!r}{hint} PACKAGE.MODULE:NAME takes one from elsewhere")
    if weights:
        _load(model, weights)
    return model.eval()


def _is_path(text: str) -> bool:
    return Path(text).exists() or "/" in text or "." in text


def _from_torchvision(name: str, weights: str | None = None) -> "nn.Module":
    from torchvision import models

    builder = models.get_model_builder(name)
    options = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    if weights is None:
        return builder(weights=None, **options)
    known = models.get_model_weights(name).__members__
    if weights not in known:
        raise OptionError(
            f"--weights: there is no file {weights!r}, and torchvision's for {name} are {', '.join(known) or 'none'}"
        )
    try:
        return builder(weights=known[weights], **options)
    except OSError as error:
        raise CheckpointError(f"--weights: {known[weights].url} cannot be downloaded: {error}") from error


def _from_code(name: str) -> "nn.Module":
    """What `package.module:name` is or returns."""
    from torch import nn

    module_name, _, path = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise OptionError(f"there is no module {error.name!r}, here or where Python finds its packages") from None
        raise Error(f"{module_name} cannot be imported: {_said(error)}") from error
    for step in path.split("."):
        if not hasattr(found, step):
            hint = ", ".join(difflib.get_close_matches(step, dir(found)))
            raise OptionError(f"{module_name} has no {path!r}" + (f"; did you mean {hint}?" if hint else ""))
        found = getattr(found, step)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise OptionError(f"{name} is a {type(found).__name__}: name a torch.nn.Module or a function that returns one")
    try:
        made = found()
    except Exception as error:
        raise Error(f"{name}() does not run: {_said(error)}") from error
    if not isinstance(made, nn.Module):
        raise OptionError(f"{name}() returns a {type(made).__name__}, no torch.nn.Module")
    return made


def _said(error: Exception) -> str:
    """What an exception of the user's code says, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if frame.filename == __file__ else f" ({frame.filename}:{frame.lineno})"
    return f"{type(error).__name__}: {error}{where}"


def _load(model: "nn.Module", where: str) -> None:
    """Load a state_dict from a file."""
    from fxfeedback.storage.checkpoints import named_tensors, read_checkpoint
    from fxfeedback.tracing.saved import without_prefixes

    state = without_prefixes(named_tensors(read_checkpoint(where), where), model)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        misfits = " ".join(str(error).split("\n", 1)[-1].split())
        raise CheckpointError(f"{where} does not fit the model: {textwrap.shorten(misfits, 400)}") from None


# -- completion -------------------------------------------------------------------------------------------------------


def torchvision_names() -> list[str]:
    """The names of torchvision's models, read from its source: it takes seconds to import, and completion waits."""
    found = importlib.util.find_spec("torchvision")
    sources = [Path(folder, "models").rglob("*.py") for folder in (found and found.submodule_search_locations) or []]
    registered = re.compile(r'^@register_model\((?:name="(\w+)")?\).*?^def (\w+)', re.MULTILINE | re.DOTALL)
    texts = (path.read_text(encoding="utf-8") for path in itertools.chain(*sources))
    return sorted(name or function for text in texts for name, function in registered.findall(text))
