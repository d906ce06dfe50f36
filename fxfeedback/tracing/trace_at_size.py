"""Trace code that looks at sizes, for inputs of one size, by proxies that know their shapes.

`trace_at` does so with a model; `open_modules` with attention, recurrent modules and functions of the model's.
"""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxfeedback.errors import TraceError
from fxfeedback.graph.specs import EXAMPLE_BATCH
from fxfeedback.tracing.arguments import Form, form_of
from fxfeedback.tracing.doors import both, is_final
from fxfeedback.tracing.draws import seed
from fxfeedback.tracing.export_door import export_graph
from fxfeedback.tracing.known_shapes import Either, Shapes
from fxfeedback.tracing.stand_ins import Shaped, Sizes, StandIn, device_of_inputs, elements
from fxfeedback.tracing.trace import PathTracer, trace_with


class _Tracer(PathTracer):
    """Traces at any size: its proxies know of what kind they are."""

    def __init__(self, model: nn.Module, examples: Sequence[torch.Tensor], form: Form) -> None:
        super().__init__(form)
        self.shapes = Shapes(model, examples)

    def trace(self, root: Any, *args: Any, **kwargs: Any) -> fx.Graph:
        """As torch.fx; what modules make of shapes is asked of those that are traced."""
        self.shapes.of_model(root)
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
        self.shapes.note_dtype(proxy.node)
        return proxy if fact is NotImplemented else fact

    def create_arg(self, a: Any) -> Any:
        a = tuple(a) if isinstance(a, Sizes) else a
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
            seed(device, 0)
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
    model: nn.Module, examples: Sequence[torch.Tensor], form: Form | None = None, door: str | None = None
) -> tuple[fx.GraphModule, bool]:
    """The model's graph for a call of this form, and whether it is one for the examples' sizes and dtypes only.

    Args:
        model: a copy made by `share`, as constants of its code become buffers of it.
        examples: one tensor for each input, batch first.
        form: of the call; None: positional tensors.
        door: "fx" or "export"; None: torch.export is tried where torch.fx cannot trace the model (see doors.py).

    Raises:
        TraceError: the model cannot be traced, not even at this size.
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
    if door == "export":
        return export_graph(model, examples, form), True
    try:
        return _trace(model, examples, form)
    except TraceError as by_fx:
        if door == "fx" or is_final(by_fx):
            raise
        try:
            return export_graph(model, examples, form), True
        except TraceError as by_export:
            raise both(by_fx, by_export) from by_fx


def _trace(model: nn.Module, examples: Sequence[torch.Tensor], form: Form) -> tuple[fx.GraphModule, bool]:
    """By torch.fx: for all sizes, or else for those of the examples."""
    try:
        return trace_with(partial(_Tracer, model, examples), model, form), False
    except TraceError:
        return trace_at(model, examples, form), True
