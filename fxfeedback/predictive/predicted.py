"""What a model with predictions returns of its steps, and the state with which a call goes on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fxfeedback.errors import InputError
from fxfeedback.graph.specs import EXAMPLE_BATCH, Spec
from fxfeedback.predictive.steps import Held

State = dict[str, Held]
"""Name of a node that predicts -> r, p and g of the last step."""


class Predicted(NamedTuple):
    """A prediction in one step: r, p, the mean of (p - τ)² over batch and elements, f.

    Of a node that predicts nothing only `representation`, its value.
    """

    representation: torch.Tensor
    prediction: torch.Tensor | None = None
    error: torch.Tensor | None = None
    feedforward: torch.Tensor | None = None


def predicted(r: torch.Tensor, p: torch.Tensor | None = None, target: Any = None, f: Any = None) -> Predicted:
    """What is read out of a graph, as users get it."""
    return Predicted(r) if p is None else Predicted(r, p, (p - target).square().mean(), f)


def tensors_of_state(given: Any, specs: Mapping[str, tuple[Spec, Spec]], batch: int) -> list[torch.Tensor]:
    """The tensors of a state in the order in which a graph takes them.

    Args:
        given: what an earlier call returned.
        specs: of each prediction its representation's and its prediction's.
        batch: of the call.

    Raises:
        InputError: it is something else, or of another batch or size.
    """
    names = ", ".join(specs)
    if not isinstance(given, Mapping) or set(given) != set(specs):
        raise InputError(f"state= has r, p and g of each prediction ({names}): give what unroll returned")
    tensors: list[torch.Tensor] = []
    for name, (representation, prediction) in specs.items():
        held = given[name]
        if not isinstance(held, Sequence) or len(held) != 3 or not all(isinstance(x, torch.Tensor) for x in held):
            raise InputError(f"state= has something else than r, p and g for {name!r}: give what unroll returned")
        for what, value, spec in zip(Held._fields, held, (representation, prediction, representation), strict=True):
            wanted = at_batch(spec, batch)
            if tuple(value.shape) != wanted:
                raise InputError(f"state=: the {what} of {name!r} has shape {tuple(value.shape)}, not {wanted}")
        tensors += held
    return tensors


def at_batch(spec: Spec, batch: int) -> tuple[int, ...]:
    """The shape of a value at this batch size."""
    pairs = zip(spec.shape, spec.per_sample, strict=True)
    return tuple([size + slope * (batch - EXAMPLE_BATCH) for size, slope in pairs])
