"""Writing into a part of a tensor: what an assignment x[index] = z becomes."""

from fxfeedback.ops import put_at
from fxfeedback.rules.core import rule, transpose
from fxfeedback.rules.examples import T, call


@rule(put_at)
def put(y, input, index, value):
    """x with z at the index"""
    return {
        "input": transpose(lambda t: put_at(t, index, 0)),
        "value": transpose(lambda t: t[index].sum_to_size(value.shape)),
    }


put.examples = [
    call(lambda x, z: put_at(x, (slice(None), slice(1, 4)), z), T(4, 5, 3), T(3, 1)),
    call(lambda x: put_at(x, (slice(None), 0), 2 * x[:, 1]), T(4, 5, 3)),
    call(lambda x: put_at(x, (slice(None), slice(0, 5, 2)), 1.5), T(4, 5)),
]
