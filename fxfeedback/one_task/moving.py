"""Ops that compute nothing: they move values, or join them. What they do to channels is read off by trying it."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from fxfeedback.graph.nodes import spec_of, specs_of
from fxfeedback.graph.specs import Spec
from fxfeedback.one_task.emitter import Emitter
from fxfeedback.one_task.network import Channels, Network, Step
from fxfeedback.one_task.steps import pick
from fxfeedback.rules import RULES, Rule, indexing, reshaping
from fxfeedback.rules.dropout import identity
from fxfeedback.rules.reshaping import copy, pad, reshape

MOVES: list[Rule] = [
    *(reshape, reshaping.permute, reshaping.swap, reshaping.t, reshaping.movedim, reshaping.roll, reshaping.flip),
    *(reshaping.rot90, reshaping.channel_shuffle, reshaping.split, reshaping.tensor_split, reshaping.unbind),
    *(indexing.getitem, indexing.narrow, indexing.index_select, indexing.attribute),
]
"""The ops that only move values of one operand."""


class Gathering(Step):
    """Channels of one value in another order: slices, shuffles, flips.

    origin: for each channel which of the source's it is; -1: zero.
    """

    def __init__(self, network: Network, node: fx.Node, source: fx.Node, origin: torch.Tensor) -> None:
        self.network, self.node, self.source, self.origin = network, node, source, origin
        channels = network.channels(source)
        zero = origin < 0
        known, number = channels.known[origin.clamp(0)] | zero, torch.where(zero, 0.0, channels.number[origin.clamp(0)])
        self.channels = Channels(channels.dim, known, number)

    def reads(self, live: torch.Tensor) -> Iterator[tuple[fx.Node, torch.Tensor]]:
        mask = torch.zeros_like(self.network.channels(self.source).known)
        mask[self.origin[live]] = True
        yield self.source, mask

    def emit(self, out: Emitter, live: list[int]) -> tuple[fx.Node, list[int]]:
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
        network: Network,
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

    def emit(self, out: Emitter, live: list[int]) -> tuple[fx.Node, list[int]]:
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
    """Channels of several values, one after the other."""

    def __init__(self, network: Network, node: fx.Node, dim: int) -> None:
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

    def emit(self, out: Emitter, live: list[int]) -> tuple[fx.Node, list[int]]:
        nodes, made, start, wanted = [], [], 0, set(live)
        for part, size in zip(self.parts, self.sizes, strict=True):
            if wanted & set(range(start, start + size)):
                tracked = self.network.channels(part).dim == self.dim
                kept = out.lists[part] if tracked else list(range(size))
                nodes.append(out.aligned(part, self.dim, kept))
                made += [start + channel for channel in kept]
            start += size
        return (nodes[0] if len(nodes) == 1 else out.insert(torch.cat, (nodes, self.dim), self.node)), made


def moving(network: Network, node: fx.Node) -> Step | None:
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
    return rule in MOVES or rule in (pad, copy, identity)


def _run(network: Network, path: Iterable[fx.Node], source: fx.Node, x: Any, shape: Any = None) -> Any:
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


def _numbered(network: Network, source: fx.Node) -> tuple[torch.Tensor, int]:
    """A tensor of the source's shape, each value another number from 1 on, and how far apart those of channels are."""
    shape, dim = network.shape(source), network.channels(source).dim
    assert dim is not None
    return torch.arange(1, math.prod(shape) + 1).reshape(shape), math.prod(shape[dim + 1 :])


def _gathering(network: Network, node: fx.Node, source: fx.Node, path: list[fx.Node]) -> Step | None:
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


def _moving(network: Network, node: fx.Node, source: fx.Node, path: list[fx.Node]) -> Step | None:
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
    network: Network,
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
    return RULES.get(node.target) is reshape


def new_shape(node: fx.Node, dim: int | None, size: int) -> list[int] | None:
    """The shape of a reshaped value with `size` channels along `dim`, with -1 for the batch; None for two of these."""
    spec = spec_of(node)
    sizes = [size if d == dim else -1 if spec.per_sample[d] else n for d, n in enumerate(spec.shape)]
    return sizes if sizes.count(-1) < 2 else None
