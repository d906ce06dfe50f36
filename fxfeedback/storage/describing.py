"""A module's architecture as plain data: its class, its attributes, its tensors and children; building.py reads it."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxfeedback.errors import CheckpointError
from fxfeedback.storage.allowed import FUNCTIONS, HELPERS, found_by_name

TENSORS = ("_parameters", "_buffers")
PARTS = ("class", "attributes", *TENSORS, "_non_persistent_buffers_set", "_modules")
"""What there is of a module."""
SMALL = 64
"""Elements of a tensor that is neither a parameter nor a buffer, at most."""
LEVELS = 100
"""How deep a description is nested, at most: a module in another is two levels."""
FRESH = vars(nn.Module())
"""What torch itself keeps on every module."""


class NotDescribed(ValueError):
    """Something has no description."""


def describe(module: nn.Module, names: Mapping[int, str]) -> dict[str, Any]:
    """A module as JSON-ready data.

    Args:
        module: any module.
        names: of its tensors, by identity.

    Raises:
        NotDescribed: a class that cannot be found by its name, a hook, an attribute that is not plain data.
    """
    kind = type(module)
    attributes = {}
    for name, value in vars(module).items():
        if "_hooks" in name and value:
            raise NotDescribed(f"a {kind.__name__} has hooks")
        if name not in FRESH:
            try:
                attributes[name] = encode(value, names)
            except NotDescribed as error:
                raise NotDescribed(f"the attribute {name!r} of a {kind.__name__}: {error}") from None
    return {
        "class": name_of_class(kind),
        "attributes": attributes,
        **{group: {name: _key(value, names) for name, value in getattr(module, group).items()} for group in TENSORS},
        "_non_persistent_buffers_set": sorted(module._non_persistent_buffers_set),
        "_modules": {name: None if m is None else describe(m, names) for name, m in module._modules.items()},
    }


def encode(value: Any, names: Mapping[int, str]) -> Any:
    """Plain data as JSON has it; what JSON does not have, as a dict with one key that says its kind.

    Raises:
        NotDescribed: the value is not plain data.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [encode(item, names) for item in value]
    if type(value) in (tuple, set, torch.Size):
        return {"set" if isinstance(value, set) else "tuple": [encode(item, names) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, names), _encode_item(key, item, names)] for key, item in value.items()]}
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, nn.Module):
        return {"module": describe(value, names)}
    if isinstance(value, functools.partial):
        return {"partial": [encode(part, names) for part in (value.func, value.args, value.keywords)]}
    if isinstance(value, torch.Tensor) and value.numel() <= SMALL:
        return {"tensor": [encode(value.dtype, names), value.tolist()]}
    if f"{type(value).__module__}:{type(value).__qualname__}" in HELPERS:
        return {"helper": [name_of_class(type(value)), encode(vars(value), names)]}
    if isinstance(value, type) or callable(value):
        return {"name": name_of_class(value)}
    raise NotDescribed(f"a {type(value).__name__} is not plain data")


def _encode_item(key: Any, item: Any, names: Mapping[int, str]) -> Any:
    try:
        return encode(item, names)
    except NotDescribed as error:
        raise NotDescribed(f"{key}: {error}") from None


def name_of_class(thing: Any) -> str:
    """package.module:Class"""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "")
    candidates = [module] if isinstance(thing, type) else FUNCTIONS
    for candidate in candidates:
        found = f"{candidate}:{name.rpartition('.')[2] if candidate in FUNCTIONS else name}"
        if found in HELPERS or found_by_name(found) is thing:
            return found
    shown = f"{module}.{name}" if name else repr(thing)
    raise NotDescribed(f"{shown} cannot be found again by its name")


def _key(tensor: torch.Tensor | None, names: Mapping[int, str]) -> str | None:
    return None if tensor is None else names[id(tensor)]


def check_levels(data: Any, where: Any) -> None:
    """Refuse what is nested deeper than any model is, before anything walks through it.

    Raises:
        CheckpointError: it is.
    """
    present = [data]
    for _ in range(LEVELS):
        present = [
            item
            for value in present
            if isinstance(value, (dict, list))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not present:
            return
    raise CheckpointError(f"{where} is damaged: it is nested over {LEVELS} levels deep")
