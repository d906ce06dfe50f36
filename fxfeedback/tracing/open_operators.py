"""Open what has no rule into PyTorch's own decomposition of it: the operators that it calls when it runs.

PyTorch writes most of its operators in terms of a small core of others; a run on tensors without data shows which. It
is the last opening of all: what has a rule keeps its name, its fused kernel and its gate.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.effects import has_effect
from fxfeedback.graph.nodes import inherit, is_users, name_of, specs_of, tell, unopened
from fxfeedback.graph.operands import is_element, is_floating, passes
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.specs import EXAMPLE_BATCH, Spec
from fxfeedback.graph.structures import plain, unpack_tuples
from fxfeedback.graph.values import Emitter, Value, batch_size
from fxfeedback.rules import RULES
from fxfeedback.tracing.aten import emit, is_spelled
from fxfeedback.tracing.tensors import Tensors
from fxfeedback.tracing.while_tracing import quiet_torch

BATCHES = (7, 1009)
"""Two batch sizes at which an op is taken apart: a number that differs between the two grows with the batch."""


def open_operators(module: fx.GraphModule, examples: Sequence[torch.Tensor], owner: nn.Module) -> None:
    """Open, in place, the calls without a rule that a counter neuron has to pass.

    One that PyTorch does not decompose stays, and the reason is said of it (`nodes.unopened`).

    Args:
        module: an opened graph with shapes, and with a node for each tensor of a tuple.
        examples: the inputs that its shapes are of.
        owner: the model, on which constants of decompositions become buffers.
    """
    tensors = Tensors(owner, module)
    learned = _learned(module.graph, tensors)
    waiting = [node for node in module.graph.nodes if node in learned and passes(node) and not _has_rule(node)]
    made: dict[Any, list[fx.GraphModule]] = {}
    for node in waiting:
        try:
            call = _call_of(node, learned)
            if call not in made:
                with quiet_torch():
                    made[call] = [_decomposed(node, batch, learned) for batch in BATCHES]
            replaced = _Opening(node, tensors).replace(*made[call])
            learned |= {new for old, new in replaced.items() if old in learned}
        except Exception as error:
            tell(node, unopened=str(error).partition("\n")[0])
    if any(unopened(node) is None for node in waiting):
        module.graph.eliminate_dead_code(is_impure_node=has_effect)
        module.recompile()
        annotate_shapes(module, examples)
        unpack_tuples(module)


def _learned(graph: fx.Graph, tensors: Tensors) -> set[fx.Node]:
    """What gets a gradient: what depends on inputs and parameters."""
    parameters = [n for n in graph.nodes if n.op == "get_attr" and isinstance(tensors.by_name[n.target], nn.Parameter)]
    bu = BottomUp(graph)
    return bu.below(node for node in (*parameters, *bu.inputs) if is_floating(node))


def _has_rule(node: fx.Node) -> bool:
    """Whether a rule takes the call; code of the user's has none in PyTorch to open into either."""
    if node.target not in RULES:
        return is_element(node) or is_users(node.target) or hasattr(node.target, "autograd_function")
    try:
        RULES[node.target].operands(node.args, node.kwargs)
    except TypeError:
        return False
    return True


def _decompositions() -> dict[Any, Any]:
    """Those of operators without a function that has a rule, but for random ones: they draw other numbers."""
    return {
        operator: decomposition
        for operator, decomposition in decomposition_table.items()
        if not is_spelled(operator) and torch.Tag.nondeterministic_seeded not in getattr(operator, "tags", ())
    }


def _call_of(node: fx.Node, learned: set[fx.Node]) -> Any:
    """What two calls have in common that have the same decomposition: all but the values of their inputs."""
    places = {source: i for i, source in enumerate(node.all_input_nodes)}
    arguments = repr(fx.map_arg((node.args, node.kwargs), lambda source: places[source]))
    facts = [specs_of(x) or tuple(_value(x, batch) for batch in BATCHES) for x in places]
    return node.target, arguments, tuple(facts), tuple(x in learned for x in places)


class _WithGradient(TorchFunctionMode):
    """Refuses what a function computes under torch.no_grad(), which a graph does not know."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.is_grad_enabled():
            raise ValueError("it computes under torch.no_grad()")
        return func(*args, **(kwargs or {}))


def _decomposed(node: fx.Node, batch: int, learned: set[fx.Node]) -> fx.GraphModule:
    """The operators that the node's function calls at this batch size; its tensors are the placeholders, in order."""
    sources = _tensors(node)
    sizes = {source: _value(source, batch) for source in node.all_input_nodes if source not in sources}

    def run(*tensors: Any) -> Any:
        values = dict(zip(sources, tensors, strict=True)) | sizes
        args, kwargs = (plain(fx.map_arg(a, values.__getitem__)) for a in (node.args, node.kwargs))
        with torch.enable_grad(), _WithGradient(), sdpa_kernel(SDPBackend.MATH):  # which is made of the core's ops
            return node.target(*args, **kwargs)  # type: ignore[operator]

    with FakeTensorMode():
        examples = [_value(source, batch) for source in sources]
        pairs = zip(examples, sources, strict=True)
        results = tree_leaves(run(*(x.clone().requires_grad_(source in learned) for x, source in pairs)))

    def differentiated(*tensors: Any) -> Any:
        """A result that autograd passes nothing on from, as the mean that a layer norm also returns, is detached."""
        made = tree_leaves(run(*tensors))
        return [
            y if y is None or like.requires_grad or not (y.is_floating_point() or y.is_complex()) else y.detach()
            for y, like in zip(made, results, strict=True)
        ]

    table = _decompositions()
    traced = make_fx(differentiated, table, tracing_mode="fake")(*examples)
    for written in traced.graph.find_nodes(op="call_function", target=torch.ops.prims.copy_to.default):
        written.target = torch.ops.aten.copy_.default
    traced.recompile()
    # Decompositions write into what they have made: once more, without.
    return make_fx(torch.func.functionalize(traced), table, tracing_mode="fake")(*examples)


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors among its inputs; the others are sizes."""
    return [source for source in node.all_input_nodes if isinstance(specs_of(source), Spec)]


def _value(node: fx.Node, batch: int) -> Any:
    """What the node is at this batch size: a tensor without data, or a size that is computed from one."""
    spec = specs_of(node)
    if not isinstance(spec, Spec):
        with FakeTensorMode():
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: _value(source, batch))
            return node.target(*args, **kwargs)  # type: ignore[operator]
    shape = [size + slope * (batch - EXAMPLE_BATCH) for size, slope in zip(spec.shape, spec.per_sample, strict=True)]
    return torch.empty(shape, dtype=spec.dtype)


class _Emitter(Emitter):
    """A BU graph has functions only, x.to(...) among them."""

    def create_proxy(self, kind: str, target: Any, *rest: Any, **kwargs: Any) -> Value:
        if kind == "call_method":
            kind, target = "call_function", getattr(torch.Tensor, target)
        return super().create_proxy(kind, target, *rest, **kwargs)


class _Opening:
    """One walk over a decomposition; `values` maps its nodes to proxies in the graph of the node that is opened."""

    def __init__(self, node: fx.Node, tensors: Tensors) -> None:
        self.node, self.tensors = node, tensors
        self.emitter = _Emitter()
        self.emitter.graph = node.graph
        self.values: dict[fx.Node, Any] = {}

    @functools.cached_property
    def device(self) -> Any:
        """The device at run time: that of the node's first input."""
        return self.emitter.create_proxy(
            "call_function", getattr, (fx.Proxy(self.node.all_input_nodes[0]), "device"), {}
        )

    def replace(self, first: fx.GraphModule, second: fx.GraphModule) -> dict[fx.Node, fx.Node]:
        """Put the operators of a decomposition, as it is at both batch sizes, in the place of the node.

        Returns what its users read now, by what they read before.

        Raises:
            ValueError: it computes in another way at the other batch size.
        """
        sources = iter(_tensors(self.node))
        last = self.node.prev
        try:
            with self.node.graph.inserting_before(self.node):
                inputs = [self.emitter.proxy(node) for node in self.node.graph.nodes if node.op == "placeholder"]
                self.emitter.batch = batch_size(value for value in inputs if isinstance(value.spec, Spec))
                for a, b in zip(first.graph.nodes, second.graph.nodes, strict=True):
                    if (a.op, a.target) != (b.op, b.target):
                        raise ValueError("it computes in another way at another batch size")
                    if a.op == "placeholder":
                        self.values[a] = self.emitter.proxy(next(sources))
                    elif a.op == "get_attr":
                        self.values[a] = self.constant(getattr(first, a.target))
                    else:
                        self.values[a] = self.run(a, b)
        except Exception:
            while self.node.prev is not last:
                self.node.graph.erase_node(self.node.prev)
            raise
        return self.hand_over(self.values[a], last)

    def run(self, a: fx.Node, b: fx.Node) -> Any:
        """What a node of the decomposition computes, which has the arguments `a` has and `b` at the two batch sizes."""
        args, kwargs = self.both(a.args, b.args), self.both(a.kwargs, b.kwargs)
        if a.op == "output":
            return args[0]
        if a.target is operator.getitem:
            return args[0][args[1]]
        value = emit(
            self.emitter, a.target, args, {k: v for k, v in kwargs.items() if k not in ("layout", "pin_memory")}
        )
        if isinstance(value, fx.Proxy):
            tell(value.node, spec=_spec(a.meta["val"], b.meta["val"]))
        return value

    def both(self, a: Any, b: Any) -> Any:
        """An argument that holds at every batch size."""
        if isinstance(a, fx.Node):
            return self.values[a]
        if isinstance(a, (list, tuple)):
            return type(plain(a))(self.both(*pair) for pair in zip(a, b, strict=True))
        if isinstance(a, dict):
            return {key: self.both(value, b[key]) for key, value in a.items()}
        if isinstance(a, torch.device):
            return self.device
        if type(a) is int and type(b) is int and a != b:
            return self.emitter.size(_grown([a], [b], torch.int64), 0)
        if repr(a) != repr(b):
            raise ValueError("a number in it depends on the batch size")
        return a

    def constant(self, tensor: torch.Tensor) -> Any:
        """A tensor that the function itself has made."""
        if tensor not in self.tensors:
            self.tensors.keep_constant(tensor)
        return self.emitter.attribute(self.tensors.name_of(tensor))

    def hand_over(self, output: Any, last: fx.Node) -> dict[fx.Node, fx.Node]:
        """The users of the node read what the decomposition has computed."""
        added = []
        while last.next is not self.node:
            last = last.next
            added.append(last)
            inherit(last, self.node, name=f"{name_of(self.node)}.{last.name}", spec=specs_of(last))
            last.stack_trace = self.node.stack_trace
        for unread in [user for user in self.node.users if is_element(user) and not user.users]:
            unread.graph.erase_node(unread)
        if isinstance(specs_of(self.node), tuple):
            replaced = {user: output[user.args[1]].node for user in self.node.users}
        else:
            (value,) = output
            tell(value.node, name=name_of(self.node))
            replaced = {self.node: value.node}
        for old, new in replaced.items():
            old.replace_all_uses_with(new)
            old.graph.erase_node(old)
        if self.node not in replaced:
            self.node.graph.erase_node(self.node)
        return replaced


def _spec(a: Any, b: Any) -> Any:
    """What the values at the two batch sizes say of a node."""
    if not isinstance(a, torch.Tensor):
        return tuple(map(_spec, a, b)) if isinstance(a, (tuple, list)) else None
    return _grown(a.shape, b.shape, a.dtype)


def _grown(a: Sequence[int], b: Sequence[int], dtype: torch.dtype) -> Spec:
    """What has these sizes at the two batch sizes."""
    slopes = []
    for small, large in zip(a, b, strict=True):
        slope, rest = divmod(large - small, BATCHES[1] - BATCHES[0])
        if rest:
            raise ValueError("a size in it does not grow evenly with the batch size")
        slopes.append(slope)
    shape = [size - slope * (BATCHES[0] - EXAMPLE_BATCH) for size, slope in zip(a, slopes, strict=True)]
    return Spec(tuple(shape), tuple(slopes), dtype)
