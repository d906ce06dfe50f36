"""Emit Counter-Hebb learning into the graph.

`learner` joins three things in one graph: the BU pass, the TD pass from the error, and one update node per parameter.
autograd_bridge.py lets `loss.backward()` run it. No gradient is taken anywhere.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxfeedback.feedback_weights import Broadcast, Direct, Twins, twins_in
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.channels import channels_of
from fxfeedback.graph.effects import has_effect
from fxfeedback.graph.nodes import gate_of, gated_site_of, name_of, spec_of, specs_of, tell
from fxfeedback.graph.operands import operand, weight_of
from fxfeedback.graph.values import Emitter, Value, batch_size
from fxfeedback.rules import RULES
from fxfeedback.rules.gating import gates_of_samples
from fxfeedback.td_graph import Walk

INPUT = "input:"
"""Marks the model's inputs among the names of what learns."""


def key_of(node: fx.Node) -> str:
    """What an input or parameter is called in `Learning.wanted`: INPUT + its name, or the parameter's name."""
    return INPUT + str(node.target) if node.op == "placeholder" else str(node.target)


@dataclass(frozen=True)
class Learning:
    """How the learner learns.

    wanted: names of the inputs, parameters, TD twins and TD biases that get an update.
    twins: BU weight name -> what stands for it in TD: the name of its TD twin, or its signs.
    td_biases: BU weight name -> name of the TD bias after its transpose.
    direct: how the error itself is broadcast; None: it runs down.
    decay: a weight that has a twin, and the twin, get decay times themselves added to their updates.
    clip: what a linear layer or convolution hands on is clamped to [-clip, clip]; None: it is not.
    noise: deviation of the factor 1 + noise * randn that each weight's update gets.
    lateral: (error, BU value) -> error at the sites, in place of the exact derivative; None is GaLU, which is exact.
    sites: names of the gating sites; only an inexact lateral needs them.
    fused: PyTorch's fused kernels in place of the rules, where there are any.
    autocast: whether the BU pass runs under autocast.
    errors: the numbers of the outputs that have an error; None: all.
    """

    wanted: frozenset[str]
    twins: Twins
    td_biases: Mapping[str, str]
    direct: Direct | None = None
    decay: float = 0.0
    clip: float | None = None
    noise: float = 0.0
    lateral: Callable[[Any, Any], Any] | None = None
    sites: frozenset[str] = frozenset()
    fused: bool = True
    autocast: bool = False
    errors: frozenset[int] | None = None


def learner(module: fx.GraphModule, root: nn.Module, learning: Learning) -> fx.GraphModule:
    """BU pass, error pass and updates in one graph.

    Args:
        module: a BU graph in functional ops, gated or not.
        root: has the parameters that `learning` names.
        learning: what to update and how.

    Returns:
        A graph with the inputs of `module`, the magnitudes of signs that are drawn, and one error per floating-point
        tensor of its output, shaped like it. It returns the output of `module` and a dict: name of an input, parameter
        or TD twin -> its update, summed over the batch as the error has it (a mean loss makes mean updates).
    """
    bu = BottomUp(module.graph)
    emitter = Emitter()
    wanted = bu.below(node for node in _learning(bu) if _learns(key_of(node), learning))
    values, saved = _emit_bottom_up(bu, emitter, wanted, learning.fused)
    leaves = [leaf for i, leaf in enumerate(bu.output_leaves()) if learning.errors is None or i in learning.errors]
    names = ["error"] if len(leaves) == 1 else [f"error_{i}" for i in range(len(leaves))]
    twin = twins_in(emitter, learning.twins, values.__getitem__)
    seeds = {leaf: emitter.placeholder(name, spec_of(leaf)) for leaf, name in zip(leaves, names, strict=True)}
    for seed in seeds.values():
        tell(seed.node, error=True)
    sized = [*seeds.values(), *(values[node] for node in bu.inputs)]  # seeds first: an input would have to be kept
    emitter.batch = batch_size(sized)

    broadcast = Broadcast(emitter, learning.direct, *seeds.values()) if learning.direct else None

    def arrive(node: fx.Node, e: Any) -> tuple[Any, bool]:
        e = broadcast.at_site(node, e) if broadcast else e
        if _is_gated_step(node) and node.args[1] not in wanted:
            # One look is both: v = relu(z) [t > 0] is positive where the gate is open and relu lets z pass.
            activation = node.all_input_nodes[0]
            return walk.apply(RULES[activation.target], activation, e, values[node], ["input"])["input"], True
        return e, any(_is_gated_step(user) and user.args[1] not in wanted for user in node.users)

    def arrive_laterally(node: fx.Node, e: Any) -> tuple[Any, bool]:
        e = broadcast.at_site(node, e) if broadcast else e
        if name_of(node) not in learning.sites:
            return e, gated_site_of(node) is not None
        gated = next((user for user in node.users if gated_site_of(user) is not None), node)
        return learning.lateral(e, values[gated]), True  # type: ignore[misc]

    walk = Walk(
        bu,
        emitter,
        "error",
        values.__getitem__,
        wanted,
        arrive=arrive if learning.lateral is None else arrive_laterally,
        twin=twin,
        instead=(lambda node: broadcast.to_input(node, values)) if broadcast else lambda node: None,
        clip=learning.clip,
        fused=learning.fused,
        saved=saved,
        autocast=learning.autocast,
    )
    counters = walk.run({leaf: seed for leaf, seed in seeds.items() if leaf in wanted})
    updates = _updates(bu, emitter, counters, values, learning)
    emitter.graph.output((fx.map_arg(bu.output, lambda node: values[node].node), updates))
    emitter.graph.eliminate_dead_code(is_impure_node=has_effect)
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
            value.spec = specs_of(node)
            tell(value.node, name=name_of(node))
        else:
            value = emitter.proxy(emitter.graph.node_copy(node, lambda source: values[source].node))
        values[node] = value
        if node.op == "placeholder" and emitter.batch is None:
            emitter.batch = batch_size([value])  # for kernels that ask for sizes
    return values, saved


def _is_gated_step(node: fx.Node) -> bool:
    """Whether the node is the gate after an activation that is a step (see `Rule`) and that is read by nothing else.

    That each sample's gates are laid out like it is no reading.
    """
    if gated_site_of(node) is None:
        return False
    activation = node.all_input_nodes[0]
    rule = RULES.get(activation.target)
    alone = all(user is node or user.target is gates_of_samples for user in activation.users)
    return rule is not None and rule.step and alone


def _updates(
    bu: BottomUp, emitter: Emitter, counters: Mapping[fx.Node, Any], values: Mapping[fx.Node, Value], learning: Learning
) -> dict[str, fx.Node]:
    """One node per input, parameter, TD twin and TD bias that gets an update, named after it."""
    updates: dict[str, fx.Node] = {}

    def emit(name: str, value: Any) -> None:
        assert name not in updates, f"{name} gets two updates, and would keep one of them"
        tell(value.node, update=name)
        value.node._rename("update_" + re.sub(r"\W", "_", name.removeprefix(INPUT)))
        updates[name] = value.node

    weighted = [node for node in bu.nodes if bu.is_weighted(node)]
    weights = set(map(weight_of, weighted))
    for node in _learning(bu):
        name = key_of(node)
        if not _learns(name, learning) or node not in counters:
            continue
        update = counters[node]
        twin = learning.twins.get(name)
        if twin in learning.wanted:
            emit(twin, _decaying(_noisy(update, learning.noise), emitter.attribute(twin), learning.decay))
        if name in learning.wanted:
            update = _noisy(update, learning.noise) if node in weights else update
            emit(name, _decaying(update, values[node], learning.decay if twin else 0))
    biases: dict[str, Any] = {}
    for node in weighted:
        name = learning.td_biases.get(str(weight_of(node).target), "")
        if name in learning.wanted:
            update = bias_update(values[operand(node, "input")], channels_of(node))
            biases[name] = biases[name] + update if name in biases else update
    for name, update in biases.items():
        emit(name, update)
    return updates


def _learning(bu: BottomUp) -> list[fx.Node]:
    """What may get an update: the model's inputs, its parameters, and gates, for whoever makes them."""
    return [*bu.inputs, *bu.parameters, *(node for node in bu.nodes if gate_of(node) is not None)]


def bias_update(x: Any, channels: int) -> Any:
    """A TD bias learns the BU value at its place: summed over positions, mean over the batch."""
    positions = [d for d in range(1, x.ndim) if d != channels % x.ndim]
    return (x.sum(positions) if positions else x).mean(0)


def _learns(name: str, learning: Learning) -> bool:
    return name in learning.wanted or learning.twins.get(name) in learning.wanted


def _decaying(update: Any, weight: Any, decay: float) -> Any:
    """The update plus decay times the weight: with the same of its twin, both forget where they started."""
    return update + decay * weight if decay else update


def _noisy(update: Any, deviation: float) -> Any:
    """The update times one draw of 1 + deviation * randn."""
    return update * (1 + deviation * update.new_empty(()).normal_()) if deviation else update
