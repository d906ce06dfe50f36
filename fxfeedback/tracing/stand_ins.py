"""Proxies that know what they stand for: `StandIn` its kind, `Shaped` its shape."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fxfeedback.graph.effects import OPERATORS
from fxfeedback.rules.ops import put_at
from fxfeedback.tracing.known_shapes import Shapes

TENSORS = ("T", "mT", "H", "mH", "real", "imag", "data")
"""Attributes of tensors that are tensors."""
IN_PLACE = {operator.iadd: "add_", operator.isub: "sub_", operator.imul: "mul_", operator.itruediv: "div_"}


class StandIn(fx.Proxy):
    """A proxy that knows what it stands for: see `isinstance_of`."""

    node: fx.Node

    def stands_for(self) -> Any:
        """A value of the kind that a call has here: a parameter, a tensor, a number; itself where it is not known."""
        if self.node.op == "get_attr":
            return self.tracer.shapes.tensor(self.node)
        values = self.tracer.values(self.node)
        return values[0] if values else self

    @property
    def layout(self) -> torch.layout:
        return torch.strided

    def __getattr__(self, name: str) -> Any:
        """As of any proxy; what no tensor has is looked for in the value, for hasattr(x, "tensors")."""
        if not hasattr(torch.Tensor, name):
            values = None if name.startswith("__") else self.tracer.values(self.node)
            if name.startswith("__") or (values and not hasattr(values[0], name)):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in TENSORS:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def written(self, function: Any, other: Any) -> Any:
        """x += y, with operator.iadd: in the graph it is in place, under the name that x + y has."""
        if self.node.op == "get_attr":
            self.tracer.create_proxy("call_method", IN_PLACE[function], (self, other), {})
            return self
        if self.is_number():
            return OPERATORS[function](self, other)
        if self.is_part():
            raise ValueError("it writes into a part of a tensor, of which only the size says what it is")
        name = OPERATORS[function].__name__
        return self.tracer.create_proxy("call_function", function, (self, other), {}, name)

    def is_number(self) -> bool:
        """Whether it is a size, say."""
        values = None if self.node.op == "call_module" else self.tracer.values(self.node)
        return values is not None and not isinstance(values[0], torch.Tensor)

    def is_part(self) -> bool:
        """Whether it is x[index] of a tensor."""
        values = self.tracer.values(self.node) if self.node.target is operator.getitem else None
        return values is not None and isinstance(values[0], torch.Tensor)


def _in_place(function: Any) -> Any:
    return lambda self, other: self.written(function, other)


for _function in OPERATORS:
    setattr(StandIn, f"__{_function.__name__.rstrip('_')}__", _in_place(_function))


class Sizes(tuple):
    """A shape whose batch sizes are proxies. It knows whether it equals another where that depends on no batch size."""

    ends: tuple[tuple[int, ...], tuple[int, ...]]
    """The shape at two batch sizes; a size is a line through both."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple):
            return False
        ends = other.ends if isinstance(other, Sizes) else (other, other)
        if self.ends == ends:
            return True
        fixed = [(a, c) for a, b, c, d in zip(*self.ends, *ends, strict=False) if type(c) is int and (a, c) == (b, d)]
        if len(self) != len(other) or any(a != c for a, c in fixed):
            return False
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


class Shaped(StandIn):
    """A proxy of a tensor whose shape is known. Sizes are ints, but for batch dimensions, which are proxies.

    Facts about its dtype and layout are answered. Writing into it makes a new value, which the proxy stands for from
    then on; a slice passes it on to the whole.
    """

    is_nested = False
    view_of: "tuple[Shaped, Any] | None" = None
    seen: "fx.Node | None" = None  # the node of what it is a view of, when it was read from there

    def __init__(self, node: fx.Node, tracer: Any, small: torch.Tensor, large: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.small, self.large = small, large

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """A slice is read again where the whole has been written into."""
        if self.view_of is not None and self.view_of[0].node is not self.seen:
            whole, index = self.view_of
            self.seen = whole.node
            self.present = fx.Proxy.__getitem__(whole, index).node
        return self.present

    @node.setter
    def node(self, node: fx.Node) -> None:
        self.present = node

    def stands_for(self) -> Any:
        return self.tracer.shapes.tensor(self.node) if self.node.op == "get_attr" else self.small

    def __getattr__(self, name: str) -> Any:
        """A method, which waits for its call, or the value of an attribute."""
        what = getattr(torch.Tensor, name)
        if callable(what):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    @property
    def requires_grad(self) -> bool:
        return self.tracer.shapes.answer("requires_grad")

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        return self.tracer.shapes.answer("is_contiguous")

    @property
    def shape(self) -> tuple[Any, ...]:
        ends = tuple(self.small.shape), tuple(self.large.shape)
        pairs = enumerate(zip(*ends, strict=True))
        sizes = Sizes(a if a == b else self.tracer.size_node(self, dim) for dim, (a, b) in pairs)
        sizes.ends = ends
        return sizes

    @property
    def ndim(self) -> int:
        return self.small.ndim

    @property
    def device(self) -> torch.device:
        return self.tracer.shapes.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

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
            part.view_of, part.seen = (self, index), self.node
        return part

    def is_part(self) -> bool:
        return False

    def is_number(self) -> bool:
        return False

    def written(self, function: Any, other: Any) -> Any:
        if self.node.op == "get_attr":
            return super().written(function, other)
        value = OPERATORS[function](self, other) if self.view_of else super().written(function, other)
        if value is not self:
            self.becomes(value)
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        view = value.view_of if issubclass(type(value), Shaped) else None
        if not (view and view[0] is self and view[1] is index):  # x[i] += y, which has written already
            self.becomes(put_at(self, index, value))

    def becomes(self, value: "Shaped") -> None:
        """From now on the proxy stands for `value`, as after an op in place."""
        self.node, self.small, self.large = value.node, value.small, value.large
        if self.view_of is not None:
            whole, index = self.view_of
            whole.becomes(put_at(whole, index, value))


def lacks_batch(input: Any, ndim: int) -> bool:
    """Whether a value is known to have one dimension less than `ndim`: torch takes it for a batch of one."""
    return isinstance(input, Shaped) and input.ndim == ndim - 1


def call(function: Callable[..., Any], input: fx.Proxy, *args: Any) -> fx.Proxy:
    """A node that calls a function of ours as a whole, for what cannot run on proxies."""
    return input.tracer.create_proxy("call_function", function, (input, *args), {})


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
