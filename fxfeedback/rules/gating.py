"""The gates that fxfeedback itself puts into a BU graph: the lateral connections of an instructed pass."""

from fxfeedback.rules.core import rule, transpose
from fxfeedback.rules.examples import C, T, call
from fxfeedback.rules.ops import one_node


@one_node
def gate(value, open):
    """GaLU's BU side: `value` where its gate is open, 0 elsewhere.

    open: 1 or 0 for each unit, broadcasting to value's shape; floats, as booleans multiply several times slower.
    """
    return value * open.to(value.dtype)


@rule(gate, examples=[call(gate, T(4, 5), C(5))])
def galu(y, value, open):
    """v [t > 0]; the gate is a constant for the error"""
    return {"value": transpose(lambda t: t * open)}
