"""Insert LRM connections into a graph and unroll its passes into one flat graph.

`unroll` walks the graph once per pass. A node is emitted again only where one of its inputs differs from those that it
had in an earlier pass; otherwise both passes share it. What is unused is dropped at the end.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxfeedback.graph.effects import counts_batches, drop_unused, has_effect, is_new_in_every_pass
from fxfeedback.graph.nodes import input_node, is_named, name_of, pass_of, tell
from fxfeedback.graph.operands import operand
from fxfeedback.rules.ops import ADVANCES


@dataclass(frozen=True)
class Link:
    """One connection between nodes of a graph.

    block: qualified name of its `Modulation`; activation: "relu" or "none", what follows the destination's modulation;
    mode: "multiply" or "add".
    """

    source: fx.Node
    destination: fx.Node
    block: str
    activation: str
    mode: str = "multiply"


class Unrolling(NamedTuple):  # no dataclass: torch.compile has to take it as a constant
    """What is unrolled.

    passes: how many; all_outputs: whether every pass returns its output, or only the last.
    state: names of the sources that have a signal from an earlier call.
    steered: names of the steered sources; steer_first: whether steering begins before the first pass.
    readout: names of nodes that are returned for every pass.
    """

    passes: int
    all_outputs: bool = True
    state: tuple[str, ...] = ()
    steered: tuple[str, ...] = ()
    steer_first: bool = False
    readout: tuple[str, ...] = ()


@dataclass
class Passes:
    """Emits a source graph several times into one flat `graph`; what would be computed again as it was is shared."""

    WORD = "pass"
    """What one run over the source is called, in names of nodes."""
    FIRST = 1
    """The number of the first."""

    source: fx.Graph
    graph: fx.Graph = field(default_factory=fx.Graph, kw_only=True)
    emitted: dict[Any, fx.Node] = field(default_factory=dict, kw_only=True)

    def emit(self, node: fx.Node, values: Mapping[fx.Node, fx.Node], number: int) -> fx.Node:
        """The node in this pass: an earlier pass's where the inputs are the same and nothing is drawn at random."""
        key = (node, *(values[source] for source in node.all_input_nodes))
        if key in self.emitted and not is_new_in_every_pass(node):
            if node.target in ADVANCES:
                self.advance_statistics(self.emitted[key])
            return self.emitted[key]
        copy = self.graph.node_copy(node, values.__getitem__)
        if number > self.FIRST and node.op != "get_attr":
            copy._rename(f"{node.name}_{self.WORD}{number}")
            tell(copy, **{"pass": number})
        self.emitted[key] = copy
        return copy

    def advance_statistics(self, norm: fx.Node) -> None:
        """A batch norm in training mode whose value two passes share has seen the batch once more all the same."""
        if counts_batches(norm):
            x, mean, var = (operand(norm, name) for name in ("input", "running_mean", "running_var"))
            with self.graph.inserting_after(norm):  # where x is at hand
                self.graph.call_function(ADVANCES[norm.target], (x, mean, var, operand(norm, "momentum")))

    def once(self, function: Any, *args: Any) -> fx.Node:
        """The call's node; one for equal calls."""
        key = (function, *args)
        if key not in self.emitted:
            self.emitted[key] = self.graph.call_function(function, args)
        return self.emitted[key]

    def placeholder(self, kind: str, name: str) -> fx.Node:
        """An input of the flat graph."""
        return input_node(self.graph, f"{kind}_{name}")


@dataclass
class Unroller(Passes):
    """Emits the passes, one after the other, into `graph`."""

    links: Sequence[Link]
    what: Unrolling
    signals: dict[fx.Node, fx.Node] = field(default_factory=dict)
    steering: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]] = field(default_factory=dict)
    strength: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def run(self) -> fx.Graph:
        """The flat graph: inputs, then states, then (activation, alpha, strength) of each steered source.

        It returns a list of outputs (or the last), a dict of the sources' last signals, and a dict of the readouts.
        """
        inputs = {node: self.graph.node_copy(node) for node in self.source.nodes if node.op == "placeholder"}
        sources = {name_of(link.source): link.source for link in self.links}
        self.signals = {sources[name]: self.placeholder("state", name) for name in self.what.state}
        kinds = ("activation", "alpha", "strength")
        self.steering = {sources[n]: tuple(self.placeholder(k, n) for k in kinds) for n in self.what.steered}
        if self.what.steer_first:
            self.steer()
        outputs, readouts = [], []
        for number in range(1, self.what.passes + 1):
            output, readout = self.one_pass(number, inputs)
            outputs.append(output)
            readouts.append(readout)
            self.steer()
        state = {name: self.signals[source] for name, source in sources.items()}
        self.graph.output((outputs if self.what.all_outputs else outputs[-1], state, readouts))
        drop_unused(self.graph)
        return self.graph

    def one_pass(self, number: int, inputs: dict[fx.Node, fx.Node]) -> tuple[Any, dict[str, Any]]:
        """One pass over the graph: its output, and what is read out of it."""
        values: dict[fx.Node, fx.Node] = {}
        readout: dict[str, Any] = {}
        feedback = dict(self.signals)  # what the previous pass handed on
        for node in self.source.nodes:
            if node.op == "output":
                output = fx.map_arg(node.args[0], values.__getitem__)
            else:
                values[node] = before = inputs[node] if node in inputs else self.emit(node, values, number)
                links = [link for link in self.links if link.destination is node]
                signals = [(link, self.signal(link.source, node, values, feedback)) for link in links]
                signals = [(link, signal) for link, signal in signals if signal is not None]
                modulation = self.modulation(before, signals)
                if modulation is not None:
                    values[node] = self.modulated(before, modulation, signals[0][0])
                if name_of(node) in self.what.readout:
                    readout[name_of(node)] = (values[node], before, modulation)
        self.signals = {link.source: values[link.source] for link in self.links}
        return output, readout

    def signal(
        self, source: fx.Node, node: fx.Node, values: dict[fx.Node, fx.Node], feedback: dict[fx.Node, fx.Node]
    ) -> fx.Node | None:
        """What a source hands on to `node`: its value if it ran earlier in this pass, or else in the previous one."""
        return values[source] if source in values and source is not node else feedback.get(source)

    def modulation(self, y: fx.Node, signals: Sequence[tuple[Link, fx.Node]]) -> fx.Node | None:
        """Σ over the connections of m, or None where none has a signal."""
        total = None
        for link, signal in signals:
            arguments = (signal, y, self.strength.get(link.source))
            key = (link.block, *arguments)
            if key not in self.emitted:
                self.emitted[key] = self.graph.call_module(link.block, arguments)
            m = self.emitted[key]
            total = m if total is None else self.once(operator.add, total, m)
        return total

    def modulated(self, y: fx.Node, modulation: fx.Node, link: Link) -> fx.Node:
        """relu(y + y m), or relu(y + m); `link`: any of its connections, which agree."""
        arguments = (torch.add, y, modulation) if link.mode == "add" else (torch.addcmul, y, y, modulation)
        value = self.once(*arguments)
        return self.once(torch.relu, value) if link.activation == "relu" else value

    def steer(self) -> None:
        """signal <- alpha activation + (1 - alpha) signal; from now on the source's scales are multiplied."""
        for source, (activation, alpha, strength) in self.steering.items():
            signal = self.signals.get(source)
            if signal is None:
                self.signals[source] = activation
            else:
                rest = self.once(operator.sub, 1, alpha)
                mixed = (self.once(operator.mul, alpha, activation), self.once(operator.mul, rest, signal))
                self.signals[source] = self.once(operator.add, *mixed)
            self.strength[source] = strength


def unroll(module: fx.GraphModule, root: nn.Module, links: Sequence[Link], what: Unrolling) -> fx.GraphModule:
    """The passes of `module` with its connections, as one flat graph (see `Unroller.run`).

    Args:
        module: a graph in functional ops, with shapes.
        root: has its parameters and the connections' blocks.
    """
    return fx.GraphModule(root, Unroller(module.graph, links, what).run(), "Unrolled")


def name_by_pass(module: fx.GraphModule, word: str = Passes.WORD) -> None:
    """Let an unrolled graph return its outputs alone, and call what a later pass n computes anew with `.pass{n}`."""
    graph = module.graph
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_module" and not is_named(node) else name_of(node)
        tell(node, name=f"{name}.{word}{pass_of(node)}" if pass_of(node) else name)
    graph.output_node().args = (graph.output_node().args[0][0],)  # type: ignore[index]
    graph.eliminate_dead_code(is_impure_node=has_effect)
    module.recompile()
