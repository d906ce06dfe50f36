"""A module's architecture as plain data, and back: each module is its class, its attributes, its tensors and children.

Only what can be found again by name is described, and only names that are safe to call are followed: classes of
modules, and functions of torch that compute. A description is data: to build it runs no constructor and no stored code.
"""

import functools
import sys
import types
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from fxfeedback.errors import CheckpointError

IMPORTED = ("torch.nn", "torchvision", "timm")
"""Packages that are imported where a description names them; others must be imported already."""
FUNCTIONS = ("torch", "torch._C._nn", "torch.nn.functional", "torchvision.ops")
"""Where functions are taken from."""
HELPERS = ("torchvision.models", "timm.layers", "timm.models")
"""Packages whose objects that are no modules are described, too: anchors, coders, matchers."""
TENSORS = ("_parameters", "_buffers")


class NotDescribed(ValueError):
    """Something has no description."""


def describe(module: nn.Module, names: Mapping[int, str]) -> dict[str, Any]:
    """A module as JSON-ready data.

    Args:
        module: any module.
        names: of its tensors, by identity.

    Raises:
        NotDescribed: a class that has no name of its own, a hook, an attribute that is no plain data.
    """
    fresh = vars(nn.Module())
    kind = type(module)
    attributes = {}
    for name, value in vars(module).items():
        if "_hooks" in name and value:
            raise NotDescribed(f"a {kind.__name__} has hooks")
        if name not in fresh:
            try:
                attributes[name] = encode(value, names)
            except NotDescribed as error:
                raise NotDescribed(f"the attribute {name!r} of a {kind.__name__}: {error}") from None
    return {
        "class": _name_of(kind),
        "attributes": attributes,
        **{group: {name: _key(value, names) for name, value in getattr(module, group).items()} for group in TENSORS},
        "_non_persistent_buffers_set": sorted(module._non_persistent_buffers_set),
        "_modules": {name: None if m is None else describe(m, names) for name, m in module._modules.items()},
    }


def build(description: Any, tensors: Mapping[str, torch.Tensor], where: Any = "the description") -> nn.Module:
    """The module that `describe` described, with `tensors` by name; a tied one is one tensor again.

    Raises:
        CheckpointError: the description is damaged, or names a class that is not there or not allowed.
    """
    made: dict[str, torch.Tensor] = {}

    def tensor(key: str | None, parameter: bool) -> torch.Tensor | None:
        if key is not None and key not in made:
            value = tensors[key]
            made[key] = nn.Parameter(value, value.is_floating_point()) if parameter else value
        return None if key is None else made[key]

    def one(data: Any) -> nn.Module | None:
        if data is None:
            return None
        kind = _find(data["class"], where)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise CheckpointError(f"{where} names {data['class']}, which is no module")
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        state = {name: decode(value, tensors, where) for name, value in data["attributes"].items()}
        for group in TENSORS:
            state[group] = {name: tensor(key, group == "_parameters") for name, key in data[group].items()}
        state["_non_persistent_buffers_set"] = set(data["_non_persistent_buffers_set"])
        state["_modules"] = {name: one(child) for name, child in data["_modules"].items()}
        module.__setstate__({**vars(module), **state})
        return module

    try:
        return one(description)  # type: ignore[return-value]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is damaged: its description of the model is not whole ({error!r})") from error


# -- values -----------------------------------------------------------------------------------------------------------


def encode(value: Any, names: Mapping[int, str]) -> Any:
    """Plain data as JSON has it; what JSON has not, as a dict with one key that says its kind.

    Raises:
        NotDescribed: the value is no plain data.
    """
    if value is None or (isinstance(value, (bool, int, float, str)) and type(value) in (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(item, names) for item in value]
    if type(value) in (tuple, set, torch.Size):
        return {"set" if isinstance(value, set) else "tuple": [encode(item, names) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, names), encode(item, names)] for key, item in value.items()]}
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, nn.Module):
        return {"module": describe(value, names)}
    if isinstance(value, functools.partial):
        return {"partial": [encode(part, names) for part in (value.func, value.args, value.keywords)]}
    if isinstance(value, torch.Tensor) and value.numel() <= 64:
        return {"tensor": [encode(value.dtype, names), value.tolist()]}
    if _inside(type(value).__module__, HELPERS):
        return {"helper": [_name_of(type(value)), encode(vars(value), names)]}
    if isinstance(value, type) or callable(value):
        return {"name": _name_of(value)}
    raise NotDescribed(f"a {type(value).__name__} is no plain data")


def decode(data: Any, tensors: Mapping[str, torch.Tensor], where: Any = "the description") -> Any:
    """The value that `encode` encoded.

    Raises:
        CheckpointError: as `build`.
    """
    if isinstance(data, list):
        return [decode(item, tensors, where) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "dict":
        return {decode(key, tensors, where): decode(item, tensors, where) for key, item in content}
    if kind in ("tuple", "set"):
        return {"tuple": tuple, "set": set}[kind](decode(item, tensors, where) for item in content)
    if kind == "dtype" and isinstance(getattr(torch, content, None), torch.dtype):
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    if kind == "module":
        return build(content, tensors, where)
    if kind == "partial":
        function, args, keywords = (decode(part, tensors, where) for part in content)
        return functools.partial(function, *args, **keywords)
    if kind == "tensor":
        return torch.tensor(content[1], dtype=decode(content[0], tensors, where))
    if kind == "helper":
        made = object.__new__(_find(content[0], where))
        vars(made).update(decode(content[1], tensors, where))
        return made
    if kind == "name":
        return _find(content, where)
    raise CheckpointError(f"{where} has a {kind!r}, which this version does not know")


def _key(tensor: torch.Tensor | None, names: Mapping[int, str]) -> str | None:
    return None if tensor is None else names[id(tensor)]


# -- names of classes and functions -----------------------------------------------------------------------------------


def _name_of(thing: Any) -> str:
    """package.module:Class"""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "")
    candidates = [module] if isinstance(thing, type) else FUNCTIONS
    for candidate in candidates:
        found = f"{candidate}:{name.rpartition('.')[2] if candidate in FUNCTIONS else name}"
        try:
            if _find(found, "") is thing:
                return found
        except CheckpointError:
            continue
    shown = f"{module}.{name}" if name else repr(thing)
    raise NotDescribed(f"{shown} cannot be found again by its name")


def _find(name: str, where: Any) -> Any:
    """The class of a module, or the function of torch, that is called `name`.

    Raises:
        CheckpointError: there is none, or it is neither.
    """
    module_name, _, path = name.partition(":")
    if _inside(module_name, IMPORTED):
        try:
            found: Any = import_module(module_name)
        except ImportError as error:
            raise CheckpointError(f"{where} needs {module_name}, which is not here: {error}") from None
    else:
        found = sys.modules.get(module_name)
    if found is None:
        raise CheckpointError(f"{where} needs {name}: import {module_name} first, or pass load the plain model")
    for step in path.split("."):
        found = getattr(found, step, None)
    home = getattr(found, "__module__", None) or "torch"
    if isinstance(found, type) and home == module_name:
        if issubclass(found, nn.Module) or _inside(home, HELPERS):
            return found
    elif module_name in FUNCTIONS and "." not in path and _inside(home, ("torch", "torchvision")):
        # torch's own Python functions load files and compile code; its built-in ones compute.
        builtin = isinstance(found, types.BuiltinFunctionType)
        if builtin or (isinstance(found, types.FunctionType) and module_name != "torch"):
            return found
    raise CheckpointError(f"{where} names {name}, which is no module and no function of torch that computes")


def _inside(module_name: str, packages: tuple[str, ...]) -> bool:
    return any(module_name == package or module_name.startswith(f"{package}.") for package in packages)
