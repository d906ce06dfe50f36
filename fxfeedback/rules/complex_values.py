"""Complex numbers inside of a network: transforms and their parts.

A counter neuron of a complex value x is ∂/∂Re x + i ∂/∂Im x, as in PyTorch. So a linear op has its conjugate transpose,
and an analytic function e conj(f'(x)). The rules of real numbers serve analytic functions when the counter neuron is
conjugated before and after (`on_complex`); those in `WITH_PARTS` look at the parts of a number by themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fxfeedback.errors import RuleError
from fxfeedback.rules import (
    activation,
    arithmetic,
    elementwise,
    indexing,
    linear,
    matmul,
    reduction,
    repeating,
    reshaping,
    special,
    writing,
)
from fxfeedback.rules.core import RULES, Roles, Rule, as_is, dtype_of, nothing, roles, rule, sum_to, transpose
from fxfeedback.rules.dropout import identity
from fxfeedback.rules.examples import T, call


def _complex(x):
    """Complex numbers that depend on x."""
    return torch.complex(x, x.sin() + 0.5)


# -- parts ------------------------------------------------------------------------------------------------------------


@rule(
    torch.conj,
    torch._conj,
    torch.conj_physical,
    torch._conj_physical,
    examples=[call(lambda x: torch.view_as_real(_complex(x).conj() * _complex(x * x)), T(4, 5))],
)
def conj(y, input):
    """Re x - i Im x"""
    return {"input": transpose(lambda t: t.conj())}


@rule(
    torch.resolve_conj,
    torch.resolve_neg,
    examples=[call(lambda x: x.resolve_neg() + _complex(x).conj().resolve_conj().real, T(4, 5))],
)
def resolved(y, input):
    """x itself"""
    return {"input": transpose(as_is)}


@rule(torch.real, examples=[call(lambda x: torch.real(_complex(x) ** 3) + torch.real(x), T(4, 5))])
def real(y, input):
    """Re x"""
    return {"input": transpose(as_is)}


@rule(torch.imag, examples=[call(lambda x: torch.imag(_complex(x).exp()) + _complex(x * x).imag, T(4, 5))])
def imag(y, input):
    """Im x"""
    return {"input": transpose(lambda t: t * 1j)}


@rule(
    torch.view_as_real,
    torch.view_as_real_copy,
    examples=[call(lambda x: torch.view_as_real(torch.complex(x, x.sin()) * _complex(x)), T(4, 5))],
)
def view_as_real(y, input):
    """(Re x, Im x) along a new last dimension"""
    return {"input": transpose(lambda t: torch.complex(t.select(-1, 0), t.select(-1, 1)))}


@rule(
    torch.view_as_complex,
    torch.view_as_complex_copy,
    examples=[call(lambda x: torch.view_as_real(torch.view_as_complex(x) ** 2), T(4, 5, 2))],
)
def view_as_complex(y, input):
    """x[..., 0] + i x[..., 1]"""
    return {"input": transpose(lambda t: torch.view_as_real(t.resolve_conj()))}


@rule(
    torch.complex,
    name="complex",
    examples=[call(lambda x, w: torch.complex(x, w.expand_as(x)).sin().abs(), T(4, 5), T(5))],
)
def of_parts(y, real, imag):
    """a + i b"""
    return {
        "real": transpose(lambda t: sum_to(torch.real(t), real, y)),
        "imag": transpose(lambda t: sum_to(torch.imag(t), imag, y)),
    }


@rule(torch.polar, examples=[call(lambda x: torch.view_as_real(torch.polar(x, x.sin())), T(4, 5))])
def polar(y, abs, angle):
    """r exp(i φ); an instruction goes to r, and a negative r has PyTorch's derivative: the direction of y"""

    def to_length(e):
        return sum_to(torch.real(e * torch.sgn(y).conj()), abs, y)

    return {
        "abs": roles(instruct=lambda t: sum_to(torch.real(t), abs, y), error=to_length),
        "angle": roles(instruct=nothing, error=lambda e: sum_to(torch.imag(e * y.conj()), angle, y)),
    }


@rule(torch.sgn, examples=[call(lambda x: torch.view_as_real(_complex(x).sgn()) * x.sgn().sum(), T(4, 5))])
def sgn(y, input):
    """x / |x|; of real numbers their sign, through which nothing passes"""
    if not dtype_of(input).is_complex:
        return {"input": roles(instruct=nothing, error=nothing)}

    def error(e):
        length = torch.where(input == 0, 1.0, input.abs())
        return torch.where(input == 0, 0.0, (e - torch.real(e * y.conj()) * y) / length)

    return {"input": roles(instruct=as_is, error=error)}


# -- Fourier transforms: those that all of torch.fft consist of -------------------------------------------------------


@rule(
    torch._fft_c2c,
    examples=[
        call(lambda x: torch.view_as_real(torch._fft_c2c(torch.complex(x, x * x), [2, 1], 1, True)), T(4, 5, 3)),
        call(lambda x: torch._fft_c2c(_complex(x) ** 2, [1], 2, False).imag, T(4, 6)),
    ],
)
def fft(y, input, dim, normalization, forward):
    """Σ x[k] exp(∓2πi jk / n) over the dimensions, and over √n or n"""
    return {"input": transpose(lambda t: torch._fft_c2c(t, dim, normalization, not forward))}


@rule(
    torch._fft_r2c,
    examples=[
        call(lambda x: torch.view_as_real(torch._fft_r2c(x, [1, 2], 2, True)), T(4, 5, 6)),
        call(lambda x: torch._fft_r2c(x, [1], 0, False).abs(), T(4, 5)),
    ],
)
def fft_of_real(y, input, dim, normalization, onesided):
    """The same of real numbers; the second half is left out, as it repeats the first"""

    def back(t):
        last = dim[-1] % input.ndim
        if onesided:
            t = F.pad(t, [0, 0] * (input.ndim - 1 - last) + [0, input.shape[last] - y.shape[last]])
        return torch.real(torch._fft_c2c(t, dim, normalization, False))

    return {"input": transpose(back)}


@rule(
    torch._fft_c2r,
    examples=[
        call(lambda x: torch._fft_c2r(_complex(x) ** 2, [1], 2, 7), T(4, 4)),
        call(lambda x: torch._fft_c2r(torch._fft_r2c(x, [2, 1], 0, True).sin(), [2, 1], 1, 6), T(2, 6, 3)),
    ],
)
def fft_to_real(y, input, dim, normalization, last_dim_size):
    """The way back to real numbers: what is left out counts as conjugates"""

    def back(t):
        last, n = dim[-1] % input.ndim, y.shape[dim[-1]]
        size = n // 2 + 1
        twice = torch.arange(size, device=t.device)
        weights = 1 + ((twice > 0) & (twice <= n - size)).to(t.dtype)
        return torch._fft_r2c(t, dim, normalization, True) * weights.reshape([-1] + [1] * (input.ndim - 1 - last))

    return {"input": transpose(back)}


# -- the rules of real numbers ----------------------------------------------------------------------------------------

NOT_ANALYTIC = ("abs", "frac")
WITH_PARTS = {conj, resolved, real, imag, view_as_real, view_as_complex, of_parts, polar, sgn, fft, fft_of_real} | {
    *(fft_to_real, special.angle, indexing.attribute, RULES[torch.abs], identity, reshaping.copy)
}
"""Rules that hold for complex numbers as they are."""
ANALYTIC = {
    *(arithmetic.add, arithmetic.sub, arithmetic.rsub, arithmetic.mul, arithmetic.div, arithmetic.neg),
    *(arithmetic.addcmul, arithmetic.addcdiv, elementwise.power, activation.sigmoid, activation.tanh),
    *(each for each in elementwise.FUNCTIONS if each.name not in NOT_ANALYTIC),
    *(matmul.matmul, matmul.mm, matmul.mv, matmul.addmm, matmul.einsum, matmul.tensordot, matmul.outer, linear.linear),
    *(reduction.mean, reduction.total, reduction.cumsum, reduction.prod, reduction.cumprod),
    *(repeating.expand, repeating.expand_as, repeating.repeat, repeating.repeat_interleave),
    *(indexing.getitem, indexing.narrow, indexing.index_select, indexing.gather, indexing.where),
    *(indexing.masked_fill, indexing.tril, indexing.triu, indexing.diagonal, indexing.windows),
    *(reshaping.reshape, reshaping.cast, reshaping.permute, reshaping.swap, reshaping.t, reshaping.movedim),
    *(reshaping.roll, reshaping.flip, reshaping.pad, reshaping.cat, reshaping.stack, reshaping.split, reshaping.unbind),
    *(writing.put, writing.scatter, writing.scatter_add, writing.index_copy, writing.index_add),
}
"""Rules whose formulas are those of the analytic function also."""


def on_complex(made: Rule, table: dict[str, Roles], is_complex: bool) -> dict[str, Roles]:
    """The table of a rule for a call with complex numbers.

    is_complex: whether what the op makes is complex.

    Raises:
        RuleError: the rule holds for real numbers only.
    """
    if made in WITH_PARTS:
        return table
    if made not in ANALYTIC or not is_complex:
        raise RuleError(f"the rule {made.name!r} is for real numbers: use the real and imaginary parts of complex ones")
    return {name: Roles(_conjugated(way.instruct), _conjugated(way.error)) for name, way in table.items()}


def _conjugated(way: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda t: _conj(way(_conj(t)))


def _conj(t: Any) -> Any:
    if isinstance(t, (list, tuple)):
        return [_conj(one) for one in t]
    return t if t is None or not hasattr(t, "conj") else t.conj()
