"""Functions of two values each that are not sums and products, with broadcasting.

The instruction passes to both operands as it is, summed where an operand was broadcast.
"""

import math
import operator

import torch

from fxfeedback.rules.core import roles, rule, sum_to
from fxfeedback.rules.elementwise import positive
from fxfeedback.rules.examples import C, T, call
from fxfeedback.rules.ops import TIES_SHARE
from fxfeedback.rules.special import apart_from_zero


def of_two(y, input, other, to_input, to_other):
    """The table of y = f(x, z), given e ∂f / ∂x and e ∂f / ∂z."""

    def to(x, way):
        return roles(instruct=lambda t: sum_to(t, x, y), error=lambda e: sum_to(way(e), x, y))

    return {"input": to(input, to_input), "other": to(other, to_other)}


@rule(
    torch.atan2,
    torch.arctan2,
    examples=[
        call(torch.atan2, T(4, 5, 3), T(5, 1)),
        call(lambda x: torch.atan2(torch.relu(x), torch.relu(-x) * (x > -1)), T(40, 5)),
    ],
)
def atan2(y, input, other):
    """The angle of the point (z, x); nothing passes at (0, 0)"""

    def per_area(e):
        area = input * input + other * other
        return torch.where(area == 0, 0.0, e / apart_from_zero(area))

    return of_two(y, input, other, lambda e: per_area(e) * other, lambda e: -per_area(e) * input)


@rule(torch.hypot, examples=[call(torch.hypot, T(4, 5, 3), T(5, 1))])
def hypot(y, input, other):
    """√(x² + z²)"""
    return of_two(y, input, other, lambda e: e * (input / y), lambda e: e * (other / y))


@rule(
    torch.fmax,
    examples=[
        call(torch.fmax, T(4, 5, 3), T(5, 1)),
        call(lambda x: torch.fmax(torch.relu(x), 0 * x), T(4, 5)),
        call(lambda x: torch.fmax(x, torch.where(x > 0, x, math.nan)), T(4, 5)),
    ],
)
def fmax(y, input, other):
    """The greater of two, that which is a number"""
    return not_behind(y, input, other, torch.lt, torch.gt)


@rule(
    torch.fmin,
    examples=[call(torch.fmin, T(4, 5, 3), T(3)), call(lambda x: torch.fmin(torch.relu(x), 0 * x), T(4, 5))],
)
def fmin(y, input, other):
    """The smaller of two, that which is a number"""
    return not_behind(y, input, other, torch.gt, torch.lt)


def not_behind(y, input, other, loses, wins):
    """For the one of two that does not lose; ties and what is not a number as this version of torch treats them."""
    if TIES_SHARE:

        def way(lost):
            return lambda e: torch.where(lost(input, other), 0.0, torch.where(input == other, e / 2, e))

        return of_two(y, input, other, way(loses), way(wins))
    first = lambda: wins(input, other) | (input == other) | (other != other)  # noqa: E731
    return of_two(y, input, other, lambda e: torch.where(first(), e, 0.0), lambda e: torch.where(first(), 0.0, e))


@rule(
    torch.remainder,
    operator.mod,
    examples=[
        call(torch.remainder, T(4, 5), 0.7),
        call(lambda x, w: torch.remainder(x, positive(w)), T(4, 5, 3), T(5, 1)),
        call(lambda x: x % -0.3, T(4, 5)),
    ],
)
def remainder(y, input, other):
    """x - z ⌊x / z⌋"""
    return of_two(y, input, other, lambda e: e, lambda e: -e * torch.div(input, other, rounding_mode="floor"))


@rule(torch.Tensor.__rmod__, name="rmod", examples=[call(torch.Tensor.__rmod__, T(4, 5), T(5))])
def reflected_remainder(y, input, other):
    """z - x ⌊z / x⌋"""
    table = remainder.table(y, other, input)
    return {"input": table["other"], "other": table["input"]}


@rule(
    torch.fmod,
    examples=[
        call(torch.fmod, T(4, 5), 0.7),
        call(lambda x, w: torch.fmod(x, positive(w)), T(4, 5, 3), T(5, 1)),
    ],
)
def fmod(y, input, other):
    """x - z trunc(x / z)"""
    return of_two(y, input, other, lambda e: e, lambda e: -e * torch.div(input, other, rounding_mode="trunc"))


@rule(
    torch.copysign,
    examples=[
        call(torch.copysign, T(4, 5, 3), T(5, 1)),
        call(lambda x: torch.copysign(torch.relu(x), -1.0), T(4, 5)),
    ],
)
def copysign(y, input, other):
    """|x| with the sign of z; nothing passes where x is 0"""

    def to_input(e):
        return e * torch.where(input == 0, 0.0, y / apart_from_zero(input))

    return of_two(y, input, other, to_input, lambda e: torch.zeros_like(e))


@rule(
    torch.ldexp,
    examples=[
        call(torch.ldexp, T(4, 5, 3), T(5, 1)),
        call(lambda x, c: torch.ldexp(x, c.round().int()), T(4, 5), C(5)),
    ],
)
def ldexp(y, input, other):
    """x 2ᶻ"""
    return of_two(y, input, other, lambda e: e * 2.0**other, lambda e: e * y * math.log(2))


@rule(torch.logaddexp, examples=[call(torch.logaddexp, T(4, 5, 3), T(5, 1))])
def logaddexp(y, input, other):
    """log(exp x + exp z)"""
    return of_two(
        y, input, other, lambda e: e / (1 + torch.exp(other - input)), lambda e: e / (1 + torch.exp(input - other))
    )


@rule(torch.logaddexp2, examples=[call(torch.logaddexp2, T(4, 5, 3), T(5, 1))])
def logaddexp2(y, input, other):
    """log₂(2ˣ + 2ᶻ)"""
    return of_two(
        y, input, other, lambda e: e / (1 + torch.exp2(other - input)), lambda e: e / (1 + torch.exp2(input - other))
    )


@rule(
    torch.xlogy,
    torch.special.xlogy,
    examples=[
        call(lambda x, w: torch.xlogy(x, positive(w)), T(4, 5, 3), T(5, 1)),
        call(lambda x: torch.xlogy(2, positive(x)), T(4, 5)),
        call(lambda x: torch.xlogy(torch.relu(x), 0.5), T(4, 5)),
    ],
)
def xlogy(y, input, other):
    """x log z; 0 where x is 0"""
    return product_with_log(y, input, other, torch.xlogy, 0.0)


@rule(
    torch.special.xlog1py,
    name="xlog1py",
    examples=[
        call(lambda x, w: torch.special.xlog1py(x, positive(w)), T(4, 5, 3), T(5, 1)),
        call(lambda x: torch.special.xlog1py(2, positive(x)), T(4, 5)),
    ],
)
def xlog1py(y, input, other):
    """x log(1 + z); 0 where x is 0"""
    return product_with_log(y, input, other, torch.special.xlog1py, 1.0)


def product_with_log(y, input, other, function, shift):
    """The table of f(x, z) = x log(z + shift), which is 0 where x is."""

    def to_input(e):
        return torch.where((input == 0) & (other <= -shift), 0.0, function(e, other))

    return of_two(y, input, other, to_input, lambda e: e * input / (other + shift))


@rule(
    torch.special.zeta,
    name="zeta",
    examples=[call(lambda x: torch.special.zeta(2.5, positive(x)), T(4, 5))],
)
def zeta(y, input, other):
    """Σ 1 / (k + z)ˣ over k ≥ 0; torch does not differentiate it by x"""
    return {
        "other": of_two(y, input, other, None, lambda e: -e * input * torch.special.zeta(input + 1, other))["other"]
    }
