"""Factors of matrices: Cholesky, LU, QR.

The errors are those of PyTorch, which derives them as Giles (2008) does, "An extended collection of matrix derivative
results". A factor goes to the matrix that it was made from as it is by an instruction; where the shapes differ, it is
averaged and spread over rows and columns.
"""

import torch
import torch.nn.functional as F

from fxfeedback.errors import RuleError
from fxfeedback.rules.core import as_is, roles, rule, transpose
from fxfeedback.rules.examples import T, call
from fxfeedback.rules.linear_algebra import definite, first_of, regular, turned

linalg = torch.linalg


def sizes(x):
    """Rows and columns of matrices, and the smaller of these."""
    m, n = x.shape[-2:]
    if not (isinstance(m, int) and isinstance(n, int)):
        raise RuleError("no rule for the factors of a matrix whose size depends on the batch")
    return m, n, min(m, n)


def fitted(t, rows, columns, x):
    """Matrices `t` of this size in that of x: averaged and spread over rows and columns where it differs."""
    for dim, size in ((-2, rows), (-1, columns)):
        t = t if size == x.shape[dim] else t.mean(dim, keepdim=True)
    return t.expand(x.shape)


def divided_by(e, R):
    """e R⁻ᵀ for an upper triangular R"""
    return linalg.solve_triangular(turned(R), e, upper=False, left=False)


# -- Cholesky, LU, QR -------------------------------------------------------------------------------------------------


@rule(
    linalg.cholesky,
    name="cholesky",
    examples=[
        call(lambda x: linalg.cholesky(definite(x)), T(4, 3, 3)),
        call(lambda x: linalg.cholesky(definite(x), upper=True), T(4, 3, 3)),
    ],
)
def cholesky(y, A, *, upper=False):
    """L of A = L Lᵀ, or Lᵀ; instructed, as it is"""

    def error(e):
        L, e = (turned(y), turned(e)) if upper else (y, e)
        inner = torch.tril(turned(L) @ e)
        inner = (inner + turned(torch.tril(inner, -1))) / 2
        inner = linalg.solve_triangular(turned(L), inner, upper=True)
        return linalg.solve_triangular(L, inner, upper=False, left=False)

    return {"A": roles(instruct=as_is, error=error)}


@rule(linalg.cholesky_ex, name="cholesky_ex", examples=[call(lambda x: linalg.cholesky_ex(definite(x)).L, T(4, 3, 3))])
def cholesky_ex(y, A, *, upper=False, check_errors=False):
    """L of A = L Lᵀ, or Lᵀ, and whether A has one; instructed, as it is"""
    return first_of(cholesky.table(y[0], A, upper=upper))


def slope_of_lu(e_L, e_U, L, U, A):
    """The error at Pᵀ A = L U, given those at L and U.

    With the square parts L₁, U₁ and the rest L₂ below or U₂ to the right, and e likewise:
    L₁⁻ᵀ (tril(L₁ᵀ e_L₁ - e_U₂ U₂ᵀ) + triu(e_U₁ U₁ᵀ - L₂ᵀ e_L₂)) U₁⁻ᵀ, L⁻ᵀ e_U₂, e_L₂ U⁻ᵀ.
    """
    m, n, k = sizes(A)
    L1, U1 = L[..., :k, :], U[..., :k]
    lower = turned(L1) @ e_L[..., :k, :] - e_U[..., k:] @ turned(U[..., k:])
    upper = e_U[..., :k] @ turned(U1) - turned(L[..., k:, :]) @ e_L[..., k:, :]

    def solved(x):
        return linalg.solve_triangular(turned(L1), x, upper=True, unitriangular=True)

    e = divided_by(solved(torch.tril(lower, -1) + torch.triu(upper)), U1)
    if m < n:
        return torch.cat([e, solved(e_U[..., k:])], -1)
    return torch.cat([e, divided_by(e_L[..., k:, :], U1)], -2) if m > n else e


@rule(
    linalg.lu,
    name="lu",
    examples=[
        call(lambda x: linalg.lu(regular(x)), T(4, 3, 3)),
        call(linalg.lu, T(4, 3, 5)),
        call(lambda x: linalg.lu(x)[2], T(4, 5, 3)),
    ],
)
def lu(y, A, *, pivot=True):
    """P, L and U of A = P L U"""
    m, n, k = sizes(A)

    def error(e):
        e = slope_of_lu(e[1], e[2], y[1], y[2], A)
        return y[0] @ e if pivot else e

    return {"A": roles(instruct=lambda t: fitted(t[1], m, k, A) + fitted(t[2], k, n, A), error=error)}


@rule(
    linalg.lu_factor,
    name="lu_factor",
    examples=[
        call(lambda x: linalg.lu_factor(regular(x)).LU, T(4, 3, 3)),
        call(lambda x: linalg.lu_factor(x)[0], T(4, 3, 5)),
        call(lambda x: linalg.lu_factor(x)[0], T(4, 5, 3)),
    ],
)
def lu_factor(y, A, *, pivot=True):
    """L and U of A = P L U in one matrix, and P as exchanges; instructed, as it is"""

    def error(e):
        P, L, U = torch.lu_unpack(y[0], y[1], unpack_pivots=pivot)
        k = sizes(A)[2]
        e = slope_of_lu(torch.tril(e[0], -1)[..., :k], torch.triu(e[0])[..., :k, :], L, U, A)
        return P @ e if pivot else e

    return {"A": roles(instruct=lambda t: t[0], error=error)}


@rule(
    linalg.lu_factor_ex,
    name="lu_factor_ex",
    examples=[call(lambda x: linalg.lu_factor_ex(x, pivot=True)[0], T(4, 3, 3))],
)
def lu_factor_ex(y, A, *, pivot=True, check_errors=False):
    """As lu_factor, and whether there are such factors"""
    return lu_factor.table(y, A, pivot=pivot)


@rule(
    torch.lu_unpack,
    examples=[
        call(lambda x: torch.lu_unpack(x, linalg.lu_factor(x)[1]), T(4, 3, 3)),
        call(lambda x: torch.lu_unpack(x, linalg.lu_factor(x)[1]).U, T(4, 3, 5)),
        call(lambda x: torch.lu_unpack(x, linalg.lu_factor(x)[1])[1], T(4, 5, 3)),
    ],
)
def lu_unpack(y, LU_data, LU_pivots, unpack_data=True, unpack_pivots=True):
    """P, L and U of the matrix and the exchanges that lu_factor returns"""
    m, n, k = sizes(LU_data)

    def back(t):
        lower, upper = torch.tril(t[1], -1), torch.triu(t[2])
        return F.pad(lower, [0, n - k]) + F.pad(upper, [0, 0, 0, m - k])

    return {"LU_data": transpose(back if unpack_data else lambda t: torch.zeros_like(LU_data))}


def slope_of_qr(e_Q, e_R, Q, R):
    """(e_Q + Q sym(R e_Rᵀ - e_Qᵀ Q)) R⁻ᵀ, where sym takes the lower triangle for both"""
    lower = torch.tril(R @ turned(e_R) - turned(e_Q) @ Q)
    return divided_by(e_Q + Q @ (lower + turned(torch.tril(lower, -1))), R)


@rule(
    linalg.qr,
    name="qr",
    examples=[
        call(linalg.qr, T(4, 5, 3)),
        call(lambda x: linalg.qr(x, mode="complete").Q, T(4, 3, 3)),
        call(lambda x: linalg.qr(x), T(4, 3, 5)),
    ],
)
def qr(y, A, mode="reduced"):
    """Q and R of A = Q R. For a wide A = [A₁ A₂], R = [R₁ Qᵀ A₂]"""
    m, n, k = sizes(A)
    if mode == "r" or (mode == "complete" and m > n):
        raise RuleError(f"torch does not differentiate linalg.qr with mode={mode!r}{'' if mode == 'r' else ' here'}")

    def error(e):
        Q, R, e_Q, e_R = y[0], y[1], e[0], e[1]
        if m >= n:
            return slope_of_qr(e_Q, e_R, Q, R)
        rest = e_R[..., k:]
        e_Q = e_Q + A[..., k:] @ turned(rest)
        return torch.cat([slope_of_qr(e_Q, e_R[..., :k], Q, R[..., :k]), Q @ rest], -1)

    return {"A": roles(instruct=lambda t: fitted(t[0], m, k, A) + fitted(t[1], k, n, A), error=error)}
