"""Where a value has its channels, and what is asked of each of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxfeedback.graph.nodes import spec_of
from fxfeedback.graph.specs import Spec
from fxfeedback.rules import RULES

PERMUTATIONS = ("permute", "swap", "movedim", "t")
"""Rules of ops that bring dimensions into another order."""


def channels_of(node: fx.Node) -> int:
    """The dimension of the channels in a linear layer's (last) or a convolution's (1) input and output."""
    channels = RULES[node.target].channels
    assert channels is not None, f"the rule of {node.target} has a weight, but does not say where its channels are"
    return channels


def positions_of(node: fx.Node) -> list[int]:
    """The dimensions of a node's value that are neither batch nor channels."""
    spec = spec_of(node)
    channels = channel_dim(node) % len(spec.shape)
    return [d for d in range(1, len(spec.shape)) if d != channels]


def channel_dim(node: fx.Node) -> int:
    """Where the channels of a value are: 1 after a convolution or batch norm, last after a linear or layer norm.

    Any other op has them where its first input has them of which that can be said, and a permutation moves them.
    """
    waiting: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(node, ())]  # and the permutations on the way to it
    seen: set[fx.Node] = set()
    while waiting:
        node, permuted = waiting.pop()
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is not None and rule.channels is not None:
            return _moved(rule.channels, permuted)
        if node.op == "call_function" and node not in seen:
            seen.add(node)
            permuted = (node, *permuted) if rule is not None and rule.name in PERMUTATIONS else permuted
            waiting += [(source, permuted) for source in reversed(node.all_input_nodes)]
    return 1


def _moved(channels: int, permutations: Sequence[fx.Node]) -> int:
    """Where the channels are after these ops: 1 or last, if anywhere among these."""
    for node in permutations:
        source, ndim = node.all_input_nodes[0], len(spec_of(node).shape)
        if len(spec_of(source).shape) == ndim:
            places = torch.empty(*range(1, ndim + 1), device="meta")  # of each dimension another size
            moved = node.target(places, *node.args[1:], **node.kwargs).shape  # type: ignore[operator]
            place = list(moved).index(channels % ndim + 1)
            channels = -1 if place == ndim - 1 else 1
    return channels


def along_channels(channels: int, spec: Spec) -> list[int]:
    """The shape in which a vector over channels broadcasts to a tensor."""
    shape = [1] * len(spec.shape)
    shape[channels] = spec.shape[channels]
    return shape


def switch_off_channels(t: Any, site: fx.Node) -> Any:
    """relu(t) in channels whose mean over positions is positive, zero in the others."""
    return torch.relu(t) * (channel_mean(t, site) > 0)


def channel_mean(t: Any, site: fx.Node) -> Any:
    """The mean over positions, kept as dimensions of size 1."""
    positions = positions_of(site)
    return t.mean(positions, keepdim=True) if positions else t
