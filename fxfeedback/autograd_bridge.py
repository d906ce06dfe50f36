"""Let `loss.backward()` run the learner.

`cut` halves the learner's graph where the errors enter; `CounterHebb` is the autograd function whose forward is the
first half and whose backward is the second.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.autograd.function import once_differentiable

from fxfeedback.bottom_up import has_effect
from fxfeedback.counter_hebb_pass import INPUT
from fxfeedback.nodes import identifier
from fxfeedback.shapes import is_structure, leaves_of


@dataclass
class Halves:
    """A learner cut in two.

    attributes: the parameters and buffers, by name, that both halves take as inputs.
    forward: (None, *inputs, *attributes) -> (tensors of the model's output, values for the error pass).
    backward: (None, list of those values and of the errors) -> list of updates; it empties the list.
    updates: names of the updates, in order.
    reached: for each update the numbers of the errors that come to it; None where it needs no error.
    kept: which of the values are inputs, attributes or outputs: they exist anyway, and the user may write into them.
    structure: (None, *tensors of the model's output) -> the output as the model returns it.
    """

    attributes: list[str]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    updates: list[str]
    reached: list[frozenset[int] | None]
    kept: list[bool]
    structure: Callable[..., Any]


def lift(module: fx.GraphModule, more: Sequence[str] = ()) -> tuple[fx.GraphModule, list[str]]:
    """Make parameters and buffers inputs of the graph, behind its own: (graph, their names)."""
    graph = fx.Graph()
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    names = list(dict.fromkeys([str(node.target) for node in module.graph.nodes if node.op == "get_attr"] + list(more)))
    copies = {node: graph.node_copy(node) for node in inputs}
    lifted = {name: graph.placeholder(identifier(name)) for name in names}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            copies[node] = lifted[str(node.target)]
        elif node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(module, graph), names


def cut(joint: fx.GraphModule) -> Halves:
    """Cut a learner where the errors enter: everything that the model's output needs, and everything else."""
    outputs, updates = joint.graph.output_node().args[0]  # type: ignore[misc]
    module, attributes = lift(joint, [name for name in updates if not name.startswith(INPUT)])
    nodes = list(module.graph.nodes)
    outputs, updates = nodes[-1].args[0]  # type: ignore[misc]
    leaves = leaves_of(outputs)

    errors = {node for node in nodes if node.op == "placeholder" and "error" in node.meta}
    late = _closure(errors, nodes, lambda node: node.all_input_nodes)
    needed = set(leaves) | {node for node in nodes[:-1] if has_effect(node) and node not in late}
    early = _closure(needed, nodes[::-1], lambda node: list(node.users))
    # A tuple crosses the cut as the elements that are read: it would keep the others, too.
    early |= {node for node in nodes if _is_picked(node) and node.args[0] in early}
    crossing = [
        node
        for node in nodes
        if node in early and any(user not in early for user in node.users if user is not nodes[-1])
    ]
    crossing += [node for node in updates.values() if node in early and node not in crossing]

    first = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node in early:
            copies[node] = first.node_copy(node, copies.__getitem__)
    first.output(([copies[node] for node in leaves], [copies[node] for node in crossing]))

    second = fx.Graph()
    values = second.placeholder("values")
    handed_over = [*crossing, *(node for node in nodes if node in errors)]
    copies = {node: second.call_function(operator.getitem, (values, i)) for i, node in enumerate(handed_over)}
    second.call_method("clear", (values,))  # each value dies with its last use
    for node in nodes[:-1]:
        if node not in early and node not in copies:
            copies[node] = second.node_copy(node, copies.__getitem__)
    second.output([copies[node] for node in updates.values()])

    entries = [node for node in nodes if node in errors]
    downstream = [_closure({entry}, nodes, lambda node: node.all_input_nodes) for entry in entries]
    shape = fx.Graph()
    places = {leaf: shape.placeholder(leaf.name) for leaf in leaves}

    def rebuild(node: fx.Node) -> fx.Node:
        if not is_structure(node):
            return places[node]
        return shape.call_function(node.target, *fx.map_arg((node.args, node.kwargs), rebuild))

    shape.output(fx.map_arg(outputs, rebuild))

    return Halves(
        attributes,
        type(fx.GraphModule(module, first, "Forward")).forward,
        type(fx.GraphModule(module, second, "Backward")).forward,
        list(updates),
        [
            frozenset(i for i, reached in enumerate(downstream) if node in reached) if node in late else None
            for node in updates.values()
        ],
        [node in leaves or (node.op == "placeholder" and "gate" not in node.meta) for node in crossing],
        type(fx.GraphModule(nn.Module(), shape, "Output")).forward,
    )


def _is_picked(node: fx.Node) -> bool:
    """Whether the node is one element of a tuple, or one row."""
    return node.target is operator.getitem and isinstance(node.args[1], int)


def _closure(
    start: set[fx.Node], order: Sequence[fx.Node], before: Callable[[fx.Node], Sequence[fx.Node]]
) -> set[fx.Node]:
    """`start` and, walking in `order`, every node next to one that is in already."""
    reached = set(start)
    for node in order:
        if node.op != "output" and any(neighbour in reached for neighbour in before(node)):
            reached.add(node)
    return reached


class CounterHebb(torch.autograd.Function):
    """The learner as an autograd function: backward runs the error pass and returns the updates as gradients."""

    @staticmethod
    def forward(ctx: Any, halves: Halves, names: Sequence[str], *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """names: of `values`, the graph's inputs and attributes. Returns the tensors of the model's output."""
        outputs, saved = halves.forward(None, *values)
        ctx.halves, ctx.names = halves, names
        kept = halves.kept
        if torch.compiler.is_compiling():  # torch.compile frees by itself what autograd saves, and knows no other way
            kept = [isinstance(value, torch.Tensor) for value in saved]
        ctx.save_for_backward(*(value if keep else None for value, keep in zip(saved, kept, strict=True)))
        ctx.between = [None if keep else value for value, keep in zip(saved, kept, strict=True)]
        ctx.mark_non_differentiable(*(value for value in outputs if not value.is_floating_point()))
        ctx.set_materialize_grads(False)
        ctx.like = [(value.shape, value.dtype, value.device) for value in outputs if value.is_floating_point()]
        ctx.floating = [value.is_floating_point() for value in outputs]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *errors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = [b if b is not None else a for a, b in zip(ctx.saved_tensors, ctx.between, strict=True)]
        if not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.between = [None] * len(saved)
        given = [error for error, floating in zip(errors, ctx.floating, strict=True) if floating]
        arrived = {i for i, error in enumerate(given) if error is not None}
        for (shape, dtype, device), error in zip(ctx.like, given, strict=True):
            saved.append(torch.zeros(shape, dtype=dtype, device=device) if error is None else error)
        results = zip(ctx.halves.updates, ctx.halves.reached, ctx.halves.backward(None, saved), strict=True)
        # As autograd has it, what only unused outputs depend on gets nothing rather than zeros.
        updates = {name: update for name, reached, update in results if reached is None or reached & arrived}
        return None, None, *(updates.get(name) for name in ctx.names)
