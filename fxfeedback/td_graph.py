"""Derive the top-down graph from the bottom-up graph: the same nodes in reverse, on the same weights.

`walk` is the whole of it: from the top down, each node's rule brings the node's counter neuron to its operands. The
instruction pass (`instruct`) and the error pass (in counter_hebb_pass.py) are this walk in two roles.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from fxfeedback.errors import NodeNameError, RuleError
from fxfeedback.rules import RULES, Rule
from fxfeedback.rules.core import CONSTANT
from fxfeedback.trace import EXAMPLE_BATCH, Spec, find_node, nearest, user_line

# -- values: what rules compute on ------------------------------------------------------------------------------------


class Emitter(fx.Tracer):
    """Turns the tensor code of rules into nodes of one graph. `batch` is the run-time batch size as a proxy."""

    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Module()
        self.graph = fx.Graph(tracer_cls=fx.Tracer)
        self.batch: Any = None
        self.prefix: str | None = None

    @contextmanager
    def named(self, prefix: str) -> Iterator[None]:
        """Name the nodes that are made in the meantime."""
        self.prefix = prefix
        yield
        self.prefix = None

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, *rest: Any
    ) -> "Value":
        if self.prefix and kind in ("call_function", "call_method"):
            name = self.prefix
        return super().create_proxy(kind, target, args, kwargs, name, *rest)  # type: ignore[return-value]

    def proxy(self, node: fx.Node) -> "Value":
        return Value(node, self)

    def size(self, spec: Spec, dim: int) -> Any:
        """Size of one dimension: an int, or for a batch dimension a proxy."""
        slope = spec.per_sample[dim]
        if not slope:
            return spec.shape[dim]
        size = self.batch if slope == 1 else self.batch * slope
        constant = spec.shape[dim] - slope * EXAMPLE_BATCH
        return size + constant if constant else size

    def placeholder(self, name: str, spec: Any = None) -> "Value":
        value = self.create_proxy("placeholder", name, (), {})
        value.spec = spec
        return value

    def attribute(self, name: str, spec: Any = None) -> "Value":
        """The parameter or buffer `name`; one node however often it is used."""
        for node in self.graph.find_nodes(op="get_attr", target=name):
            return self.proxy(node)
        value = self.create_proxy("get_attr", name, (), {}, name.replace(".", "_"))
        value.spec = spec
        return value


class Value(fx.Proxy):
    """A proxy that knows its shape as far as tracing knows it."""

    has_value = True

    @property
    def spec(self) -> Any:
        return self.node.meta.get("spec")

    @spec.setter
    def spec(self, spec: Any) -> None:
        self.node.meta["spec"] = spec

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.tracer.size(self.spec, d) for d in range(self.ndim))

    @property
    def ndim(self) -> int:
        return len(self.spec.shape)


class Unknown:
    """A BU value in the instruction pass: it has a shape, but does not exist yet."""

    has_value = False

    def __init__(self, emitter: Emitter, node: fx.Node) -> None:
        self.emitter, self.node, self.spec = emitter, node, node.meta["spec"]

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.emitter.size(self.spec, d) for d in range(self.ndim))

    @property
    def ndim(self) -> int:
        return len(self.spec.shape)

    def __getattr__(self, name: str) -> Any:
        raise RuleError(
            f"a rule asked for .{name} of the BU value {self.node.meta.get('name')!r} in the instruction pass, where no BU "
            "value exists yet: give the rule roles(instruct=..., error=...)"
        )


# -- questions about the BU graph ---------------------------------------------------------------------------------------


@dataclass
class BottomUp:
    """The opened BU graph and what the TD graph asks of it."""

    graph: fx.Graph
    nodes: list[fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = list(self.graph.nodes)

    @cached_property
    def digraph(self) -> "nx.DiGraph":
        """The data flow: edges from each node to its users."""
        digraph = nx.DiGraph()
        digraph.add_nodes_from(self.nodes)
        digraph.add_edges_from((node, user) for node in self.nodes for user in node.users)
        return digraph

    @cached_property
    def dynamic(self) -> set[fx.Node]:
        """The nodes that depend on the model's input."""
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
        return [node for node in self.nodes if node.op == "placeholder" and "instruction" not in node.meta]

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
        leaves: list[fx.Node] = []
        fx.map_arg(self.output, lambda node: leaves.append(node) if node not in leaves else None)
        return [node for node in leaves if is_floating(node)]

    def sites(self, top: fx.Node, names: Sequence[str] | None = None) -> list[fx.Node]:
        """The gating sites that TD from `top` reaches: the rectifying activations, or the nodes called `names`."""
        reached = self.above(top) - {top}
        if names is None:
            rule = {node: RULES.get(node.target) for node in reached if node.op == "call_function"}
            return [node for node in self.nodes if node in reached and rule.get(node) and rule[node].rectifies]
        chosen = {find_node(self.graph, name) for name in names}
        for node in chosen - reached:
            raise NodeNameError(f"sites: TD does not reach {node.meta['name']!r} from {top.meta['name']!r}")
        return [node for node in self.nodes if node in chosen]

    def find_head(self, name: str | None) -> fx.Node:
        """The prediction head: the node called `name`, or the last linear or convolution that every path to the main
        output crosses.

        Raises:
            NodeNameError: there is none, or `name` is no linear or convolution.
        """
        weighted = [node for node in self.nodes if self.is_weighted(node)]
        names = ", ".join(repr(node.meta["name"]) for node in weighted[-5:])
        if name is not None:
            head = find_node(self.graph, name)
            if head not in weighted:
                raise NodeNameError(f"head={name!r} is no linear layer or convolution; candidates: {names}")
            return head
        leaves = self.output_leaves()
        main = self.output.get("out") if isinstance(self.output, dict) else None
        crossed = self.crossed_by_all_paths_to(main or leaves[0]) if leaves else []
        heads = [node for node in crossed if node in weighted]
        if not heads:
            raise NodeNameError(
                "no linear layer or convolution lies on every path to the model's output, so instructions have no "
                f"prediction head to start from: pass head= with one of {names or 'its linear layers (it has none)'}"
            )
        return heads[-1]

    def crossed_by_all_paths_to(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that every path from the inputs to `node` crosses, from the bottom up: its dominators."""
        start = "inputs"
        digraph = self.digraph.copy()
        digraph.add_edges_from((start, node) for node in self.inputs)
        dominator = nx.immediate_dominators(digraph, start)
        chain = [node]
        while chain[-1] in dominator and dominator[chain[-1]] not in (start, chain[-1], None):
            chain.append(dominator[chain[-1]])
        return chain[::-1]

    def is_weighted(self, node: fx.Node) -> bool:
        """Whether the node is a linear layer or a convolution of a BU value with a weight."""
        rule = RULES.get(node.target) if node.op == "call_function" else None
        return bool(rule and rule.weight and node in self.dynamic and weight_of(node) not in self.dynamic)


def weight_of(node: fx.Node) -> Any:
    """The weight of a linear layer or convolution, as a node of the BU graph."""
    rule = RULES[node.target]
    return rule.operands(node.args, node.kwargs)[rule.weight or ""]


def passes(node: fx.Node) -> bool:
    """Whether a counter neuron can pass through the node: it computes floating-point tensors, and not by chance."""
    return node.op == "call_function" and node.target not in CONSTANT and is_floating(node)


def is_floating(node: fx.Node) -> bool:
    """Whether the node's value is a floating-point tensor, or holds one."""
    specs: list[Any] = [node.meta.get("spec")]
    if isinstance(specs[0], tuple):
        specs = list(specs[0])
    return any(isinstance(spec, Spec) and spec.dtype.is_floating_point for spec in specs)


# -- the walk ---------------------------------------------------------------------------------------------------------


@dataclass
class Walk:
    """One TD pass over a BU graph, in the role "instruct" or "error".

    bu: the BU graph.
    emitter: takes the nodes that the rules make.
    role: which side of the rules' table is used.
    values: BU node -> what rules see of it.
    wanted: the BU nodes that need a counter neuron; nothing is computed for others.
    arrive: (node, counter neuron) -> counter neuron, and whether that is its first operand's as it is, without a rule.
    depart: (node, counter neuron of the operand) -> the same, applied after the transpose of a linear layer or
        convolution: TD biases and norms.
    twin: weight node -> the TD weight that stands for it, or None.
    fused: whether fused kernels may stand in for rules; saved: what their forward handed out, by node.
    """

    bu: BottomUp
    emitter: Emitter
    role: str
    values: Callable[[fx.Node], Any]
    wanted: set[fx.Node]
    arrive: Callable[[fx.Node, Any], tuple[Any, bool]] = lambda node, t: (t, False)
    depart: Callable[[fx.Node, Any], Any] = lambda node, t: t
    twin: Callable[[fx.Node], Any] = lambda node: None
    fused: bool = False
    saved: Mapping[fx.Node, Any] = field(default_factory=dict)

    def run(self, seeds: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """From the counter neurons `seeds` down to those of all wanted nodes."""
        counters: dict[fx.Node, Any] = dict(seeds)
        for node in reversed(self.bu.nodes):
            if node in counters and node in self.wanted and node.op == "call_function":
                with self.emitter.named(f"{node.name}_td"):
                    t = self._whole(node, counters[node])
                    if isinstance(t, Value):
                        t.spec = node.meta["spec"]
                    t, done = self.arrive(node, t)
                    for source, counter in self.pass_down(node, t, done):
                        _add(counters, source, counter)
        return counters

    def pass_down(self, node: fx.Node, t: Any, as_it_is: bool) -> Iterable[tuple[fx.Node, Any]]:
        """The counter neurons that `node` brings to its operands: pairs of a BU node and what is added to it."""
        if as_it_is:
            return [(source, t) for source in node.all_input_nodes[:1] if source in self.wanted]
        rule, args, kwargs = self._call(node)
        if rule is None:  # an element of a tuple
            return [(node.args[0], {node.args[1]: t})]  # type: ignore[list-item]
        operands = rule.operands(node.args, node.kwargs)
        wanted = {name for name, operand in operands.items() if self._wants(operand)}
        if (
            self.fused
            and self.role == "error"
            and rule.fused
            and rule.fused.applies(self.values(node), *args, **kwargs)
        ):
            results = rule.fused.error(t, self.values(node), self.saved.get(node, ()), wanted, *args, **kwargs)
        else:
            table = rule.table(self.values(node), *args, **kwargs)
            results = {name: getattr(table[name], self.role)(t) for name in wanted}
        if rule.weight and "input" in results:
            results["input"] = self.depart(node, results["input"])
        pairs = [pair for name in operands if name in results for pair in _zip(operands[name], results[name])]
        return [(source, counter) for source, counter in pairs if source in self.wanted and counter is not None]

    def _call(self, node: fx.Node) -> tuple[Rule | None, Any, Any]:
        rule = RULES.get(node.target)
        if rule is None and _is_element(node):
            return None, (), {}
        if rule is None:
            raise RuleError(_no_rule(node))
        try:
            twin = self.twin(weight_of(node)) if rule.weight else None
        except TypeError as error:
            raise RuleError(
                f"the rule {rule.name!r} does not cover this call: {error} (at node {_where(node)})"
            ) from None
        substitute = {weight_of(node): twin} if twin is not None else {}
        for weight, value in substitute.items():
            value.spec = weight.meta["spec"]
        see = lambda source: substitute.get(source) if source in substitute else self.values(source)  # noqa: E731
        return rule, _map(node.args, see), _map(node.kwargs, see)

    def _wants(self, operand: Any) -> bool:
        return any(
            isinstance(x, fx.Node) and x in self.wanted
            for x in (operand if isinstance(operand, (list, tuple)) else [operand])
        )

    def _whole(self, node: fx.Node, t: Any) -> Any:
        """For a tuple of outputs: a counter neuron for each, zero for those that nobody used."""
        if not isinstance(t, dict):
            return t
        some, specs = next(iter(t.values())), node.meta["spec"]
        return [
            t[i] if i in t else some.new_zeros([self.emitter.size(spec, d) for d in range(len(spec.shape))])
            for i, spec in enumerate(specs)
        ]


def _is_element(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return (
        node.target is operator.getitem and isinstance(source, fx.Node) and isinstance(source.meta.get("spec"), tuple)
    )


def _add(counters: dict[fx.Node, Any], node: fx.Node, t: Any) -> None:
    if isinstance(t, dict):  # elements of a tuple
        elements = counters.setdefault(node, {})
        for index, element in t.items():
            elements[index] = elements[index] + element if index in elements else element
    else:
        counters[node] = counters[node] + t if node in counters else t


def _zip(operand: Any, counter: Any) -> list[tuple[fx.Node, Any]]:
    return list(zip(operand, counter, strict=True)) if isinstance(operand, (list, tuple)) else [(operand, counter)]


def _map(arguments: Any, see: Callable[[fx.Node], Any]) -> Any:
    return fx.node.map_arg(arguments, see)


def _where(node: fx.Node) -> str:
    return f"{node.meta.get('name', node.name)!r}{user_line(node)}"


def _no_rule(node: fx.Node) -> str:
    name = fx.node._get_qualified_name(node.target) if callable(node.target) else str(node.target)
    known = {fx.node._get_qualified_name(target): target for target in RULES}
    return (
        f"no rule for {name} (at node {_where(node)}){nearest(name, known)}. Add one with @fxfeedback.rules.rule({name}): "
        "see 'Adding a rule' in CONTRIBUTING.md."
    )


# -- gates ------------------------------------------------------------------------------------------------------------


def gate_sites(module: fx.GraphModule, sites: Sequence[fx.Node], lateral: Callable[[Any, Any], Any]) -> fx.GraphModule:
    """The BU graph with `lateral(value, gate)` behind every site; the gates are inputs, behind the model's own."""
    graph = fx.Graph()
    copies = {node: graph.node_copy(node) for node in module.graph.nodes if node.op == "placeholder"}
    gates = {site: graph.placeholder(f"gate_{site.name}") for site in sites}
    for node in module.graph.nodes:
        if node in copies:
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in gates:
            copies[node] = graph.call_function(lateral, (copies[node], gates[node]))
            copies[node].meta.update(spec=node.meta["spec"], name=node.meta["name"] + ".gated", gates=node.meta["name"])
            copies[node]._rename(f"gated_{node.name}")
    return fx.GraphModule(module, graph, "Predict")


# -- the instruction pass -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instructing:
    """How the instruction pass runs down the TD graph.

    sites: the gating sites, whose counter neurons the graph returns.
    head: the prediction head.
    through_head: whether the instruction is a vector over the head's output (no instruction head).
    twins, td_biases: BU weight name -> name of the TD weight, of the TD bias behind its transpose.
    td_norms: BU weight name -> name of the TD norm module behind its transpose, in place of the BU batch norm.
    by_channel: a channel whose counter neuron has a positive mean over its positions is on, the others hand on zero.
    """

    sites: Sequence[fx.Node]
    head: fx.Node
    through_head: bool
    twins: Mapping[str, str]
    td_biases: Mapping[str, str]
    td_norms: Mapping[str, str]
    by_channel: bool = False


def instruct(module: fx.GraphModule, root: nn.Module, how: Instructing) -> fx.GraphModule:
    """The instruction pass: instruction (B, size) -> dict: site name -> counter neurons, shaped like the site.

    Args:
        module: the BU graph in functional ops.
        root: has the modules and parameters that `how` names, and `instruction_head`.
    """
    bu = BottomUp(module.graph)
    emitter = Emitter()
    t = emitter.placeholder("instruction")
    emitter.batch = fx.Proxy.__getattr__(t, "shape")[0]
    constants: dict[fx.Node, Value] = {}

    def see(node: fx.Node) -> Any:
        if node in bu.dynamic:
            return Unknown(emitter, node)
        if node not in constants:
            for source in node.all_input_nodes:
                see(source)
            constants[node] = emitter.proxy(emitter.graph.node_copy(node, lambda source: constants[source].node))
        return constants[node]

    counters_at_sites: dict[str, Any] = {}
    replaced = {norm for norm in bu.nodes if batch_norm_of(norm) in how.td_norms}

    def arrive(node: fx.Node, t: Any) -> tuple[Any, bool]:
        if node in replaced:
            return t, True
        if node in how.sites:
            t = switch_off_channels(t, node) if how.by_channel else torch.relu(t)
            counters_at_sites[node.meta["name"]] = t
        return t, False

    def depart(node: fx.Node, t: Any) -> Any:
        weight = str(weight_of(node).target)
        if weight in how.td_biases:
            bias = emitter.attribute(how.td_biases[weight])
            t = t + bias.reshape(along_channels(RULES[node.target].channels, node.args[0].meta["spec"]))
        if weight in how.td_norms:
            t = emitter.create_proxy("call_module", how.td_norms[weight], (t,), {})
        return t

    top = how.head
    if not how.through_head:
        t = emitter.create_proxy("call_module", "instruction_head", (t,), {})
        top = RULES[how.head.target].operands(how.head.args, how.head.kwargs)["input"]
    spec = top.meta["spec"]
    channels = RULES[how.head.target].channels
    t = t.reshape((-1, *along_channels(channels, spec)[1:])).expand(
        [emitter.size(spec, d) for d in range(len(spec.shape))]
    )

    wanted = bu.below(how.sites)
    Walk(
        bu,
        emitter,
        "instruct",
        see,
        wanted,
        arrive,
        depart,
        twin=lambda weight: emitter.attribute(how.twins[weight.target]) if weight.target in how.twins else None,
    ).run({top: t})
    emitter.graph.output({site.meta["name"]: counters_at_sites[site.meta["name"]].node for site in how.sites})
    emitter.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return fx.GraphModule(root, emitter.graph, "TopDown")


def switch_off_channels(t: Any, site: fx.Node) -> Any:
    """relu(t) in channels whose mean over positions is positive, zero in the others."""
    return torch.relu(t) * (channel_mean(t, site) > 0)


def channel_mean(t: Any, site: fx.Node) -> Any:
    """The mean over positions, kept as dimensions of size 1."""
    positions = positions_of(site)
    return t.mean(positions, keepdim=True) if positions else t


def positions_of(node: fx.Node) -> list[int]:
    """The dimensions of a node's value that are neither batch nor channels."""
    spec = node.meta["spec"]
    channels = channel_dim(node) % len(spec.shape)
    return [d for d in range(1, len(spec.shape)) if d != channels]


def channel_dim(node: fx.Node) -> int:
    """Where the channels of a value are: 1 behind a convolution or batch norm, last behind a linear layer or layer norm;
    any other op has them where its input has them."""
    while node.op == "call_function":
        rule = RULES.get(node.target)
        if rule is not None and rule.channels is not None:
            return rule.channels
        node = node.all_input_nodes[0]
    return 1


def along_channels(channels: int, spec: Spec) -> list[int]:
    """The shape in which a vector over channels broadcasts to a tensor."""
    shape = [1] * len(spec.shape)
    shape[channels] = spec.shape[channels]
    return shape


def batch_norm_of(node: fx.Node) -> str | None:
    """For a batch norm that follows a convolution directly: the name of the convolution's weight."""
    if node.op != "call_function" or getattr(RULES.get(node.target), "name", "") != "batch_norm":
        return None
    source = node.args[0]
    rule = RULES.get(source.target) if isinstance(source, fx.Node) else None
    return str(weight_of(source).target) if rule and rule.weight and rule.channels == 1 else None
