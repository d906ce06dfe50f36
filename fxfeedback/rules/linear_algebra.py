"""Inverses, determinants, solutions of linear systems and functions of matrices, the last two dimensions of a tensor.

The errors are those of Giles (2008), "An extended collection of matrix derivative results", as PyTorch has them. A
solution is linear in its right-hand side, where an instruction passes by the transpose if the matrix is a weight. A
function of a matrix it passes as it is; where the shapes differ, it is averaged and spread over rows and columns.
"""

import torch

from fxfeedback.rules.core import as_is, dtype_of, eye_like, known, mean_to, nothing, roles, rule, sum_to, transpose
from fxfeedback.rules.examples import T, call
from fxfeedback.rules.reduction import averaging

linalg = torch.linalg


def regular(x):
    """Square matrices that are far from singular."""
    return x + 4 * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def definite(x):
    """Symmetric matrices with positive eigenvalues, which differ."""
    return x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def turned(x):
    """The transposed matrices."""
    return x.transpose(-1, -2)


def with_corners(t):
    """Numbers as matrices of one value."""
    return t.unsqueeze(-1).unsqueeze(-1)


def element(way, number):
    """For an op of several outputs, the way to an operand from one of them, which has this number."""
    return roles(instruct=lambda t: way.instruct(t[number]), error=lambda e: way.error(e[number]))


def first_of(table):
    """For an op of several outputs, the table of the first of them, given that of the op that has no others."""
    return {name: element(way, 0) for name, way in table.items()}


# -- inverses and determinants ----------------------------------------------------------------------------------------


@rule(linalg.inv, torch.inverse, name="inv", examples=[call(lambda x: linalg.inv(regular(x)), T(4, 3, 3))])
def inverse(y, A):
    """A⁻¹; instructed, as it is"""
    return {"A": roles(instruct=as_is, error=lambda e: -(turned(y) @ e @ turned(y)))}


@rule(linalg.inv_ex, name="inv_ex", examples=[call(lambda x: linalg.inv_ex(regular(x)).inverse, T(4, 3, 3))])
def inverse_ex(y, A, *, check_errors=False):
    """A⁻¹ and whether A has one; instructed, as it is"""
    return first_of(inverse.table(y[0], A))


@rule(
    linalg.pinv,
    torch.pinverse,
    name="pinv",
    examples=[
        call(linalg.pinv, T(4, 3, 2)),
        call(lambda x: linalg.pinv(x, rtol=1e-9), T(4, 2, 3)),
        call(lambda x: linalg.pinv(definite(x), hermitian=True), T(4, 3, 3)),
    ],
)
def pseudo_inverse(y, input, rcond=None, hermitian=False, *, atol=None, rtol=None):
    """The pseudo-inverse; instructed, as the transpose is"""

    def error(e):
        e, z = turned(e), turned(y)
        if input.shape[-2] <= input.shape[-1]:
            k = e @ y
            return -turned(y @ k) + k @ z - input @ y @ (k @ z) + z @ y @ (e - k @ input)
        k = y @ e
        return -turned(k @ y) + (e - input @ k) @ (y @ z) + z @ k - z @ k @ y @ input

    return {"input": roles(instruct=turned, error=error)}


def slope_of_det(e, y, A):
    """e y A⁻ᵀ by A's own factors, so that the smallest pivot cancels; a pivot of zero is a tiny one, as in PyTorch."""
    LU, pivots = linalg.lu_factor_ex(A)[:2]
    one = eye_like(e, A.shape[-1])
    LU = torch.where((one == 1) & (LU == 0), torch.finfo(dtype_of(A)).eps, LU)
    return linalg.lu_solve(LU, pivots, with_corners(e * y) * one, adjoint=True)


@rule(
    linalg.det,
    torch.det,
    name="det",
    examples=[call(linalg.det, T(4, 3, 3))],
)
def determinant(y, A):
    """The determinant"""
    return {"A": averaging(A, (-2, -1), False, lambda e: slope_of_det(e, y, A))["input"]}


@rule(
    torch._linalg_det,
    name="det_with_factors",
    examples=[call(lambda x: torch._linalg_det(x)[0], T(4, 3, 3))],
)
def determinant_with_factors(y, A):
    """The determinant, and the factors that it was made from"""
    return first_of(determinant.table(y[0], A))


@rule(torch.logdet, examples=[call(lambda x: torch.logdet(definite(x)), T(4, 3, 3))])
def logdet(y, input):
    """The logarithm of the determinant"""
    return averaging(input, (-2, -1), False, lambda e: with_corners(e) * turned(linalg.inv_ex(input)[0]))


@rule(
    linalg.slogdet,
    torch.slogdet,
    torch._linalg_slogdet,
    name="slogdet",
    examples=[
        call(linalg.slogdet, T(4, 3, 3)),
        call(lambda x: torch.slogdet(x).logabsdet, T(4, 3, 3)),
        call(lambda x: torch._linalg_slogdet(x)[1], T(4, 3, 3)),
    ],
)
def sign_and_logdet(y, A):
    """The sign of the determinant and the logarithm of its size"""
    return {"A": element(logdet.table(None, A)["input"], 1)}


# -- functions and products -------------------------------------------------------------------------------------------


@rule(
    linalg.matrix_exp,
    torch.matrix_exp,
    name="matrix_exp",
    examples=[call(linalg.matrix_exp, T(4, 3, 3)), call(lambda x: x.matrix_exp(), T(4, 2, 2))],
)
def matrix_exp(y, input):
    """exp of a matrix; instructed, as it is. The error is a corner of exp [Aᵀ e; 0 Aᵀ] (Higham 2008, theorem 3.6)"""

    def error(e):
        size, diagonal = input.shape[-1], turned(input)
        rows = [torch.cat([diagonal, e], -1), torch.cat([torch.zeros_like(e), diagonal], -1)]
        return linalg.matrix_exp(torch.cat(rows, -2)).narrow(-2, 0, size).narrow(-1, size, size)

    return {"input": roles(instruct=as_is, error=error)}


@rule(
    torch.addbmm,
    examples=[
        call(lambda x, b, w: torch.addbmm(b, x.unsqueeze(0), w, beta=0.5, alpha=3), T(4, 3), T(1, 5), T(1, 3, 5)),
        call(lambda x, w: x + torch.addbmm(x[0], w, w.transpose(1, 2) @ w), T(4, 3), T(2, 1, 3)),
    ],
)
def addbmm(y, input, batch1, batch2, *, beta=1, alpha=1):
    """β x + α Σ z w over the batch"""

    def to_batch1(t):
        return t.unsqueeze(0) @ turned(batch2) * alpha

    def to_batch2(t):
        return turned(batch1) @ t.unsqueeze(0) * alpha

    def uniformly(t):
        return (t.mean(0, keepdim=True) * alpha).unsqueeze(0).expand(batch2.shape)

    return {
        "input": transpose(lambda t: sum_to(t * beta, input, y)),
        "batch1": roles(instruct=to_batch1 if known(batch2) else nothing, error=to_batch1),
        "batch2": roles(instruct=to_batch2 if known(batch1) else uniformly, error=to_batch2),
    }


@rule(
    linalg.cross,
    name="cross",
    examples=[
        call(linalg.cross, T(4, 5, 3), T(1, 5, 3)),
        call(lambda x: linalg.cross(x, x.sin(), dim=1), T(4, 3, 2)),
    ],
)
def cross(y, input, other, *, dim=-1):
    """x × z"""
    dim = dim - y.ndim if dim >= 0 else dim

    def to_input(t):
        return sum_to(linalg.cross(other.expand(y.shape), t, dim=dim), input, y)

    def to_other(t):
        return sum_to(linalg.cross(t, input.expand(y.shape), dim=dim), other, y)

    return {
        "input": roles(instruct=to_input if known(other) else lambda t: mean_to(t, input, y), error=to_input),
        "other": roles(instruct=to_other if known(input) else lambda t: mean_to(t, other, y), error=to_other),
    }


@rule(
    torch.cross,
    name="cross_of",
    examples=[
        call(lambda x: torch.cross(x, x.sin()), T(4, 3, 2)),
        call(lambda x, w: x.cross(w, dim=-1), T(4, 5, 3), T(1, 1, 3)),
    ],
)
def torch_cross(y, input, other, dim=None):
    """x × z; without dim, along the first dimension of size 3"""
    if dim is None:
        dim = next(d for d, size in enumerate(y.shape) if isinstance(size, int) and size == 3)
    return cross.table(y, input, other, dim=dim)
