"""Special functions of each value by itself, by the formulas of PyTorch. The instruction passes them as it is.

Several functions are the derivatives of others here: each has a rule of its own, as second derivatives need them.
"""

import math

import torch

from fxfeedback.rules.activation import pointwise
from fxfeedback.rules.core import dtype_of, roles, rule
from fxfeedback.rules.elementwise import PEAK, function, positive
from fxfeedback.rules.examples import T, call

Tensor, special = torch.Tensor, torch.special

ROOT_2_PI = math.sqrt(2 * math.pi)


def between(x):
    """Between 0.1 and 0.9."""
    return 0.1 + 0.8 * x.sigmoid()


def inside(x):
    """Between -0.9 and 0.9."""
    return 0.9 * x.tanh()


def apart_from_zero(x):
    """x, and 1 where it is 0: for a quotient that is not used there, and would spoil derivatives."""
    return torch.where(x == 0, 1.0, x)


def slope_of_sinc(e, x, y):
    """(cos πx - y) / x; 0 at 0"""
    return torch.where(x == 0, 0.0, e * (torch.cos(math.pi * x) - y) / apart_from_zero(x))


def slope_of_i1(e, x, y):
    """I₀(x) - I₁(x) / x; ½ where x is next to nothing"""
    tiny = x.abs() <= torch.finfo(dtype_of(x)).eps
    z = torch.where(tiny, 1.0, x)
    return e * torch.where(tiny, 0.5, torch.i0(z) - y / z)


def slope_of_i1e(e, x, y):
    """exp(-|x|) I₀(x) - y (sign x + 1 / x); ½ where x is next to nothing"""
    tiny = x.abs() <= torch.finfo(dtype_of(x)).eps
    z = torch.where(tiny, 1.0, x)
    return e * torch.where(tiny, 0.5, special.i0e(z) - y * (torch.sign(z) + 1 / z))


FUNCTIONS = [
    function("log Γ(x)", lambda e, x, y: e * torch.digamma(x), torch.lgamma, special.gammaln, of=positive),
    function(
        "(log Γ)'(x)",
        lambda e, x, y: e * torch.polygamma(1, x),
        *(torch.digamma, special.digamma, special.psi),
        of=positive,
    ),
    function("Φ(x)", lambda e, x, y: e * torch.exp(-x * x / 2) / ROOT_2_PI, special.ndtr),
    function("log Φ(x)", lambda e, x, y: e * torch.exp(-x * x / 2 - y) / ROOT_2_PI, special.log_ndtr),
    function("Φ⁻¹(x)", lambda e, x, y: e * torch.exp(y * y / 2) * ROOT_2_PI, special.ndtri, of=between),
    function("erf⁻¹(x)", lambda e, x, y: e * torch.exp(y * y) / PEAK, torch.erfinv, special.erfinv, of=inside),
    function("exp(x²) erfc x", lambda e, x, y: e * (2 * x * y - PEAK), special.erfcx),
    function("-x log x", lambda e, x, y: -e * (1 + torch.log(x)), special.entr, of=positive),
    function("sin πx / πx; 1 at 0", slope_of_sinc, torch.sinc, special.sinc),
    function("I₀(x), a Bessel function", lambda e, x, y: e * special.i1(x), torch.i0, special.i0),
    function("exp(-|x|) I₀(x)", lambda e, x, y: e * (special.i1e(x) - torch.sign(x) * y), special.i0e),
    function("I₁(x), a Bessel function", slope_of_i1, special.i1, kink=True),
    function("exp(-|x|) I₁(x)", slope_of_i1e, special.i1e, kink=True),
    function("180 x / π", lambda e, x, y: e * (180 / math.pi), torch.rad2deg),
    function("π x / 180", lambda e, x, y: e * (math.pi / 180), torch.deg2rad),
]
"""Functions of which nothing but the derivative need be said."""
for made in FUNCTIONS:
    made.table.__module__ = __name__  # where the page of operators lists them


@rule(
    torch.polygamma,
    special.polygamma,
    examples=[call(lambda x: torch.polygamma(2, positive(x)), T(4, 5)), call(lambda x: torch.polygamma(0, x), T(4, 5))],
)
def polygamma(y, n, input):
    """The n-th derivative of digamma"""
    return {"input": pointwise(lambda e: e * torch.polygamma(n + 1, input))["input"]}


@rule(Tensor.polygamma, name="polygamma_method", examples=[call(lambda x: positive(x).polygamma(1), T(4, 5))])
def tensor_polygamma(y, input, n):
    """The n-th derivative of digamma"""
    return polygamma.table(y, n, input)


@rule(
    torch.mvlgamma,
    special.multigammaln,
    name="mvlgamma",
    examples=[call(lambda x: torch.mvlgamma(1 + positive(x), 3), T(4, 5))],
)
def multivariate_lgamma(y, input, p):
    """log Γ of p variables: Σ log Γ(x - j / 2) over j < p, and a constant"""
    return pointwise(lambda e: e * sum(torch.digamma(input - j / 2) for j in range(p)))


@rule(
    torch.logit,
    special.logit,
    examples=[
        call(lambda x: torch.logit(between(x)), T(4, 5)),
        call(lambda x: x.logit(0.2), T(4, 5)),
    ],
)
def logit(y, input, eps=None):
    """log(x / (1 - x)), NaN where x is not between 0 and 1; with eps, of x kept eps away from both: no error beyond"""
    if eps is None:
        return pointwise(lambda e: torch.where((input < 0) | (input > 1), math.nan, e / (input * (1 - input))))

    def error(e):
        within = (input >= eps) & (input <= 1 - eps)
        x = torch.where(within, input, 0.5)
        return torch.where(within, e / (x * (1 - x)), 0.0)

    return pointwise(error)


@rule(
    torch.angle,
    examples=[call(lambda x: x + torch.angle(x), T(4, 5)), call(lambda x: torch.complex(x, x.sin()).angle(), T(4, 5))],
)
def angle(y, input):
    """0 where x ≥ 0, π elsewhere: no error passes; of a complex number the φ of r exp(i φ)"""
    if not dtype_of(input).is_complex:
        return pointwise(torch.zeros_like)
    none = input == 0
    return pointwise(lambda e: torch.where(none, 0.0, e * 1j / torch.where(none, 1.0, input).conj()))


@rule(torch.frexp, examples=[call(lambda x: torch.frexp(x)[0], T(4, 5)), call(lambda x: x.frexp().mantissa, T(4, 5))])
def frexp(y, input):
    """m and k of x = m 2ᵏ"""
    return {"input": roles(instruct=lambda t: t[0], error=lambda e: e[0] / torch.exp2(y[1].to(dtype_of(input))))}
