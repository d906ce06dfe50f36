"""What the graphs of a model depend on beside their inputs, and whether it is still as it was.

A graph holds what the model's code did with its attributes: a dropout's p, a convolution's stride, a flag that forward
branches on. Users change them; a graph is right as long as the modules have the same fingerprint.
"""

import argparse
import itertools
import sys
import sysconfig
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from fxfeedback.errors import OptionError
from fxfeedback.graph.nodes import is_pythons
from fxfeedback.tracing.buffers import READ
from fxfeedback.tracing.by_id import Shelf
from fxfeedback.tracing.waiting import is_captured

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""What nn.Module's call runs, and a graph does not."""

GROUPS = ("_parameters", "_buffers", "_modules")
MACHINERY = frozenset(vars(nn.Module())) - {"training"}
CONSTANTS = ("_tensor_constant", "_constant_")  # buffers that tracing leaves on a model


class Cache:
    """What a network keeps.

    graphs: what calls run, by what it depends on. sources: of what that is made, likewise. numbers: of the fingerprints
    that were seen, and of their parts that are the model's alone. present: the last one, its number and that of its
    part. compared: what was compared with the model under autocast. gates: of the last call.
    """

    def __init__(self) -> None:
        self.numbers: dict[Fingerprint | OfModel, int] = {}
        self.present: tuple[Fingerprint, int, int] | None = None
        self.clear()

    def clear(self) -> None:
        """Without graphs, and what was made with them."""
        self.graphs = Shelf()
        self.sources = Shelf()
        self.compared: set[Any] = set()
        self.gates: Any = None


VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout)
CLOSED = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, torch.Generator, ParametrizationList, Cache)
"""What is compared as a whole; parametrizations run in every call."""

SETTINGS = (SimpleNamespace, argparse.Namespace)  # not looked into are others of Python's, as loggers and locks


class Fingerprint:
    """Modes, plain attributes, children, and sizes and dtypes of the tensors of all modules below `traced`.

    Lists, dicts and objects among the attributes count with all that is in them, and a user's class with its own
    attributes. What parameters and buffers hold does not count: graphs read them in every call.

    Args:
        traced: the module whose code graphs are made from; its modules' hooks do not run.
        called: children of the wrapper; those that `traced` has not are called by graphs as they are, with hooks.
    """

    def __init__(self, traced: nn.Module, called: Mapping[str, nn.Module | None]) -> None:
        self._live: list[Any] = []  # the dicts of modules, objects and classes
        self._kept: list[Any] = []  # what equals them as long as nothing changes
        self._orders: list[tuple[Any, list[str]]] = []  # of children; dicts are equal in any order
        self._objects: list[Any] = []
        self._buffers: list[tuple[nn.Module, dict[str, Any]]] = []  # with what was kept of them
        self._known: set[int] = set()
        self._tensors: dict[int, _Tensor] = {}
        self._value(traced)
        self._look_into(0, GROUPS)
        n_traced = len(self._objects)
        self.n_of_model = n_traced, len(self._orders), len(self._kept)
        self.hooks = [vars(m)[kind] for m in self._objects if isinstance(m, nn.Module) for kind in HOOKS]
        self._add(called)
        self._look_into(n_traced, (*GROUPS, *HOOKS))
        self._types = [type(one) for one in self._objects]
        self._hash = hash(self.modes())
        self._hold_read(lambda buffer, then: buffer.detach().clone())
        del self._known, self._tensors

    def holds(self) -> bool:
        """Whether all is as it was."""
        if self._n_read != READ.count:
            self._hold_read(lambda buffer, then: then)
        return (
            self._kept == self._live  # in this order: a tensor on the left would be slow
            and [type(one) for one in self._objects] == self._types
            and [list(children) for children, _ in self._orders] == [names for _, names in self._orders]
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        return self.content() == other.content()

    def __hash__(self) -> int:
        return self._hash

    def modes(self, n_objects: int | None = None) -> tuple[bool, ...]:
        """Whether the modules among the first so many objects train, now."""
        return tuple([one.training for one in self._objects[:n_objects] if isinstance(one, nn.Module)])

    def content(
        self, n_objects: int | None = None, n_orders: int | None = None, n_kept: int | None = None
    ) -> tuple[Any, ...]:
        """What makes two the same, of the first so many."""
        orders = [names for _, names in self._orders[:n_orders]]
        kept = [{k: v for k, v in kept.items() if not _is_constant(k)} for kept in self._kept[:n_kept]]
        return self._types[:n_objects], orders, kept

    def _hold_read(self, value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """Buffers whose values are in graphs count with a value, made of the present one and that in the graph."""
        self._n_read = READ.count
        for module, kept in self._buffers:
            for name, then in READ.values.get(module, {}).items():
                record, buffer = kept.get(name), module._buffers.get(name)
                if isinstance(record, _Tensor) and buffer is not None and record.held is None:
                    record.held = value(buffer, then)

    def _look_into(self, first: int, groups: tuple[str, ...]) -> None:
        """Add what is in the objects from number `first` on, and in those that are found there."""
        for one in itertools.islice(self._objects, first, None):
            if not isinstance(one, nn.Module):
                self._add(vars(one), frozenset([name for name in vars(one) if str(name).startswith("__")]))
                continue
            for group in groups:  # other tensors may come to stand for parameters, as in torch.func.functional_call
                self._add(vars(one)[group], replaceable=group in ("_parameters", "_buffers"))
            self._buffers.append((one, self._kept[-1 - groups[::-1].index("_buffers")]))
            self._add(vars(one), MACHINERY)
            if one._modules:
                self._orders.append((one._modules, list(one._modules)))
            for kind in type(one).__mro__:
                if kind.__module__.partition(".")[0] not in ("torch", "torchvision") and not is_pythons(kind):
                    self._find(kind)

    def _find(self, one: Any) -> None:
        if id(one) not in self._known:
            self._known.add(id(one))
            self._objects.append(one)

    def _add(self, live: Any, as_they_are: frozenset[str] = frozenset(), replaceable: bool = False) -> None:
        self._live.append(live)
        self._kept.append(
            {
                name: _ANY if _is_constant(name) else value if name in as_they_are else self._value(value, replaceable)
                for name, value in live.items()
            }
        )

    def _value(self, value: Any, replaceable: bool = False) -> Any:
        """What equals `value` as long as it is the same, or is a tensor of the same kind that may take its place."""
        if isinstance(value, VALUES + CLOSED):
            return value
        if isinstance(value, torch.Tensor):
            record = self._tensors.setdefault(id(value), _Tensor(value, len(self._tensors)))
            record.places += 1
            record.only = None if replaceable and record.places == 1 else value
            if not replaceable and record.places == 1 and value.device.type != "meta":
                record.held = value.detach().clone()
            return record
        if isinstance(value, (list, tuple)):
            values = [self._value(part) for part in value]
            return values if isinstance(value, list) else tuple(values)
        if isinstance(value, dict):
            return {key: self._value(part) for key, part in value.items()}
        if isinstance(value, (set, frozenset)):
            return set(value)
        if hasattr(value, "__dict__") and (isinstance(value, SETTINGS) or not is_pythons(type(value))):
            self._find(value)
        return value if type(value).__eq__ is object.__eq__ and not hasattr(value, "__slots__") else _Same(value)


class OfModel:
    """The part of a fingerprint that is the traced model's alone, without what the wrapper adds."""

    def __init__(self, whole: Fingerprint) -> None:
        self._whole, self._hash = whole, hash(whole.modes(whole.n_of_model[0]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OfModel):
            return NotImplemented
        one, another = self._whole, other._whole
        return one.content(*one.n_of_model) == another.content(*another.n_of_model)

    def __hash__(self) -> int:
        return self._hash


class _Tensor:
    """A tensor's size, dtype and device; and that it is this one, if it is an attribute or has several names."""

    def __init__(self, tensor: torch.Tensor, number: int) -> None:
        self.facts = tensor.shape, tensor.dtype, tensor.device
        self.number, self.places = number, 0
        self.only: torch.Tensor | None = None
        self.held: torch.Tensor | None = None  # of one whose values are constants of a graph
        self.seen: torch.Tensor | None = None  # what had them last, in this version
        self.version = -1

    def __eq__(self, other: object) -> bool:
        if isinstance(other, torch.Tensor):
            same = (other.shape, other.dtype, other.device) == self.facts and (self.only is None or self.only is other)
            return same and (self.held is None or self._holds(other))
        if not isinstance(other, _Tensor) or (other.number, other.facts) != (self.number, self.facts):
            return False
        return other.held is self.held or (
            self.held is not None and other.held is not None and torch.equal(self.held, other.held)
        )

    def _holds(self, other: torch.Tensor) -> bool:
        """Whether it has the values still; while a CUDA graph is captured, when nobody can look: by its version."""
        version = -1 if other.is_inference() else other._version
        if is_captured(other):
            return self.seen is other and self.version == version >= 0
        same = torch.equal(self.held, other)  # type: ignore[arg-type]
        self.seen, self.version = other if same else None, version
        return same


class _Any:
    """Equals everything: what tracing leaves on a model may be moved to another device."""

    def __eq__(self, other: object) -> bool:
        return True


_ANY = _Any()


class _Same:
    """An object that is compared by identity, and by what it holds where that is not an attribute."""

    def __init__(self, value: Any) -> None:
        self.value, self.held = value, _held(value)

    def __eq__(self, other: object) -> bool:
        other = other.value if isinstance(other, _Same) else other
        return other is self.value and _held(other) == self.held


def _held(value: Any) -> Any:
    if hasattr(value, "__array_interface__"):
        return value.shape, str(value.dtype), value.tobytes()
    if isinstance(value, bytearray):
        return bytes(value)
    names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return [getattr(value, name, None) for name in names]


def _is_constant(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(CONSTANTS)


def refuse_hooks(prefix: str, module: nn.Module) -> None:
    """Hooks of inner modules would be silently ignored: the graph has their ops, and does not call them."""
    for path, inner in module.named_modules(prefix=prefix):
        for kind in HOOKS:
            for hook in getattr(inner, kind).values():
                if "forward" in kind and _is_librarys_own(hook, inner):
                    continue
                what = kind.strip("_").removesuffix("s").replace("_", " ")
                called = getattr(hook, "__name__", type(hook).__name__)
                raise OptionError(
                    f"the module {path or type(inner).__name__!r} has a {what} ({called}), which would not run, as its "
                    "ops are nodes of a graph: remove it, and hook the converted model or its parameters, or read "
                    "values with readout() or counter_neurons(); for weight_norm and spectral_norm use "
                    "torch.nn.utils.parametrizations, for pruning prune.remove()"
                )


def _is_librarys_own(hook: Any, module: nn.Module) -> bool:
    """Whether an installed library has put the hook on a module of its own: part of forward, and traced with it."""
    library = str(getattr(hook, "__module__", "")).partition(".")[0]
    path = str(getattr(sys.modules.get(library), "__file__", None))
    own = library == type(module).__module__.partition(".")[0] != "torch"
    return own and path.startswith(sysconfig.get_paths()["purelib"])
