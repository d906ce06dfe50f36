"""Let `loss.backward()` run the learner.

`cut` halves the learner's graph where the errors enter; `CounterHebb` is the autograd function whose forward is the
first half and whose backward is the second. With create_graph=True backward runs on values that replay.py computes
again, so that autograd can differentiate the updates.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxfeedback.counter_hebb_pass import INPUT, key_of
from fxfeedback.errors import GradientError
from fxfeedback.graph.bottom_up import has_effect
from fxfeedback.graph.nodes import gate_of, identifier, is_error
from fxfeedback.graph.shapes import is_structure, leaves_of
from fxfeedback.instructed.replay import Replay, replay, with_masks


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
    replay: how the values are computed again where updates are to be differentiated.
    """

    attributes: list[str]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    updates: list[str]
    reached: list[frozenset[int] | None]
    kept: list[bool]
    structure: Callable[..., Any]
    replay: Replay


def lift(module: fx.GraphModule, more: Sequence[str] = ()) -> tuple[fx.GraphModule, list[str]]:
    """Make parameters and buffers inputs of the graph, behind its own: (graph, their names)."""
    graph = fx.Graph()
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    names = list(dict.fromkeys([str(node.target) for node in module.graph.nodes if node.op == "get_attr"] + list(more)))
    copies = {node: graph.node_copy(node) for node in inputs}
    taken = {str(node.target) for node in inputs}
    lifted = {}
    for name in names:
        free = identifier(name)
        while free in taken:  # an input of the model may be called like a parameter
            free += "_"
        taken.add(free)
        lifted[name] = graph.placeholder(free)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            copies[node] = lifted[str(node.target)]
        elif node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(module, graph), names


def cut(joint: fx.GraphModule, inexact: str = "") -> Halves:
    """Cut a learner where the errors enter: everything that the model's output needs, and everything else.

    inexact: the option with which the learner's updates are not gradients, if there is one.
    """
    _, updates = joint.graph.output_node().args[0]  # type: ignore[misc]
    module, attributes = lift(joint, [name for name in updates if not name.startswith(INPUT)])
    with_masks(module.graph)
    nodes = list(module.graph.nodes)
    outputs, updates = nodes[-1].args[0]  # type: ignore[misc]
    leaves = leaves_of(outputs)

    errors = [node for node in nodes if node.op == "placeholder" and is_error(node)]
    late = _closure(set(errors), nodes, lambda node: node.all_input_nodes)
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
    inputs = [node for node in nodes if node.op == "placeholder" and node not in errors]
    own = [key_of(node) for node in inputs[: len(inputs) - len(attributes)]]
    learning = {node for node, name in zip(inputs, [*own, *attributes], strict=True) if name in updates}
    again, crossing = replay(module, crossing, learning)
    if inexact:
        again = again._replace(refused=NOT_EXACT.format(inexact))

    downstream = [_closure({entry}, nodes, lambda node: node.all_input_nodes) for entry in errors]
    return Halves(
        attributes,
        _first_half(module, early, leaves, crossing),
        _second_half(module, early, [*crossing, *errors], list(updates.values())),
        list(updates),
        [
            frozenset(i for i, reached in enumerate(downstream) if node in reached) if node in late else None
            for node in updates.values()
        ],
        [node in leaves or (node.op == "placeholder" and gate_of(node) is None) for node in crossing],
        _structure(outputs, leaves),
        again,
    )


NOT_EXACT = (
    "with {} the updates are not gradients and have no derivatives: call to_butd without it, or with "
    'learning="backprop", for gradient penalties, Hessian-vector products and the like'
)


def _first_half(
    module: fx.GraphModule, early: set[fx.Node], leaves: Sequence[fx.Node], crossing: Sequence[fx.Node]
) -> Callable[..., Any]:
    """See `Halves.forward`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node in early:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(([copies[node] for node in leaves], [copies[node] for node in crossing]))
    return type(fx.GraphModule(module, graph, "Forward")).forward


def _second_half(
    module: fx.GraphModule, early: set[fx.Node], given: Sequence[fx.Node], updates: Sequence[fx.Node]
) -> Callable[..., Any]:
    """See `Halves.backward`."""
    graph = fx.Graph()
    values = graph.placeholder("values")
    copies = {node: graph.call_function(operator.getitem, (values, i)) for i, node in enumerate(given)}
    graph.call_method("clear", (values,))  # each value dies with its last use
    for node in module.graph.nodes:
        if node.op != "output" and node not in early and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in updates])
    return type(fx.GraphModule(module, graph, "Backward")).forward


def _structure(outputs: Any, leaves: Sequence[fx.Node]) -> Callable[..., Any]:
    """See `Halves.structure`."""
    graph = fx.Graph()
    places = {leaf: graph.placeholder(leaf.name) for leaf in leaves}

    def rebuild(node: fx.Node) -> fx.Node:
        if not is_structure(node):
            return places[node]
        return graph.call_function(node.target, *fx.map_arg((node.args, node.kwargs), rebuild))

    graph.output(fx.map_arg(outputs, rebuild))
    return type(fx.GraphModule(nn.Module(), graph, "Output")).forward


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


def _unchanged(values: Sequence[Any], versions: Sequence[int]) -> Sequence[Any]:
    """The values.

    Raises:
        GradientError: somebody wrote into one of them since it had its version.
    """
    for value, version in zip(values, versions, strict=True):
        if _version(value) != version:
            raise GradientError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of size {tuple(value.shape)}, after the call that took or made it. Write into it after the "
                "backward pass, or into a copy"
            )
    return values


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def _autocast(device: str) -> Callable[..., Any]:
    """What makes the present autocast again; without its cache, in which weights have lost their history."""
    if not torch.amp.is_autocast_available(device):
        return lambda enabled=False: contextlib.nullcontext()
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return functools.partial(torch.autocast, device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _recorded(ctx: Any, saved: Sequence[Any]) -> list[Any]:
    """The values for the error pass, computed again while autograd looks on.

    Raises:
        GradientError: updates have no derivatives here, or an input or parameter was written into since the call.
    """
    again = ctx.halves.replay
    if again.refused:
        raise GradientError(f"create_graph=True: {again.refused}")
    with ctx.autocast():
        return again.run(None, *_unchanged(*ctx.inputs), *(saved[i] for i in again.values))


def refuse_transforms() -> None:
    """torch.func's transforms do not differentiate the learner.

    Raises:
        GradientError: one of them is at work.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise GradientError(
            "Counter-Hebb learning does not run under functorch transforms (torch.func.grad, vmap, jvp, ...): use "
            'torch.autograd.grad or torch.autograd.functional, or call to_butd with learning="backprop"'
        )


class CounterHebb(torch.autograd.Function):
    """The learner as an autograd function: backward runs the error pass and returns the updates as gradients."""

    @staticmethod
    def forward(ctx: Any, halves: Halves, names: Sequence[str], *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """names: of `values`, the graph's inputs and attributes. Returns the tensors of the model's output."""
        compiling = torch.compiler.is_compiling()
        if not compiling:
            inputs = [values[i] for i in halves.replay.inputs]
            ctx.inputs = inputs, [_version(value) for value in inputs]  # before a buffer advances
            ctx.autocast = _autocast(values[0].device.type)
        outputs, saved = halves.forward(None, *values)
        ctx.halves, ctx.names = halves, names
        kept = halves.kept
        if compiling:  # torch.compile frees by itself what autograd saves, and knows no other way
            kept = [isinstance(value, torch.Tensor) for value in saved]
        ctx.save_for_backward(*(value if keep else None for value, keep in zip(saved, kept, strict=True)))
        ctx.between = [None if keep else value for value, keep in zip(saved, kept, strict=True)]
        ctx.versions = [] if compiling else [_version(value) for value in ctx.between]
        ctx.mark_non_differentiable(*(value for value in outputs if not value.is_floating_point()))
        ctx.set_materialize_grads(False)
        ctx.like = [(value.shape, value.dtype, value.device) for value in outputs if value.is_floating_point()]
        ctx.floating = [value.is_floating_point() for value in outputs]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *errors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        saved = [b if b is not None else a for a, b in zip(ctx.saved_tensors, ctx.between, strict=True)]
        recorded = torch.is_grad_enabled() and not compiling  # create_graph=True
        if not compiling:
            _unchanged(ctx.between, ctx.versions)
        if recorded:
            saved = _recorded(ctx, saved)
        elif not compiling and not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.between, ctx.inputs = [None] * len(saved), None
        given = [error for error, floating in zip(errors, ctx.floating, strict=True) if floating]
        arrived = {i for i, error in enumerate(given) if error is not None}
        for (shape, dtype, device), error in zip(ctx.like, given, strict=True):
            saved.append(torch.zeros(shape, dtype=dtype, device=device) if error is None else error)
        with ctx.autocast(enabled=False) if recorded else contextlib.nullcontext():
            made = ctx.halves.backward(None, saved)
        results = zip(ctx.halves.updates, ctx.halves.reached, made, strict=True)
        # As autograd has it, what only unused outputs depend on gets nothing rather than zeros. What needs no error is
        # no gradient of anything, so it has no derivatives.
        updates = {
            name: update.detach() if reached is None else update
            for name, reached, update in results
            if reached is None or reached & arrived
        }
        return None, None, *(updates.get(name) for name in ctx.names)
