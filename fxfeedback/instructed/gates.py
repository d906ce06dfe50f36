"""The gates of an instructed pass: where they stand in the BU graph, and what opens them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxfeedback.graph.channels import positions_of
from fxfeedback.graph.nodes import name_of, spec_of, tell
from fxfeedback.graph.specs import Spec
from fxfeedback.rules.gating import gates_of_samples


def gate_sites(
    module: fx.GraphModule,
    sites: Sequence[fx.Node],
    lateral: Callable[[Any, Any], Any],
    by_row: bool = False,
    by_channel: bool = False,
) -> fx.GraphModule:
    """The BU graph with `lateral(value, gate)` after every site; the gates are inputs, after the model's own.

    With `by_row` the gates are those of a few instructions, and an input before them says which one each sample has.
    """
    graph = fx.Graph()
    copies = {node: graph.node_copy(node) for node in module.graph.nodes if node.op == "placeholder"}
    rows = graph.placeholder("rows") if by_row else None
    if rows is not None:
        tell(rows, rows=True)
    gates = {site: graph.placeholder(f"gate_{site.name}") for site in sites}
    for site, placeholder in gates.items():
        tell(placeholder, gate=name_of(site), **({} if by_row else {"spec": _spec(site, by_channel)}))
    for node in module.graph.nodes:
        if node in copies:
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in gates:
            value, gate = copies[node], gates[node]
            gate = graph.call_function(gates_of_samples, (gate, rows, value)) if by_row else gate
            copies[node] = graph.call_function(lateral, (value, gate))
            tell(copies[node], spec=spec_of(node), name=name_of(node) + ".gated", gates=name_of(node))
            copies[node]._rename(f"gated_{node.name}")
    return fx.GraphModule(module, graph, "Predict")


def _spec(site: fx.Node, by_channel: bool) -> Spec:
    """What the gate of a site is like: as its value, or with one number for each channel."""
    spec = spec_of(site)
    ones = positions_of(site) if by_channel else ()
    shape = tuple(1 if d in ones else size for d, size in enumerate(spec.shape))
    return Spec(shape, tuple(0 if d in ones else n for d, n in enumerate(spec.per_sample)), spec.dtype)


class StraightThrough(torch.autograd.Function):
    """The gate [t > 0] of a counter neuron t; its derivative is taken as that of the clipped identity, [|t| <= 1].

    "Binarized Neural Networks", NeurIPS 2016, arXiv:1602.02830, section 1.3, after "Estimating or Propagating Gradients
    Through Stochastic Neurons", arXiv:1308.3432.
    """

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(t)
        return (t > 0).to(t.dtype)

    @staticmethod
    def backward(ctx: Any, error: torch.Tensor) -> torch.Tensor:
        (t,) = ctx.saved_tensors
        return error * (t.abs() <= 1)
