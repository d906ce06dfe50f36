"""Trace code that looks at sizes, for inputs of one size, by proxies that know their shapes.

`trace_at` does so with a model; `open_modules` with attention, recurrent modules and functions of the model's.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfeedback import einops_backend
from fxfeedback.errors import TraceError
from fxfeedback.nodes import is_users
from fxfeedback.ops import put_at
from fxfeedback.shapes import EXAMPLE_BATCH, on_meta, plain
from fxfeedback.trace import PathTracer, trace, trace_with
from fxfeedback.while_tracing import untraced


class Shapes:
    """What each node of a growing graph is on the meta device, at two batch sizes: tensors without data, and numbers.

    examples: one tensor per input, batch first; only sizes and dtypes matter.
    """

    def __init__(self, root: Any, examples: Sequence[torch.Tensor]) -> None:
        self.root, self.examples = root, list(examples)
        self.runs: tuple[dict[fx.Node, Any], ...] = ({}, {})
        self.device = next((p.device for p in root.parameters()), torch.device("cpu"))
        einops_backend.register(Shaped)

    def run(self, node: fx.Node) -> None:
        """Note what `node` is, as far as its arguments are known; who does not run here has no shape."""
        index = sum(other.op == "placeholder" for other in node.graph.nodes) - 1 if node.op == "placeholder" else 0
        try:
            with torch.device("meta"), torch.no_grad():
                values = [self._value(node, run, EXAMPLE_BATCH + i, index) for i, run in enumerate(self.runs)]
        except Exception:
            return
        for run, value in zip(self.runs, values, strict=True):
            run[node] = value

    def of(self, node: fx.Node) -> list[Any] | None:
        """What the node is at both batch sizes, or None."""
        return [run[node] for run in self.runs] if node in self.runs[0] else None

    def _value(self, node: fx.Node, run: dict[fx.Node, Any], batch: int, index: int) -> Any:
        if node.op == "placeholder":
            example = self.examples[index]
            return torch.empty(batch, *example.shape[1:], dtype=example.dtype)

        def look(source: fx.Node) -> Any:
            if source not in run and source.op == "get_attr":  # tracing makes these without a proxy
                run[source] = self._value(source, run, batch, index)
            return run[source]

        args, kwargs = (plain(fx.map_arg(a, look)) for a in (node.args, node.kwargs))
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            with untraced():
                return getattr(self.root.get_submodule(path), leaf).to("meta")
        if node.target is F.batch_norm:  # its kernel for meta tensors takes milliseconds to say this
            return torch.empty_like(args[0])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if not (node.op == "call_module" or is_users(node.target)):
            return node.target(*args, **kwargs)  # type: ignore[operator]
        with untraced():  # takes a tenth of a millisecond
            if node.op == "call_module":
                return on_meta(self.root.get_submodule(str(node.target)), args, kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]


class Shaped(fx.Proxy):
    """A proxy of a tensor whose shape is known. Sizes are ints, but for batch dimensions, which are proxies.

    Writing into it makes a new value, which the proxy stands for from then on; a slice passes it on to the whole.
    """

    node: fx.Node
    is_nested = False
    view_of: "tuple[Shaped, Any] | None" = None

    def __init__(self, node: fx.Node, tracer: Any, small: torch.Tensor, large: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.small, self.large = small, large

    @property
    def shape(self) -> tuple[Any, ...]:
        pairs = enumerate(zip(self.small.shape, self.large.shape, strict=True))
        return tuple(a if a == b else self.tracer.size_node(self, dim) for dim, (a, b) in pairs)

    @property
    def ndim(self) -> int:
        return self.small.ndim

    @property
    def device(self) -> torch.device:
        return self.tracer.shapes.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> Any:
        total = 1
        for size in self.shape:
            total = size * total
        return total

    def __len__(self) -> int:
        if isinstance(self.shape[0], fx.Proxy):
            raise TypeError("len(x) is the batch size, which a graph leaves open: write x.shape[0]")
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        entries = index if isinstance(index, tuple) else (index,)
        if isinstance(part, Shaped) and all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in entries):
            part.view_of = self, index
        return part

    def __setitem__(self, index: Any, value: Any) -> None:
        self.becomes(put_at(self, index, value))

    def becomes(self, value: "Shaped") -> None:
        """From now on the proxy stands for `value`, as after an op in place."""
        self.node, self.small, self.large = value.node, value.small, value.large
        if self.view_of is not None:
            whole, index = self.view_of
            whole[index] = self


class _Tracer(PathTracer):
    """Traces at one size: whatever the batch has no say in is a number."""

    def __init__(self, model: nn.Module, examples: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.shapes = Shapes(model, examples)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        self.shapes.run(node)
        values = self.shapes.of(node)
        if values and all(isinstance(value, torch.Tensor) for value in values):
            return Shaped(node, self, *values)
        return super().proxy(node)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(*args, **kwargs)
        values = self.shapes.of(proxy.node)
        if values and type(values[0]) in (tuple, list) and len(values[0]) == len(values[1]):
            return type(values[0])(proxy[i] for i in range(len(values[0])))
        return values[0] if values and same_number(*values) else proxy

    def create_arg(self, a: Any) -> Any:
        return super().create_arg(device_of_inputs(self) if a is self.shapes.device else a)

    def size_node(self, x: Shaped, dim: int) -> Any:
        return self.create_proxy("call_method", "size", (x, dim), {})

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return elements(obj, self.shapes) or super().iter(obj)


def device_of_inputs(tracer: fx.Tracer) -> fx.Proxy:
    """A node for it, in the place of the device that the model was on in tracing."""
    first = next(node for node in tracer.graph.nodes if node.op == "placeholder")
    return tracer.create_proxy("call_function", getattr, (fx.Proxy(first, tracer), "device"), {})


def elements(x: fx.Proxy, shapes: Shapes | None) -> Iterator[Any] | None:
    """What a loop over a proxy runs through: the parts of a tuple, the rows of a tensor; None where it is not known."""
    values = shapes.of(x.node) if shapes else None
    if not values or not isinstance(values[0], (tuple, list, torch.Tensor)) or len(values[0]) != len(values[1]):
        return None
    return iter([x[i] for i in range(len(values[0]))])


def same_number(small: Any, large: Any) -> bool:
    """Whether a node is one whole number at both batch sizes."""
    return type(small) is type(large) is int and small == large


def trace_at(model: nn.Module, examples: Sequence[torch.Tensor]) -> fx.GraphModule:
    """As `trace`, for inputs of the examples' sizes: the model's code may look at sizes, but for the batch's.

    Raises:
        TraceError: torch.fx cannot trace the model at this size, either.
    """
    return trace_with(_Tracer(model, examples), model, len(examples))


def trace_for(model: nn.Module, examples: Sequence[torch.Tensor]) -> tuple[fx.GraphModule, bool]:
    """The model's graph, and whether it is one for inputs of the examples' sizes only.

    Raises:
        TraceError: torch.fx cannot trace the model, not even at this size.
    """
    try:
        return trace(model, len(examples)), False
    except TraceError:
        return trace_at(model, examples), True
