"""Questions about an opened BU graph: what depends on the input, where the prediction head and the gating sites are."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

import networkx as nx
from torch import fx

from fxfeedback.errors import NodeNameError
from fxfeedback.graph.nodes import find_node, is_own_input, name_of
from fxfeedback.graph.operands import is_floating, passes, rectifies, weight_of
from fxfeedback.graph.structures import is_structure, leaves_of
from fxfeedback.rules import RULES

START = "inputs"  # of all paths
MAIN = ("out", "logits")
"""What models that return several outputs call the one that counts: torchvision's and Hugging Face's."""


class BottomUp:
    """The opened BU graph and what the TD graph asks of it."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.nodes: list[fx.Node] = list(graph.nodes)

    @cached_property
    def digraph(self) -> "nx.DiGraph":
        """The data flow: edges from each node to its users."""
        digraph = nx.DiGraph()
        digraph.add_nodes_from(self.nodes)
        digraph.add_edges_from((node, user) for node in self.nodes for user in node.users)
        return digraph

    @cached_property
    def depending_on_inputs(self) -> set[fx.Node]:
        """The nodes that do not exist before the inputs do: BU values, and their sizes."""
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        return set(inputs).union(*(nx.descendants(self.digraph, node) for node in inputs))

    @cached_property
    def dynamic(self) -> set[fx.Node]:
        """The BU values: nodes that depend on the model's input and that a counter neuron can reach."""
        return self.below(node for node in self.nodes if node.op == "placeholder")

    def below(self, starts: Iterable[fx.Node]) -> set[fx.Node]:
        """`starts` and every node that a counter neuron can pass on its way down to them."""
        reached = set(starts)
        for node in self.nodes:
            if node not in reached and passes(node) and any(source in reached for source in node.all_input_nodes):
                reached.add(node)
        return reached

    def above(self, start: fx.Node) -> set[fx.Node]:
        """`start` and every node that a counter neuron of it can reach."""
        reached = {start}
        for node in reversed(self.nodes):
            if node in reached and passes(node):
                reached.update(source for source in node.all_input_nodes if source in self.dynamic)
        return reached

    @property
    def inputs(self) -> list[fx.Node]:
        """The model's own inputs."""
        return [node for node in self.nodes if is_own_input(node)]

    @property
    def parameters(self) -> list[fx.Node]:
        """The get_attr nodes: parameters, buffers and constants."""
        return [node for node in self.nodes if node.op == "get_attr"]

    @property
    def output(self) -> Any:
        """The structure that the model returns, with nodes as leaves."""
        return self.nodes[-1].args[0]

    def output_leaves(self) -> list[fx.Node]:
        """The tensors that the model returns, in order, each once."""
        return [node for node in leaves_of(self.output) if is_floating(node)]

    def sites(self, top: fx.Node, names: Sequence[str] | None = None) -> list[fx.Node]:
        """The gating sites that TD from `top` reaches: the rectifying activations, or the nodes called `names`."""
        reached = self.above(top) - {top}
        if names is None:
            return [node for node in self.nodes if node in reached and rectifies(node)]
        chosen = {find_node(self.graph, name) for name in names}
        for node in chosen - reached:
            raise NodeNameError(f"sites: TD does not reach {name_of(node)!r} from {name_of(top)!r}")
        return [node for node in self.nodes if node in chosen]

    def find_head(self, name: str | None) -> fx.Node:
        """The prediction head: the node called `name`, or the last linear or convolution that every path to the main
        output crosses.

        Raises:
            NodeNameError: there is none, or several outputs have one each; `name` is not a linear layer or convolution.
        """
        weighted = [node for node in self.nodes if self.is_weighted(node)]
        names = ", ".join(repr(name_of(node)) for node in weighted[-5:])
        if name is not None:
            head = find_node(self.graph, name)
            if head not in weighted:
                raise NodeNameError(f"head={name!r} is not a linear layer or convolution; candidates: {names}")
            return head
        heads = self._heads_of_outputs(weighted)
        if len(heads) > 1:
            candidates = ", ".join(repr(name_of(node)) for node in heads)
            raise NodeNameError(
                f"the model returns several outputs, each with a prediction head of its own: {candidates}; pass head= "
                "with the one that instructions start from"
            )
        if not heads:
            raise NodeNameError(
                "no linear layer or convolution lies on every path to the model's output, so instructions have no "
                f"prediction head to start from: pass head= with one of {names or 'its linear layers (it has none)'}"
            )
        return heads[0]

    def _heads_of_outputs(self, weighted: list[fx.Node]) -> list[fx.Node]:
        """The heads of the outputs that may count, one for each weight: that of several passes is the last one's.

        What comes along from below another output's head, as features do, has none.
        """
        heads: dict[fx.Node, fx.Node] = {}
        below: set[fx.Node] = set()
        leaves = self.main_leaves()
        for leaf in leaves if isinstance(self.output, list) else leaves[::-1]:
            crossed = [node for node in self.crossed_by_all_paths_to(leaf) if node in weighted]
            if crossed:
                heads[weight_of(crossed[-1])] = crossed[-1]
                below.update(crossed[:-1])
        return [head for head in heads.values() if head not in below]

    def main_leaves(self) -> list[fx.Node]:
        """The tensors that may count: of a dict or named tuple what is called "out" or "logits", if anything is."""
        return [node for node in leaves_of(_main_part(self.output)) if is_floating(node)]

    def main_output(self) -> fx.Node | None:
        """The tensor that counts: what is called "out" or "logits", the last of a list (of passes), else the first."""
        leaves = self.main_leaves()
        return leaves[-1 if isinstance(self.output, list) else 0] if leaves else None

    @cached_property
    def _dominators(self) -> dict[Any, Any]:
        digraph = nx.DiGraph(self.digraph.subgraph(self.dynamic))
        digraph.add_edges_from((START, node) for node in self.inputs)
        return nx.immediate_dominators(digraph, START)

    def crossed_by_all_paths_to(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that every path of BU values from the inputs to `node` crosses, from the bottom up: dominators."""
        dominator, chain = self._dominators, [node]
        while chain[-1] in dominator and dominator[chain[-1]] not in (START, chain[-1], None):
            chain.append(dominator[chain[-1]])
        return chain[::-1]

    def is_weighted(self, node: fx.Node) -> bool:
        """Whether the node is a linear layer or a convolution of a BU value with a weight."""
        rule = RULES.get(node.target) if node.op == "call_function" else None
        return bool(rule and rule.weight and node in self.dynamic and weight_of(node) not in self.dynamic)


def reaching_output(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the output depends on."""
    reaching = set(graph.output_node().all_input_nodes)
    for node in reversed(graph.nodes):
        if node in reaching:
            reaching.update(node.all_input_nodes)
    return reaching


def _main_part(output: Any) -> Any:
    """Of the structure that a model returns, without what is beside an output called as `MAIN` says."""
    if isinstance(output, fx.Node) and is_structure(output):
        names = getattr(output.target, "_fields", None) or [field.name for field in fields(output.target)]
        output = dict(zip(names, output.args, strict=False)) | dict(output.kwargs)
    if isinstance(output, dict):
        return next((_main_part(output[name]) for name in MAIN if output.get(name) is not None), output)
    if isinstance(output, (list, tuple)):
        return [_main_part(part) for part in output]
    return output
