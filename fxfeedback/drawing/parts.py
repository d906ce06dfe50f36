"""What a picture is of: nodes, arcs between them, and what passes and instructions do at each node."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from fxfeedback.drawing.text import short_number
from fxfeedback.graph.nodes import is_named, name_of


@dataclass
class Node:
    """One node of the BU graph that makes a tensor.

    name: as `node_names` gives it. module: the one whose code made it, of a parameter the first that reads it.
    op: what it is called; call: with its settings. shape: without the batch, None for another size that depends on it.
    parameters: name -> shape. reads: the nodes whose tensors it takes.
    computed: the passes that compute it; the others share an earlier pass's value.
    roles: "instruction", "error": the TD passes that cross it. site: whether it is a gating site.
    """

    name: str
    module: str
    op: str
    call: str
    shape: tuple[int | None, ...] | None
    parameters: dict[str, tuple[int, ...]]
    reads: tuple[str, ...]
    computed: frozenset[int] = frozenset({1})
    roles: frozenset[str] = frozenset()
    site: bool = False


@dataclass(frozen=True)
class Arc:
    """A connection between two nodes, or a prediction of one by another.

    given: how the user wrote it. parameters: how many its block or predictor has. predicts: whether it is a prediction.
    added: whether what it brings is added and not multiplied.
    """

    number: int
    source: str
    destination: str
    given: tuple[str, str]
    feedback: bool
    parameters: int
    added: bool = False
    predicts: bool = False

    @property
    def kind(self) -> str:
        """What is said of it: feedback, skip or prediction."""
        return "prediction" if self.predicts else "feedback" if self.feedback else "skip"

    @property
    def size(self) -> str:
        """1.2k parameters, added"""
        return f"{short_number(self.parameters)} parameters" + ", added" * self.added

    @property
    def arrow(self) -> str:
        """From where to where, as the user wrote it: fc → conv1"""
        return " → ".join(self.given)


@dataclass
class Network:
    """A model as it is drawn.

    nodes: by name, in execution order. classes: module path -> name of its class. passes: 1 without connections; steps:
    1 without predictions.
    instruction: sizes from the instruction to what it arrives at, and the node whose counter neurons it sets.
    feedback: what TD reads, in a word or two, and as the end of a sentence. heads: of one per task, how many outputs.
    """

    title: str
    nodes: dict[str, Node]
    classes: dict[str, str]
    arcs: list[Arc] = field(default_factory=list)
    passes: int = 1
    steps: int = 1
    instruction: tuple[list[int], str] | None = None
    feedback: tuple[str, str] = ("", "")
    heads: tuple[int, ...] = ()

    @property
    def has_td(self) -> bool:
        """Whether there is a TD graph."""
        return any(node.roles for node in self.nodes.values())

    def readers(self) -> dict[str, list[str]]:
        """Node name -> the nodes that read it."""
        readers: dict[str, list[str]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for source in node.reads:
                readers[source].append(node.name)
        return readers


def drawn_as(network: Network, node: fx.Node) -> str:
    """The drawn node to which a node of an opened graph, in any of its passes, belongs.

    A node that a connection adds has a name that no drawn node has, and belongs to what the first of its inputs belongs
    to. '' if none of them belongs to a drawn node.
    """
    name = drawn_name(network, name_of(node) if is_named(node) else "")
    return name or next(filter(None, (drawn_as(network, source) for source in node.all_input_nodes)), "")


def drawn_name(network: Network, name: str) -> str:
    """The drawn node of this name, or the one whose name this name continues, as layer4.1.relu.pass2; '' if none."""
    while name and name not in network.nodes:
        name = name.rpartition(".")[0]
    return name


def count(parameters: Iterable[dict[str, tuple[int, ...]]]) -> int:
    """How many numbers the parameters have together; a parameter that several nodes share counts once."""
    shapes: dict[str, tuple[int, ...]] = {}
    for some in parameters:
        shapes |= some
    return sum(math.prod(shape) for shape in shapes.values())
