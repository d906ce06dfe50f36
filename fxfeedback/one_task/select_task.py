"""One task's network: the instruction pass is done once, its gates are constants, and dead channels are removed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxfeedback.errors import InputError
from fxfeedback.graph.effects import has_effect
from fxfeedback.graph.nodes import (
    draws,
    gate_of,
    gated_site_of,
    identifier,
    inherit,
    is_instruction,
    name_of,
    spec_of,
    task_heads_of,
    tell,
)
from fxfeedback.graph.operands import operand
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.one_task.dead_channels import remove_dead_channels
from fxfeedback.one_task.step_table import step_of
from fxfeedback.rules.gating import gate
from fxfeedback.rules.ops import one_node

if TYPE_CHECKING:
    from fxfeedback.instructed.graphs import Graphs


@torch.no_grad()
def select_task(graphs: "Graphs", instruction: torch.Tensor, examples: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The gated BU graph with the gates of one instruction as constants, on its live channels.

    Args:
        graphs: in evaluation mode.
        instruction: (1, instruction size).
        examples: tensors without data like the inputs.
    """
    gates = {name_of(site): gate for site, gate in zip(graphs.sites, graphs.gates(instruction), strict=True)}
    folded = _Folding(graphs, gates, instruction)
    module = fx.GraphModule(folded.tensors, folded.run(), "Gated")
    if not graphs.options.exact:
        annotate_shapes(module, examples)  # the lateral may be any function
    selected = remove_dead_channels(module.graph, folded.tensors, step_of)
    _check_sizes(selected.graph)
    for node in selected.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and getattr(torch.Tensor, name, None) is node.target:
            node.op, node.target = "call_method", name  # a module with x.flatten(1) in its code can be pickled
    selected.recompile()
    return selected.eval()


@one_node
def sized(input: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The input, whose size without the batch must be `size`: for another size the gates would differ."""
    if tuple(input.shape[1:]) != tuple(size):
        raise InputError(
            f"this network was selected for inputs of size {tuple(size)}, not {tuple(input.shape[1:])}: "
            f"butd.select(task, input_size={tuple(input.shape[1:])}) selects one for these"
        )
    return input


def _check_sizes(graph: fx.Graph) -> None:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in reversed(inputs):
        with graph.inserting_after(inputs[-1]):
            checked = graph.call_function(sized, (node, tuple(spec_of(node).shape[1:])))
        tell(checked, name=name_of(node))
        node.replace_all_uses_with(checked, delete_user_cb=lambda user, checked=checked: user is not checked)


class _Folding:
    """Copies the gated BU graph; what does not depend on the input is computed, and becomes a get_attr node."""

    def __init__(self, graphs: "Graphs", gates: Mapping[str, torch.Tensor], instruction: torch.Tensor) -> None:
        self.graphs, self.gates, self.instruction = graphs, gates, instruction
        self.graph = fx.Graph()
        self.tensors: dict[str, torch.Tensor] = {}
        self.constants: dict[fx.Node, Any] = {}
        self.copies: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.Graph:
        for node in self.graphs.predicting(True).graph.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.use))
            elif node not in self.copies:
                self.copy(node)
        return self.graph

    def copy(self, node: fx.Node) -> None:
        """The node's copy, or what it computes where that is a constant."""
        if is_instruction(node):
            self.constants[node] = self.instruction
        elif gate_of(node) is not None:
            self.constants[node] = self.gates[str(gate_of(node))]
        elif node.op == "get_attr":
            self.constants[node] = self.graphs.owner.fetch(str(node.target))
        elif self.is_constant(node):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.constants.__getitem__)
            self.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif gated_site_of(node) is not None:
            self.copies[node] = self.gated(node)
        elif task_heads_of(node) == "chosen":  # by steps, of which the last has the name and shape of the sum
            self.copies[node] = self.copies[node.all_input_nodes[0]]
            inherit(self.copies[node], node)
        else:
            self.copies[node] = self.graph.node_copy(node, self.use)
            if task_heads_of(node) == "stacked":
                self.one_head(self.copies[node])

    def is_constant(self, node: fx.Node) -> bool:
        known = all(source in self.constants for source in node.all_input_nodes)
        return node.op == "call_function" and known and not draws(node) and not has_effect(node)

    def use(self, node: fx.Node) -> Any:
        """An operand in the new graph: a node, or a number."""
        if node in self.copies or not isinstance(self.constants.get(node), torch.Tensor):
            return self.copies[node] if node in self.copies else self.constants[node]
        given = {"get_attr": str(node.target), "placeholder": node.name}
        name = given.get(node.op, f"folded_{identifier(node.name)}")  # no name that a module could have
        while self.tensors.get(name, self.constants[node]) is not self.constants[node]:
            name += "_"
        self.tensors[name] = self.constants[node]
        self.copies[node] = made = self.graph.get_attr(name)
        tell(made, name=name_of(node))
        return made

    def gated(self, node: fx.Node) -> fx.Node:
        """What the lateral makes of a site's value and its constant gate."""
        lateral: Any = torch.mul if node.target is gate else node.target
        inner = fx.Graph()
        tracer = fx.proxy.GraphAppendingTracer(inner)
        value, opening = (inner.placeholder(name) for name in ("value", "gate"))
        result = lateral(fx.Proxy(value, tracer), fx.Proxy(opening, tracer)).node
        self.copies[value], self.constants[opening] = self.use(node.args[0]), self.constants[node.args[1]]  # type: ignore
        opening._rename(node.args[1].name)  # type: ignore[union-attr]
        for step in list(inner.nodes)[2:]:
            if step.op == "call_method":
                step.op, step.target = "call_function", getattr(torch.Tensor, str(step.target))
            step._rename(f"{node.name}_{step.name}")
            self.copy(step)
        made = self.use(result)
        made._rename(node.name)
        inherit(made, node)
        return made

    def one_head(self, copy: fx.Node) -> None:
        """In the place of the stacked heads of all tasks: their sum, weighted by the instruction."""
        heads, (weights,) = self.graphs.bu.task_heads, self.instruction
        for name in ("weight", "bias"):
            source = operand(copy, name)
            if source is not None:
                self.tensors[str(source.target)] = torch.tensordot(weights, heads.by_task(name), 1)
