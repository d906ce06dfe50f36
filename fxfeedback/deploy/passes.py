"""A model with connections as a program: its passes, and what steers their sources."""

from typing import Any

import torch
from torch import fx

from fxfeedback.checks import check_passes
from fxfeedback.deploy.parts import about, own_inputs, return_only
from fxfeedback.deploy.program import SPATIAL, Input, Program
from fxfeedback.errors import OptionError
from fxfeedback.graph.nodes import find_node, name_of, pass_of, spec_of, tell
from fxfeedback.lrm.feedback_model import FeedbackModel, bottom_up_of, links_of, looks_at_sizes
from fxfeedback.rewrite import Link, Unroller, Unrolling
from fxfeedback.tracing.wrapper import fetch_of, like_of, root_of


class _Numbered(Unroller):
    """Says of every node of the flat graph in which pass it is computed."""

    def one_pass(self, number: int, inputs: dict[fx.Node, fx.Node]) -> tuple[Any, dict[str, Any]]:
        before = set(self.graph.nodes)
        result = super().one_pass(number, inputs)
        for node in self.graph.nodes:
            if node not in before:
                tell(node, **{"pass": number})
        return result

    def modulated(self, y: fx.Node, modulation: fx.Node, link: Link) -> fx.Node:
        before = set(self.graph.nodes)
        value = super().modulated(y, modulation, link)
        for node in self.graph.nodes:
            if node not in before:
                tell(node, name=f"{name_of(y)}.modulated")
        return value


def unrolled_program(model: FeedbackModel, passes: int, steerable: bool, any_size: bool) -> Program:
    """Its passes: the model's own inputs in, with steerable also what steers the sources, one output per pass out."""
    check_passes(passes)
    bu = bottom_up_of(model)
    if any_size and looks_at_sizes(model):
        raise OptionError("dynamic_size: the model's code looks at the size of its input, so its graph is for one size")
    sources = {c.source: find_node(bu.graph, c.source) for c in model.connections}
    steered = {name_of(node): name for name, node in reversed(sources.items())} if steerable else {}
    graph = _Numbered(bu.graph, links_of(model), Unrolling(passes, model.return_all, steered=tuple(steered))).run()
    return_only(graph, graph.output_node().args[0][0])  # type: ignore[index]
    inputs = own_inputs(model, graph)
    for given in inputs:
        given.any_size = any_size and given.example.ndim in SPATIAL
    like = like_of(model)
    for node_name, name in steered.items():
        spec = spec_of(find_node(bu.graph, node_name))
        if spec.per_sample[0] != 1 or any(spec.per_sample[1:]):
            raise OptionError(
                f"steerable: the value of {name!r} is not one per sample of the batch: it cannot be steered"
            )
        if any_size and len(spec.shape) > 2:
            raise OptionError(f"dynamic_size: {name!r} is steered with a map of the example's size: export one of both")
        one = torch.empty(1, *spec.shape[1:], dtype=like.dtype, device="meta")
        inputs += [
            Input(f"{name}.activation", one, f"{name}.batch", torch.zeros(one.shape, dtype=one.dtype)),
            Input(
                f"{name}.alpha", torch.empty((), dtype=one.dtype, device="meta"), None, torch.zeros((), dtype=one.dtype)
            ),
            Input(
                f"{name}.strength", torch.empty(2, dtype=one.dtype, device="meta"), None, torch.ones(2, dtype=one.dtype)
            ),
        ]
    labels = {}
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_module" else name_of(node)
        labels[node] = f"pass{pass_of(node)}/{name}" if pass_of(node) else f"steering/{name}"
    metadata = about(model, "lrm") | {
        "connections": [vars(connection) for connection in model.connections],
        "passes": passes,
        "steerable": {given: steered[name_of(node)] for given, node in sources.items()} | steered if steerable else {},
    }
    return Program(graph, labels, inputs, root_of(model), fetch_of(model), metadata)
