"""What a call of a model with connections runs, and by what it is kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxfeedback.graph.effects import has_effect
from fxfeedback.graph.nodes import find_node, is_named, name_of, pass_of, tell, writes_into_arguments
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.specs import of_size
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.lrm.connections import Connection, link
from fxfeedback.lrm.recompute import brief, lean, segmented
from fxfeedback.lrm.steering import Source, check_sources
from fxfeedback.rewrite import Unrolling, unroll
from fxfeedback.tracing.arguments import Form
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.trace_at_size import trace_for
from fxfeedback.tracing.while_tracing import is_rewritten

Sizes = tuple[tuple[tuple[int, ...] | None, torch.dtype], ...]
"""Of each input its size without the batch (see `size_of`), and its dtype."""
Step = Callable[[fx.GraphModule], fx.GraphModule]


class GraphKey(NamedTuple):
    """By what a bottom-up graph is kept.

    modes: a number for the modes and attributes of all modules. sizes: of the inputs; None: it serves all.
    form: of the call; None: the example's.
    """

    modes: int
    sizes: Sizes | None
    form: Form | None


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


def opened(
    net: nn.Module, stand_ins: Sequence[torch.Tensor], sizes: Sizes | None, form: Form, door: str | None = None
) -> tuple[fx.GraphModule, bool]:
    """A model's graph in functional ops with shapes, and whether it serves inputs of these sizes only.

    It does where the model's code branches on sizes, and where its functions write into their arguments: these must be
    opened, and look at sizes.

    Args:
        net: the model.
        stand_ins: tensors without data like the example inputs.
        sizes: of the inputs; None: the example's.
        form: of the call.
        door: by which the model is traced.
    """
    examples = stand_ins if sizes is None else [of_size(size, dtype) for size, dtype in sizes]
    traced, by_size = trace_for(net, examples, form, door)
    module = open_modules(traced, strict=False, owner=net)
    annotate_shapes(module, examples)
    unpack_tuples(module)
    writes = any(writes_into_arguments(node) for node in module.graph.nodes)
    if writes:
        module = open_modules(traced, strict=False, example_inputs=examples, owner=net)
        annotate_shapes(module, examples)
        unpack_tuples(module)
    return module, by_size or writes


def name_by_pass(module: fx.GraphModule) -> None:
    """Let an unrolled graph return its outputs alone, and call what a later pass n computes anew with `.pass{n}`."""
    graph = module.graph
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_module" and not is_named(node) else name_of(node)
        tell(node, name=f"{name}.pass{pass_of(node)}" if pass_of(node) else name)
    graph.output_node().args = (graph.output_node().args[0][0],)  # type: ignore[index]
    graph.eliminate_dead_code(is_impure_node=has_effect)
    module.recompile()
