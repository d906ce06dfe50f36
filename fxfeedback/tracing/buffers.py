"""What a model's forward computes from its buffers before it sees the input.

A graph computes such values itself, in every call, as a buffer may be loaded or changed later: `FromBuffers` remembers
the call that made each of them, and makes it a node where the value is used. What cannot be a node (a number that the
code branches on, an array, an op without a rule) becomes a constant, and `READ` says so: then the graph is right for
the buffer's present values only, which count in the fingerprint (fingerprint.py).
"""

import operator
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fxfeedback.rules.core import CONSTANT, RULES

FACTS = (
    "__get__", "__hash__", "__len__", "__repr__", "data_ptr", "dim", "element_size", "get_device", "is_complex",
    "is_contiguous", "is_floating_point", "is_signed", "is_storage", "ndimension", "nelement", "numel", "size",
    "storage_offset", "stride", "type", "untyped_storage", "requires_grad_", "can_cast", "result_type", "is_same_size",
    "is_pinned", "has_names", "is_inference", "is_conj", "is_neg", "is_coalesced", "is_shared", "dim_order", "nbytes",
)  # fmt: skip
"""What is asked of a tensor without looking at its values."""
SWAPPED = {"__radd__", "__rsub__", "__rmul__", "__rdiv__", "__rtruediv__", "__rpow__", "__rmatmul__", "__rfloordiv__"}


class Read:
    """The buffers whose values are in graphs: of a module, name -> the value when the graph was made."""

    def __init__(self) -> None:
        self.values: weakref.WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = weakref.WeakKeyDictionary()
        self.count = 0

    def note(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        """The graph that has just been made holds this value of the module's buffer."""
        if not value.is_meta:
            self.values.setdefault(module, {})[name] = value
            self.count += 1


READ = Read()


@dataclass
class Made:
    """A tensor, the call that made it, and which of the call's results it is (None: the only one)."""

    tensor: torch.Tensor
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: int | None
    proxy: Any = None

    def again(self, of: Callable[[Any], Any] = lambda value: value) -> Any:
        """The call's result, with `of` of its arguments."""
        value = self.function(*tree_map(of, self.args), **tree_map(of, self.kwargs))
        return value if self.part is None else value[self.part]

    def as_node(self) -> tuple[str, Any, tuple[Any, ...]] | None:
        """(op, target, args) of a node that does this; None where there is no rule for it."""
        name = getattr(self.function, "__name__", "")
        if getattr(torch.Tensor, name, None) is not self.function:
            return ("call_function", self.function, self.args) if _has_rule(self.function) else None
        if name in SWAPPED:
            return "call_function", getattr(operator, name.replace("__r", "").strip("_")), self.args[::-1]
        if name.startswith("__"):
            target = getattr(operator, name.strip("_"), None)
            return ("call_function", target, self.args) if _has_rule(target) else None
        return ("call_method", name, self.args) if _has_rule(self.function) else None


def _has_rule(target: Any) -> bool:
    return target in RULES or target in CONSTANT


class FromBuffers(TorchFunctionMode):
    """While a model is traced: notes which tensors its code makes of buffers alone, and how.

    Args:
        buffers: the buffers that the code sees, by name.
    """

    def __init__(self, buffers: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = {id(buffer): name for name, buffer in buffers.items()}
        self.thread, self.off = threading.get_ident(), False
        self.read: set[str] = set()  # names of the buffers whose values the code has looked at
        self._made: dict[int, Made] = {}
        self._kept: list[Any] = [*buffers.values()]  # or an id could become another's
        self._sources = {memory(buffer): {name} for name, buffer in buffers.items()}

    def sources(self, tensor: torch.Tensor) -> set[str]:
        """The names of the buffers that the tensor's values come from."""
        return self._sources.get(memory(tensor), set())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.off or threading.get_ident() != self.thread:
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        given = [leaf for leaf in leaves if _is_tensor(leaf)]
        sources = set[str]().union(*map(self.sources, given))
        if not sources or any(issubclass(type(leaf), fx.Proxy) for leaf in leaves):
            return func(*args, **kwargs)
        versions = [_version(tensor) for tensor in given]
        value = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(value) if _is_tensor(leaf)]
        if any(t.is_meta for t in results) and not any(t.is_meta for t in given):
            return value  # its shape is asked for: there is nothing to compute
        if not results and getattr(func, "__name__", "") not in FACTS:
            self.read |= sources
        written = [t for t, version in zip(given, versions, strict=True) if _version(t) != version]
        for tensor in (*results, *written):
            self._kept.append(tensor)
            self._sources[memory(tensor)] = sources | self.sources(tensor)
        for i, part in enumerate(value if issubclass(type(value), (tuple, list)) else [value]):
            if _is_tensor(part) and all(part is not tensor for tensor in given):
                self._made[id(part)] = Made(part, func, args, kwargs, None if part is value else i)
        return value

    def use(self, tracer: Any, tensor: torch.Tensor) -> Any:
        """A proxy of what `tensor` is, computed in the graph; None where it has to be a constant.

        tracer: has `create_proxy`, and `node_to_qualname` for the names of nodes.
        """
        made = self._made.get(id(tensor))
        if made is None or not self._is_so(made):
            self.read |= self.sources(tensor)
            return None
        if made.proxy is None:
            call = made.as_node()
            if call is None:
                self.read |= self.sources(tensor)
                return None
            source = min(self.sources(tensor))
            with torch.enable_grad():
                made.proxy = _named(tracer, source, tracer.create_proxy(*call, made.kwargs))
                if made.part is not None:
                    made.proxy = _named(tracer, source, made.proxy[made.part])
        return made.proxy

    def use_all(self, tracer: Any) -> None:
        """Compute all that was made so far now, as the graph is about to write into a buffer."""
        read = set(self.read)
        for made in list(self._made.values()):
            if made.proxy is None:
                self.use(tracer, made.tensor)
        self.read = read

    def _is_so(self, made: Made) -> bool:
        """Whether the call still makes this value, of which the size depends on no values."""
        self.off = True
        try:
            with torch.no_grad():
                size = made.again(lambda value: value.to("meta") if _is_tensor(value) else value).shape
                return size == made.tensor.shape and (made.tensor.is_meta or is_same(made.again(), made.tensor))
        except Exception:  # its size depends on values, say: a constant, of which `read` tells
            return False
        finally:
            self.off = False


def _named(tracer: Any, source: str, proxy: Any) -> Any:
    """The proxy, with the node named after the buffer, so that the names of other nodes stay torchvision's."""
    if issubclass(type(proxy), fx.Proxy):
        taken, name = set(tracer.node_to_qualname.values()), proxy.node.name.rstrip("0123456789").rstrip("_")
        names = [f"{source}.{name}", *(f"{source}.{name}_{i}" for i in range(1, len(taken) + 2))]
        tracer.node_to_qualname[proxy.node] = next(each for each in names if each not in taken)
    return proxy


def _is_tensor(value: Any) -> bool:
    return issubclass(type(value), torch.Tensor)  # isinstance may take a proxy for one


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def is_same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    """Whether both hold the same values, in the same dtype and place; False where that cannot be seen."""
    if a is None or (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, torch.strided) or a.is_meta:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def memory(tensor: torch.Tensor) -> Any:
    """What tensors have in common that are views of one."""
    try:
        return tensor.untyped_storage()._cdata
    except Exception:  # a sparse tensor has none
        return "tensor", id(tensor)


def noted(stage_modules: Sequence[tuple[nn.Module, nn.Module]], names: set[str], root: nn.Module) -> None:
    """Note for the model's own modules that these buffers' values are in a graph.

    stage_modules: (module of the traced copy, the model's own module). root: of the copy.
    """
    read = {id(buffer): buffer for name, buffer in root.named_buffers(remove_duplicate=False) if name in names}
    for module, own in stage_modules:
        for name, buffer in module._buffers.items():
            if id(buffer) in read and name in own._buffers:
                READ.note(own, name, read[id(buffer)])
