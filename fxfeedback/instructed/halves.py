"""A learner cut in two where the errors enter: what runs in a call, and what runs in its backward pass."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxfeedback.counter_hebb_pass import INPUT, key_of
from fxfeedback.graph.effects import has_effect
from fxfeedback.graph.nodes import gate_of, identifier, is_error
from fxfeedback.graph.structures import is_structure, leaves_of
from fxfeedback.instructed.replay import Replay, replay, with_masks

NOT_EXACT = (
    "with {} the updates are not gradients and have no derivatives: call to_butd without it, or with "
    'learning="backprop", for gradient penalties, Hessian-vector products and the like'
)


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
    """Make parameters and buffers inputs of the graph, after its own: (graph, their names)."""
    graph = fx.Graph()
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    names = list(dict.fromkeys([str(node.target) for node in module.graph.nodes if node.op == "get_attr"] + list(more)))
    copies = {node: graph.node_copy(node) for node in inputs}
    taken = {str(node.target) for node in inputs}
    lifted = {}
    for name in names:
        free = identifier(name)
        while free in taken:  # an input of the model may have a parameter's name
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
    early = _before_errors(nodes, leaves, errors)
    learning = _learning(nodes, attributes, updates)
    again, crossing = replay(module, _crossing(nodes, early, list(updates.values())), learning)
    if inexact:
        again = again._replace(refused=NOT_EXACT.format(inexact))
    return Halves(
        attributes=attributes,
        forward=_first_half(module, early, leaves, crossing),
        backward=_second_half(module, early, [*crossing, *errors], list(updates.values())),
        updates=list(updates),
        reached=_reached(nodes, errors, list(updates.values())),
        kept=[node in leaves or (node.op == "placeholder" and gate_of(node) is None) for node in crossing],
        structure=_structure(outputs, leaves),
        replay=again,
    )


# -- where to cut -----------------------------------------------------------------------------------------------------


def _before_errors(nodes: Sequence[fx.Node], leaves: Sequence[fx.Node], errors: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes of the first half: what the model's output needs, and what has an effect without any error."""
    late = _downstream(errors, nodes)
    needed = set(leaves) | {node for node in nodes[:-1] if has_effect(node) and node not in late}
    early = _closure(needed, nodes[::-1], lambda node: list(node.users))
    # A tuple crosses the cut as the elements that are read: it would also keep the others.
    return early | {node for node in nodes if _is_picked(node) and node.args[0] in early}


def _crossing(nodes: Sequence[fx.Node], early: set[fx.Node], updates: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes of the first half whose values the second one takes, or returns."""
    crossing = [
        node
        for node in nodes
        if node in early and any(user not in early for user in node.users if user is not nodes[-1])
    ]
    return crossing + [node for node in updates if node in early and node not in crossing]


def _learning(nodes: Sequence[fx.Node], attributes: Sequence[str], updates: Mapping[str, fx.Node]) -> set[fx.Node]:
    """The inputs that get updates; the last of the inputs are `attributes`."""
    inputs = [node for node in nodes if node.op == "placeholder" and not is_error(node)]
    own = [key_of(node) for node in inputs[: len(inputs) - len(attributes)]]
    return {node for node, name in zip(inputs, [*own, *attributes], strict=True) if name in updates}


def _reached(
    nodes: Sequence[fx.Node], errors: Sequence[fx.Node], updates: Sequence[fx.Node]
) -> list[frozenset[int] | None]:
    """See `Halves.reached`."""
    downstream = [_downstream([error], nodes) for error in errors]
    reached = [frozenset(i for i, nodes in enumerate(downstream) if node in nodes) for node in updates]
    return [numbers or None for numbers in reached]


def _downstream(start: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """`start` and all that depends on it."""
    return _closure(set(start), nodes, lambda node: node.all_input_nodes)


def _is_picked(node: fx.Node) -> bool:
    """Whether the node is one element of a tuple, or one row."""
    return node.target is operator.getitem and isinstance(node.args[1], int)


def _closure(
    start: set[fx.Node], order: Sequence[fx.Node], before: Callable[[fx.Node], Sequence[fx.Node]]
) -> set[fx.Node]:
    """`start` and, walking in `order`, every node next to one that is already in."""
    reached = set(start)
    for node in order:
        if node.op != "output" and any(neighbour in reached for neighbour in before(node)):
            reached.add(node)
    return reached


# -- the halves -------------------------------------------------------------------------------------------------------


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
