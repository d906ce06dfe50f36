"""What a call of a model with connections runs, and by what it is kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxfeedback.graph.nodes import find_node, name_of
from fxfeedback.lrm.connections import Connection, link
from fxfeedback.lrm.recompute import brief, lean, segmented
from fxfeedback.lrm.steering import Source, check_sources
from fxfeedback.rewrite import Unrolling, unroll
from fxfeedback.tracing.opened import GraphKey
from fxfeedback.tracing.while_tracing import is_rewritten

Step = Callable[[fx.GraphModule], fx.GraphModule]


class PlanKey(NamedTuple):
    """By what a plan is kept.

    graph: the bottom-up graph that is unrolled. what: how, with the steered nodes as the user names them.
    steps: what else is done to the unrolled graph.
    """

    graph: GraphKey
    what: Unrolling
    steps: tuple[Step, ...]


@dataclass(eq=False)
class Plan:
    """What a call runs.

    run: the unrolled graph as a function of the module with the tensors and the blocks, of inputs, state and steering.
    state, steered: the sources that have a signal already, and those that are steered.
    """

    run: Callable[..., Any]
    state: list[Source]
    steered: list[Source]


def make_plan(bu: fx.GraphModule, root: nn.Module, connections: Sequence[Connection], key: PlanKey) -> Plan:
    """Unroll a bottom-up graph.

    Args:
        bu: a graph in functional ops, with shapes.
        root: has its tensors and the connections' blocks.
        connections: between its nodes.
        key: how; its `graph` is `bu`.

    Raises:
        NodeNameError: a node in the state or the steering that is not a source.
        OptionError: a source that is steered twice.
    """
    sources = {source.name: source for source in (Source.of(find_node(bu.graph, one.source)) for one in connections)}
    steered = [(name, name_of(find_node(bu.graph, name))) for name in key.what.steered]
    check_sources(sources, key.what.state, steered)
    nodes = tuple(node for _, node in steered)
    links = [link(bu.graph, connection) for connection in connections]
    module = unroll(bu, root, links, key.what._replace(steered=nodes))
    for step in key.steps:
        module = step(module)
    return Plan(type(module).forward, [sources[name] for name in key.what.state], [sources[name] for name in nodes])


def steps(checkpoint: bool) -> tuple[Step, ...]:
    """What else is done to an unrolled graph: that less is computed, and with gradients that less is kept.

    Not while someone else rewrites the graph or its gradients: torch.compile, a tracer, torch.func.
    """
    if is_rewritten() or torch.jit.is_tracing():
        return ()
    if not torch.is_grad_enabled():
        return (brief,)
    return (lean, segmented) if checkpoint else (lean,)
