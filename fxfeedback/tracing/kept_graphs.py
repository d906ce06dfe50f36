"""The graphs that a network keeps, and which of them is right for the modules as they are."""

import itertools
import weakref
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Self

import torch
from torch import fx, nn

from fxfeedback.graph.nodes import asked_dtype
from fxfeedback.graph.specs import of_size, sizes_of
from fxfeedback.tracing.arguments import Form
from fxfeedback.tracing.autocast import autocast_dtype
from fxfeedback.tracing.by_id import Shelf, by_id, known_by_id
from fxfeedback.tracing.fingerprint import Cache, Fingerprint, OfModel, refuse_hooks
from fxfeedback.tracing.verify import verify_under_autocast
from fxfeedback.tracing.while_tracing import building, forget

_NUMBERS = itertools.count()
FACTS = (bool, int, float, str, type(None))


class KeepsGraphs(nn.Module):
    """Makes a graph where it has none for a key, and keeps it. A key has the modules' fingerprint, as a number."""

    max_graphs = 32
    """How many graphs are kept, one per input size, mode and set of attributes; the least recently used go first."""

    OWN: tuple[str, ...] = ()
    """Names of the submodules that the wrapper adds."""
    _net: nn.Module  # like the user's model, with the same tensors and our modes
    _form: Form  # of the example's call
    _root: nn.Module  # our tensors and modules without our methods, whose names the model's children may have as well
    _cache: Cache
    _children: dict[str, nn.Module | None]  # as they were when the two last agreed

    def __new__(cls, *args: Any, **named: Any) -> Self:
        """However it is made, also by copying and unpickling, functions that take its id find it."""
        return known_by_id(super().__new__(cls))

    def _fingerprint(self) -> int:
        """A number for the modules' modes and attributes: the same for the same ones.

        Raises:
            OptionError: a module has a hook, which would not run.
        """
        number = _number(id(self))
        return _number(id(self), self._watched()) if torch.compiler.is_compiling() else number

    def _fingerprint_of_model(self) -> int:
        """As `_fingerprint`, for the modules of the model alone: it stays as it is when the wrapper adds some."""
        self._fingerprint()
        return _number_of_model(id(self))

    def _watched(self) -> int:
        """How many of the plain attributes are as they are: read so that torch.compile looks at each in every call."""
        same = 0
        for module, plain in zip(self._everything(), _plain(id(self)), strict=True):
            id(module)  # torch.compile looks whether it is this one
            for name, value in plain:
                if getattr(module, name) == value:
                    same += 1
        return same

    def _everything(self) -> list[nn.Module]:
        return [*self.modules(), *self._net.modules()]  # a child may be exchanged in either

    def _numbered(self) -> int:
        if self._cache.present is None or not self._cache.present[0].holds():
            self._follow()
            now = Fingerprint(self._net, self._modules)
            if len(self._cache.numbers) > 4 * self.max_graphs:
                self._cache.numbers.clear()
            number, of_model = (self._cache.numbers.setdefault(one, next(_NUMBERS)) for one in (now, OfModel(now)))
            self._cache.present = now, number, of_model
        fingerprint, number, _ = self._cache.present
        if any(fingerprint.hooks):
            refuse_hooks("", self._net)
        return number

    def _follow(self) -> None:
        """Children that were exchanged, here or by the model's own methods, are so in the other place as well."""
        net, ours = self._net, {name: child for name, child in self._modules.items() if name not in self.OWN}
        if ours != self._children:
            net._modules.clear()
            net._modules.update(ours)
        elif net._modules != self._children:
            own = {name: child for name, child in self._modules.items() if name in self.OWN}
            self._modules.clear()
            self._modules.update({**net._modules, **own})
        self._children = dict(net._modules)
        vars(self._root).update((name, value) for name, value in vars(net).items() if isinstance(value, torch.Tensor))

    def _kept(self, key: tuple[Any, ...]) -> Any:
        """What `_build` makes for this key; made once, and kept as long as it is one of the last that were used.

        key: its kind first; calls run "graphs" and a "plan", the others are what these are made of.
        """
        name = _made(id(self), key)
        kept = getattr(self._shelf(key), name, None)
        return self._kept(key) if kept is None else kept  # another thread may have cleared the cache

    def _shelf(self, key: tuple[Any, ...]) -> Shelf:
        return self._cache.graphs if key[0] in ("graphs", "plan") else self._cache.sources

    def _make(self, key: tuple[Any, ...]) -> str:
        graphs = self._shelf(key)
        name = graphs.find(key)
        if name is None:
            with building(self._net) as sources:
                name = graphs.find(key)
                if name is None:
                    made = self._build(key)
                    weakref.finalize(made, forget, sources)
                    name = graphs.put(key, made)
        graphs.keep(self.max_graphs)
        return name

    def _check_autocast(self, inputs: Sequence[torch.Tensor], form: Form | None) -> None:
        """Under autocast, compare a graph that has answers about dtypes with the model: once for each.

        Raises:
            TraceError: the graph differs.
        """
        dtype = autocast_dtype(inputs[0])
        if dtype is not None:
            sizes = sizes_of(inputs)
            _compare(id(self), (self._fingerprint(), sizes, form, dtype))

    def _compare(self, key: tuple[Any, ...]) -> None:
        _, sizes, form, dtype = key
        if any(map(asked_dtype, self._graph(sizes, form).nodes)) and key not in self._cache.compared:
            with building(self._net):
                examples = [of_size(*each) for each in sizes]
                verify_under_autocast(self._net, form or self._form, examples, dtype)
                self._cache.compared.add(key)

    def _graph(self, sizes: Any, form: Form | None) -> fx.Graph:
        """The opened graph for calls of this form (None: the example's) with inputs of these sizes and dtypes."""
        raise NotImplementedError

    def _build(self, key: tuple[Any, ...]) -> Any:
        raise NotImplementedError


def modes_of(keeper: KeepsGraphs) -> int:
    """A number for the modes and attributes of all modules: the same for the same ones."""
    return keeper._fingerprint()


# -- what torch.compile cannot trace and takes as constants: it checks the objects of ids in every call


@torch.compiler.assume_constant_result
def _number(keeper: int, watched: int = 0) -> int:
    return by_id(keeper)._numbered()


@torch.compiler.assume_constant_result
def _number_of_model(keeper: int) -> int:
    present = by_id(keeper)._cache.present
    assert present is not None  # `_fingerprint` was called
    return present[2]


@torch.compiler.assume_constant_result
def _made(keeper: int, key: tuple[Any, ...]) -> str:
    return by_id(keeper)._make(key)


@torch.compiler.assume_constant_result
def _compare(keeper: int, key: tuple[Any, ...]) -> None:
    by_id(keeper)._compare(key)


@torch.compiler.assume_constant_result
def _plain(keeper: int) -> tuple[tuple[tuple[str, Any], ...], ...]:
    """Of every module its mode, numbers and words, and lists of such, by name."""
    return tuple(
        [
            tuple([(name, deepcopy(value)) for name, value in vars(module).items() if _is_plain(value)])
            for module in by_id(keeper)._everything()
        ]
    )


def _is_plain(value: Any) -> bool:
    parts = value if type(value) in (list, tuple) else ()
    return isinstance(value, FACTS) or (bool(parts) and all(map(_is_plain, parts)))
