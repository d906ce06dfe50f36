"""Emit Counter-Hebb learning into the graph, and let `loss.backward()` run it.

`learner` joins three things in one graph: the BU pass, the TD pass from the error, and one update node per parameter.
`cut` halves that graph where the error enters; `CounterHebb` is the autograd function whose forward is the first half
and whose backward is the second. No gradient is taken anywhere.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.autograd.function import once_differentiable

from fxfeedback.rules import RULES
from fxfeedback.td_graph import BottomUp, Emitter, Value, Walk, weight_of
from fxfeedback.trace import EXAMPLE_BATCH

Tensors = tuple[torch.Tensor, ...]

INPUT = "input:"
"""Marks the model's inputs among the names of what learns."""


def key_of(node: fx.Node) -> str:
    """What an input or parameter is called in `Learning.wanted`: INPUT + its name, or the parameter's name."""
    return INPUT + str(node.target) if node.op == "placeholder" else str(node.target)


@dataclass(frozen=True)
class Learning:
    """How the learner learns.

    wanted: names of the inputs, parameters, TD twins and TD biases that get an update.
    twins: BU weight name -> name of its TD twin, for separate weights.
    td_biases: BU weight name -> name of the TD bias behind its transpose.
    noise: deviation of the factor 1 + noise * randn that each weight's update gets.
    lateral: (error, BU value) -> error at the sites, in place of the exact derivative; None is GaLU, which is exact.
    sites: names of the gating sites; only an inexact lateral needs them.
    fused: PyTorch's fused kernels in place of the rules, where there are any.
    """

    wanted: frozenset[str]
    twins: Mapping[str, str]
    td_biases: Mapping[str, str]
    noise: float = 0.0
    lateral: Callable[[Any, Any], Any] | None = None
    sites: frozenset[str] = frozenset()
    fused: bool = True


def learner(module: fx.GraphModule, root: nn.Module, learning: Learning) -> fx.GraphModule:
    """BU pass, error pass and updates in one graph.

    Args:
        module: a BU graph in functional ops, gated or not.
        root: has the parameters that `learning` names.
        learning: what to update and how.

    Returns:
        A graph with the inputs of `module` and one error per floating-point tensor of its output, shaped like it. It
        returns the output of `module` and a dict: name of an input, parameter or TD twin -> its update, summed over
        the batch as the error has it (a mean loss makes mean updates).
    """
    bu = BottomUp(module.graph)
    emitter = Emitter()
    wanted = bu.below(node for node in [*bu.inputs, *bu.parameters] if _learns(key_of(node), learning))
    values, saved = _emit_bottom_up(bu, emitter, wanted, learning.fused)
    leaves = bu.output_leaves()
    names = ["error"] if len(leaves) == 1 else [f"error_{i}" for i in range(len(leaves))]
    seeds = {leaf: emitter.placeholder(name, leaf.meta["spec"]) for leaf, name in zip(leaves, names, strict=True)}
    for seed in seeds.values():
        seed.node.meta["error"] = True
    emitter.batch = batch_size(
        [*seeds.values(), *(values[node] for node in bu.inputs)]
    )  # an input would have to be kept

    def arrive(node: fx.Node, e: Any) -> tuple[Any, bool]:
        if _is_gated_step(node):
            # One sign is both: v = relu(z) [t > 0] is positive where the gate is open and relu lets z pass.
            return open_where_positive(e, values[node], learning.fused), True
        return e, any(_is_gated_step(user) for user in node.users)

    def arrive_laterally(node: fx.Node, e: Any) -> tuple[Any, bool]:
        if node.meta["name"] not in learning.sites:
            return e, "gates" in node.meta
        gated = next((user for user in node.users if "gates" in user.meta), node)
        return learning.lateral(e, values[gated]), True  # type: ignore[misc]

    walk = Walk(
        bu,
        emitter,
        "error",
        values.__getitem__,
        wanted,
        arrive=arrive if learning.lateral is None else arrive_laterally,
        twin=lambda weight: (
            emitter.attribute(learning.twins[weight.target]) if weight.target in learning.twins else None
        ),
        fused=learning.fused,
        saved=saved,
    )
    counters = walk.run({leaf: seed for leaf, seed in seeds.items() if leaf in wanted})
    updates = _updates(bu, emitter, counters, values, learning)
    emitter.graph.output((fx.map_arg(bu.output, lambda node: values[node].node), updates))
    emitter.graph.eliminate_dead_code(is_impure_node=_has_effect)
    return fx.GraphModule(root, emitter.graph, "Learner")


def _emit_bottom_up(bu: BottomUp, emitter: Emitter, wanted: set[fx.Node], fused: bool) -> tuple[dict, dict]:
    """Copy the BU graph; where a fused kernel hands out values for the error pass, take that one."""
    values: dict[fx.Node, Value] = {}
    saved: dict[fx.Node, Any] = {}
    for node in bu.nodes[:-1]:
        kernel = RULES[node.target].fused if fused and node in wanted and node.target in RULES else None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        own = Value(node, emitter)
        if kernel and kernel.forward and kernel.applies(own, *args, **kwargs):
            with emitter.named(f"{node.name}_kernel"):
                value, saved[node] = kernel.forward(*args, **kwargs)
            value.node._rename(node.name)
            value.spec = node.meta["spec"]
            value.node.meta["name"] = node.meta["name"]
        else:
            value = emitter.proxy(emitter.graph.node_copy(node, lambda source: values[source].node))
        values[node] = value
    return values, saved


def _is_gated_step(node: fx.Node) -> bool:
    """Whether the node is the gate behind an activation whose derivative is a step, and that nothing else reads."""
    if "gates" not in node.meta:
        return False
    activation = node.all_input_nodes[0]
    rule = RULES.get(activation.target)
    return rule is not None and rule.step and len(activation.users) == 1


def open_where_positive(e: Any, v: Any, fused: bool) -> Any:
    """GaLU in the error pass: e [v > 0]."""
    return torch.ops.aten.threshold_backward(e, v, 0) if fused else e * (v > 0)


def batch_size(values: Iterable[Value]) -> Any:
    """The batch size at run time, from the first of `values` that has a batch dimension, or None."""
    for value in values:
        for dim, slope in enumerate(value.spec.per_sample):
            if slope == 1 and value.spec.shape[dim] == EXAMPLE_BATCH:
                return fx.Proxy.__getattr__(value, "shape")[dim]
    return None


def _updates(
    bu: BottomUp, emitter: Emitter, counters: Mapping[fx.Node, Any], values: Mapping[fx.Node, Value], learning: Learning
) -> dict[str, fx.Node]:
    """One node per input, parameter, TD twin and TD bias that gets an update, named after it."""
    updates: dict[str, fx.Node] = {}

    def emit(name: str, value: Any) -> None:
        value.node.meta["update"] = name
        value.node._rename("update_" + name.removeprefix(INPUT).replace(".", "_"))
        updates[name] = value.node

    weights = {weight_of(node): node for node in bu.nodes if bu.is_weighted(node)}
    for node in [*bu.inputs, *bu.parameters]:
        name = key_of(node)
        if not _learns(name, learning) or node not in counters:
            continue
        update = counters[node]
        if learning.twins.get(name) in learning.wanted:
            emit(learning.twins[name], _noisy(update, learning.noise))
        if name in learning.wanted:
            emit(name, _noisy(update, learning.noise) if node in weights else update)
    for weight, node in weights.items():
        if learning.td_biases.get(str(weight.target)) in learning.wanted:
            x = values[RULES[node.target].operands(node.args, node.kwargs)["input"]]
            emit(learning.td_biases[str(weight.target)], bias_update(x, RULES[node.target].channels))
    return updates


def bias_update(x: Any, channels: int) -> Any:
    """A TD bias learns the BU value at its place: summed over positions, mean over the batch."""
    positions = [d for d in range(1, x.ndim) if d != channels % x.ndim]
    return (x.sum(positions) if positions else x).mean(0)


def _learns(name: str, learning: Learning) -> bool:
    return name in learning.wanted or learning.twins.get(name) in learning.wanted


def _has_effect(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or getattr(node.target, "__name__", "").endswith("_")


def _noisy(update: Any, deviation: float) -> Any:
    """The update times one draw of 1 + deviation * randn."""
    return update * (1 + deviation * update.new_empty(()).normal_()) if deviation else update


# -- the bridge to autograd ---------------------------------------------------------------------------------------------


@dataclass
class Halves:
    """A learner cut in two.

    attributes: the parameters and buffers, by name, that both halves take as inputs.
    forward: (*inputs, *attributes) -> (tensors of the model's output, values for the error pass).
    backward: (list of those values and of the errors) -> list of updates; it empties the list as it goes.
    updates: names of the updates, in order.
    kept: which of the values are inputs, attributes or outputs, that exist anyway.
    structure: tensors of the model's output -> the output as the model returns it.
    """

    attributes: list[str]
    forward: fx.GraphModule
    backward: fx.GraphModule
    updates: list[str]
    kept: list[bool]
    structure: fx.GraphModule


def lift(module: fx.GraphModule, more: Sequence[str] = ()) -> tuple[fx.GraphModule, list[str]]:
    """Make parameters and buffers inputs of the graph, behind its own: (graph, their names)."""
    graph = fx.Graph()
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    names = list(dict.fromkeys([str(node.target) for node in module.graph.nodes if node.op == "get_attr"] + list(more)))
    copies = {node: graph.node_copy(node) for node in inputs}
    lifted = {name: graph.placeholder("_" * name[0].isdigit() + name.replace(".", "_")) for name in names}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            copies[node] = lifted[str(node.target)]
        elif node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(module, graph), names


def cut(joint: fx.GraphModule) -> Halves:
    """Cut a learner where the errors enter: everything that the model's output needs, and everything else."""
    outputs, updates = joint.graph.output_node().args[0]  # type: ignore[misc]
    module, attributes = lift(joint, [name for name in updates if not name.startswith(INPUT)])
    nodes = list(module.graph.nodes)
    outputs, updates = nodes[-1].args[0]  # type: ignore[misc]
    leaves: list[fx.Node] = []
    fx.map_arg(outputs, lambda node: leaves.append(node) if node not in leaves else None)

    errors = {node for node in nodes if node.op == "placeholder" and "error" in node.meta}
    late = _closure(errors, nodes, lambda node: node.all_input_nodes)
    needed = set(leaves) | {node for node in nodes[:-1] if _has_effect(node) and node not in late}
    early = _closure(needed, nodes[::-1], lambda node: list(node.users))
    crossing = [
        node
        for node in nodes
        if node in early and any(user not in early for user in node.users if user is not nodes[-1])
    ]
    crossing += [node for node in updates.values() if node in early and node not in crossing]

    first = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node in early:
            copies[node] = first.node_copy(node, copies.__getitem__)
    first.output(([copies[node] for node in leaves], [copies[node] for node in crossing]))

    second = fx.Graph()
    values = second.placeholder("values")
    handed_over = [*crossing, *(node for node in nodes if node in errors)]
    copies = {node: second.call_function(operator.getitem, (values, i)) for i, node in enumerate(handed_over)}
    second.call_method("clear", (values,))  # each value dies with its last use
    for node in nodes[:-1]:
        if node not in early and node not in copies:
            copies[node] = second.node_copy(node, copies.__getitem__)
    second.output([copies[node] for node in updates.values()])

    shape = fx.Graph()
    places = {leaf: shape.placeholder(leaf.name) for leaf in leaves}
    shape.output(fx.map_arg(outputs, places.__getitem__))

    return Halves(
        attributes,
        fx.GraphModule(module, first, "Forward"),
        fx.GraphModule(module, second, "Backward"),
        list(updates),
        [node.op == "placeholder" or node in leaves for node in crossing],
        fx.GraphModule(nn.Module(), shape, "Output"),
    )


def _closure(
    start: set[fx.Node], order: Sequence[fx.Node], before: Callable[[fx.Node], Sequence[fx.Node]]
) -> set[fx.Node]:
    """`start` and, walking in `order`, every node next to one that is in already."""
    reached = set(start)
    for node in order:
        if node.op != "output" and any(neighbour in reached for neighbour in before(node)):
            reached.add(node)
    return reached


class CounterHebb(torch.autograd.Function):
    """The learner as an autograd function: backward runs the error pass and returns the updates as gradients."""

    @staticmethod
    def forward(ctx: Any, halves: Halves, names: Sequence[str], *values: torch.Tensor) -> Tensors:
        """names: of `values`, which are the graph's inputs and attributes. Returns the tensors of the model's output."""
        outputs, saved = halves.forward(*values)
        ctx.halves, ctx.names = halves, names
        ctx.save_for_backward(*(value if keep else None for value, keep in zip(saved, halves.kept, strict=True)))
        ctx.between = [None if keep else value for value, keep in zip(saved, halves.kept, strict=True)]
        ctx.mark_non_differentiable(*(value for value in outputs if not value.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *errors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = [b if b is not None else a for a, b in zip(ctx.saved_tensors, ctx.between, strict=True)]
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.between = [None] * len(saved)
        saved += [error for error in errors if error.is_floating_point()]
        updates = dict(zip(ctx.halves.updates, ctx.halves.backward(saved), strict=True))
        return None, None, *(updates.get(name) for name in ctx.names)
