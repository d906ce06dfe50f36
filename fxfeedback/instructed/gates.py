"""The gates of an instructed pass: where they stand in the BU graph, and what opens them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fxfeedback.graph.nodes import name_of, spec_of, tell
from fxfeedback.rules.gating import gates_of_samples


def gate_sites(
    module: fx.GraphModule, sites: Sequence[fx.Node], lateral: Callable[[Any, Any], Any], by_row: bool = False
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
        tell(placeholder, gate=name_of(site))
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
