"""Which op does what with channels: a table from rules to the steps of steps.py.

An op that is not in the table, or is called in a way that is not covered, mixes all channels of its operands into all
of its own: nothing is removed through it, and the values that it reads are made whole.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxfeedback.graph.nodes import spec_of, specs_of
from fxfeedback.graph.specs import Spec
from fxfeedback.one_task.steps import (
    Gathering,
    Joining,
    Mixing,
    Moving,
    PerChannel,
    Step,
    is_reshape,
    new_shape,
    pick,
    unknown,
)
from fxfeedback.rules import RULES, Rule, indexing, pooling, reduction, resizing
from fxfeedback.rules import activation as act
from fxfeedback.rules import arithmetic as sums
from fxfeedback.rules import elementwise as each
from fxfeedback.rules import normalization as norms
from fxfeedback.rules import reshaping as moves
from fxfeedback.rules.convolution import convolution, transposed_convolution
from fxfeedback.rules.core import as_tuple
from fxfeedback.rules.dropout import identity
from fxfeedback.rules.linear import linear

if TYPE_CHECKING:
    from fxfeedback.one_task.dead_channels import Network

Choice = Callable[["Network", fx.Node], Step | None]
"""The step of a call, or None where the op mixes channels when it is called like this."""


def elementwise(network: "Network", node: fx.Node, zero_wins: bool = False) -> Step | None:
    """Each value by itself, with broadcasting."""
    spec = spec_of(node)
    operands = [source for source in node.all_input_nodes if source not in network.numbers]
    places: dict[fx.Node, int] = {}  # of the channels, counted from the last dimension
    for source in operands:
        channels = network.channels(source) if source in network.steps else unknown(None)
        if channels.dim is not None and channels.size == spec.shape[channels.dim - len(network.shape(source))]:
            places[source] = channels.dim - len(network.shape(source))
    if not places:
        return None
    leader = max(places, key=lambda s: (bool(network.channels(s).known.any()), math.prod(network.shape(s))))
    place = places[leader]

    def along(source: fx.Node) -> int | None:
        shape = network.shape(source)
        here = len(shape) >= -place and shape[place] == spec.shape[place]
        return len(shape) + place if here else None

    return PerChannel(
        network, node, len(spec.shape) + place, {source: along(source) for source in operands}, zero_wins=zero_wins
    )


def product(network: "Network", node: fx.Node) -> Step | None:
    """A product, of finite values."""
    return elementwise(network, node, zero_wins=True)


def of_one(network: "Network", node: fx.Node) -> Step | None:
    """Each value by itself; a second tensor would only lend its dtype."""
    return elementwise(network, node) if len(node.all_input_nodes) == 1 else None


def with_vectors(*names: str) -> Choice:
    """Maps (N, C, ...), channel by channel, with vectors over channels as further operands."""

    def choose(network: "Network", node: fx.Node) -> Step | None:
        operands = RULES[node.target].operands(node.args, dict(node.kwargs))
        source, shape = operands["input"], network.shape(operands["input"])
        vectors = {operands[name]: 0 for name in names if isinstance(operands.get(name), fx.Node)}
        others = [s for s in node.all_input_nodes if s is not source and s not in vectors and s not in network.numbers]
        constants = all(network.constant(vector) is not None for vector in vectors)
        whole = all(network.shape(vector) == (shape[1],) for vector in vectors) if len(shape) > 1 else False
        if others or not (constants and whole) or network.channels(source).dim != 1 or not _has_batch(node, shape):
            return None
        return PerChannel(network, node, 1, {source: 1, **vectors}, on_maps=True)

    return choose


def one_slope_or_many(network: "Network", node: fx.Node) -> Step | None:
    """PReLU: one number for all channels, or one each."""
    weight = network.constant(RULES[node.target].operands(node.args, dict(node.kwargs))["weight"])
    if weight is None:
        return None
    return elementwise(network, node) if weight.numel() == 1 else with_vectors("weight")(network, node)


def _has_batch(node: fx.Node, shape: Sequence[int]) -> bool:
    """Whether an op on maps sees (N, C, ...), and not a single map (C, ...)."""
    digits = [c for c in getattr(node.target, "__name__", "") if c.isdigit()]
    return not digits or len(shape) == int(digits[-1]) + 2


def over_positions(network: "Network", node: fx.Node) -> Step | None:
    """A reduction over dimensions without channels."""
    operands = RULES[node.target].operands(node.args, dict(node.kwargs))
    source = operands["input"]
    dim, ndim = network.channels(source).dim, len(network.shape(source))
    given = operands.get("dim")
    if dim is None or given is None or isinstance(given, bool) or given in ((), []):
        return None
    reduced = {d % ndim for d in (given if isinstance(given, (tuple, list)) else (given,))}
    if dim in reduced or any(spec_of(source).per_sample[d] for d in reduced):
        return None
    gone = 0 if operands.get("keepdim") else sum(d < dim for d in reduced)
    return PerChannel(network, node, dim - gone, {source: dim}, on_maps=True)


def padding(network: "Network", node: fx.Node) -> Step | None:
    """Around positions; or zeros around the channels."""
    operands = RULES[node.target].operands(node.args, dict(node.kwargs))
    source, widths = operands["input"], list(operands["pad"])
    dim, ndim = network.channels(source).dim, len(network.shape(source))
    if dim is None or any(isinstance(width, fx.Node) for width in widths):
        return None
    at = 2 * (ndim - 1 - dim)
    if not any(widths[at : at + 2]):
        return PerChannel(network, node, dim, {source: dim}, on_maps=True)
    return moving(network, node) if not operands.get("value") else None


def layer(network: "Network", node: fx.Node) -> Step | None:
    """Convolutions and linear layers, of weights that do not depend on the input."""
    operands = RULES[node.target].operands(node.args, dict(node.kwargs))
    bias = operands.get("bias")
    if network.constant(operands["weight"]) is None or (bias is not None and network.constant(bias) is None):
        return None
    if RULES[node.target] is linear:
        return Mixing(network, node, len(network.shape(operands["input"])) - 1, 1, False)
    pads = operands.get("padding", 0)
    padded = isinstance(pads, str) or any(as_tuple(pads, 1)) or RULES[node.target] is transposed_convolution
    if not _has_batch(node, network.shape(operands["input"])):
        return None
    return Mixing(network, node, 1, operands.get("groups", 1), padded)


def joining(network: "Network", node: fx.Node) -> Step | None:
    """Values one behind the other, along the channels or along positions."""
    operands = RULES[node.target].operands(node.args, dict(node.kwargs))
    parts, ndim = list(operands["tensors"]), len(spec_of(node).shape)
    dim = operands.get("dim", 0) % ndim
    tracked = [part for part in parts if part in network.steps and network.channels(part).dim is not None]
    if len(parts) > len([part for part in parts if part in network.steps]) or not tracked:
        return None
    if any(network.channels(part).dim == dim for part in tracked) and not spec_of(node).per_sample[dim]:
        return Joining(network, node, dim)
    along = network.channels(tracked[0]).dim
    return PerChannel(network, node, along, dict.fromkeys(parts, along)) if along not in (None, dim) else None


def moving(network: "Network", node: fx.Node) -> Step | None:
    """What only moves values. What it does to channels is read off by running it on numbered ones.

    Where one op splits the channels over two dimensions and a later one joins them again, as in a shuffle, they count
    as one op.
    """
    path = [node]
    while True:
        sources, sized = network.values(path[0]), any(s in network.numbers for s in path[0].all_input_nodes)
        if len(sources) != 1 or (sized and not is_reshape(path[0])):
            return None
        source, spec = sources[0], spec_of(sources[0])
        if isinstance(spec, Spec) and network.channels(source).dim is not None and network.channels(source).size > 1:
            step = _gathering(network, node, source, path) or _moving(network, node, source, path)
            if step:
                return step
        if not _only_moves(source):
            return None
        path.insert(0, source)


def _only_moves(node: fx.Node) -> bool:
    rule = RULES.get(node.target) if node.op == "call_function" else None
    return STEPS.get(id(rule)) in (moving, padding) or rule in (moves.copy, identity)


def _run(network: "Network", path: Iterable[fx.Node], source: fx.Node, x: Any, shape: Any = None) -> Any:
    """The nodes of the path on x in the source's place; a reshape takes `shape`, if that is given."""
    values = {source: x}

    def see(operand: fx.Node) -> Any:
        if operand in values:
            return values[operand]
        constant = network.constant(operand)
        return network.numbers[operand] if constant is None else constant.cpu()

    for step in path:
        if shape is not None and is_reshape(step):
            values[step] = values[step.all_input_nodes[0]].reshape(shape)
        else:
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), see)
            values[step] = step.target(*args, **kwargs)  # type: ignore[operator]
        last = values[step]
    return last


def _numbered(network: "Network", source: fx.Node) -> tuple[torch.Tensor, int]:
    """A tensor of the source's shape, each value another number from 1 on, and how far apart those of channels are."""
    shape, dim = network.shape(source), network.channels(source).dim
    assert dim is not None
    return torch.arange(1, math.prod(shape) + 1).reshape(shape), math.prod(shape[dim + 1 :])


def _gathering(network: "Network", node: fx.Node, source: fx.Node, path: list[fx.Node]) -> Step | None:
    numbers, stride = _numbered(network, source)
    dim = network.channels(source).dim
    assert dim is not None
    out = _run(network, path, source, numbers)
    if spec_of(node).per_sample[dim : dim + 1] != (0,):
        return None
    if out.ndim != numbers.ndim or any(
        a != b for d, (a, b) in enumerate(zip(out.shape, numbers.shape, strict=True)) if d != dim
    ):
        return None
    first = out.movedim(dim, 0).reshape(out.shape[dim], -1)[:, 0]
    origin = torch.where(first == 0, -1, (first - 1) // stride)
    if (origin >= numbers.shape[dim]).any():
        return None
    expected = numbers.index_select(dim, origin.clamp(0))
    expected = torch.where((origin < 0).reshape([-1 if d == dim else 1 for d in range(out.ndim)]), 0, expected)
    return Gathering(network, node, source, origin) if torch.equal(out, expected) else None


def _moving(network: "Network", node: fx.Node, source: fx.Node, path: list[fx.Node]) -> Step | None:
    numbers, stride = _numbered(network, source)
    channels, spec = network.channels(source), spec_of(node)
    assert channels.dim is not None
    if len(path) > 1 and (len(path) > 2 or isinstance(specs_of(path[0]), Spec)):
        return None
    out, size = _run(network, path, source, numbers), channels.size
    for dim in range(out.ndim):
        if spec.per_sample[dim] or out.shape[dim] % size:
            continue
        block = out.shape[dim] // size
        offsets = torch.arange(size).reshape([-1 if d == dim else 1 for d in range(out.ndim + 1)]) * stride
        one = out.unflatten(dim, (size, block)) - offsets
        if not (one == one.narrow(dim, 0, 1)).all():
            continue
        for reshapes in (False, True):
            if _does_the_same(network, node, source, path, out, dim, block, reshapes):
                return Moving(network, node, source, path, dim, block, reshapes)
        return None
    return None


def _does_the_same(
    network: "Network",
    node: fx.Node,
    source: fx.Node,
    path: list[fx.Node],
    out: torch.Tensor,
    dim: int,
    block: int,
    reshapes: bool,
) -> bool:
    """Whether the path gives the same values for some of the channels, in another order."""
    (numbers, _), channels = _numbered(network, source), network.channels(source)
    if channels.dim is None or (reshapes and (not is_reshape(node) or new_shape(node, dim, block) is None)):
        return False
    for some in ([channels.size - 1], list(range(channels.size - 1, 0, -1))):
        shape = new_shape(node, dim, len(some) * block) if reshapes else None
        expected = pick(out, dim, [channel * block + i for channel in some for i in range(block)])
        try:
            result = _run(network, path, source, pick(numbers, channels.dim, some), shape)
        except (RuntimeError, IndexError, TypeError):
            return False
        if not isinstance(result, torch.Tensor) or not torch.equal(result, expected):
            return False
    return True


def _table(*rows: tuple[Choice, Iterable[Rule]]) -> dict[int, Choice]:
    return {id(rule): choice for choice, rules in rows for rule in rules}


STEPS: dict[int, Choice] = _table(
    (
        elementwise,
        [
            *(act.relu, act.leaky_relu, act.relu6, act.hardtanh, act.sigmoid, act.tanh, act.gelu, act.silu, act.mish),
            *(act.elu, act.hardswish, act.hardsigmoid, act.softplus, act.celu, act.selu, act.logsigmoid, act.softsign),
            *(act.tanhshrink, act.hardshrink, act.softshrink, act.threshold),
            *(each.exp, each.expm1, each.log, each.log2, each.log10, each.log1p, each.sqrt, each.rsqrt, each.square),
            *(each.reciprocal, each.abs, each.sin, each.cos, each.tan, each.asin, each.acos, each.atan, each.sinh),
            *(each.cosh, each.asinh, each.acosh, each.atanh, each.exp2, each.erf, each.erfc, each.frac),
            *(each.pow, each.nan_to_num, each.clamp, each.clamp_min, each.clamp_max, each.maximum, each.minimum),
            *(sums.add, sums.sub, sums.div, sums.neg, sums.rsub, sums.addcmul, sums.addcdiv, sums.lerp),
            *(indexing.where, indexing.tensor_where, indexing.masked_fill, moves.copy, identity),
        ],
    ),
    (product, [sums.mul]),
    (of_one, [moves.cast]),
    (with_vectors("running_mean", "running_var", "weight", "bias"), [norms.batch_norm, norms.instance_norm]),
    (one_slope_or_many, [act.prelu]),
    (
        with_vectors(),
        [
            pooling.avg_pool,
            pooling.adaptive_avg_pool,
            pooling.max_pool,
            pooling.adaptive_max_pool,
            resizing.interpolate,
        ],
    ),
    (over_positions, [reduction.mean, reduction.sum, reduction.amax, reduction.var, reduction.std]),
    (padding, [moves.pad]),
    (layer, [convolution, transposed_convolution, linear]),
    (joining, [moves.cat]),
    (
        moving,
        [
            *(moves.reshape, moves.permute, moves.swap, moves.t, moves.movedim, moves.roll, moves.flip, moves.rot90),
            *(moves.channel_shuffle, moves.split, moves.tensor_split, moves.unbind),
            *(indexing.getitem, indexing.narrow, indexing.index_select, indexing.attribute),
        ],
    ),
)
"""id of a rule -> how its op treats channels."""


def step_of(network: "Network", node: fx.Node) -> Step:
    """How the node's op treats channels."""
    choice = STEPS.get(id(RULES.get(node.target))) if node.op == "call_function" else None
    spec = specs_of(node)
    if choice and isinstance(spec, Spec) and spec.dtype.is_floating_point and 0 not in spec.shape:
        return choice(network, node) or Step(network, node)
    return Step(network, node)
