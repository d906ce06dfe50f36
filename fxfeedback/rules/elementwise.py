"""Functions of each value by itself that are no activations. The instruction passes them as it is."""

import math
import operator

import torch
import torch.nn.functional as F

from fxfeedback.rules.activation import pointwise
from fxfeedback.rules.core import as_is, constant, nothing, roles, rule, sum_to
from fxfeedback.rules.examples import C, T, call
from fxfeedback.rules.ops import BOUNDS_PASS, drawn_like, without_gradient

Tensor = torch.Tensor


@rule(torch.exp)
def exp(y, input):
    """exp x"""
    return pointwise(lambda e: e * y)


@rule(torch.expm1, torch.special.expm1)
def expm1(y, input):
    """exp x - 1"""
    return pointwise(lambda e: e * (y + 1))


@rule(torch.log)
def log(y, input):
    """log x"""
    return pointwise(lambda e: e / input)


@rule(torch.log2)
def log2(y, input):
    """log x / log 2"""
    return pointwise(lambda e: e / (input * math.log(2)))


@rule(torch.log10)
def log10(y, input):
    """log x / log 10"""
    return pointwise(lambda e: e / (input * math.log(10)))


@rule(torch.log1p, torch.special.log1p)
def log1p(y, input):
    """log(1 + x)"""
    return pointwise(lambda e: e / (1 + input))


@rule(torch.sqrt)
def sqrt(y, input):
    """√x"""
    return pointwise(lambda e: e / (2 * y))


@rule(torch.rsqrt)
def rsqrt(y, input):
    """1 / √x"""
    return pointwise(lambda e: -0.5 * e * y * y * y)


@rule(torch.square)
def square(y, input):
    """x²"""
    return pointwise(lambda e: 2 * e * input)


@rule(torch.reciprocal)
def reciprocal(y, input):
    """1 / x"""
    return pointwise(lambda e: -e * y * y)


@rule(torch.abs, torch.absolute, operator.abs)
def abs(y, input):
    """|x|"""
    return pointwise(lambda e: e * torch.sign(input))


@rule(torch.sin)
def sin(y, input):
    """sin x"""
    return pointwise(lambda e: e * torch.cos(input))


@rule(torch.cos)
def cos(y, input):
    """cos x"""
    return pointwise(lambda e: -e * torch.sin(input))


@rule(torch.tan)
def tan(y, input):
    """tan x"""
    return pointwise(lambda e: e * (1 + y * y))


@rule(torch.asin, torch.arcsin)
def asin(y, input):
    """arcsin x"""
    return pointwise(lambda e: e * torch.rsqrt(1 - input * input))


@rule(torch.acos, torch.arccos)
def acos(y, input):
    """arccos x"""
    return pointwise(lambda e: -e * torch.rsqrt(1 - input * input))


@rule(torch.atan, torch.arctan)
def atan(y, input):
    """arctan x"""
    return pointwise(lambda e: e / (1 + input * input))


@rule(torch.sinh)
def sinh(y, input):
    """(exp x - exp(-x)) / 2"""
    return pointwise(lambda e: e * torch.cosh(input))


@rule(torch.cosh)
def cosh(y, input):
    """(exp x + exp(-x)) / 2"""
    return pointwise(lambda e: e * torch.sinh(input))


@rule(torch.asinh, torch.arcsinh)
def asinh(y, input):
    """log(x + √(x² + 1))"""
    return pointwise(lambda e: e * torch.rsqrt(input * input + 1))


@rule(torch.acosh, torch.arccosh)
def acosh(y, input):
    """log(x + √(x² - 1))"""
    return pointwise(lambda e: e * torch.rsqrt(input * input - 1))


@rule(torch.atanh, torch.arctanh)
def atanh(y, input):
    """log((1 + x) / (1 - x)) / 2"""
    return pointwise(lambda e: e / (1 - input * input))


@rule(torch.exp2, torch.special.exp2)
def exp2(y, input):
    """2ˣ"""
    return pointwise(lambda e: e * y * math.log(2))


@rule(torch.erf, torch.special.erf)
def erf(y, input):
    """2 / √π ∫ exp(-u²) from 0 to x"""
    return pointwise(lambda e: e * torch.exp(-input * input) * (2 / math.sqrt(math.pi)))


@rule(torch.erfc, torch.special.erfc)
def erfc(y, input):
    """1 - erf x"""
    return pointwise(lambda e: -e * torch.exp(-input * input) * (2 / math.sqrt(math.pi)))


@rule(torch.frac)
def frac(y, input):
    """x without its whole part"""
    return pointwise(as_is)


@rule(torch.nan_to_num)
def nan_to_num(y, input, nan=0.0, posinf=None, neginf=None):
    """x, and a number where x is none"""
    return pointwise(lambda e: torch.where(torch.isfinite(input), e, 0.0))


@rule(torch.pow, operator.pow)
def pow(y, input, exponent):
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


@rule(torch.clamp, torch.clip)
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


@rule(torch.clamp_min)
def clamp_min(y, input, min):
    """max(x, low)"""
    return clamp.table(y, input, min)


@rule(torch.clamp_max)
def clamp_max(y, input, max):
    """min(x, high)"""
    return clamp.table(y, input, None, max)


@rule(torch.maximum)
def maximum(y, input, other):
    """The greater of two; equals share the error"""
    return chosen(y, input, other, lambda a, b: a > b)


@rule(torch.minimum)
def minimum(y, input, other):
    """The smaller of two; equals share the error"""
    return chosen(y, input, other, lambda a, b: a < b)


def chosen(y, input, other, before):
    """For the one of two values that comes before the other; the instruction passes to both as it is."""

    def to(x, z):
        return roles(
            instruct=lambda t: sum_to(t, x, y),
            error=lambda e: sum_to(torch.where(x == z, e / 2, torch.where(before(x, z), e, 0.0)), x, y),
        )

    return {"input": to(input, other), "other": to(other, input)}


@rule(without_gradient)
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
    torch.sgn,
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
)  # steps, and tensors that only take another's shape


def _positive(function):
    """The function of 0.5 + x²."""
    return lambda x: function(0.5 + x * x)


def _made(x, z):
    """x with the values of z."""
    return x - x.detach() + z


cut_off.examples = [call(lambda x: x + without_gradient(x), T(4, 5))]
exp.examples = [call(torch.exp, T(4, 5))]
expm1.examples = [call(torch.expm1, T(4, 5))]
log.examples = [call(_positive(torch.log), T(4, 5))]
log2.examples = [call(_positive(torch.log2), T(4, 5))]
log10.examples = [call(_positive(torch.log10), T(4, 5))]
log1p.examples = [call(_positive(torch.log1p), T(4, 5))]
sqrt.examples = [call(_positive(torch.sqrt), T(4, 5))]
rsqrt.examples = [call(_positive(torch.rsqrt), T(4, 5))]
square.examples = [call(torch.square, T(4, 5))]
reciprocal.examples = [call(torch.reciprocal, T(4, 5))]
abs.examples = [call(torch.abs, T(4, 5)), call(lambda x: F.relu(x).abs(), T(4, 5))]
sin.examples = [call(torch.sin, T(4, 5))]
cos.examples = [call(torch.cos, T(4, 5))]
tan.examples = [call(torch.tan, T(4, 5))]
asin.examples = [call(lambda x: torch.asin(x.tanh()), T(4, 5))]
acos.examples = [call(lambda x: torch.acos(x.tanh()), T(4, 5))]
atan.examples = [call(torch.atan, T(4, 5))]
sinh.examples = [call(torch.sinh, T(4, 5))]
cosh.examples = [call(torch.cosh, T(4, 5))]
asinh.examples = [call(torch.asinh, T(4, 5))]
acosh.examples = [call(lambda x: torch.acosh(1.1 + x * x), T(4, 5))]
atanh.examples = [call(lambda x: torch.atanh(x.tanh()), T(4, 5))]
exp2.examples = [call(torch.exp2, T(4, 5))]
erf.examples = [call(torch.erf, T(4, 5))]
erfc.examples = [call(torch.erfc, T(4, 5))]
frac.examples = [call(torch.frac, T(4, 5))]
nan_to_num.examples = [call(lambda x: torch.nan_to_num(x.where(x > 0, math.inf), posinf=2.0), T(4, 5))]
pow.examples = [
    call(operator.pow, T(4, 5), 3),
    call(torch.pow, T(4, 5), 0),
    call(lambda x: F.relu(x) ** 2.0, T(4, 5)),
    call(lambda x: (x * x) ** -0.5, T(4, 5)),
    call(operator.pow, 2, T(4, 5)),
    call(lambda x, w: (x * x).pow(w), T(4, 5, 3), T(3)),
    call(lambda x, c: (0 * x + 1) * F.relu(x).pow(c.round() - 1), T(4, 5), C(5)),
]
clamp.examples = [
    call(torch.clamp, T(4, 5), -0.5, 0.5),
    call(lambda x: F.relu(x).clamp(max=1, min=0), T(4, 5)),
    call(lambda x, low, high: x.clip(low, high), T(40, 5, 3), T(3), T(5, 1)),
    call(lambda x: _made(x, 1.0).clamp(0, 1) + x, T(4, 5)),
    call(lambda x, w: _made(x, w).clip(w, w.exp() + w), T(4, 5), T(5)),
    call(lambda x, w: torch.stack([x, _made(x, w)]).clip(w, w), T(4, 5), T(5)),
]
clamp_min.examples = [call(lambda x: F.relu(x).clamp_min(0.0), T(4, 5)), call(torch.clamp_min, T(4, 5), T(1, 5))]
clamp_max.examples = [
    call(lambda x: x.clamp_max(0.1), T(4, 5)),
    call(lambda x, w: _made(x, w).clamp_max(w), T(4, 5), T(5)),
]
maximum.examples = [call(torch.maximum, T(4, 5, 3), T(5, 1)), call(lambda x: torch.maximum(F.relu(x), 0 * x), T(4, 5))]
minimum.examples = [call(torch.minimum, T(4, 5, 3), T(3)), call(lambda x: torch.minimum(F.relu(x), 0 * x), T(4, 5))]
