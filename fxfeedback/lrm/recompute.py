"""An unrolled graph as it is run: the same values in less memory and time.

`brief` (without gradients), `lean` and `segmented` (with them) take an unrolled graph and return one; every step is one
walk over the nodes.
"""

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from fxfeedback.graph.effects import drop_unused
from fxfeedback.graph.nodes import inherit, specs_of
from fxfeedback.graph.operands import operand
from fxfeedback.graph.specs import Spec
from fxfeedback.lrm.modulation import Modulation, modulate
from fxfeedback.rules.ops import linear_of_passes

RELUS = (F.relu, torch.relu, torch.Tensor.relu)


# -- without gradients ------------------------------------------------------------------------------------------------


def brief(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with each modulation as one call, which works on a few samples at a time and in place."""
    for step in (_modulate, _rectify_once):
        step(module.graph, module)
    drop_unused(module.graph)
    module.recompile()
    return module


# -- what every backward pass can do without --------------------------------------------------------------------------


def lean(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with each modulation as one call, which computes its blocks again; without a ReLU of what is one;
    with the passes' errors of a linear layer's weight summed in place."""
    graph = module.graph
    for step in (_modulate, _rectify_once, _sum_in_place):
        step(graph, module)
    drop_unused(graph)
    module.recompile()
    return module


def _modulate(graph: fx.Graph, root: nn.Module) -> None:
    modulated = ((torch.addcmul, "multiply"), (torch.add, "add"))
    for node, mode in [(n, mode) for f, mode in modulated for n in graph.find_nodes(op="call_function", target=f)]:
        y, *factors, modulation = node.args if len(node.args) > 1 else (None, None)
        blocks = _blocks(modulation, root) if factors == ([y] if mode == "multiply" else []) else []
        if blocks:
            relu = next((user for user in node.users if user.target is torch.relu and len(node.users) == 1), None)
            with graph.inserting_before(node):
                shares = [(graph.get_attr(block.target), *block.args[::2]) for block in blocks]
                value = graph.call_function(modulate, (y, shares, "relu" if relu else "none", mode))
            inherit(value, y)
            (relu or node).replace_all_uses_with(value)


def _blocks(modulation: Any, root: nn.Module) -> list[fx.Node]:
    """The calls of blocks that Σ m is the sum of; none where it is not such a sum."""
    if not isinstance(modulation, fx.Node):
        return []
    if modulation.op == "call_module":
        return [modulation] if isinstance(root.get_submodule(str(modulation.target)), Modulation) else []
    if modulation.target is not operator.add:
        return []
    first, second = (_blocks(part, root) for part in modulation.args)
    return first + second if first and second else []


def _rectify_once(graph: fx.Graph, root: nn.Module) -> None:
    for node in graph.nodes:
        if node.target in RELUS:
            (source,) = node.all_input_nodes
            if source.target is modulate and source.args[2] == "relu":
                node.replace_all_uses_with(source)


def _sum_in_place(graph: fx.Graph, root: nn.Module) -> None:
    linears = graph.find_nodes(op="call_function", target=F.linear)
    weights = [operand(node, "weight") for node in linears]
    handed_on: dict[fx.Node, fx.Node] = {}
    for node, weight in zip(linears, weights, strict=True):
        if weights.count(weight) > 1:
            arguments = (operand(node, "input"), handed_on.get(weight, weight), operand(node, "bias"))
            with graph.inserting_before(node):
                both = graph.call_function(linear_of_passes, arguments)
                value, handed_on[weight] = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
            inherit(both, node)
            inherit(value, node)
            node.replace_all_uses_with(value)


# -- segments ---------------------------------------------------------------------------------------------------------


def segmented(module: fx.GraphModule) -> fx.GraphModule:
    """The graph as a sequence of segments, each of which is computed again in the backward pass from what it reads."""
    given = [node for node in module.graph.nodes if node.op in ("placeholder", "get_attr")]
    buffers = {name for name, _ in module.named_buffers()}
    graph = fx.Graph()
    values = {node: graph.node_copy(node) for node in given}
    for nodes in _segments(module.graph):
        inside = set(nodes)
        read = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
        advanced = [node for node in read if node.op == "get_attr" and node.target in buffers]
        reads = [*advanced, *(node for node in read if node not in advanced)]
        results = [node for node in nodes if not inside.issuperset(node.users)]
        run = _checkpointed(_graph_of(nodes, reads, results, module), len(advanced))
        call = graph.call_function(run, tuple(values[node] for node in reads))
        values.update((node, graph.call_function(operator.getitem, (call, i))) for i, node in enumerate(results))
    graph.output(fx.map_arg(module.graph.output_node().args[0], values.__getitem__))
    return fx.GraphModule(module, graph, "Segmented")


def _segments(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Consecutive nodes that compute, cut where fewer bytes are alive than before and after."""
    last_reader = {source: node for node in graph.nodes for source in node.all_input_nodes}
    segment: list[fx.Node] = []
    falling = False
    for node in graph.nodes:
        if node.op.startswith("call"):
            change = sum(-_bytes(source) for source in node.all_input_nodes if last_reader[source] is node)
            change += _bytes(node) if node in last_reader else 0
            if falling and change > 0:
                yield segment
                segment = []
            falling = change < 0 or (falling and change == 0)
            segment.append(node)
    yield segment


def _bytes(node: fx.Node) -> int:
    """Bytes of a value; parameters and the model's inputs stay alive anyway."""
    specs = specs_of(node) if node.op.startswith("call") else None
    specs = specs if isinstance(specs, tuple) else (specs,)
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs if isinstance(spec, Spec))


def _graph_of(
    nodes: Sequence[fx.Node], reads: Sequence[fx.Node], results: Sequence[fx.Node], root: nn.Module
) -> fx.GraphModule:
    graph = fx.Graph()
    values = {node: graph.placeholder(node.name) for node in reads}
    for node in nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in results))
    return fx.GraphModule(root, graph, "Segment")


def _checkpointed(run: fx.GraphModule, n_buffers: int) -> Callable[..., Any]:
    """`run` under torch's checkpointing. Buffers, its first arguments, advance once."""

    def segment(*args: Any) -> Any:
        buffers, others = args[:n_buffers], args[n_buffers:]
        unchanged = _Unchanged([*run.buffers(), *buffers])
        return checkpoint(
            lambda *others: run.forward(*buffers, *others),
            *others,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), unchanged),
        )

    return segment


class _Unchanged:
    """Tensors that are afterwards as they were before; as often as it is entered."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tensors

    def __enter__(self) -> None:
        self.before = [tensor.detach().clone() for tensor in self.tensors]

    def __exit__(self, *error: Any) -> None:
        for tensor, before in zip(self.tensors, self.before, strict=True):
            tensor.data.copy_(before)  # through .data: no backward pass reads them
