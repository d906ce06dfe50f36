"""Functions of each value by itself that are not activations. The instruction passes them as it is."""

import math
import operator

import torch
import torch.nn.functional as F

from fxfeedback.rules.activation import pointwise
from fxfeedback.rules.core import as_is, constant, dtype_of, nothing, roles, rule, sum_to
from fxfeedback.rules.draws import drawn_like
from fxfeedback.rules.examples import C, T, call
from fxfeedback.rules.ops import BOUNDS_PASS, without_gradient

Tensor = torch.Tensor


def function(y, error, *spellings, of=None, kink=False):
    """The rule of y = f(x), a function of each value by itself.

    Args:
        y: the formula.
        error: (e, x, y) -> e f'(x).
        spellings: f, as torch names it.
        of: maps any number into f's domain: the example is f(of(x)) then, and f(x) otherwise.
        kink: whether f has a kink at 0, where a second example tries it.
    """
    f = spellings[0]

    def table(y, input):
        return pointwise(lambda e: error(e, input, y))

    table.__doc__ = y
    examples = [call(f if of is None else lambda x: f(of(x)), T(4, 5))]
    examples += [call(lambda x: f(F.relu(x)), T(4, 5))] if kink else []
    return rule(*spellings, name=f.__name__.removeprefix("special_"), examples=examples)(table)


def positive(x):
    """At least 0.5."""
    return 0.5 + x * x


def over_one(x):
    """At least 1.1."""
    return 1.1 + x * x


def direction(x):
    """x / |x|"""
    return torch.sgn(x) if dtype_of(x).is_complex else torch.sign(x)


PEAK = 2 / math.sqrt(math.pi)  # the slope of erf at 0

FUNCTIONS = [
    function("exp x", lambda e, x, y: e * y, torch.exp),
    function("exp x - 1", lambda e, x, y: e * (y + 1), torch.expm1, torch.special.expm1),
    function("log x", lambda e, x, y: e / x, torch.log, of=positive),
    function("log x / log 2", lambda e, x, y: e / (x * math.log(2)), torch.log2, of=positive),
    function("log x / log 10", lambda e, x, y: e / (x * math.log(10)), torch.log10, of=positive),
    function("log(1 + x)", lambda e, x, y: e / (1 + x), torch.log1p, torch.special.log1p, of=positive),
    function("√x", lambda e, x, y: e / (2 * y), torch.sqrt, of=positive),
    function("1 / √x", lambda e, x, y: -0.5 * e * y * y * y, torch.rsqrt, of=positive),
    function("x²", lambda e, x, y: 2 * e * x, torch.square),
    function("1 / x", lambda e, x, y: -e * y * y, torch.reciprocal),
    function("|x|", lambda e, x, y: e * direction(x), torch.abs, torch.absolute, operator.abs, kink=True),
    function("sin x", lambda e, x, y: e * torch.cos(x), torch.sin),
    function("cos x", lambda e, x, y: -e * torch.sin(x), torch.cos),
    function("tan x", lambda e, x, y: e * (1 + y * y), torch.tan),
    function("arcsin x", lambda e, x, y: e * torch.rsqrt(1 - x * x), torch.asin, torch.arcsin, of=torch.tanh),
    function("arccos x", lambda e, x, y: -e * torch.rsqrt(1 - x * x), torch.acos, torch.arccos, of=torch.tanh),
    function("arctan x", lambda e, x, y: e / (1 + x * x), torch.atan, torch.arctan),
    function("(exp x - exp(-x)) / 2", lambda e, x, y: e * torch.cosh(x), torch.sinh),
    function("(exp x + exp(-x)) / 2", lambda e, x, y: e * torch.sinh(x), torch.cosh),
    function("log(x + √(x² + 1))", lambda e, x, y: e * torch.rsqrt(x * x + 1), torch.asinh, torch.arcsinh),
    function("log(x + √(x² - 1))", lambda e, x, y: e * torch.rsqrt(x * x - 1), torch.acosh, torch.arccosh, of=over_one),
    function("log((1 + x) / (1 - x)) / 2", lambda e, x, y: e / (1 - x * x), torch.atanh, torch.arctanh, of=torch.tanh),
    function("2ˣ", lambda e, x, y: e * y * math.log(2), torch.exp2, torch.special.exp2),
    function("2 / √π ∫₀ˣ exp(-u²)", lambda e, x, y: e * torch.exp(-x * x) * PEAK, torch.erf, torch.special.erf),
    function("1 - erf x", lambda e, x, y: -e * torch.exp(-x * x) * PEAK, torch.erfc, torch.special.erfc),
    function("x without its whole part", lambda e, x, y: e, torch.frac),
]
"""Functions of which nothing but the derivative need be said."""


@rule(torch.nan_to_num, examples=[call(lambda x: torch.nan_to_num(x.where(x > 0, math.inf), posinf=2.0), T(4, 5))])
def nan_to_num(y, input, nan=0.0, posinf=None, neginf=None):
    """x, and a number where x is not finite"""
    return pointwise(lambda e: torch.where(torch.isfinite(input), e, 0.0))


@rule(
    torch.pow,
    operator.pow,
    name="pow",
    examples=[
        call(operator.pow, T(4, 5), 3),
        call(torch.pow, T(4, 5), 0),
        call(lambda x: F.relu(x) ** 2.0, T(4, 5)),
        call(lambda x: (x * x) ** -0.5, T(4, 5)),
        call(operator.pow, 2, T(4, 5)),
        call(lambda x, w: (x * x).pow(w), T(4, 5, 3), T(3)),
        call(lambda x, c: (0 * x + 1) * F.relu(x).pow(c.round() - 1), T(4, 5), C(5)),
    ],
)
def power(y, input, exponent):
    """xᵖ"""

    def to_input(e):
        if isinstance(exponent, (int, float)):
            return e * exponent * input ** (exponent - 1) if exponent else torch.zeros_like(e)
        return sum_to(torch.where(exponent == 0, 0.0, e * exponent * input ** (exponent - 1)), input, y)

    def to_exponent(e):
        if isinstance(input, (int, float)):
            return e * y * math.log(input)
        return sum_to(torch.where((input == 0) & (exponent >= 0), 0.0, e * y * torch.log(input)), exponent, y)

    return {
        "input": roles(
            instruct=lambda t: t if isinstance(exponent, (int, float)) else sum_to(t, input, y), error=to_input
        ),
        "exponent": roles(
            instruct=lambda t: t if isinstance(input, (int, float)) else sum_to(t, exponent, y), error=to_exponent
        ),
    }


def _made(x, z):
    """x with the values of z."""
    return x - x.detach() + z


@rule(
    torch.clamp,
    torch.clip,
    examples=[
        call(torch.clamp, T(4, 5), -0.5, 0.5),
        call(lambda x: F.relu(x).clamp(max=1, min=0), T(4, 5)),
        call(lambda x, low, high: x.clip(low, high), T(40, 5, 3), T(3), T(5, 1)),
        call(lambda x: _made(x, 1.0).clamp(0, 1) + x, T(4, 5)),
        call(lambda x, w: _made(x, w).clip(w, w.exp() + w), T(4, 5), T(5)),
        call(lambda x, w: torch.stack([x, _made(x, w)]).clip(w, w), T(4, 5), T(5)),
    ],
)
def clamp(y, input, min=None, max=None):
    """min(max(x, low), high); where x equals a bound the error goes where this version of torch sends it"""
    passed, to_min, to_max = (passing if BOUNDS_PASS else sharing)(y, input, min, max)
    return {
        "input": roles(instruct=lambda t: sum_to(t, input, y), error=passed),
        "min": roles(instruct=lambda t: sum_to(t, min, y), error=to_min),
        "max": roles(instruct=lambda t: sum_to(t, max, y), error=to_max),
    }


def passing(y, input, min, max):
    """torch's older way: an error passes to x where it equals a bound."""

    def passed(e):
        for bound, beyond in ((min, operator.lt), (max, operator.gt)):
            e = e if bound is None else torch.where(beyond(input, bound), 0.0, e)
        return sum_to(e, input, y)

    def to_min(e):
        below = input < min if max is None else (input < min) & (min < max)
        return sum_to(torch.where(below, e, 0.0), min, y)

    def to_max(e):
        above = input > max if min is None else (input > max) | (max < min)
        return sum_to(torch.where(above, e, 0.0), max, y)

    return passed, to_min, to_max


def sharing(y, input, min, max):
    """torch's newer way: a number as a bound lets no error pass to its equals, a tensor shares with them."""
    two_tensors = not any(isinstance(bound, (int, float, type(None))) for bound in (min, max))

    def passed(e):
        inside = e
        for bound, within in ((min, operator.gt), (max, operator.lt)):
            if bound is not None:
                equals = 0.0 if isinstance(bound, (int, float)) else torch.where(input == bound, inside / 2, 0.0)
                inside = torch.where(within(input, bound), inside, equals)
        return sum_to(torch.where((min == max) & (input == min), e, inside) if two_tensors else inside, input, y)

    def to_min(e):
        share = torch.where(input < min, e, torch.where(input == min, e / 2, 0.0))
        crossed = torch.where((min == max) & (input < min), e, 0.0) if two_tensors else 0.0
        return sum_to(torch.where(min < max, share, crossed) if two_tensors else share, min, y)

    def to_max(e):
        share = torch.where(input > max, e, torch.where(input == max, e / 2, 0.0))
        crossed = torch.where((max < min) | (input > max), e, 0.0) if two_tensors else 0.0
        return sum_to(torch.where(min < max, share, crossed) if two_tensors else share, max, y)

    return passed, to_min, to_max


@rule(
    torch.clamp_min,
    examples=[call(lambda x: F.relu(x).clamp_min(0.0), T(4, 5)), call(torch.clamp_min, T(4, 5), T(1, 5))],
)
def clamp_min(y, input, min):
    """max(x, low)"""
    return clamp.table(y, input, min)


@rule(
    torch.clamp_max,
    examples=[
        call(lambda x: x.clamp_max(0.1), T(4, 5)),
        call(lambda x, w: _made(x, w).clamp_max(w), T(4, 5), T(5)),
    ],
)
def clamp_max(y, input, max):
    """min(x, high)"""
    return clamp.table(y, input, None, max)


@rule(
    torch.maximum,
    examples=[call(torch.maximum, T(4, 5, 3), T(5, 1)), call(lambda x: torch.maximum(F.relu(x), 0 * x), T(4, 5))],
)
def maximum(y, input, other):
    """The greater of two; ties share the error"""
    return chosen(y, input, other, lambda a, b: a > b)


@rule(
    torch.minimum,
    examples=[call(torch.minimum, T(4, 5, 3), T(3)), call(lambda x: torch.minimum(F.relu(x), 0 * x), T(4, 5))],
)
def minimum(y, input, other):
    """The smaller of two; ties share the error"""
    return chosen(y, input, other, lambda a, b: a < b)


def chosen(y, input, other, before):
    """For the one of two values that comes before the other; the instruction passes to both as it is."""

    def to(x, z):
        return roles(
            instruct=lambda t: sum_to(t, x, y),
            error=lambda e: sum_to(torch.where(x == z, e / 2, torch.where(before(x, z), e, 0.0)), x, y),
        )

    return {"input": to(input, other), "other": to(other, input)}


@rule(without_gradient, examples=[call(lambda x: x + without_gradient(x), T(4, 5))])
def cut_off(y, input):
    """x, made under torch.no_grad(): instructions pass, errors do not"""
    return {"input": roles(instruct=as_is, error=nothing)}


constant(
    torch.floor,
    torch.ceil,
    torch.round,
    torch.trunc,
    torch.fix,
    torch.sign,
    torch.floor_divide,
    operator.floordiv,
    torch.detach,
    torch.bernoulli,
    drawn_like,
    torch.zeros_like,
    torch.ones_like,
    torch.full_like,
    torch.empty_like,
    torch.rand_like,
    torch.randn_like,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_full,
    Tensor.new_empty,
    Tensor.new_tensor,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.empty,
    torch.eye,
    torch.arange,
    torch.linspace,
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
)  # step functions, and tensors that only take the shape of another
