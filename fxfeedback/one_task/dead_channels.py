"""Remove dead channels: those that hold one number whatever the input is, and those that are not read.

Three walks over a graph of functional ops. Forwards, `Network` finds out which channels are known; backwards, which of
the others are read; forwards again, `Emitter` makes the network of these, with weights cut to size. A channel of
a sum may live in one addend and be dead in the other: the smaller one is padded with zeros. (torch-pruning cuts modules
and removes a channel from all addends of a sum, or from none; it knows neither functional graphs nor constants.)
"""

from collections.abc import Callable, Mapping

import torch
from torch import fx

from fxfeedback.one_task.emitter import Emitter
from fxfeedback.one_task.network import Network, Step


@torch.no_grad()
def remove_dead_channels(
    graph: fx.Graph, tensors: Mapping[str, torch.Tensor], step_of: Callable[[Network, fx.Node], Step]
) -> fx.GraphModule:
    """The same network on its live channels.

    Args:
        graph: functional ops with shapes (`annotate_shapes`), in evaluation mode; values that do not depend on the
            input are get_attr nodes. The batch is the first dimension of the first input.
        tensors: what the get_attr nodes name.
        step_of: how a node's op treats channels (step_table.py).

    Returns:
        A module with tensors of its own, under the same names where they are still one tensor.
    """
    network = Network(graph, tensors, step_of)
    out = Emitter(network)
    for node in graph.nodes:
        out.emit(node)
    out.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    out.graph.lint()
    return fx.GraphModule(out.used(), out.graph, "Selected")
