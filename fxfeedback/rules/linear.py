"""Linear layers."""

import torch.nn.functional as F

from fxfeedback.rules.core import outer, rule, sum_to, transpose, update
from fxfeedback.rules.examples import T, call


@rule(
    F.linear,
    weight="weight",
    channels=-1,
    examples=[
        call(F.linear, T(4, 3), T(2, 3), T(2)),
        call(F.linear, T(4, 5, 3), T(2, 3)),
        call(lambda x: x + F.linear(x, x[0]), T(4, 3, 3)),
    ],
)
def linear(y, input, weight, bias=None):
    """y = x Wᵀ + b"""
    return {
        "input": transpose(lambda t: t @ weight),
        "weight": update(lambda e: outer(e, input)),
        "bias": update(lambda e: sum_to(e, bias, y)),
    }
