"""Which connections to choose: ends that do little harm, one per stage of a model, and what a connection costs."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxfeedback.checks import is_count
from fxfeedback.errors import Error, OptionError
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.layout import layout_of
from fxfeedback.graph.nodes import name_of, spec_of
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.signs import never_negative
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.lrm.connections import (
    Connection,
    activation_of,
    arrow,
    check_connections,
    legal_ends,
    make_block,
    plainly,
)
from fxfeedback.lrm.feedback_model import FeedbackModel, bottom_up_of
from fxfeedback.rules import RULES
from fxfeedback.tracing.examples import examples_of
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.wrapper import Wrapper, net_of, stand_ins_of

HEAVY = 0.1
"""The part of a model's parameters from which on a connection's block is heavy."""
STAGES = 5
"""Where the sizes of a model's values make fewer, its largest stages are cut in halves."""
BACK = 2
"""How many stages a suggested connection leads back, where there are so many."""
IDLE = {
    "dropout", "reshape", "permute", "identity", "copy", "swap", "movedim", "mean", "getitem", "index_select", "narrow",
    "avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool",
}  # fmt: skip
"""Rules of ops that only hand on, or sum up, what they read."""


@dataclass(frozen=True)
class Suggestion(Connection):
    """A `Connection` of `suggest_connections`, and what it costs.

    parameters: of its block; share: these, as a part of the model's own. operations: floating-point operations of the
    second pass of one image with this connection alone, a multiplication and an addition as two; whole: of the model's
    own pass.
    """

    parameters: int = 0
    share: float = 0.0
    operations: int = 0
    whole: int = 0

    def __str__(self) -> str:
        return (
            f"{self.source} -> {self.destination}: {self.parameters:,} parameters ({self.share:.1%} of the model's), "
            f"{self.operations / max(self.whole, 1):.0%} of a pass again"
        )


def suggest_connections(
    model: nn.Module,
    n: int = 3,
    *,
    input_size: Sequence[int] | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
) -> list[Suggestion]:
    """Feedback connections from late to early stages, as in the published models, and what each costs.

    Between the good ends of `node_names`. The first leads from the last stage two stages back, the next ones begin
    earlier. Where the default block would have more than a tenth of the model's parameters, it has `norm="channel"`.

    Args:
        model, input_size, example_inputs: as for `add_feedback`, which takes what is returned.
        n: how many; fewer come back where the model has fewer stages.

    Raises:
        OptionError: n is not a whole number from 1 on.
        TraceError: the model cannot be traced, or does not run at this size.
    """
    if not is_count(n):
        raise OptionError(f"n={n!r}: give a whole number from 1 on")
    plain = FeedbackModel(model, [], 1, examples_of(model, input_size, example_inputs))
    graph = bottom_up_of(plain).graph
    ends, own = stage_ends(graph), sum(p.numel() for p in plain.parameters())
    stages = range(len(ends))
    pairs = [(late, early) for late in stages for early in stages if early < late]
    pairs.sort(key=lambda pair: (abs(pair[0] - pair[1] - BACK), -pair[0]))
    made = [_suggested(graph, ends[late][1], ends[early][0], own) for late, early in pairs]
    light = sorted((one for one in made if one is not None), key=lambda one: one.share > HEAVY)[:n]
    given = stand_ins_of(plain) if example_inputs is None else example_inputs
    return [_with_operations(one, FeedbackModel(net_of(plain), [plainly(one)], 2, given)) for one in light]


def _suggested(graph: fx.Graph, source: fx.Node, destination: fx.Node, own: int) -> Suggestion | None:
    """The connection, if there can be one, in a model with so many parameters of its own."""
    made = Suggestion(name_of(source), name_of(destination))
    if activation_of(made, destination) == "relu" and destination not in never_negative(graph):
        made = replace(made, activation="none")
    try:
        check_connections(graph, [made])
    except Error:
        return None
    for norm in ("layer", "channel"):
        with torch.device("meta"):
            block = make_block(graph, replace(made, norm=norm))
        size = sum(p.numel() for p in block.parameters())
        made = replace(made, norm=norm, parameters=size, share=size / max(own, 1))
        if made.share <= HEAVY:
            break
    return made


def _with_operations(made: Suggestion, model: FeedbackModel) -> Suggestion:
    whole, again = operations_of_passes(model)
    return replace(made, operations=again, whole=whole)


# -- good ends --------------------------------------------------------------------------------------------------------


def good_ends(traced: fx.GraphModule, examples: Sequence[Any], owner: nn.Module) -> tuple[set[str], set[str]]:
    """The names of a traced model's good sources and destinations; none where its graph cannot be opened."""
    try:
        graph = open_modules(traced, strict=False, owner=owner).graph
        annotate_shapes(graph.owning_module, examples)
        unpack_tuples(graph.owning_module)
    except Error:
        return set(), set()
    ends = stage_ends(graph)
    return {name_of(source) for _, source in ends}, {name_of(destination) for destination, _ in ends[:-1] or ends}


def stage_ends(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Of each stage of an opened graph with shapes a good destination and a good source, in execution order.

    Stages are nodes whose values have as many positions. Good ends lie where every path to the output passes, after an
    activation or else a sum, and the destination is rectified where there is such a node. The last source is the
    output itself, where that is a vector.
    """
    trunk, rectified = _trunk(graph), never_negative(graph)
    sizes = [list(group) for _, group in itertools.groupby(trunk, _positions)]
    groups = [[node for node in group if node in rectified] or group for group in sizes]
    while len(groups) < STAGES and max(map(len, groups), default=0) > 1:
        i = max(range(len(groups)), key=lambda i: len(groups[i]))
        half = len(groups[i]) // 2
        groups[i : i + 1] = [groups[i][:half], groups[i][half:]]
    ends = [(group[-1], _last_active(group)) for group in groups]
    return [*ends[:-1], (ends[-1][0], trunk[-1] if not _positions(trunk[-1]) else ends[-1][1])] if ends else []


def _positions(node: fx.Node) -> tuple[int, ...]:
    """The size of a value's map; a map of one position has the size of a vector."""
    size = layout_of(node).size
    return size if any(n > 1 for n in size) else ()


def _trunk(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that all paths cross, that may be both ends, and do more than hand on."""
    bottom_up, (sources, destinations) = BottomUp(graph), legal_ends(graph)
    output = bottom_up.main_output()
    if output is None:
        return []
    crossed = [*bottom_up.crossed_by_all_paths_to(output), output]
    legal = [node for node in dict.fromkeys(crossed) if node in sources and node in destinations]
    return [node for node in legal if node.op == "call_function" and _rule(node) not in IDLE and spec_of(node).sizes]


def _last_active(nodes: Sequence[fx.Node]) -> fx.Node:
    active = [node for node in nodes if node.target in RULES and RULES[node.target].rectifies]
    return active[-1] if active else nodes[-1]


def _rule(node: fx.Node) -> str:
    rule = RULES.get(node.target)
    return rule.name if rule else ""


# -- what is warned of ------------------------------------------------------------------------------------------------


def heavy(model: FeedbackModel) -> list[str]:
    """A warning of each block with more than a tenth of the model's parameters."""
    own, messages = sum(p.numel() for p in model.backbone_parameters()), []
    for connection in model.connections:
        block = model.modulation(connection.source, connection.destination)
        size, norm = (sum(p.numel() for p in part.parameters()) for part in (block, block.norm))
        if own and size > HEAVY * own:
            why = f"{norm:,} are its layer norm's, which has the destination's size: "
            why += f'norm="channel" has {2 * block.source.channels:,}'
            if norm < size / 2:
                why = f"its 1x1 convolution leads from {block.source.channels:,} channels to "
                why += f"{block.destination.channels:,}: ends with fewer are lighter"
            messages.append(
                f"{arrow(connection)} adds {size:,} parameters, {size / own:.0%} of the model's {own:,}; {why}"
            )
    return messages


def sized(model: FeedbackModel) -> list[str]:
    """A warning of the first block whose parameters have a size that nobody gave."""
    for connection in model.connections:
        shape = model.modulation(connection.source, connection.destination).norm.weight.shape
        if len(shape) > 1:
            size = " x ".join(map(str, stand_ins_of(model)[0].shape[1:]))
            return [
                f"{arrow(connection)}: its layer norm has parameters of {' x '.join(map(str, shape))}, as the model is "
                f"made for inputs of {size} where no input_size= is given; for another size they would be others. Say "
                'input_size=, or norm="channel", which has one parameter per channel'
            ]
    return []


# -- what connections cost --------------------------------------------------------------------------------------------


def operations_of_passes(model: FeedbackModel) -> list[int]:
    """The floating-point operations of each pass for one image, a multiplication and an addition as two; no data."""
    return operations_of_runs(model, "passes", model.passes)


def operations_of_runs(model: Wrapper, option: str, runs: int) -> list[int]:
    """The same of a model that takes the number of its runs as this option of the call."""
    empty = copy.deepcopy(model).to("meta")
    inputs = stand_ins_of(empty)
    totals = [0]
    for number in range(1, runs + 1):
        empty(*inputs, **{option: number})  # makes its graph, which is not to be counted
        with FlopCounterMode(display=False) as counter:
            empty(*inputs, **{option: number})
        totals.append(counter.get_total_flops())
    return [after - before for before, after in itertools.pairwise(totals)]
