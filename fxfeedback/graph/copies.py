"""Copies of graphs, which a pass may change in place."""

from torch import fx


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A module with the same tensors and a graph of its own, whose nodes have what was said of their originals."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)
