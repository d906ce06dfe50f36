"""What TD reads in place of a BU weight W, its V: a weight of its own, the sign of W times a magnitude, or the error.

Both TD passes ask `twins_in`. In the graph of a call the V of a weight is made once, however often it is read. Direct
feedback has no V: `Broadcast` hands the error at the logits to every layer or site, in the error pass only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxfeedback.graph.channels import channels_of
from fxfeedback.graph.nodes import gated_site_of, identifier, name_of, spec_of, tell
from fxfeedback.graph.operands import operand, weight_of
from fxfeedback.graph.specs import Spec
from fxfeedback.graph.values import Emitter, Value
from fxfeedback.rules import RULES
from fxfeedback.rules.convolution import CONV_TRANSPOSE


@dataclass(frozen=True)
class Signed:
    """V = M sign(W).

    magnitude: M, a number, the name of a buffer, or None: an input of the graph.
    """

    magnitude: float | str | None


Twins = Mapping[str, str | Signed]
"""BU weight name -> what stands for it in TD: the name of a parameter, or its signs."""


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan in, fan out) of a weight of this shape: terms that one output sums, and outputs that one input enters."""
    positions = math.prod(shape[2:])
    return shape[1] * positions, shape[0] * positions


def scale(shape: Sequence[int], how: str | float) -> float:
    """The size of V where it is the same in all of it, and the root of its mean square where it is drawn.

    how: "xavier" √(2 / (fan in + fan out)), "kaiming" 1 / √(3 fan in), or the number itself.
    """
    fan_in, fan_out = fans(shape)
    kinds = {"xavier": lambda: math.sqrt(2 / (fan_in + fan_out)), "kaiming": lambda: 1 / math.sqrt(3 * fan_in)}
    return kinds[how]() if isinstance(how, str) else float(how)


def bound(shape: Sequence[int], how: str | float) -> float:
    """b, where magnitudes are drawn from |U(-b, b)|: its root mean square is `scale`."""
    return math.sqrt(3) * scale(shape, how)


def twins_in(emitter: Emitter, twins: Twins, see: Callable[[fx.Node], Any]) -> Callable[[fx.Node], Any]:
    """What `Walk.twin` asks for: weight node -> what TD reads in its place, or None where that is the weight itself.

    Magnitudes that are drawn become inputs of the graph now.

    see: weight node -> its value in the graph.
    """
    inputs = {name: _magnitude(emitter, name) for name, how in twins.items() if how == Signed(None)}
    made: dict[str, Any] = {}

    def twin(weight: fx.Node) -> Any:
        name = str(weight.target)
        how = twins.get(name) if weight.op == "get_attr" else None
        if not isinstance(how, Signed):
            return None if how is None else emitter.attribute(how)
        if name not in made:
            factor = how.magnitude if how.magnitude is not None else inputs[name]
            with emitter.named(f"{identifier(name)}_sign", feedback_weight=name):
                factor = emitter.attribute(factor) if isinstance(factor, str) else factor
                made[name] = torch.mul(torch.sign(see(weight)), factor)
            made[name].node._rename(f"{identifier(name)}_feedback")
        return made[name]

    return twin


def _magnitude(emitter: Emitter, name: str) -> Value:
    value = emitter.placeholder(f"{identifier(name)}_magnitude")
    tell(value.node, magnitude=name)
    return value


def clamped(results: Mapping[str, Any], limit: float) -> dict[str, Any]:
    """Counter neurons and updates, each value of them in [-limit, limit]."""
    return {name: t.clamp(-limit, limit) for name, t in results.items()}


# -- direct feedback --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Direct:
    """How the error at the logits, e (B, K), is broadcast by fixed random weights.

    names: BU weight name, or site name -> name of its random weight.
    by_unit: at each site, by (K, units); else at the input of each linear layer or convolution, by a weight as its own.
    """

    names: Mapping[str, str]
    by_unit: bool


class Broadcast:
    """Emits e, broadcast."""

    def __init__(self, emitter: Emitter, direct: Direct, e: Value) -> None:
        self.emitter, self.direct, self.e = emitter, direct, e

    def at_site(self, node: fx.Node, t: Any) -> Any:
        """e B at a site, laid out as its value, in place of what comes from above, t; elsewhere t."""
        gated = any(gated_site_of(user) is not None for user in node.users)
        name = self.direct.names.get(gated_site_of(node) or name_of(node)) if self.direct.by_unit else None
        if name is None or (gated and gated_site_of(node) is None):
            return t
        spec = spec_of(node)
        t = (self._error(spec) @ self.emitter.attribute(name)).reshape(-1, *spec.shape[1:])
        t.spec = spec
        return t

    def to_input(self, node: fx.Node, values: Mapping[fx.Node, Value]) -> Any:
        """What a linear layer or convolution hands to its input: its transpose with B for W, of e at every position."""
        rule = RULES.get(node.target)
        weight = weight_of(node) if rule and rule.weight else None
        name = self.direct.names.get(str(weight.target)) if weight is not None and not self.direct.by_unit else None
        if rule is None or name is None:
            return None
        operands = fx.node.map_arg(rule.operands(node.args, node.kwargs), values.__getitem__)
        b, spec = self.emitter.attribute(name), spec_of(node)
        b.spec = broadcasting(node, self.e.spec.shape[-1])
        ungrouped = operands | {rule.weight: b} | ({"groups": 1} if "groups" in operands else {})
        t = self._spread(spec, channels_of(node))
        t = rule.table(values[node], **ungrouped)["input"].error(t)
        below = spec_of(operand(node, "input"))
        return t.expand(self.emitter.sizes(below)) if channels_of(node) == -1 and len(below.shape) > 2 else t

    def _spread(self, spec: Spec, channels: int) -> Any:
        """e with a dimension for each of an op's output; along tokens, which a linear layer treats alike, of size 1."""
        (batch,) = (d for d, slope in enumerate(spec.per_sample) if slope)
        e, copies = self._error(spec), spec.per_sample[batch]
        if copies > 1:  # windows of one sample, which follow each other
            e = e.unsqueeze(1).expand(-1, copies, -1).flatten(0, 1)
        shape = [1] * len(spec.shape)
        shape[batch], shape[channels] = -1, self.e.spec.shape[-1]
        e = e.reshape(shape)
        return e if channels == -1 else e.expand(-1, -1, *spec.shape[2:])

    def _error(self, spec: Spec) -> Any:
        return self.e if spec.dtype == self.e.spec.dtype else self.e.to(spec.dtype)


def broadcasting(node: fx.Node, outputs: int) -> Spec:
    """What a random weight is like that brings an error over `outputs` logits to the input of a layer: its own weight
    with the logits in the place of its output's channels, and without groups.
    """
    weight = spec_of(weight_of(node))
    inputs = spec_of(operand(node, "input")).shape[channels_of(node)]
    sizes = (inputs, outputs) if node.target in CONV_TRANSPOSE.values() else (outputs, inputs)
    shape = (*sizes, *weight.shape[2:])
    return Spec(shape, (0,) * len(shape), weight.dtype)
