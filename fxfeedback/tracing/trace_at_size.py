"""Trace code that looks at sizes, for inputs of one size, by proxies that know their shapes.

`trace_at` does so with a model; `open_modules` with attention, recurrent modules and functions of the model's.
"""

import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxfeedback.errors import TraceError
from fxfeedback.graph.nodes import is_users
from fxfeedback.graph.shapes import EXAMPLE_BATCH, at_batch, on_meta, plain
from fxfeedback.rules.ops import put_at
from fxfeedback.tracing.arguments import Form, form_of
from fxfeedback.tracing.trace import PathTracer, trace_with
from fxfeedback.tracing.while_tracing import untraced

BATCHES = (EXAMPLE_BATCH, 1009)
"""Two batch sizes: what is the same at both has nothing to do with the batch, as 2 // 4 would have with 3 // 4."""
SETTLED = (torch.dtype, torch.layout, torch.memory_format)
"""Kinds of facts that are the same in every call of one size and dtype."""
QUESTIONS = ("is_floating_point", "is_complex", "is_signed", "is_sparse", "is_quantized", "is_conj", "is_neg")
"""What is asked of a tensor's dtype and layout with yes or no."""
CHANGING = (
    "stride",
    "storage_offset",
    "data_ptr",
    "storage",
    "untyped_storage",
    "is_leaf",
    "grad",
    "grad_fn",
    "_version",
)
"""What may differ from call to call at one size, and is not known."""
OUT_OF_PLACE = {"add_": operator.add, "sub_": operator.sub, "mul_": operator.mul, "div_": operator.truediv}


@dataclass
class Either:
    """What is answered to questions on which nothing should depend."""

    requires_grad: bool
    is_contiguous: bool
    asked: bool = False


class Shapes:
    """What each node of a growing graph is on the meta device, at two batch sizes: tensors without data, and numbers.

    examples: one tensor per input, batch first; only sizes and dtypes matter.
    """

    def __init__(self, root: Any, examples: Sequence[torch.Tensor]) -> None:
        self.root, self.examples = root, list(examples)
        self.runs: tuple[dict[fx.Node, Any], ...] = ({}, {})
        self.running = False
        self.either: Either | None = None  # None: to ask for it is an error
        self.device = next((p.device for p in root.parameters()), torch.device("cpu"))

    def run(self, node: fx.Node) -> None:
        """Note what `node` is, as far as its arguments are known; who does not run here has no shape.

        Raises:
            RuntimeError: called while it runs: a proxy among the values makes nodes without end, each in a device mode.
        """
        if self.running:
            raise RuntimeError(f"a stand-in got among the values that it stands for, at {node}")
        if _asked(node) in CHANGING:
            return
        index = sum(other.op == "placeholder" for other in node.graph.nodes) - 1 if node.op == "placeholder" else 0
        self.running = True
        try:
            with torch.device("meta"), torch.no_grad():
                values = [self._value(node, run, batch, index) for run, batch in zip(self.runs, BATCHES, strict=True)]
        except Exception:
            return
        finally:
            self.running = False
        for run, value in zip(self.runs, values, strict=True):
            run[node] = value

    def of(self, node: fx.Node) -> list[Any] | None:
        """What the node is at both batch sizes, or None."""
        return [run[node] for run in self.runs] if node in self.runs[0] else None

    def fact(self, node: fx.Node) -> Any:
        """What the node is, where it is a number or another fact that the batch has no say in; NotImplemented else."""
        small, large = self.of(node) or (None, None)
        if not isinstance(small, (int, *SETTLED)) or type(small) is not type(large) or small != large:
            return NotImplemented
        if type(small) is bool:
            asked = _asked(node)
            same = (asked == "eq" and small) or (asked == "ne" and not small)  # at two batch sizes, so at every one
            return small if same or asked in QUESTIONS or self._is_beyond(node) else NotImplemented
        return small

    def _is_beyond(self, node: fx.Node) -> bool:
        """Whether the node compares a number that grows with the batch with one that batch 1 is beyond already."""
        if _asked(node) not in ("gt", "ge", "lt", "le", "eq", "ne") or not isinstance(node.args[0], fx.Node):
            return False
        small, large = self.of(node.args[0]) or (None, None)
        if type(small) is not int or type(large) is not int or not isinstance(node.args[1], int):
            return False
        slope, rest = divmod(large - small, BATCHES[1] - BATCHES[0])
        least = small - slope * (BATCHES[0] - 1)
        exceeds = least >= node.args[1] if _asked(node) in ("ge", "lt") else least > node.args[1]
        return rest == 0 and slope > 0 and exceeds

    def answer(self, question: str) -> bool:
        """To a question about a tensor on which nothing should depend."""
        if self.either is None:
            raise ValueError(f"it asks for a tensor's {question}, which may differ from call to call")
        self.either.asked = True
        return getattr(self.either, question)

    def tensor(self, node: fx.Node) -> Any:
        """The parameter or buffer of a get_attr node."""
        path, _, leaf = str(node.target).rpartition(".")
        with untraced():
            return getattr(self.root.get_submodule(path), leaf)

    def _value(self, node: fx.Node, run: dict[fx.Node, Any], batch: int, index: int) -> Any:
        if node.op == "placeholder":
            example = self.examples[index]
            return at_batch(batch, example)

        def look(source: fx.Node) -> Any:
            if source not in run and source.op == "get_attr":  # tracing makes these without a proxy
                run[source] = self._value(source, run, batch, index)
            return run[source]

        args, kwargs = (plain(fx.map_arg(a, look)) for a in (node.args, node.kwargs))
        if node.op == "get_attr":
            return self.tensor(node).to("meta")
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


def _asked(node: fx.Node) -> str:
    """The attribute, method or function that the node is a call of."""
    if node.target is getattr:
        return str(node.args[1])
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


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
        return super().__getattr__(name)

    def written(self, method: str, other: Any) -> Any:
        """What is left of x += y: a buffer counts in the graph, too; of others there is a new one, if it is no part."""
        if self.node.op == "get_attr":
            self.tracer.create_proxy("call_method", method, (self, other), {})
            return self
        if self.is_part():
            raise ValueError("it writes into a part of a tensor, of which only the size says what it is")
        return OUT_OF_PLACE[method](self, other)

    def is_part(self) -> bool:
        """Whether it is x[index] of a tensor."""
        values = self.tracer.values(self.node) if self.node.target is operator.getitem else None
        return values is not None and isinstance(values[0], torch.Tensor)

    def __iadd__(self, other: Any) -> Any:
        return self.written("add_", other)

    def __isub__(self, other: Any) -> Any:
        return self.written("sub_", other)

    def __imul__(self, other: Any) -> Any:
        return self.written("mul_", other)

    def __itruediv__(self, other: Any) -> Any:
        return self.written("div_", other)


class Shaped(StandIn):
    """A proxy of a tensor whose shape is known. Sizes are ints, but for batch dimensions, which are proxies.

    Facts about its dtype and layout are answered. Writing into it makes a new value, which the proxy stands for from
    then on; a slice passes it on to the whole.
    """

    is_nested = False
    view_of: "tuple[Shaped, Any] | None" = None

    def __init__(self, node: fx.Node, tracer: Any, small: torch.Tensor, large: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.small, self.large = small, large

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
            part.view_of = self, index
        return part

    def is_part(self) -> bool:
        return False

    def written(self, method: str, other: Any) -> Any:
        if self.view_of is None:
            return super().written(method, other)
        self.becomes(OUT_OF_PLACE[method](self, other))
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
            whole.becomes(put_at(whole, index, self))


class _Tracer(PathTracer):
    """Traces at any size: its proxies know of what kind they are."""

    def __init__(self, model: nn.Module, examples: Sequence[torch.Tensor], form: Form) -> None:
        super().__init__(form)
        self.shapes = Shapes(model, examples)

    def trace(self, root: Any, *args: Any, **kwargs: Any) -> fx.Graph:
        """As torch.fx; what modules make of shapes is asked of those that are traced."""
        self.shapes.root = root
        return super().trace(root, *args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return StandIn(node, self)

    def values(self, node: fx.Node) -> list[Any] | None:
        """What the node is at two batch sizes, where it is known; found out when it is first asked for."""
        for each in node.graph.nodes:
            if self.shapes.of(each) is None:
                self.shapes.run(each)
        return self.shapes.of(node)


class _TracerAtSize(_Tracer):
    """Traces at one size: whatever the batch has no say in is a number."""

    def __init__(self, model: nn.Module, examples: Sequence[torch.Tensor], either: Either, form: Form) -> None:
        super().__init__(model, examples, form)
        self.shapes.either = either

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
        fact = self.shapes.fact(proxy.node)
        return proxy if fact is NotImplemented else fact

    def create_arg(self, a: Any) -> Any:
        return super().create_arg(device_of_inputs(self) if a is self.shapes.device else a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        known = [self.shapes.of(node) for node in (obj.node, *obj.node.all_input_nodes)]
        if any(values and isinstance(values[0], int) and values[0] != values[1] for values in known):
            raise ValueError("its code branches on the batch size, which a graph leaves open")
        return super().to_bool(obj)

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


def trace_at(model: nn.Module, examples: Sequence[torch.Tensor], form: Form | None = None) -> fx.GraphModule:
    """As `trace`, for inputs of the examples' sizes and dtypes: the model's code may look at them, but for the batch's.

    Raises:
        TraceError: torch.fx cannot trace the model at this size, either, or not to the same effect whatever
            x.requires_grad and x.is_contiguous() are.
    """
    form = form or form_of(model, len(examples))

    def attempt(requires_grad: bool, is_contiguous: bool) -> tuple[fx.GraphModule, bool]:
        either = Either(requires_grad, is_contiguous)
        return trace_with(partial(_TracerAtSize, model, examples, either), model, form), either.asked

    try:
        made, asked = attempt(True, False)  # learns, and takes every memory layout
    except TraceError:
        made, asked = attempt(True, True)
    if asked:
        other, _ = attempt(False, True)
        if _meaning(made) != _meaning(other) and not _agree((made, other), examples):
            raise TraceError(
                f"{type(model).__name__} computes something else where x.requires_grad or x.is_contiguous() are "
                "otherwise. They may differ from call to call: let nothing but the way to the same result depend on "
                "them"
            )
    return made


def _agree(modules: Sequence[fx.GraphModule], examples: Sequence[torch.Tensor]) -> bool:
    """Whether the graphs are two ways to compute the same: on random numbers, up to rounding."""
    tensors = [*modules[0].parameters(), *modules[0].buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return False
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    outputs = []
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for module in modules:
            torch.manual_seed(0)
            zeros = [torch.zeros(EXAMPLE_BATCH, *x.shape[1:], dtype=x.dtype, device=device) for x in examples]
            inputs = [torch.randn_like(x) if x.is_floating_point() else x for x in zeros]
            outputs.append(tree_leaves(copy.deepcopy(module)(*inputs)))
    return all(_is_near(*pair) for pair in zip(*outputs, strict=True))


def _is_near(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not a.is_floating_point():
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)
    rounding = {torch.float64: 1e-9, torch.float32: 1e-5}.get(a.dtype, 3e-2)
    return torch.allclose(a, b, rtol=rounding, atol=rounding * float(b.abs().max()), equal_nan=True)


def _meaning(module: fx.GraphModule) -> str:
    """What a graph computes, to compare it with another's; copies into other memory layouts do not count."""
    rows: list[Any] = []
    numbers: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        args, kwargs = (fx.map_arg(a, numbers.__getitem__) for a in (node.args, node.kwargs))
        if node.target == "contiguous":
            numbers[node] = args[0]
            continue
        constant = node.op == "get_attr" and str(node.target).startswith("_tensor_constant")
        numbers[node] = f"value {len(rows)}"
        rows.append((node.op, getattr(module, node.target).tolist() if constant else node.target, args, kwargs))
    return repr(rows)  # as NaN is not equal to itself


def trace_for(
    model: nn.Module, examples: Sequence[torch.Tensor], form: Form | None = None
) -> tuple[fx.GraphModule, bool]:
    """The model's graph for a call of this form, and whether it is one for the examples' sizes and dtypes only.

    Raises:
        TraceError: torch.fx cannot trace the model, not even at this size.
    """
    form = form or form_of(model, len(examples))
    as_graph = getattr(type(model), "as_graph", None)
    if as_graph is not None:  # a model of ours
        args, named = form.fill(examples)
        module, inputs = as_graph(model, args, named)
        places = [node for node in module.graph.nodes if node.op == "placeholder"]
        place_of = {id(x): node for x, node in zip(inputs, places, strict=True)}
        for x in reversed(examples):  # in the order of this form
            next(iter(module.graph.nodes)).prepend(place_of[id(x)])
        return module, bool(getattr(model, "_by_size", True))
    try:
        return trace_with(partial(_Tracer, model, examples), model, form), False
    except TraceError:
        return trace_at(model, examples, form), True
