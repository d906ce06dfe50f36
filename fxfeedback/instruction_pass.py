"""The instruction pass: the walk down the TD graph from an instruction, in which no BU value exists yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxfeedback.feedback_weights import Twins, twins_in
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.channels import along_channels, channels_of, switch_off_channels
from fxfeedback.graph.nodes import name_of, spec_of, tell
from fxfeedback.graph.operands import batch_norm_of, is_floating, operand, weight_of
from fxfeedback.graph.values import Emitter, Unknown, Value
from fxfeedback.td_graph import Walk, dtype_of


@dataclass(frozen=True)
class Instructing:
    """How the instruction pass runs down the TD graph.

    sites: the gating sites, whose counter neurons the graph returns.
    head: the prediction head.
    through_head: whether the instruction is a vector over the head's output (no instruction head).
    twins: BU weight name -> what stands for it in TD. td_biases: -> name of the TD bias after its transpose.
    td_norms: BU weight name -> name of the TD norm module after its transpose, in place of the BU batch norm.
    rectified: whether the counter neurons of the sites are returned as they go on, after the TD ReLU; else before it.
    by_channel: a channel whose counter neuron has a positive mean over its positions is on, the others hand on zero.
    """

    sites: Sequence[fx.Node]
    head: fx.Node
    through_head: bool
    twins: Twins
    td_biases: Mapping[str, str]
    td_norms: Mapping[str, str]
    by_channel: bool = False
    rectified: bool = True


def instruct(module: fx.GraphModule, root: nn.Module, how: Instructing) -> fx.GraphModule:
    """The instruction pass: instruction (B, size) -> dict: site name -> counter neurons, shaped like the site.

    Where magnitudes are drawn, they are further inputs.

    Args:
        module: the BU graph in functional ops.
        root: has the modules and parameters that `how` names, and `instruction_head`.
    """
    bu, emitter = BottomUp(module.graph), Emitter()
    down = _InstructionPass(bu, emitter, how)
    top, t = down.start()
    twin = twins_in(emitter, how.twins, down.see)
    Walk(bu, emitter, "instruct", down.see, bu.below(how.sites), down.arrive, down.depart, twin).run({top: t})
    names = [name_of(site) for site in how.sites]
    emitter.graph.output({name: down.counters[name].node for name in names if name in down.counters})
    emitter.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return fx.GraphModule(root, emitter.graph, "TopDown")


class _InstructionPass:
    """What the instruction pass adds to the walk. `counters`: site name -> counter neurons."""

    def __init__(self, bu: BottomUp, emitter: Emitter, how: Instructing) -> None:
        self.bu, self.emitter, self.how = bu, emitter, how
        self.counters: dict[str, Any] = {}
        self.constants: dict[fx.Node, Value] = {}
        self.replaced = {norm for norm in bu.nodes if batch_norm_of(norm) in how.td_norms}

    def start(self) -> tuple[fx.Node, Any]:
        """The node at which TD starts, and its counter neuron: the instruction's, spread over positions."""
        t = self.emitter.placeholder("instruction")
        tell(t.node, instruction=True)
        self.emitter.batch = fx.Proxy.__getattr__(t, "shape")[0]
        head = self.how.head
        if self.how.through_head:
            top = head
        else:
            top = operand(head, "input")
            t = self.emitter.create_proxy("call_module", "instruction_head", (t,), {})
        spec = spec_of(top)
        if len({dtype_of(node) for node in self.bu.parameters if is_floating(node)}) > 1:
            t = t.to(spec.dtype)  # the instruction has the first parameter's
        t = t.reshape((-1, *along_channels(channels_of(head), spec)[1:]))
        return top, t.expand(self.emitter.sizes(spec))

    def see(self, node: fx.Node) -> Any:
        """Constants, parameters among them, exist already; BU values do not."""
        if node in self.bu.depending_on_inputs:
            return Unknown(self.emitter, node)
        if node not in self.constants:
            for source in node.all_input_nodes:
                self.see(source)
            copy = self.emitter.graph.node_copy(node, lambda source: self.constants[source].node)
            self.constants[node] = self.emitter.proxy(copy)
        return self.constants[node]

    def arrive(self, node: fx.Node, t: Any) -> tuple[Any, bool]:
        """At a site the counter neuron is rectified and kept; past a batch norm that TD replaces it goes as it is."""
        if node in self.replaced:
            return t, True
        if node in self.how.sites:
            before, t = t, switch_off_channels(t, node) if self.how.by_channel else torch.relu(t)
            self.counters[name_of(node)] = t if self.how.rectified else before
        return t, False

    def depart(self, node: fx.Node, t: Any) -> Any:
        """After the transpose of a linear layer or convolution: TD's own bias and norm."""
        weight = str(weight_of(node).target)
        if weight in self.how.td_biases:
            bias = self.emitter.attribute(self.how.td_biases[weight])
            t = t + bias.reshape(along_channels(channels_of(node), spec_of(operand(node, "input"))))
        if weight in self.how.td_norms:
            t = self.emitter.create_proxy("call_module", self.how.td_norms[weight], (t,), {})
        return t
