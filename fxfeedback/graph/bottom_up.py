"""Questions about an opened BU graph: what depends on the input, where the prediction head and the gating sites are."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import fx

from fxfeedback.errors import NodeNameError
from fxfeedback.graph.nodes import find_node, is_own_input, name_of, specs_of
from fxfeedback.graph.shapes import is_structure, leaves_of
from fxfeedback.graph.specs import Spec
from fxfeedback.rules import RULES
from fxfeedback.rules.core import CONSTANT
from fxfeedback.rules.ops import survival, surviving_channels

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
            NodeNameError: there is none, or several outputs have one each; `name` is no linear or convolution.
        """
        weighted = [node for node in self.nodes if self.is_weighted(node)]
        names = ", ".join(repr(name_of(node)) for node in weighted[-5:])
        if name is not None:
            head = find_node(self.graph, name)
            if head not in weighted:
                raise NodeNameError(f"head={name!r} is no linear layer or convolution; candidates: {names}")
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


def rectifies(node: fx.Node) -> bool:
    """Whether the node is an activation whose output is a gating site."""
    rule = RULES.get(node.target) if node.op == "call_function" else None
    return rule is not None and rule.rectifies


NEVER_NEGATIVE = {
    "relu", "relu6", "sigmoid", "hardsigmoid", "softplus", "softmax", "softmin", "exp", "exp2", "abs", "square", "sqrt",
    "vector_norm", "var", "std",
}  # fmt: skip
LOWEST = {"clamp": "min", "clamp_min": "min", "hardtanh": "min_val"}
ARITHMETIC = ("add", "mul", "div", "max", "min")
KEEP_SIGNS = {
    "add", "mul", "div", "maximum", "minimum", "mean", "sum", "amax", "max", "min", "median", "cumsum", "prod",
    "avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool", "interpolate", "pad", "dropout", "identity",
    "cut_off", "reshape", "cast", "copy", "permute", "swap", "t", "movedim", "roll", "flip", "rot90", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "unfold", "fold", "cat", "stack", "split", "tensor_split", "unbind",
    "expand", "expand_as", "repeat", "repeat_interleave", "getitem", "attribute", "narrow", "index_select", "gather",
    "take_along_dim", "diagonal", "tril", "triu", "windows", "sort", "topk",
}  # fmt: skip


def never_negative(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a graph with shapes whose values are rectified: zero or more, whatever the input is.

    By an activation, or by an op after it that keeps signs, as pooling does, or the sum of such values.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        rule = RULES.get(node.target) if node.op == "call_function" else None
        name = rule.name if rule else ""
        if name in NEVER_NEGATIVE or node.target in (survival, surviving_channels):
            found.add(node)
        elif name in LOWEST:
            lowest = operand(node, LOWEST[name])
            if lowest in found or _is_positive(lowest):
                found.add(node)
        elif name in KEEP_SIGNS and _keeps_signs(node, name):
            values = [source for source in node.all_input_nodes if _has_sign(source, name)]
            if values and found.issuperset(values):
                found.add(node)
    return found


def _keeps_signs(node: fx.Node, name: str) -> bool:
    """Whether an op of `KEEP_SIGNS`, called like this, makes nothing negative of what is not."""
    if name == "interpolate":
        return operand(node, "mode") != "bicubic"  # it overshoots
    if name == "pad":
        value = operand(node, "value")
        return value is None or _is_positive(value)
    numbers = [arg for arg in node.args if isinstance(arg, (int, float))]
    return name not in ARITHMETIC or (not node.kwargs and all(map(_is_positive, numbers)))


def _has_sign(source: fx.Node, name: str) -> bool:
    """Whether an operand's sign matters to the op: not that of positions, sizes and masks."""
    spec = specs_of(source)
    counts = isinstance(spec, Spec) and spec.dtype != torch.bool and name in ARITHMETIC
    return counts or is_floating(source)


def _is_positive(number: Any) -> bool:
    return isinstance(number, (int, float)) and number >= 0


def operand(node: fx.Node, name: str) -> Any:
    """What a call gives to the operand that the op's rule calls `name`: a node, a number, or None."""
    return RULES[node.target].operands(node.args, node.kwargs).get(name)


def weight_of(node: fx.Node) -> fx.Node:
    """The weight of a linear layer or convolution, as a node of the BU graph."""
    return operand(node, RULES[node.target].weight or "")


LOGICAL = (operator.and_, operator.or_, operator.not_)  # called as if they were in place


def has_effect(node: fx.Node) -> bool:
    """Whether the node matters although nothing reads it: inputs, outputs, in-place ops."""
    in_place = getattr(node.target, "__name__", "").endswith("_") and node.target not in LOGICAL
    return node.op in ("placeholder", "output") or in_place


def passes(node: fx.Node) -> bool:
    """Whether a counter neuron can pass through the node: it computes floating-point tensors, and not by chance."""
    return node.op == "call_function" and node.target not in CONSTANT and is_floating(node)


def is_floating(node: fx.Node) -> bool:
    """Whether the node's value is a floating-point tensor, or holds one; complex numbers are such, too."""
    specs: list[Any] = [specs_of(node)]
    if isinstance(specs[0], tuple):
        specs = list(specs[0])
    return any(isinstance(spec, Spec) and (spec.dtype.is_floating_point or spec.dtype.is_complex) for spec in specs)


def batch_norm_of(node: fx.Node) -> str | None:
    """For a batch norm that follows a convolution directly: the name of the convolution's weight."""
    if node.op != "call_function" or getattr(RULES.get(node.target), "name", "") != "batch_norm":
        return None
    source = node.args[0]
    rule = RULES.get(source.target) if isinstance(source, fx.Node) else None
    return str(weight_of(source).target) if rule and rule.weight and rule.channels == 1 else None
