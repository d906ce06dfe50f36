"""A module's architecture as plain data, and back: each module is its class, its attributes, its tensors and children.

A description is data, and it may come from anybody. To build it runs no constructor, no function and no stored code;
it names classes of modules and a few functions that compute, and can replace nothing that a class defines.
"""

import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import fx, nn

from fxfeedback.errors import CheckpointError
from fxfeedback.graph.writable import NAME, NAMES

PACKAGES = (
    "torch.nn.modules",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
    "timm.layers",
    "timm.models",
)
"""Packages that are imported where a description names a class of modules in them."""
ALSO = (
    "torch.ao.nn.quantized.modules.functional_modules:FloatFunctional",
    "torch.ao.quantization.stubs:QuantStub",
    "torch.ao.quantization.stubs:DeQuantStub",
)
"""What torchvision's quantizable models have of elsewhere in torch."""
NOT_USERS = {"torch", "torchvision", "timm", "fxfeedback", *sys.stdlib_module_names} - {"__main__"}
"""Packages in which no class of a user's is looked for."""
FUNCTIONS = {
    "torch": "abs add clamp cos erf exp log_softmax maximum minimum mul relu selu sigmoid sin softmax square sub tanh",
    "torch._C._nn": "elu gelu glu hardsigmoid hardswish hardtanh leaky_relu log_sigmoid mish relu6 silu softplus",
    "torch.nn.functional": "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d "
    "avg_pool3d batch_norm celu dropout elu gelu glu group_norm gumbel_softmax hardshrink hardsigmoid hardswish "
    "hardtanh instance_norm layer_norm leaky_relu local_response_norm log_softmax logsigmoid max_pool1d max_pool2d "
    "max_pool3d mish normalize prelu relu relu6 rms_norm rrelu selu sigmoid silu softmax softmin softplus softshrink "
    "softsign tanh tanhshrink threshold",
    "torchvision.ops": "box_iou",
}
"""Functions that a module may keep: they compute, and what they make is no larger than what they are given."""
HELPERS = (
    "torchvision.models.detection._utils:BalancedPositiveNegativeSampler",
    "torchvision.models.detection._utils:BoxCoder",
    "torchvision.models.detection._utils:BoxLinearCoder",
    "torchvision.models.detection._utils:Matcher",
    "torchvision.models.detection._utils:SSDMatcher",
    "timm.models._features:FeatureInfo",
)
"""Classes whose objects are no modules and are described all the same."""
MADE_LATER = re.compile(
    r"\w*(BatchNorm|LayerNorm|GroupNorm|InstanceNorm|RMSNorm|RmsNorm|LRN)\w*|"
    r"(Leaky|P|RR)?ReLU6?|[CS]?ELU|GELU|GLU|SiLU|Mish|Hard\w+|Sigmoid|LogSigmoid|Tanh\w*|Soft\w+|LogSoftmax|Identity"
)
"""Classes of modules of which a partial may be kept: norms and activations, whose tensors are vectors."""
TENSORS = ("_parameters", "_buffers")
PARTS = ("class", "attributes", *TENSORS, "_non_persistent_buffers_set", "_modules")
"""What there is of a module."""
LEVELS = 100
"""How deep a description is nested, at most: a module in another is two levels."""
SMALL = 64
"""Elements of a tensor that is no parameter and no buffer, at most."""
SIZE = 2**14
"""A number in a module of `PACKAGES` is at most this, or how many numbers the file holds: it may be a size."""


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
    return _Builder(tensors, where).module(description, "net")


def decode(data: Any, tensors: Mapping[str, torch.Tensor], where: Any = "the description", at: str = "data") -> Any:
    """The value that `encode` encoded; `at` is what errors call it.

    Raises:
        CheckpointError: as `build`.
    """
    return _Builder(tensors, where).value(data, at)


# -- values -----------------------------------------------------------------------------------------------------------


def encode(value: Any, names: Mapping[int, str]) -> Any:
    """Plain data as JSON has it; what JSON has not, as a dict with one key that says its kind.

    Raises:
        NotDescribed: the value is no plain data.
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
        return {"helper": [_name_of(type(value)), encode(vars(value), names)]}
    if isinstance(value, type) or callable(value):
        return {"name": _name_of(value)}
    raise NotDescribed(f"a {type(value).__name__} is no plain data")


def _encode_item(key: Any, item: Any, names: Mapping[int, str]) -> Any:
    try:
        return encode(item, names)
    except NotDescribed as error:
        raise NotDescribed(f"{key}: {error}") from None


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
            raise self.wrong(f"{at}.class", f"names {data['class']!r}, which is no module")
        made = object.__new__(kind)
        nn.Module.__init__(made)
        attributes = {name: self.value(value, f"{at}.attributes.{name}") for name, value in data["attributes"].items()}
        if _inside(kind.__module__, PACKAGES):
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
            raise self.wrong(f"{at}._non_persistent_buffers_set", "names what is no buffer")
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
            raise self.wrong(at, "is a dict of other things than pairs")
        return {(name := self.key(key, at)): self.value(item, f"{at}.{name}") for key, item in pairs}

    def a_dtype(self, content: Any, at: str) -> torch.dtype:
        dtype = vars(torch).get(content) if isinstance(content, str) else None
        if not isinstance(dtype, torch.dtype):
            raise self.wrong(at, f"names no dtype: {content!r}")
        return dtype

    def a_device(self, content: Any, at: str) -> torch.device:
        try:
            return torch.device(self.check(content, str, at))
        except RuntimeError:
            raise self.wrong(at, f"names no device: {content!r}") from None

    def a_partial(self, content: Any, at: str) -> "functools.partial[Any]":
        function, args, keywords = self.several(content, at, 3)
        named = isinstance(function, type) and MADE_LATER.fullmatch(function.__name__)
        if not (named and _inside(function.__module__, PACKAGES)) and not any(function is f for f in _functions()):
            raise self.wrong(at, "is of something else than a norm, an activation or a function that computes")
        plain = type(keywords) is dict and all(type(value) in PLAIN for value in keywords.values())
        if args != () or not plain or not all(isinstance(name, str) and name.isidentifier() for name in keywords):
            raise self.wrong(at, "has other arguments than named numbers, strings and None")
        self.check_sizes(keywords, at)
        return functools.partial(function, **keywords)

    def a_tensor(self, content: Any, at: str) -> torch.Tensor:
        dtype, values = self.several(content, at, 2)
        if not isinstance(dtype, torch.dtype) or _count(values) > SMALL:
            raise self.wrong(at, f"is no tensor of at most {SMALL} numbers")
        try:
            return torch.tensor(values, dtype=dtype)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise self.wrong(at, f"is no tensor: {error}") from None

    def a_helper(self, content: Any, at: str) -> Any:
        self.check(content, list, at)
        if len(content) != 2 or content[0] not in HELPERS:
            raise self.wrong(at, f"names {content[:1]}, whose objects are not stored")
        kind, attributes = _class(content[0]), self.check(self.value(content[1], at), dict, at)
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
        found = _found(content)
        if found is not None:
            return found
        module_name, _, path = content.partition(":")
        if module_name == "__main__":
            what = f"the class {path!r} of the script that saved it: pass the plain model, load(directory, model=...)"
        elif module_name.split(".")[0] in NOT_USERS or module_name in sys.modules:
            what = f"{content!r}, which is no module and no function that a file may name"
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

FRESH = vars(nn.Module())
"""What torch itself keeps on every module."""
PLAIN = (bool, int, float, str, type(None))


def _key(tensor: torch.Tensor | None, names: Mapping[int, str]) -> str | None:
    return None if tensor is None else names[id(tensor)]


def _count(values: Any) -> int:
    return sum(map(_count, values)) + 1 if isinstance(values, list) else 1


def _shown(at: str) -> str:
    """Where in the file, as far as it can be printed: the names are the file's own."""
    return textwrap.shorten(at.encode("unicode_escape").decode(), 200)


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


# -- names of classes and functions -----------------------------------------------------------------------------------


def _name_of(thing: Any) -> str:
    """package.module:Class"""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "")
    candidates = [module] if isinstance(thing, type) else FUNCTIONS
    for candidate in candidates:
        found = f"{candidate}:{name.rpartition('.')[2] if candidate in FUNCTIONS else name}"
        if found in HELPERS or _found(found) is thing:
            return found
    shown = f"{module}.{name}" if name else repr(thing)
    raise NotDescribed(f"{shown} cannot be found again by its name")


def _found(name: str) -> Any:
    """The class of modules, or the function, that is called `name` and may be named by a file; or None."""
    module_name, _, path = name.partition(":")
    if module_name in FUNCTIONS:
        if path in FUNCTIONS[module_name].split():
            return getattr(torch if module_name == "torch" else import_module(module_name), path, None)
        return None
    found = _class(name)
    no_code_of_its_own = isinstance(found, type) and (
        issubclass(found, nn.Module)
        and not issubclass(found, (fx.GraphModule, torch.jit.ScriptModule, nn.RNNBase))
        and _inside(next(c.__module__ for c in found.__mro__ if "__setstate__" in vars(c)), ("torch.nn.modules",))
    )
    return found if no_code_of_its_own else None


def _class(name: str) -> Any:
    """The class that is called `name`, of one of `PACKAGES` or of the user's modules that are imported already."""
    module_name, _, path = name.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module_name):
        return None
    module = sys.modules.get(module_name)
    if _inside(module_name, PACKAGES) or name in ALSO or name in HELPERS:
        try:
            module = import_module(module_name)
        except ImportError:
            return None
    elif module_name.split(".")[0] in NOT_USERS:
        return None
    found: Any = module
    for step in path.split("."):  # past what modules and classes do when they are asked for an attribute
        found = vars(found).get(step) if hasattr(found, "__dict__") else None
    is_at_home = isinstance(found, type) and found.__module__ == module_name
    return found if is_at_home else None


def _functions() -> list[Any]:
    return [_found(f"{module}:{name}") for module, names in FUNCTIONS.items() for name in names.split()]


def _inside(module_name: str, packages: tuple[str, ...]) -> bool:
    return any(module_name == package or module_name.startswith(f"{package}.") for package in packages)
