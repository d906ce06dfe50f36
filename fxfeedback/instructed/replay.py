"""The BU values for the error pass once more, as functions of inputs and parameters: what create_graph=True needs.

The error pass is made of ops that torch can differentiate, but the values that the BU pass left for it have no history.
To differentiate the updates, `Replay` computes these values again while autograd looks on; what was drawn at random is
what the BU pass drew, and no buffer advances.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from fxfeedback.graph.effects import has_effect
from fxfeedback.graph.nodes import draws, is_error, name_of, user_line
from fxfeedback.rules import RULES
from fxfeedback.rules.core import CONSTANT
from fxfeedback.rules.draws import DROPOUTS
from fxfeedback.rules.ops import synced_batch_norm

NORMS = (F.batch_norm, synced_batch_norm, F.instance_norm)
"""What advances running statistics while it computes something else."""


class Replay(NamedTuple):
    """How the values for the error pass are computed again.

    run: (None, *inputs, *values) -> all values for the error pass, in order.
    inputs: which of the learner's inputs and attributes it takes, by number.
    values: which of the BU pass's values it takes, by number: what depends on nothing that learns, and what was drawn.
    refused: why it would not be right; empty where it is.
    """

    run: Callable[..., Any]
    inputs: list[int]
    values: list[int]
    refused: str


def replay(module: fx.GraphModule, crossing: Iterable[fx.Node], learning: set[fx.Node]) -> tuple[Replay, list[fx.Node]]:
    """(How to compute the values of `crossing` again, `crossing` and what must be kept for that besides).

    Args:
        module: a learner whose parameters and buffers are inputs.
        crossing: the nodes whose values the error pass takes.
        learning: the inputs that get updates.
    """
    nodes, crossing = list(module.graph.nodes), list(crossing)
    depending = set(learning)
    for node in nodes:
        if not _stays(node) and any(source in depending for source in _sources(node)):
            depending.add(node)
    needed = set(crossing)
    taken: dict[fx.Node, None] = {}
    for node in reversed(nodes):
        if node in needed and (_stays(node) or (node in crossing and node not in depending)):
            taken[node] = None
        elif node in needed:
            needed.update(_sources(node))
            taken.update((mask, None) for mask in _masks(node))
    crossing += [node for node in taken if node not in crossing and node.op != "placeholder"]

    given = [node for node in nodes if node.op == "placeholder" and not is_error(node)]
    inputs = [i for i, node in enumerate(given) if node in needed]
    values = [i for i, node in enumerate(crossing) if node in taken and node.op != "placeholder"]
    graph = fx.Graph()
    copies = {
        node: graph.placeholder(node.name) for node in [*(given[i] for i in inputs), *(crossing[i] for i in values)]
    }
    for node in nodes:
        if node in needed and node not in copies:
            copies[node] = _again(node, graph, copies)
    graph.output([copies[node] for node in crossing])
    run = type(fx.GraphModule(module, graph, "Replay")).forward
    return Replay(run, inputs, values, _refused(taken, depending)), crossing


def _stays(node: fx.Node) -> bool:
    """Whether the node's value is taken as it was: an input, what was drawn at random, a buffer that was changed."""
    if node.target is operator.getitem:
        return node in _masks(node.args[0])
    return has_effect(node) or (draws(node) and node.target not in DROPOUTS)


def _masks(node: Any) -> list[fx.Node]:
    """The masks of a dropout, which it returns after its value."""
    if node.target not in DROPOUTS:
        return []
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == 1]


def with_masks(graph: fx.Graph) -> None:
    """Let every dropout have a node for its mask."""
    for node in list(graph.nodes):
        if node.target in DROPOUTS and not _masks(node):
            with graph.inserting_after(node):
                graph.call_function(operator.getitem, (node, 1))


def _call(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's arguments; those of a norm in training mode without the running statistics, which it would advance."""
    if node.target is torch.native_batch_norm and node.args[5] is True:
        return (*node.args[:3], None, None, True, 0.0, node.args[7]), {}
    if node.target in NORMS:
        operands = RULES[node.target].operands(node.args, node.kwargs)
        instance = node.target is F.instance_norm
        if operands.get("use_input_stats" if instance else "training", instance) is True:
            return (), operands | {"running_mean": None, "running_var": None, "momentum": 0.0}
    return node.args, node.kwargs


def _sources(node: fx.Node) -> list[fx.Node]:
    """What the node's call takes, as `_call` has it."""
    found: list[fx.Node] = []
    fx.map_arg(_call(node), found.append)
    return found


def _again(node: fx.Node, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    if node.target in DROPOUTS:
        return graph.call_function(dropped_again, (copies[node.args[0]], node.args[1], copies[_masks(node)[0]]))  # type: ignore[index]
    args, kwargs = fx.map_arg(_call(node), copies.__getitem__)
    return graph.create_node(node.op, node.target, args, kwargs, node.name)


def dropped_again(input: torch.Tensor, p: float, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dropout with a mask that it drew before."""
    return input * mask * (1 / (1 - p) if p < 1 else 0.0), mask


def _refused(taken: Iterable[fx.Node], depending: set[fx.Node]) -> str:
    for node in taken:
        drawn = node.op == "call_function" and draws(node) and node.target not in CONSTANT
        if drawn and not has_effect(node) and any(source in depending for source in node.all_input_nodes):
            return (
                f"the op at node {name_of(node)!r}{user_line(node)} draws random numbers of its own and would "
                "draw others when it runs again: give it its random numbers as an input"
            )
    return ""
