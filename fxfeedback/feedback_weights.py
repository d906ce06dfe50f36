"""What TD reads in place of a BU weight W, its V: a weight of its own, or the sign of W times a magnitude.

Both TD passes ask `twins_in`. In the graph of a call the V of a weight is made once, however often it is read.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxfeedback.graph.nodes import identifier, tell
from fxfeedback.graph.values import Emitter, Value


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
    made: dict[str, Value] = {}

    def twin(weight: fx.Node) -> Any:
        name = str(weight.target)
        how = twins.get(name) if weight.op == "get_attr" else None
        if not isinstance(how, Signed):
            return None if how is None else emitter.attribute(how)
        if name not in made:
            factor = how.magnitude if how.magnitude is not None else inputs[name]
            with emitter.named(f"{identifier(name)}_sign", feedback_weight=name):
                made[name] = see(weight).sign() * (emitter.attribute(factor) if isinstance(factor, str) else factor)
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
