"""A module from its description, which is data and may come from anybody.

To build it runs no constructor, no function and no stored code; it names classes of modules and a few functions that
compute (allowed.py), and can replace nothing that a class defines. Each part is checked before it is used.
"""

import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxfeedback.errors import CheckpointError
from fxfeedback.graph.writable import NAME, NAMES
from fxfeedback.storage.allowed import (
    HELPERS,
    MADE_LATER,
    NOT_USERS,
    PACKAGES,
    class_by_name,
    found_by_name,
    functions,
    is_inside,
)
from fxfeedback.storage.describing import FRESH, PARTS, SMALL, TENSORS

SIZE = 2**14
"""A number in a module of `PACKAGES` is at most this, or how many numbers the file holds: it may be a size."""
PLAIN = (bool, int, float, str, type(None))


def build(description: Any, tensors: Mapping[str, torch.Tensor], where: Any = "the description") -> nn.Module:
    """The module that `describe` described, with `tensors` by name; a tied one is one tensor again.

    Raises:
        CheckpointError: the description is damaged, or names a class that is not there or not allowed.
    """
    return _Builder(tensors, where).module(description, "net")


def decode(data: Any, tensors: Mapping[str, torch.Tensor], where: Any = "the description", at: str = "data") -> Any:
    """The value that `encode` encoded; `at` is what errors call it.

    Raises:
        CheckpointError: as `build`.
    """
    return _Builder(tensors, where).value(data, at)


class _Builder:
    """Builds what one file describes, and checks each part before it is used."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: Any) -> None:
        self.tensors, self.where = tensors, where
        self.made: dict[str, torch.Tensor] = {}
        self.largest = max(SIZE, sum(tensor.numel() for tensor in tensors.values()))

    def wrong(self, at: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {_shown(at)} {what}")

    def module(self, data: Any, at: str) -> nn.Module:
        """One module with all that is in it."""
        self.check(data, dict, at)
        for part, kind in zip(PARTS, (str, dict, dict, dict, list, dict), strict=True):
            if part not in data:
                raise self.wrong(at, f"has no {part!r}: the file is damaged")
            self.check(data[part], kind, f"{at}.{part}")
        kind = self.find(data["class"], f"{at}.class")
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise self.wrong(f"{at}.class", f"names {data['class']!r}, which is not a module")
        made = object.__new__(kind)
        nn.Module.__init__(made)
        attributes = {name: self.value(value, f"{at}.attributes.{name}") for name, value in data["attributes"].items()}
        if is_inside(kind.__module__, PACKAGES):
            self.check_sizes(attributes, f"{at}.attributes")
        parts: dict[str, Any] = {group: self.group(data[group], f"{at}.{group}", group) for group in TENSORS}
        parts["_modules"] = {
            name: None if child is None else self.module(child, f"{at}.{name}")
            for name, child in data["_modules"].items()
        }
        names = [name for group in parts.values() for name in group]
        self.check_names([*attributes.items(), *((name, made) for name in names)], kind, at)
        loose = data["_non_persistent_buffers_set"]
        if not all(isinstance(name, str) and name in parts["_buffers"] for name in loose):
            raise self.wrong(f"{at}._non_persistent_buffers_set", "names something that is not a buffer")
        kind.__setstate__(made, {**vars(made), **attributes, **parts, "_non_persistent_buffers_set": set(loose)})
        return made

    def group(self, data: dict[str, Any], at: str, group: str) -> dict[str, torch.Tensor | None]:
        """A module's parameters or buffers; a tied one is one tensor again."""
        for name, key in data.items():
            if key is not None and not (isinstance(key, str) and key in self.tensors):
                raise self.wrong(f"{at}.{name}", f"names a tensor {key!r}, which the file does not have")
            if key is not None and key not in self.made:
                tensor = self.tensors[key]
                is_parameter = group == "_parameters"
                self.made[key] = nn.Parameter(tensor, tensor.is_floating_point()) if is_parameter else tensor
            if key is not None and isinstance(self.made[key], nn.Parameter) is not (group == "_parameters"):
                raise self.wrong(f"{at}.{name}", "is a parameter here and a buffer elsewhere")
        return {name: None if key is None else self.made[key] for name, key in data.items()}

    def check_names(self, named: Sequence[tuple[str, Any]], kind: type, at: str) -> None:
        """Nothing that torch or the class defines is replaced, and no name is given twice."""
        seen = set(FRESH)
        for name, value in named:
            if name in seen:
                raise self.wrong(at, f"has {name!r} twice, or it belongs to torch")
            seen.add(name)
            self.check_name(name, kind, value, at)

    def check_name(self, name: Any, kind: type, value: Any, at: str) -> None:
        """A plain value may take the place of a class's default; nothing else hides what the class defines."""
        if not isinstance(name, str) or not NAME.fullmatch(name) or name.startswith("__"):
            raise self.wrong(at, f"has {name!r}, {NAMES}")
        missing = object()
        own = inspect.getattr_static(kind, name, missing)
        is_default = type(own) in PLAIN and type(value) in PLAIN and not hasattr(nn.Module, name)
        if own is not missing and not is_default:
            raise self.wrong(at, f"has {name!r}, which would hide what a {kind.__name__} defines")

    def check_sizes(self, value: Any, at: str) -> None:
        """No number asks for more than the file itself holds."""
        if isinstance(value, (list, tuple, set)):
            for item in value:
                self.check_sizes(item, at)
        elif isinstance(value, dict):
            for key, item in value.items():
                self.check_sizes(item, f"{at}.{key}")
        elif isinstance(value, int) and abs(value) > self.largest:
            raise self.wrong(at, f"is a number over {self.largest:,}, more than a file of this size may ask for")

    def check(self, data: Any, kind: type, at: str) -> Any:
        if type(data) is not kind:
            raise self.wrong(at, f"is a {type(data).__name__}, not a {kind.__name__}")
        return data

    # -- values -------------------------------------------------------------------------------------------------------

    def value(self, data: Any, at: str) -> Any:
        """The value that `encode` encoded."""
        if isinstance(data, list):
            return [self.value(item, at) for item in data]
        if not isinstance(data, dict):
            return data
        if len(data) != 1:
            raise self.wrong(at, "is not encoded as this version does it")
        ((kind, content),) = data.items()
        read = READERS.get(kind)
        if read is None:
            raise self.wrong(at, f"has a {kind!r}, which this version does not know")
        return read(self, content, at)

    def several(self, content: Any, at: str, number: int | None = None) -> list[Any]:
        """The values in a list, of this length."""
        self.check(content, list, at)
        if number not in (None, len(content)):
            raise self.wrong(at, f"has {len(content)} parts, not {number}")
        return [self.value(item, at) for item in content]

    def key(self, data: Any, at: str) -> Any:
        """A key of a dict or an element of a set: plain data."""
        value = self.value(data, at)
        for part in value if isinstance(value, tuple) else (value,):
            if type(part) not in (str, int, float, bool, type(None)):
                raise self.wrong(at, f"has a key that is a {type(part).__name__}")
        return value

    def a_tuple(self, content: Any, at: str) -> tuple[Any, ...]:
        return tuple(self.several(content, at))

    def a_set(self, content: Any, at: str) -> set[Any]:
        return {self.key(item, at) for item in self.check(content, list, at)}

    def a_dict(self, content: Any, at: str) -> dict[Any, Any]:
        pairs = self.check(content, list, at)
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise self.wrong(at, "is a dict with an item that is not a pair")
        return {(name := self.key(key, at)): self.value(item, f"{at}.{name}") for key, item in pairs}

    def a_dtype(self, content: Any, at: str) -> torch.dtype:
        dtype = vars(torch).get(content) if isinstance(content, str) else None
        if not isinstance(dtype, torch.dtype):
            raise self.wrong(at, f"names {content!r}, which is not a dtype")
        return dtype

    def a_device(self, content: Any, at: str) -> torch.device:
        try:
            return torch.device(self.check(content, str, at))
        except RuntimeError:
            raise self.wrong(at, f"names {content!r}, which is not a device") from None

    def a_partial(self, content: Any, at: str) -> "functools.partial[Any]":
        function, args, keywords = self.several(content, at, 3)
        named = isinstance(function, type) and MADE_LATER.fullmatch(function.__name__)
        if not (named and is_inside(function.__module__, PACKAGES)) and not any(function is f for f in functions()):
            raise self.wrong(at, "is of something other than a norm, an activation or a function that computes")
        plain = type(keywords) is dict and all(type(value) in PLAIN for value in keywords.values())
        if args != () or not plain or not all(isinstance(name, str) and name.isidentifier() for name in keywords):
            raise self.wrong(at, "has arguments other than named numbers, strings and None")
        self.check_sizes(keywords, at)
        return functools.partial(function, **keywords)

    def a_tensor(self, content: Any, at: str) -> torch.Tensor:
        dtype, values = self.several(content, at, 2)
        if not isinstance(dtype, torch.dtype) or _count(values) > SMALL:
            raise self.wrong(at, f"is not a tensor of at most {SMALL} numbers")
        try:
            return torch.tensor(values, dtype=dtype)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise self.wrong(at, f"is not a tensor: {error}") from None

    def a_helper(self, content: Any, at: str) -> Any:
        self.check(content, list, at)
        if len(content) != 2 or content[0] not in HELPERS:
            raise self.wrong(at, f"names {content[:1]}, whose objects are not stored")
        kind, attributes = class_by_name(content[0]), self.check(self.value(content[1], at), dict, at)
        if kind is None:
            raise self.wrong(at, f"needs {content[0]}, which is not here")
        self.check_sizes(attributes, at)
        made = object.__new__(kind)
        for name, value in attributes.items():
            self.check_name(name, kind, value, at)
            vars(made)[name] = value
        return made

    def a_module(self, content: Any, at: str) -> nn.Module:
        return self.module(content, at)

    def find(self, content: Any, at: str) -> Any:
        """The class of modules, or the function, that is called `content`."""
        self.check(content, str, at)
        found = found_by_name(content)
        if found is not None:
            return found
        module_name, _, path = content.partition(":")
        if module_name == "__main__":
            what = f"the class {path!r} of the script that saved it: pass the plain model, load(directory, model=...)"
        elif module_name.split(".")[0] in NOT_USERS or module_name in sys.modules:
            what = f"{content!r}, which is neither a module nor a function that a file may name"
        else:
            what = f"{content!r}: import {module_name} first, or pass the plain model, load(directory, model=...)"
        raise CheckpointError(f"{self.where}: {at} needs {what}")


READERS: dict[str, Callable[[_Builder, Any, str], Any]] = {
    "dict": _Builder.a_dict,
    "tuple": _Builder.a_tuple,
    "set": _Builder.a_set,
    "dtype": _Builder.a_dtype,
    "device": _Builder.a_device,
    "module": _Builder.a_module,
    "partial": _Builder.a_partial,
    "tensor": _Builder.a_tensor,
    "helper": _Builder.a_helper,
    "name": _Builder.find,
}


def _count(values: Any) -> int:
    return sum(map(_count, values)) + 1 if isinstance(values, list) else 1


def _shown(at: str) -> str:
    """Where in the file, as far as it can be printed: the names are the file's own."""
    return textwrap.shorten(at.encode("unicode_escape").decode(), 200)
