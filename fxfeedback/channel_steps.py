"""What an op does with channels: which of its output's it makes constant, which it reads, and the op on a few of them.

A channel is *known* when it holds one number, whatever the network's input is: zero behind a closed gate, β behind the
batch norm of such a channel. It is *live* when it is not known and somebody reads it. `STEPS` says for each rule how
its op treats channels; an op that is not there mixes all channels of its operands into all of its own.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxfeedback.bottom_up import channel_dim
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
from fxfeedback.trace import Spec

if TYPE_CHECKING:
    from fxfeedback.dead_channels import Emitter, Network


@dataclass(frozen=True)
class Channels:
    """The channels of a value.

    dim: the dimension that they lie along; None: the value is taken as one channel.
    known: (size,), whether a channel is known; number: (size,) float64, what it holds then, 0 elsewhere.
    """

    dim: int | None
    known: torch.Tensor
    number: torch.Tensor

    @property
    def size(self) -> int:
        return len(self.known)


def unknown(dim: int | None, size: int = 1) -> Channels:
    """Channels of which nothing is known."""
    return Channels(dim, torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.double))


class Step:
    """One op of the network. Here: every channel of the output reads all channels of the operands."""

    def __init__(self, network: "Network", node: fx.Node, channels: Channels | None = None) -> None:
        self.network, self.node = network, node
        self.channels = channels or unknown(*_whole(node))

    def reads(self, live: torch.Tensor) -> Iterator[tuple[fx.Node, torch.Tensor]]:
        """The channels of the operands that the channels `live` of the output are computed from."""
        for source in self.network.values(self.node):
            yield source, torch.ones_like(self.network.channels(source).known)

    def emit(self, out: "Emitter", live: list[int]) -> tuple[fx.Node, list[int]]:
        """A node with at least the channels `live`, and which channels it has, in order."""
        return out.copy(self.node), list(range(self.channels.size))


def _whole(node: fx.Node) -> tuple[int | None, int]:
    """Where a value of any op has its channels, and how many: only a convenience for the ops behind it."""
    spec = node.meta.get("spec")
    if not isinstance(spec, Spec) or len(spec.shape) < 2 or 0 in spec.shape or not spec.dtype.is_floating_point:
        return None, 1
    dim = channel_dim(node) % len(spec.shape)
    return (None, 1) if spec.per_sample[dim] else (dim, spec.shape[dim])


class PerChannel(Step):
    """Each channel by itself: it reads the same channel of each operand, or what all channels share.

    dim: the dimension of the output's channels. along: that of each tensor operand's; None: all channels share it.
    on_maps: whether the op looks at more than one position, as at a map's border.
    zero_wins: whether one operand's zero makes the output zero, as in a product.
    """

    def __init__(
        self,
        network: "Network",
        node: fx.Node,
        dim: int,
        along: dict[fx.Node, int | None],
        on_maps: bool = False,
        zero_wins: bool = False,
    ) -> None:
        self.network, self.node, self.dim, self.along = network, node, dim, along
        self.on_maps, self.zero_wins = on_maps, zero_wins
        self.channels = self._channels(node.meta["spec"].shape[dim])

    def _channels(self, size: int) -> Channels:
        all_known, zero = torch.ones(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
        for source, along in self.along.items():
            operand = self.network.along(source, along)
            constant = self.network.constant(source) is not None
            if along is not None:
                zero |= operand.known & (operand.number == 0)
                all_known &= operand.known | constant
            elif not constant:
                all_known[:] = False
        known, number = unknown(None, size).known, unknown(None, size).number
        if all_known.any():
            picked = all_known.nonzero().flatten()
            uniform, numbers = self._evaluate(picked)
            known[picked], number[picked] = uniform, numbers
        if self.zero_wins:
            known, number = known | zero, torch.where(zero, 0.0, number)
        return Channels(self.dim, known, number)

    def _evaluate(self, picked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The op on known channels: in which it gives one number everywhere, and which."""

        def operand(source: fx.Node) -> Any:
            along, constant = self.along.get(source), self.network.constant(source)
            if constant is not None:
                constant = constant.double().cpu() if constant.is_floating_point() else constant.cpu()
                return constant if along is None else constant.index_select(along, picked)
            if source in self.network.numbers:
                return self.network.numbers[source]
            assert along is not None
            shape = self.network.shape(source)
            column = [len(picked) if d == along else 1 for d in range(len(shape))]
            numbers = self.network.along(source, along).number[picked].reshape(column)
            wide = [len(picked) if d == along else size for d, size in enumerate(shape)]
            return numbers.expand(wide) if self.on_maps else numbers

        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), operand)
        result = self.node.target(*args, **kwargs).double().movedim(self.dim, 0).reshape(len(picked), -1)  # type: ignore[operator]
        low, high = result.amin(1), result.amax(1)
        uniform = torch.isfinite(result).all(1) & (high - low <= 1e-12 * torch.maximum(low.abs(), high.abs()))
        return uniform, torch.where(uniform, low, 0.0)

    def reads(self, live: torch.Tensor) -> Iterator[tuple[fx.Node, torch.Tensor]]:
        for source in self.network.values(self.node):
            along, channels = self.along.get(source), self.network.channels(source)
            yield source, live if along is not None and along == channels.dim else torch.ones_like(channels.known)

    def emit(self, out: "Emitter", live: list[int]) -> tuple[fx.Node, list[int]]:
        live = self._in_order(out, live)
        operands: dict[fx.Node, fx.Node] = {}
        for source, along in self.along.items():
            constant = self.network.constant(source)
            if along is None:
                operands[source] = out.whole(source)
            elif constant is not None:
                operands[source] = out.attribute(str(source.target), pick(constant, along, live))
            else:
                operands[source] = out.aligned(source, along, live)
        same = self._same(out, operands)
        return (out.copy(self.node, operands) if same is None else operands[same]), live

    def _in_order(self, out: "Emitter", live: list[int]) -> list[int]:
        """`live` in the order that an operand has already, if possible one that has no others."""
        wanted = set(live)
        sources = [s for s, d in self.along.items() if d is not None and s in out.lists]
        sources = [s for s in sources if self.network.channels(s).dim == self.along[s]]
        sources.sort(key=lambda s: (math.prod(self.network.shape(s)), set(out.lists[s]) == wanted))
        first = [channel for channel in out.lists[sources[-1]] if channel in wanted] if sources else []
        return first + sorted(wanted - set(first))

    def _same(self, out: "Emitter", operands: dict[fx.Node, fx.Node]) -> fx.Node | None:
        """The operand that the op leaves as it is: the identity, and a product with open gates."""
        if RULES.get(self.node.target) is identity:
            return self.node.all_input_nodes[0]
        if not (self.zero_wins and len(operands) == 2 and self.node.target is torch.mul):
            return None
        (value, constant) = self.node.all_input_nodes
        if operands[constant].op != "get_attr" or value not in self.network.steps:
            return None
        ones = bool((out.tensors[str(operands[constant].target)] == 1).all())
        return value if ones and self.network.shape(value) == self.network.shape(self.node) else None


class Mixing(Step):
    """Convolutions and linear layers: each output channel reads all input channels of its group.

    weight: (groups, outputs, inputs, ...), the layer's weight in this order. padded: whether a known input channel that
    is not zero makes outputs that differ at the border, so that it must be there.
    """

    def __init__(self, network: "Network", node: fx.Node, dim: int, groups: int, padded: bool) -> None:
        self.network, self.node, self.dim, self.groups = network, node, dim, groups
        rule = RULES[node.target]
        self.operands = rule.operands(node.args, dict(node.kwargs))
        self.input = self.operands["input"]
        self.transposed = rule is transposed_convolution
        self.weight = self._by_group(network.constant(self.operands["weight"]))
        read = network.along(self.input, dim)
        folded = read.known & (read.number == 0) if padded else read.known
        self.read = ~folded.reshape(groups, -1)
        outputs = self.weight.shape[1]
        known = ~self.read.any(1).repeat_interleave(outputs)
        self.shift = self._constant_part(torch.where(folded, read.number, 0.0))
        bias = network.constant(self.operands.get("bias"))
        number = self.shift + (0 if bias is None else bias.detach().double().cpu())
        self.channels = Channels(dim, known, torch.where(known, number, 0.0))

    def _by_group(self, weight: Any) -> torch.Tensor:
        weight = weight.detach().unflatten(0, (self.groups, -1))
        return weight.transpose(1, 2) if self.transposed else weight

    def _constant_part(self, number: torch.Tensor) -> torch.Tensor:
        """What the known inputs add to each output."""
        groups, outputs, inputs = self.weight.shape[:3]
        number = number.reshape(groups, inputs)
        shift = torch.zeros(groups, outputs, dtype=torch.double)
        for group, channel in number.nonzero().tolist():
            column = self.weight[group, :, channel].double().reshape(outputs, -1).sum(1).cpu()
            shift[group] += number[group, channel] * column
        return shift.flatten()

    def reads(self, live: torch.Tensor) -> Iterator[tuple[fx.Node, torch.Tensor]]:
        used = live.reshape(self.groups, -1).any(1, keepdim=True)
        channels = self.network.channels(self.input)
        mask = (self.read & used).flatten()
        yield self.input, mask if channels.dim == self.dim else torch.ones_like(channels.known)

    def emit(self, out: "Emitter", live: list[int]) -> tuple[fx.Node, list[int]]:
        outputs, inputs = self.weight.shape[1:3]
        there = {channel: i for i, channel in enumerate(out.lists.get(self.input, []))}
        wanted: dict[int, list[int]] = {}
        for channel in live:
            wanted.setdefault(channel // outputs, []).append(channel % outputs)
        read = {
            g: sorted(self.read[g].nonzero().flatten().tolist(), key=lambda i: there.get(g * inputs + i, -1))
            for g in wanted
        }
        used = sorted(wanted, key=lambda g: there.get(g * inputs + read[g][0], -1))
        # All groups of a convolution have the same sizes: smaller ones compute more outputs, and read an input again
        # with weight zero.
        n_out, n_in = max(map(len, wanted.values())), max(map(len, read.values()))
        weights, made, taken = [], [], []
        for g in used:
            rows = wanted[g] + [o for o in range(outputs) if o not in wanted[g]][: n_out - len(wanted[g])]
            columns = read[g] + read[g][:1] * (n_in - len(read[g]))
            part = pick(pick(self.weight[g], 0, rows), 1, columns)
            part[:, len(read[g]) :] = 0
            weights.append(part)
            made += [g * outputs + o for o in rows]
            taken += [g * inputs + i for i in columns]
        weight = torch.stack(weights)
        weight = (weight.transpose(1, 2) if self.transposed else weight).flatten(0, 1)
        return self._call(out, weight, made, taken, len(used)), made

    def _call(self, out: "Emitter", weight: torch.Tensor, made: list[int], taken: list[int], groups: int) -> fx.Node:
        operands = dict(self.operands)
        name, bias = str(operands["weight"].target), self.network.constant(operands.get("bias"))
        bias_name = name.removesuffix("weight") + "bias" if bias is None else str(operands["bias"].target)
        shift = self.shift[made]
        if bias is not None or shift.any():
            total = shift + (0 if bias is None else pick(bias, 0, made).double().cpu())
            bias = torch.nn.Parameter(total.to(weight), requires_grad=self.network.learns(name))
            operands["bias"] = out.attribute(bias_name, bias)
        operands["weight"] = out.attribute(name, weight)
        operands["input"] = out.aligned(self.input, self.dim, taken)
        if "groups" in operands:
            operands["groups"] = groups
        return out.call(self.node, operands)


class Gathering(Step):
    """Channels of one value in another order: slices, shuffles, flips.

    origin: for each channel which of the source's it is; -1: zero.
    """

    def __init__(self, network: "Network", node: fx.Node, source: fx.Node, origin: torch.Tensor) -> None:
        self.network, self.node, self.source, self.origin = network, node, source, origin
        channels = network.channels(source)
        zero = origin < 0
        known, number = channels.known[origin.clamp(0)] | zero, torch.where(zero, 0.0, channels.number[origin.clamp(0)])
        self.channels = Channels(channels.dim, known, number)

    def reads(self, live: torch.Tensor) -> Iterator[tuple[fx.Node, torch.Tensor]]:
        mask = torch.zeros_like(self.network.channels(self.source).known)
        mask[self.origin[live]] = True
        yield self.source, mask

    def emit(self, out: "Emitter", live: list[int]) -> tuple[fx.Node, list[int]]:
        place = {channel: i for i, channel in enumerate(out.lists[self.source])}
        origin = self.origin.tolist()
        live = sorted(live, key=lambda channel: place[origin[channel]])
        assert self.channels.dim is not None
        return out.aligned(self.source, self.channels.dim, [origin[channel] for channel in live]), live


class Moving(Step):
    """Positions and dimensions of one value moved, each channel alike: permute, flatten.

    path: the nodes from the source, which is not among them, to this one. dim: where the channels are now; each became
    `block` neighbours. reshapes: whether the call names sizes, so that fewer channels need a reshape in its place.
    """

    def __init__(
        self,
        network: "Network",
        node: fx.Node,
        source: fx.Node,
        path: list[fx.Node],
        dim: int,
        block: int,
        reshapes: bool,
    ) -> None:
        self.network, self.node, self.source, self.path = network, node, source, path
        self.block, self.reshapes = block, reshapes
        channels = network.channels(source)
        self.channels = Channels(dim, channels.known.repeat_interleave(block), channels.number.repeat_interleave(block))

    def reads(self, live: torch.Tensor) -> Iterator[tuple[fx.Node, torch.Tensor]]:
        yield self.source, live.reshape(-1, self.block).any(1)

    def emit(self, out: "Emitter", live: list[int]) -> tuple[fx.Node, list[int]]:
        kept = out.lists[self.source]
        node = out.nodes[self.source]
        for step in self.path:
            if self.reshapes and len(kept) < self.network.channels(self.source).size:
                shape = new_shape(step, self.channels.dim, len(kept) * self.block)
                node = out.insert(torch.reshape, (node, shape), step)
            else:
                node = out.copy(step, {step.all_input_nodes[0]: node})
        return node, [channel * self.block + i for channel in kept for i in range(self.block)]


class Joining(Step):
    """Channels of several values, one behind the other."""

    def __init__(self, network: "Network", node: fx.Node, dim: int) -> None:
        self.network, self.node, self.dim = network, node, dim
        self.parts = list(RULES[node.target].operands(node.args, dict(node.kwargs))["tensors"])
        channels = [network.along(part, dim) for part in self.parts]
        self.sizes = [part.size for part in channels]
        self.channels = Channels(
            dim, torch.cat([part.known for part in channels]), torch.cat([part.number for part in channels])
        )

    def reads(self, live: torch.Tensor) -> Iterator[tuple[fx.Node, torch.Tensor]]:
        for part, mask in zip(self.parts, live.split(self.sizes), strict=True):
            channels = self.network.channels(part)
            if mask.any():
                yield part, mask if channels.dim == self.dim else torch.ones_like(channels.known)

    def emit(self, out: "Emitter", live: list[int]) -> tuple[fx.Node, list[int]]:
        nodes, made, start, wanted = [], [], 0, set(live)
        for part, size in zip(self.parts, self.sizes, strict=True):
            if wanted & set(range(start, start + size)):
                tracked = self.network.channels(part).dim == self.dim
                kept = out.lists[part] if tracked else list(range(size))
                nodes.append(out.aligned(part, self.dim, kept))
                made += [start + channel for channel in kept]
            start += size
        return (nodes[0] if len(nodes) == 1 else out.insert(torch.cat, (nodes, self.dim), self.node)), made


# -- which op is which ------------------------------------------------------------------------------------------------

Choice = Callable[["Network", fx.Node], Step | None]
"""The step of a call, or None where the op mixes channels when it is called like this."""


def elementwise(network: "Network", node: fx.Node, zero_wins: bool = False) -> Step | None:
    """Each value by itself, with broadcasting."""
    spec = node.meta["spec"]
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
    if dim in reduced:
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
    parts, ndim = list(operands["tensors"]), len(node.meta["spec"].shape)
    dim = operands.get("dim", 0) % ndim
    tracked = [part for part in parts if part in network.steps and network.channels(part).dim is not None]
    if len(parts) > len([part for part in parts if part in network.steps]) or not tracked:
        return None
    if any(network.channels(part).dim == dim for part in tracked) and not node.meta["spec"].per_sample[dim]:
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
        sources = [source for source in network.values(path[0]) if source not in network.numbers]
        if len(sources) != 1:
            return None
        source, spec = sources[0], sources[0].meta["spec"]
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
    channels, spec = network.channels(source), node.meta["spec"]
    assert channels.dim is not None
    if len(path) > 1 and (len(path) > 2 or isinstance(path[0].meta["spec"], Spec)):
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


def is_reshape(node: fx.Node) -> bool:
    """Whether the op gives values another shape, which names sizes."""
    return RULES.get(node.target) is moves.reshape


def new_shape(node: fx.Node, dim: int | None, size: int) -> list[int] | None:
    """The shape of a reshaped value with `size` channels along `dim`, with -1 for the batch; None for two of these."""
    spec = node.meta["spec"]
    sizes = [size if d == dim else -1 if spec.per_sample[d] else n for d, n in enumerate(spec.shape)]
    return sizes if sizes.count(-1) < 2 else None


def pick(tensor: torch.Tensor, dim: int, channels: Sequence[int]) -> torch.Tensor:
    """Some channels of a tensor, in this order; the tensor itself where these are all."""
    if list(channels) == list(range(tensor.shape[dim])):
        return tensor
    return tensor.detach().index_select(dim, torch.tensor(channels, dtype=torch.long, device=tensor.device))


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
            *(each.reciprocal, each.abs, each.sin, each.cos, each.erf, each.pow, each.clamp, each.clamp_min),
            *(each.clamp_max, each.maximum, each.minimum),
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
    spec = node.meta.get("spec")
    if choice and isinstance(spec, Spec) and spec.dtype.is_floating_point and 0 not in spec.shape:
        return choice(network, node) or Step(network, node)
    return Step(network, node)
