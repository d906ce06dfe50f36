"""One step of Counter-Hebb learning as one graph: instruction pass, gated BU pass, loss, error pass, optimizer."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfeedback.butd import BUTD
from fxfeedback.deploy.batch_norm import advanced, batch_norm_in_training
from fxfeedback.deploy.judged import judged_outputs, target_like
from fxfeedback.deploy.losses import LOSSES, Loss, by_rules
from fxfeedback.deploy.parts import about, about_butd, own_inputs, state_of, take_gate, td_name
from fxfeedback.deploy.program import Input, Program
from fxfeedback.errors import ExportError, OptionError
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.copies import copied
from fxfeedback.graph.effects import has_effect
from fxfeedback.graph.nodes import (
    feedback_weight_of,
    gate_of,
    identifier,
    is_error,
    is_named,
    is_own_input,
    magnitude_of,
    name_of,
    tell,
)
from fxfeedback.graph.operands import is_floating, operand
from fxfeedback.graph.structures import leaves_of
from fxfeedback.instructed.graphs import Graphs
from fxfeedback.instructed.kept_graphs import graphs_of
from fxfeedback.rules.ops import ADVANCES, cumulative_momentum
from fxfeedback.tracing.kept_graphs import modes_of
from fxfeedback.tracing.modes import eval_mode
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.wrapper import fetch_of, like_of, net_of, root_of

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)

STEP = "optimizer.step"
"""The input that counts Adam's steps."""


class LearnerStep:
    """Joins the graphs of a step in one: batch norms in their present mode, everything else in evaluation mode.

    labels: what its nodes are called in the file.
    given: name of an input of the graphs that are joined -> the node that has it.
    tensors: name of an entry of the state, or of what the optimizer keeps -> the node that has it now.
    """

    def __init__(
        self, butd: BUTD, loss: str | Callable, rule: Callable[..., Any], kept: Sequence[str], instructed: bool | None
    ) -> None:
        self.butd, self.loss, self.rule, self.kept = butd, loss, rule, kept
        self.graph = fx.Graph()
        self.labels: dict[fx.Node, str] = {}
        self.feedback_weights: dict[Any, fx.Node] = {}
        self.given: dict[str, fx.Node] = {}
        self.tensors: dict[str, fx.Node] = {}
        with eval_mode(butd, but=BATCH_NORMS):
            self.graphs, self.modes = graphs_of(butd), modes_of(butd)
            if instructed:
                self.graphs.require_head()
            has_tasks = butd.options.n_tasks is not None
            self.instructed = self.graphs.can_instruct and (has_tasks if instructed is None else instructed)
            self.bu = BottomUp(self.graphs.predicting(self.instructed).graph)
            self.learns = self.graphs.learning_parameters()
        self.judged = _judged(self.bu, self.graphs)
        self.state, self.tied = state_of(butd, self.learns)

    def program(self) -> Program:
        """The whole step."""
        inputs = self._inputs()
        start = dict(self.tensors)
        with eval_mode(self.butd, but=BATCH_NORMS):
            loss, logits, updates = self._learn()
        if STEP in start:
            self.tensors[STEP] = self._call(STEP, torch.add, start[STEP], 1)
        for name in updates:
            self._optimize(name, updates[name])
        outputs = {"loss": loss, "logits": logits}
        outputs |= {f"{name}.new": node for name, node in self.tensors.items() if node is not start.get(name, node)}
        with eval_mode(self.butd):
            if modes_of(self.butd) != self.modes or (self.magnitudes and self.instructed):
                self.tensors = start
                outputs["prediction"] = self._predict(graphs_of(self.butd))
        self.graph.output(outputs)
        metadata = about_butd(self.butd, self.graphs, "learner") if self.instructed else about(self.butd, "learner")
        metadata |= {"learns": list(updates), "keeps": list(self.kept), "tied": self.tied}
        metadata |= {"magnitudes": self.graphs.bounds()} if self.magnitudes else {}
        root, fetch = root_of(self.butd), fetch_of(self.butd)
        return Program(self.graph, self.labels, inputs, root, fetch, metadata, output="")

    def _inputs(self) -> list[Input]:
        """A placeholder for every input of the file, and what these inputs are."""
        like = like_of(self.butd)
        own = [node for node in self.bu.nodes if is_own_input(node)]
        self.given = {str(node.target): self.graph.node_copy(node) for node in own}
        inputs = own_inputs(self.butd, self.graph)
        for name in [given.name for given in inputs if given.name in self.state]:
            raise OptionError(
                f"the model's input {name!r} has the name of a parameter or buffer: rename forward's argument"
            )

        def put(name: str, example: torch.Tensor, batch: str | None = None, default: Any = None) -> fx.Node:
            inputs.append(Input(name, example.detach().to("meta"), batch, default))
            return self.graph.placeholder(identifier(name))

        if self.instructed:
            one = like.new_empty(1, self.graphs.instruction_size)
            self.given["instruction"] = put("instruction", one, "instructions")
        self.target = put("target", target_like(self.bu.output_leaves()[self.judged[0]], self.loss), "batch")
        self.lr = put("lr", like.new_empty(()))
        fetch = fetch_of(self.butd)
        self.magnitudes = {name: put(f"{name}.magnitude", fetch(name)) for name in self.graphs.bounds()}
        for name, tensor in self.state.items():
            self.tensors[name] = put(name, tensor, default=tensor.detach())
        for name in sorted(self.learns):
            for kind in self.kept:
                self.tensors[f"{name}.{kind}"] = put(f"{name}.{kind}", self.state[name])
        if "exp_avg" in self.kept:
            self.tensors[STEP] = put(STEP, like.new_empty(()))
        return inputs

    def _learn(self) -> tuple[fx.Node, fx.Node, dict[str, fx.Node]]:
        """The loss, the logits, and the update of every parameter that learns."""
        learner = self.graphs.drawn_learner(self.instructed, self.learns, tuple(self.judged)).graph
        gates = self._gates(self.graphs, "td", drawn=True)
        outputs = [node for node in leaves_of(learner.output_node().args[0][0]) if is_floating(node)]  # type: ignore
        judged = [outputs[i] for i in self.judged]
        pairs: list[list[fx.Node]] = []
        with_error = self._loss_with_error()

        def given(node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
            if not is_error(node):
                return gates.get(gate_of(node) or "") or self._given(node)
            logits = copies[judged[len(pairs)]]
            pairs.append(self._several("loss", with_error, logits, self.target, number=2))
            return self._mean(pairs[-1][1])

        updated = {node: name for name, node in learner.output_node().args[0][1].items()}  # type: ignore[index, union-attr]

        def label(node: fx.Node) -> str:
            if node in updated:
                return f"update/{updated[node]}"
            return f"bu/{name_of(node)}" if is_named(node) else f"error/{td_name(node)}"

        (_, updates), copies = self._copy(learner, given, label)
        total = functools.reduce(lambda a, b: self._call("loss", torch.add, a, b), [loss for loss, _ in pairs])
        return self._mean(total), copies[judged[-1]], updates

    def _loss_with_error(self) -> Loss:
        if isinstance(self.loss, str):
            return LOSSES[self.loss]
        target = target_like(self.bu.output_leaves()[self.judged[0]], self.loss)
        return by_rules(self.loss, target, target)

    def _optimize(self, name: str, update: fx.Node) -> None:
        label = f"optimizer/{name}"
        keeps = {kind: self.tensors[f"{name}.{kind}"] for kind in self.kept}
        if STEP in self.tensors:
            keeps["step"] = self.tensors[STEP]
        w, kept = self._several(label, self.rule, self.tensors[name], update, self.lr, keeps, number=2)
        self.tensors[name] = w
        for kind in self.kept:
            self.tensors[f"{name}.{kind}"] = self._call(label, operator.getitem, kept, kind)

    def _predict(self, graphs: Graphs) -> fx.Node:
        """The logits in evaluation mode."""
        gates = self._gates(graphs, "predict/td")
        bu = BottomUp(graphs.predicting(self.instructed).graph)
        _, copies = self._copy(
            bu.graph,
            lambda node, _: gates.get(gate_of(node) or "") or self._given(node),
            lambda node: f"predict/{name_of(node)}",
        )
        return copies[bu.output_leaves()[_judged(bu, graphs)[-1]]]

    def _given(self, node: fx.Node) -> fx.Node:
        """The input of the file that an input of a graph is."""
        weight = magnitude_of(node)
        return self.magnitudes[weight] if weight else self.given[str(node.target)]

    def _gates(self, graphs: Graphs, label: str, drawn: bool = False) -> dict[str, fx.Node]:
        """Name of a site -> the node that has its gate: the instruction pass."""
        if not self.instructed:
            return {}
        td = copied(graphs.instructing(drawn and graphs.options.draws))
        for node in td.graph.nodes:
            tell(node, name=td_name(node))
        # The instruction head and TD norms are modules there: opened, they work on tensors of the state.
        opened = open_modules(td, owner=net_of(self.butd))
        counters, _ = self._copy(
            opened.graph,
            lambda node, _: self._given(node),
            lambda node: f"{label}/{name_of(node)}",
        )
        gates = {}
        for site in graphs.sites:
            name, take = name_of(site), functools.partial(take_gate, graphs, site)
            gates[name] = self._call(f"{label}/gate/{name}", take, counters[name])
        return gates

    # -- nodes --------------------------------------------------------------------------------------------------------

    def _call(self, label: str, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name=identifier(label))
        self.labels[node] = label
        return node

    def _several(self, label: str, target: Callable[..., Any], *args: Any, number: int, **kwargs: Any) -> list[fx.Node]:
        """A node for each of the `number` values that `target` returns."""
        whole = self._call(label, target, *args, **kwargs)
        return [self._call(label, operator.getitem, whole, i) for i in range(number)]

    def _mean(self, total: fx.Node) -> fx.Node:
        """Over the outputs that the loss judges."""
        return self._call("loss", torch.div, total, len(self.judged)) if len(self.judged) > 1 else total

    def _copy(
        self,
        source: fx.Graph,
        given: Callable[[fx.Node, Mapping[fx.Node, fx.Node]], fx.Node],
        label: Callable[[fx.Node], str],
    ) -> tuple[Any, dict[fx.Node, fx.Node]]:
        """Copy a graph in functional ops: its output, and all copies. What it changes in place, changes in `tensors`.

        given: (placeholder, copies so far) -> the node that stands for it. label: node -> its label.
        """
        copies: dict[fx.Node, fx.Node] = {}

        def see(node: fx.Node) -> fx.Node:
            return self._tensor(str(node.target)) if node.op == "get_attr" else copies[node]

        for node in source.nodes:
            if node.op == "placeholder":
                copies[node] = given(node, copies)
            elif node.op == "output":
                return fx.map_arg(node.args[0], see), copies
            elif node.op != "get_attr":
                copies[node] = (
                    self._feedback_weight(node, see)
                    or self._out_of_place(node, see, label(node))
                    or self.graph.node_copy(node, see)
                )
                self.labels[copies[node]] = label(node)
        raise AssertionError("a graph ends with its output")

    def _feedback_weight(self, node: fx.Node, see: Callable[[fx.Node], fx.Node]) -> fx.Node | None:
        """Of what makes a weight that TD reads: its copy, one for all passes."""
        if feedback_weight_of(node) is None:
            return None
        key = node.target, *fx.map_arg(node.args, see)
        return self.feedback_weights.get(key) or self.feedback_weights.setdefault(key, self.graph.node_copy(node, see))

    def _tensor(self, name: str) -> fx.Node:
        if name not in self.tensors:
            self.tensors[name] = self.graph.get_attr(name)
        return self.tensors[name]

    def _out_of_place(self, node: fx.Node, see: Callable[[fx.Node], fx.Node], label: str) -> fx.Node | None:
        """For a node that changes tensors in place: the same out of place, and `tensors` brought up to date."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), see)
        if node.target in ADVANCES:
            operands = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs).arguments
            if not operands.get("training"):
                return None
            y, *new = self._several(label, batch_norm_in_training, *args, number=3, **kwargs)
            self._advance([operands["running_mean"], operands["running_var"]], new)
            return y
        if node.target in ADVANCES.values():
            new = self._several(label, advanced, *args, number=2, **kwargs)
            self._advance(node.args[1:3], new)
            return new[0]
        if node.target is torch.Tensor.add_ and node.args[0].op == "get_attr":  # type: ignore[union-attr]
            new = [self._call(label, torch.add, *args)]
            self._advance(node.args[:1], new)
            return new[0]
        if node.target is cumulative_momentum:
            return self._call(label, torch.reciprocal, *args)
        statistics = node.target is F.instance_norm and isinstance(operand(node, "running_mean"), fx.Node)
        if statistics or has_effect(node):
            raise ExportError(f"{label!r} changes a tensor in place, and a step can do so for batch norms only")
        return None

    def _advance(self, old: Iterable[Any], new: Iterable[fx.Node]) -> None:
        for before, after in zip(old, new, strict=True):
            if before is not None:
                self.tensors[str(before.target)] = after


def _judged(bu: BottomUp, graphs: Graphs) -> list[int]:
    return judged_outputs(bu, None if graphs.no_head else graphs.head)
