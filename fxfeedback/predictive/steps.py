"""Insert predictions into a graph and unroll its steps into one flat graph.

    r_i(0) = f_i(0)
    r_i(t) = β f_i(t) + λ p_{i+1}(t-1) + (1 - β - λ) r_i(t-1) - α g_i(t-1)
    p_i(t) = P_i(r_i(t))        g_i(t) = c J_iᵀ (p_i(t) - τ_i(t))

g comes from the rules: the walk down the predictor's graph that brings an error to its input.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.effects import drop_unused
from fxfeedback.graph.nodes import counterpart_of, is_named, name_of, pass_of, spec_of, tell
from fxfeedback.graph.values import Emitter, Value
from fxfeedback.predictive.faster import hasten
from fxfeedback.predictive.predictions import Place, block_name
from fxfeedback.rewrite import Passes
from fxfeedback.td_graph import Walk


class Stepping(NamedTuple):  # no dataclass: torch.compile has to take it as a constant
    """What is unrolled.

    steps: how many; all_outputs: whether every step returns its output, or only the last.
    continued: whether an earlier call's state is given; keeps: whether the state is returned.
    readout: names of nodes that are returned for every step.
    fused: whether what computes the same faster stands in for predictors' ops (see `hasten`) and for rules.
    """

    steps: int
    all_outputs: bool = True
    continued: bool = False
    keeps: bool = False
    readout: tuple[str, ...] = ()
    fused: bool = False


class Held(NamedTuple):
    """What the next step reads of a prediction: r, p and g of the last one; nodes in a graph, tensors in a state."""

    representation: Any
    prediction: Any
    gradient: Any


@dataclass(frozen=True)
class Part:
    """A prediction as its steps need it.

    place: between nodes of the unrolled graph. predictor: its graph (see `predictors.graph_of`).
    factor: what p - τ is multiplied by; by_batch: whether it is divided by the batch as well.
    learned: whether the multipliers are; detached: whether no gradient passes through g.
    """

    place: Place
    predictor: BottomUp
    factor: float
    by_batch: bool
    learned: bool
    detached: bool

    @property
    def name(self) -> str:
        """Of its node, as the user gave it."""
        return self.place.prediction.node


@dataclass
class Steps(Passes):
    """Emits the steps, one after the other, into `graph`."""

    WORD, FIRST = "step", 0

    parts: Sequence[Part]
    what: Stepping
    emitter: Emitter = field(default_factory=Emitter)

    def run(self) -> fx.Graph:
        """The flat graph: inputs, then the state (r, p, g of each prediction).

        It returns a list of outputs (or the last), the last state by name, and what is read out: for each step, by
        node name, (r, p, τ, f), or of a node that predicts nothing (value,).
        """
        self.graph = self.emitter.graph
        inputs = {node: self.graph.node_copy(node) for node in self.source.nodes if node.op == "placeholder"}
        held: dict[str, Held] = {}
        if self.what.continued:
            held = {part.name: Held(*(self.placeholder(k, part.name) for k in Held._fields)) for part in self.parts}
        outputs, readouts = [], []
        for number in range(self.what.steps):
            before = set(self.graph.nodes)
            output, readout, held = self.one_step(number, inputs, held)
            outputs.append(output)
            readouts.append(readout)
            self.name_nodes(before, number)
        state = {name: tuple(each) for name, each in held.items()} if self.what.keeps else {}
        self.graph.output((outputs if self.what.all_outputs else outputs[-1], state, readouts))
        drop_unused(self.graph)
        return self.graph

    def one_step(
        self, number: int, inputs: Mapping[fx.Node, fx.Node], held: Mapping[str, Held]
    ) -> tuple[Any, dict[str, Any], dict[str, Held]]:
        """One step: its output, what is read out of it, and what it hands on."""
        values: dict[fx.Node, fx.Node] = {}
        feedforward: dict[str, fx.Node] = {}
        at = {part.place.node: i for i, part in enumerate(self.parts)}
        for node in self.source.nodes:
            if node.op == "output":
                output = fx.map_arg(node.args[0], values.__getitem__)
                continue
            values[node] = inputs[node] if node in inputs else self.emit(node, values, number)
            if node in at:
                feedforward[self.parts[at[node]].name] = values[node]
                values[node] = self.represented(at[node], values[node], held) if held else values[node]
        goes_on = number < self.what.steps - 1 or self.what.keeps
        handed_on, readout = {}, {}
        for part in self.parts:
            if goes_on or part.name in self.what.readout:
                r, target = values[part.place.node], values[part.place.target]
                inside = self.predicted(part, r, number)
                p = inside[part.predictor.output].node
                readout[part.name] = (r, p, target, feedforward[part.name])
                if goes_on:
                    handed_on[part.name] = Held(r, p, self.gradient(part, inside, target))
        own = {name_of(node): (value,) for node, value in values.items() if name_of(node) in self.what.readout}
        return output, {name: {**own, **readout}[name] for name in self.what.readout}, handed_on

    # -- r ------------------------------------------------------------------------------------------------------------

    def represented(self, i: int, f: fx.Node, held: Mapping[str, Held]) -> fx.Node:
        """r = β f + λ p + (1 - β - λ) r - α g"""
        part, (r, _, g) = self.parts[i], held[self.parts[i].name]
        beta, feedback, memory, alpha = self.multipliers(part)
        terms = {"memory": (r, memory), "error": (g, self.once(operator.neg, alpha))}
        if feedback is not None:
            terms = {"feedback": (held[self.parts[i + 1].name].prediction, feedback), **terms}
        value = self.graph.call_function(operator.mul, (f, beta))
        tell(value, name=f"{part.name}.representation.feedforward")
        for name, (term, factor) in terms.items():
            value = self.graph.call_function(torch.addcmul, (value, term, factor))
            tell(value, name=f"{part.name}.representation.{name}")
        tell(value, name=f"{part.name}.representation")
        return value

    def multipliers(self, part: Part) -> tuple[fx.Node, fx.Node | None, fx.Node, fx.Node]:
        """β, λ (None where nothing is fed back), the memory 1 - β - λ, α."""
        fed_back = part.place.fed_back
        if not part.learned:
            beta, alpha = self.number(part, "feedforward"), self.number(part, "error")
            feedback = self.number(part, "feedback") if fed_back else None
            memory = self.once(operator.sub, 1, beta)
            return beta, feedback, memory if feedback is None else self.once(operator.sub, memory, feedback), alpha
        names = ("u", "v", "w") if fed_back else ("u", "w")
        shares = [self.once(torch.sigmoid, self.number(part, name)) for name in names]
        total = shares[0]
        for share in shares[1:]:
            total = self.once(operator.add, total, share)
        beta, *feedbacks, memory = (self.once(operator.truediv, share, total) for share in shares)
        return beta, feedbacks[0] if feedbacks else None, memory, self.number(part, "alpha")

    def number(self, part: Part, name: str) -> fx.Node:
        """One of the numbers that a prediction's multipliers are made of."""
        path = f"multipliers.{block_name(part.place.prediction)}.{name}"
        node = self.emitter.attribute(path).node
        tell(node, name=path)
        return node

    # -- p and g ------------------------------------------------------------------------------------------------------

    def predicted(self, part: Part, r: fx.Node, number: int) -> dict[fx.Node, Value]:
        """The nodes of the predictor, which reads r."""
        inside: dict[fx.Node, fx.Node] = {}
        for node in part.predictor.nodes[:-1]:
            inside[node] = r if node.op == "placeholder" else self.emit(node, inside, number)
            if self.what.fused and node.op == "call_function":
                hasten(inside[node], self)
        return {node: self.emitter.proxy(copy) for node, copy in inside.items()}

    def gradient(self, part: Part, inside: Mapping[fx.Node, Value], target: fx.Node) -> fx.Node:
        """g = c Jᵀ (p - τ)"""
        own = [node for node in part.predictor.nodes if node.op == "placeholder"]
        top = part.predictor.output
        with self.emitter.named(f"{top.name}_td", counterpart=name_of(top), role="error"):
            error = inside[top] - self.emitter.proxy(target)
            error = error * part.factor
            rows = fx.Proxy.__getattr__(inside[top], "shape")[0]
            error = error / rows if part.by_batch else error
            error.spec = spec_of(top)
        self.emitter.batch = fx.Proxy.__getattr__(inside[own[0]], "shape")[0]
        wanted = part.predictor.below(own)
        walk = Walk(part.predictor, self.emitter, "error", inside.__getitem__, wanted, fused=self.what.fused)
        g = walk.run({top: error} if top in wanted else {}).get(own[0])
        if g is None:  # nothing of the prediction depends on r
            return self.graph.call_function(torch.zeros_like, (inside[own[0]].node,))
        return self.graph.call_function(torch.detach, (g.node,)) if part.detached else g.node

    def name_nodes(self, before: set[fx.Node], number: int) -> None:
        """Say of the nodes that a step has made in which it is computed, and what those of the walks are called."""
        for node in [node for node in self.graph.nodes if node not in before and node.op.startswith("call")]:
            if not is_named(node) and counterpart_of(node) is not None:
                tell(node, name=f"{counterpart_of(node)}.td")
            if number > self.FIRST and pass_of(node) is None:
                node._rename(f"{node.name}_{self.WORD}{number}")
                tell(node, **{"pass": number})


def step(module: fx.GraphModule, root: nn.Module, parts: Sequence[Part], what: Stepping) -> fx.GraphModule:
    """The steps of `module` with its predictions, as one flat graph (see `Steps.run`).

    Args:
        module: a graph in functional ops, with shapes.
        root: has its parameters, the predictors and the multipliers.
    """
    return fx.GraphModule(root, Steps(module.graph, parts, what).run(), "Stepped")
