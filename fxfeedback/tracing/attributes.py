"""What a model's forward does to the attributes of its modules while it is traced.

A graph is made of one call. It is the same for the next one only if forward leaves nothing behind that the next call
reads; and a module that is called twice may have other attributes each time. `Stage` notices both.
"""

import copy
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from fxfeedback.graph.nodes import is_pythons
from fxfeedback.tracing.refusals import Refusal
from fxfeedback.tracing.share import tensors_of

NOT_THEIR_OWN = set(vars(nn.Module())) - {"training"}
"""What every module has: hooks, and the dicts of parameters, buffers and children."""
CONSTANT = "_tensor_constant"
"""What torch.fx calls the tensors that it leaves on a model."""


class Stage:
    """A copy of a model for tracing, which its forward may change: parameters are the model's own, buffers are copies.

    copy: the copy. originals: module of the copy -> the model's own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        own = {id(tensor): tensor for tensor in tensors_of(model)}
        copies = {key: t if isinstance(t, nn.Parameter) else _clone(t) for key, t in own.items()}
        self.copy = copy.deepcopy(model, dict(copies))
        self.originals = dict(zip(self.copy.modules(), model.modules(), strict=True))
        self.paths: dict[Any, str] = {module: path for path, module in self.copy.named_modules()}
        self._own: dict[int, Any] = {id(copies[key]): tensor for key, tensor in own.items()}
        self._own |= {id(m): o for m, o in self.originals.items() if isinstance(m, parametrize.ParametrizationList)}
        self.tensors = list(copies.values())  # or an id could become another's
        self._asked = {p: p.requires_grad for p in model.parameters()}
        self.paths |= {kind: kind.__name__ for module in self.originals for kind in _classes(type(module))}
        self._of_classes = [(kind, name, value, copy.copy(value)) for kind, name, value in self._class_attributes()]
        self._start = self.state()
        self._settings = {module: _setting(module) for module in self.originals}

    def _class_attributes(self) -> list[tuple[type, str, Any]]:
        """The data that the modules' classes have, which forward may change as well."""
        kinds = [owner for owner in self.paths if isinstance(owner, type)]
        data = [(kind, name, value) for kind in kinds for name, value in vars(kind).items()]
        return [each for each in data if _is_data(each[2])]

    def state(self) -> dict[Any, dict[str, Any]]:
        """The attributes of every module and of their classes, to be compared with those of another time."""
        state: dict[Any, dict[str, Any]] = {module: _attributes(module) for module in self.originals}
        for kind, name, value in self._class_attributes():
            state.setdefault(kind, {})[name] = plain_value(value)
        return state

    def restore_classes(self) -> None:
        """The classes are the user's own."""
        for kind, name, value, kept in self._of_classes:
            if isinstance(value, (list, dict, set, deque)):
                value.clear()
                (value.update if isinstance(value, (dict, set)) else value.extend)(kept)
            if vars(kind).get(name, _MISSING) is not value:
                setattr(kind, name, value)

    def as_called(self, module: nn.Module) -> nn.Module | None:
        """A copy of a module as it is now, with the model's own tensors; None if it is as it was before forward ran."""
        self._check_asking(module.parameters())
        for inner in module.modules():
            for name in getattr(type(inner), "__constants__", ()):
                if any(True for _ in proxies_in(vars(inner).get(name))):
                    raise Refusal(f"its forward computes the attribute {self.name_of(inner, name)!r}")
        if [self._settings.get(inner) for inner in module.modules()] == settings(module):
            return None
        proxies = {id(value): None for inner in module.modules() for value in proxies_in(vars(inner))}
        return copy.deepcopy(module, self._own | proxies)

    def changed(self, before: dict[Any, dict[str, Any]] | None = None) -> list[tuple[Any, str]]:
        """The attributes that are not as they were: (module or class, name)."""
        pairs = [(m, (before or self._start).get(m, {}), now) for m, now in self.state().items()]
        return [
            (module, name)
            for module, then, now in pairs
            for name in dict.fromkeys([*then, *now])
            if then.get(name, _MISSING) != now.get(name, _MISSING)
        ]

    def _changed_in_modules(self) -> list[tuple[nn.Module, str]]:
        return [each for each in self.changed() if isinstance(each[0], nn.Module)]

    def _check_tensors(self) -> None:
        """Refuse a forward that wrote into parameters or buffers, or froze them, while it was traced."""
        self._check_asking(self._asked)
        for module, name in self._changed_in_modules():
            was, now = self._start[module].get(name), _attributes(module).get(name)
            if name in module._buffers and was is not None and now is not None and was[:2] == now[:2]:
                raise Refusal(
                    f"its forward writes into the buffer {self.name_of(module, name)!r}, and did so while it was traced"
                )

    def _check_asking(self, parameters: Iterable[nn.Parameter]) -> None:
        changed = [p for p in parameters if p.requires_grad != self._asked.get(p, p.requires_grad)]
        if changed:
            names = {id(p): name for name, p in self.model.named_parameters()}
            raise Refusal(
                f"its forward changes requires_grad of {names[id(changed[0])]!r}: freeze parameters before the model "
                "is converted, or compute with them under torch.no_grad()"
            )

    @contextmanager
    def performed(self) -> Iterator[None]:
        """While the copy's forward runs. Afterwards all parameters ask for a gradient as before."""
        try:
            yield
            self._check_tensors()
        finally:
            for parameter, asked in self._asked.items():
                if parameter.requires_grad != asked:
                    parameter.requires_grad_(asked)

    def name_of(self, module: Any, name: str) -> str:
        """An attribute's qualified name."""
        return f"{self.paths[module]}.{name}" if self.paths[module] else name

    def made(self) -> list[str]:
        """The parameters and buffers that forward has made."""
        own = ((m, {*o._parameters, *o._buffers}) for m, o in self.originals.items())
        return [
            self.name_of(m, name) for m, names in own for name in (*m._parameters, *m._buffers) if name not in names
        ]

    def forget(self, kept: Callable[[fx.Graph], Collection[fx.Node]]) -> None:
        """Take from the model what forward would have set anew: it would be that of no call.

        kept: the nodes of a graph whose values are the same in every call; a cache of these stays as it was.
        """
        for module, name in self._changed_in_modules():
            nodes = [proxy.node for proxy in proxies_in(vars(module).get(name))]
            if any(node not in kept(node.graph) for node in nodes):
                vars(self.originals[module]).pop(name, None)


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


_MISSING = object()
PROXY = "a proxy"


def _classes(kind: type) -> list[type]:
    """A class and those that it is made of, as far as they are the user's."""
    return [k for k in kind.__mro__ if k.__module__.split(".")[0] not in ("torch", "fxfeedback") and not is_pythons(k)]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Every attribute of a module as plain data that can be compared; parameters, buffers and children by identity."""
    own = {name: value for name, value in vars(module).items() if name not in NOT_THEIR_OWN}
    plain = {name: plain_value(value) for name, value in own.items() if not name.startswith(CONSTANT)}
    for name, value in [*module._parameters.items(), *module._buffers.items(), *module._modules.items()]:
        tensor = isinstance(value, torch.Tensor) and not _is_proxy(value)
        plain[name] = ("tensor", id(value), _version(value)) if tensor else plain_value(value)  # type: ignore[arg-type]
    return plain


def _unseen(look: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    """Our own look at a tensor is nothing that the model's code does: what watches that code does not see it."""

    def looking(tensor: torch.Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            return look(tensor)

    return looking


@_unseen
def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_proxy(value: Any) -> bool:
    return issubclass(type(value), fx.Proxy)  # isinstance may take one for a tensor


def plain_value(value: Any, within: tuple[int, ...] = ()) -> Any:
    """A value as plain data; all proxies are one."""
    if id(value) in within or len(within) > 20:
        return "within itself"
    within = (*within, id(value))
    if _is_proxy(value):
        return PROXY
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), str(value.dtype), _content(value))
    if isinstance(value, (nn.Module, type)):
        return (type(value), id(value))
    if isinstance(value, dict):
        kept = [(k, v) for k, v in value.items() if not any(True for _ in proxies_in(k))]
        return [(plain_value(k, within), plain_value(v, within)) for k, v in kept]
    if isinstance(value, (list, tuple, deque)):
        return (type(value).__name__, [plain_value(part, within) for part in value])
    if isinstance(value, (set, frozenset, itertools.count, float)):
        return (type(value).__name__, repr(value))  # NaN is another than itself
    if hasattr(value, "tobytes"):
        return (type(value), value.tobytes())
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return value
    if callable(value):
        return (type(value), getattr(value, "__qualname__", ""))
    if hasattr(value, "__dict__"):
        return (type(value), plain_value(vars(value), within))
    return value


@_unseen
def _content(tensor: torch.Tensor) -> Any:
    if tensor.is_meta or tensor.layout is not torch.strided:
        return None
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def proxies_in(value: Any) -> Iterator[Any]:
    """The proxies in an attribute's value."""
    if _is_proxy(value):
        yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, deque)) else ()
    for part in parts:
        yield from proxies_in(part)


def attributes_of(model: nn.Module) -> list[Any]:
    """Of a model's modules and their classes: the attributes that are neither tensors of theirs nor children."""
    own = [plain_value({k: v for k, v in vars(m).items() if k not in NOT_THEIR_OWN}) for m in model.modules()]
    kinds = {kind for module in model.modules() for kind in _classes(type(module))}
    data = [[vars(kind)[name] for name in vars(kind) if _is_data(vars(kind)[name])] for kind in sorted(kinds, key=id)]
    return [own, plain_value(data)]


def _is_data(value: Any) -> bool:
    return isinstance(value, (int, float, str, list, dict, set, deque, type(None)))


def settings(module: nn.Module) -> list[dict[str, Any]]:
    """Of a module and those inside of it: the attributes that say what they compute, to be compared."""
    return [_setting(inner) for inner in module.modules()]


def _setting(module: nn.Module) -> dict[str, Any]:
    """What forward left on a module for others to see is not in it."""
    plain = _attributes(module) | {name: type(child) for name, child in module._modules.items()}
    return {name: value for name, value in plain.items() if not _says_proxy(value)}


def _says_proxy(plain: Any) -> bool:
    return plain == PROXY or (isinstance(plain, (list, tuple)) and any(map(_says_proxy, plain)))
