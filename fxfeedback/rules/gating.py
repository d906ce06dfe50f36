"""The gates that fxfeedback itself puts into a BU graph: the lateral connections of an instructed pass."""

import torch

from fxfeedback.rules.core import constant, rule, sum_to, transpose, update
from fxfeedback.rules.examples import C, T, call
from fxfeedback.rules.ops import one_node


@one_node
def gate(value, open):
    """GaLU's BU side: `value` where its gate is open, 0 elsewhere.

    open: 1 or 0 for each unit, broadcasting to value's shape; floats, as booleans multiply several times slower.
    """
    return value * open.to(value.dtype)


@one_node
def gates_of_samples(gates, rows, value):
    """Each sample's gates of those of a few instructions, laid out as the value that they gate.

    Multiplied in two different orders, memory is read several times as slowly, most of all on a GPU.
    """
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(value.ndim)
    if channels_last and not value.is_contiguous() and value.is_contiguous(memory_format=channels_last):
        return gates.movedim(1, -1).contiguous().index_select(0, rows).movedim(-1, 1)
    return gates.contiguous().index_select(0, rows)


constant(gates_of_samples)


@one_node
def of_unit_size(counter):
    """Counter values over their root mean square, of each sample; all zero stay so."""
    square = counter.square().mean(tuple(range(1, counter.ndim)), keepdim=True)
    return counter * torch.rsqrt(square.clamp_min(torch.finfo(counter.dtype).tiny))


@rule(gate, examples=[call(gate, T(4, 5), C(5)), call(gate, T(4, 5), T(5))])
def galu(y, value, open):
    """v [t > 0]; what makes the gate may learn from e v"""
    return {"value": transpose(lambda t: t * open), "open": update(lambda e: sum_to(e * value, open, y))}
