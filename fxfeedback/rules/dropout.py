"""Dropout: the instruction passes it as it is, the error takes the very mask that the BU pass drew."""

import torch.nn.functional as F

from fxfeedback.rules.core import as_is, constant, roles, rule, transpose
from fxfeedback.rules.draws import DROPOUTS, survival, surviving_channels
from fxfeedback.rules.examples import T, call
from fxfeedback.rules.ops import same


@rule(
    *DROPOUTS,
    examples=[
        call(F.dropout, T(40, 5), 0.3),
        call(lambda x: F.dropout(x * x, 0.3, inplace=True), T(40, 5)),
        call(F.dropout2d, T(40, 5, 3, 3), 0.3),
    ],
)
def dropout(y, input, p, train):
    """y, mask = x mask / (1 - p), mask"""
    scale = 1 / (1 - p) if p < 1 else 0.0
    return {"input": roles(instruct=lambda t: t[0], error=lambda e: e[0] * y[1] * scale)}


@rule(same, examples=[call(F.dropout, T(4, 5), 0.3, False)])
def identity(y, input):
    """x itself: dropout that is off, nn.Identity"""
    return {"input": transpose(as_is)}


constant(survival, surviving_channels)  # stochastic depth and channel dropout are products with a random factor
