"""Eigenvalues, singular values, and what is made from them. As in torch, nothing is differentiable through vectors that
belong to equal values. The instruction goes to a matrix as in factorizations.py; values go evenly to all of it.
"""

import torch

from fxfeedback.rules.core import as_is, eye_like, known, roles, rule
from fxfeedback.rules.examples import T, call
from fxfeedback.rules.factorizations import fitted, sizes
from fxfeedback.rules.linear_algebra import definite, element, turned

linalg = torch.linalg


def on_diagonal(values, matrix, size):
    """`matrix` with these values on its diagonal."""
    return torch.where(eye_like(matrix, size) == 1, values.unsqueeze(-1), matrix)


def quotient(a, b):
    """a / b; 0 where both are, as for a factor that is unused of a matrix with equal values."""
    both = (a == 0) & (b == 0)
    return torch.where(both, 0.0, a / torch.where(both, 1.0, b))


@rule(
    linalg.eigh,
    torch._linalg_eigh,
    name="eigh",
    examples=[
        call(lambda x: linalg.eigh(definite(x)), T(4, 3, 3)),
        call(lambda x: linalg.eigh(definite(x), "U").eigenvalues, T(4, 3, 3)),
        call(lambda x: torch._linalg_eigh(definite(x))[0], T(4, 3, 3)),
    ],
)
def eigh(y, A, UPLO="L", compute_v=True):
    """λ and V of a symmetric A = V diag(λ) Vᵀ; not differentiable, as in torch, through V where some λ are equal"""
    size = sizes(A)[0]

    def error(e):
        if not compute_v:
            return slope_of_eigenvalues(e[0], A, UPLO)
        values, V = y[0], y[1]
        inner = turned(V) @ e[1]
        apart = on_diagonal(torch.ones_like(values), differences(values), size)
        inner = quotient((inner - turned(inner)) / 2, apart)
        return V @ on_diagonal(e[0], inner, size) @ turned(V)

    def instruct(t):
        values = t[0].unsqueeze(-1).expand(A.shape) / size
        return values + t[1] if compute_v else values

    return {"A": roles(instruct=instruct, error=error)}


def differences(values):
    """Of all pairs, that of the column less that of the row."""
    return values.unsqueeze(-2) - values.unsqueeze(-1)


def slope_of_eigenvalues(e, A, UPLO):
    """V diag(e) Vᵀ"""
    V = linalg.eigh(A, UPLO)[1]
    return V * e.unsqueeze(-2) @ turned(V)


@rule(linalg.eigvalsh, name="eigvalsh", examples=[call(lambda x: linalg.eigvalsh(definite(x), "U"), T(4, 3, 3))])
def eigvalsh(y, A, UPLO="L"):
    """The eigenvalues of a symmetric A"""
    return {
        "A": roles(
            instruct=lambda t: t.unsqueeze(-1).expand(A.shape) / sizes(A)[0],
            error=lambda e: slope_of_eigenvalues(e, A, UPLO),
        )
    }


def slope_of_svd(e_U, e_S, e_Vh, U, S, Vh, A):
    """The error at A = U S Vᵀ, of the first min(m, n) columns of U and V."""
    m, n, k = sizes(A)
    e_U, e_Vh, U, Vh = e_U[..., :k], e_Vh[..., :k, :], U[..., :k], Vh[..., :k, :]
    squares = differences(S) * (S.unsqueeze(-2) + S.unsqueeze(-1))
    squares = on_diagonal(torch.ones_like(S), squares, k)

    def skew(x):
        return quotient(x - turned(x), squares)

    inner = skew(turned(U) @ e_U) * S.unsqueeze(-2) + S.unsqueeze(-1) * skew(Vh @ turned(e_Vh))
    inner = on_diagonal(e_S, inner, k)
    if m > n:
        rest = quotient(e_U - U @ (turned(U) @ e_U), S.unsqueeze(-2))
        return (U @ inner + rest) @ Vh
    if m < n:
        rest = quotient(e_Vh - (e_Vh @ turned(Vh)) @ Vh, S.unsqueeze(-1))
        return U @ (inner @ Vh + rest)
    return U @ inner @ Vh


def slope_of_singular_values(e, A):
    """U diag(e) Vᵀ"""
    U, _, Vh = linalg.svd(A, full_matrices=False)
    return U * e.unsqueeze(-2) @ Vh


def over_matrices(t, A):
    """Singular values, their mean over each matrix."""
    return t.mean(-1, keepdim=True).unsqueeze(-1).expand(A.shape)


@rule(
    linalg.svd,
    name="svd",
    examples=[
        call(lambda x: linalg.svd(x, full_matrices=False)[1], T(4, 5, 3)),
        call(lambda x: linalg.svd(x, False), T(4, 5, 3)),
        call(lambda x: linalg.svd(x, full_matrices=False), T(4, 3, 5)),
        call(lambda x: linalg.svd(x).Vh, T(4, 3, 3)),
    ],
)
def svd(y, A, full_matrices=True, *, driver=None):
    """U, S and Vᵀ of A = U S Vᵀ; not differentiable, as in torch, through U and V where some of S are equal"""
    m, n, k = sizes(A)
    rows, columns = (m, n) if full_matrices else (k, k)

    def instruct(t):
        return fitted(t[0], m, rows, A) + over_matrices(t[1], A) + fitted(t[2], columns, n, A)

    return {"A": roles(instruct=instruct, error=lambda e: slope_of_svd(e[0], e[1], e[2], y[0], y[1], y[2], A))}


@rule(
    torch._linalg_svd,
    name="svd_with_options",
    examples=[
        call(torch._linalg_svd, T(4, 3, 5)),
    ],
)
def svd_with_options(y, A, full_matrices=False, compute_uv=True, *, driver=None):
    """U, S and Vᵀ of A = U S Vᵀ, or S alone"""
    return svd.table(y, A, full_matrices) if compute_uv else {"A": element(svdvals.table(y[1], A)["A"], 1)}


@rule(linalg.svdvals, name="svdvals", examples=[call(linalg.svdvals, T(4, 5, 3))])
def svdvals(y, A, *, driver=None):
    """The singular values"""
    return {"A": roles(instruct=lambda t: over_matrices(t, A), error=lambda e: slope_of_singular_values(e, A))}


@rule(torch.svd, name="svd_of", examples=[call(torch.svd, T(4, 5, 3)), call(lambda x: x.svd().V, T(4, 3, 5))])
def torch_svd(y, input, some=True, compute_uv=True):
    """U, S and V of A = U S Vᵀ"""
    if not compute_uv:
        return {"input": element(svdvals.table(y[1], input)["A"], 1)}
    way = svd.table([y[0], y[1], turned_if_known(y[2])], input, not some)["A"]

    def back(role):
        return lambda t: role([t[0], t[1], turned(t[2])])

    return {"input": roles(instruct=back(way.instruct), error=back(way.error))}


def turned_if_known(x):
    return turned(x) if known(x) else x


def halved(M, H):
    """X of H X + X H = M for symmetric H with positive eigenvalues, by these."""
    values, V = linalg.eigh(H)
    return V @ (turned(V) @ M @ V / (values.unsqueeze(-2) + values.unsqueeze(-1))) @ turned(V)


if hasattr(linalg, "matrix_sqrth"):  # of torch's newest versions

    @rule(
        linalg.matrix_sqrth,
        name="matrix_sqrth",
        examples=[call(lambda x: linalg.matrix_sqrth(definite(x)), T(4, 3, 3))],
    )
    def root(y, A):
        """X of A = X X, symmetric with positive eigenvalues as A is; instructed, as it is"""
        return {"A": roles(instruct=as_is, error=lambda e: halved((e + turned(e)) / 2, y))}


if hasattr(linalg, "polar"):

    @rule(
        linalg.polar,
        name="polar",
        examples=[call(linalg.polar, T(4, 3, 3)), call(lambda x: linalg.polar(x), T(4, 5, 3))],
    )
    def polar(y, A):
        """U and H of A = U H: orthonormal columns, and symmetric with positive eigenvalues"""
        m, n, _ = sizes(A)

        def error(e):
            U, H = y[0], y[1]
            inner = halved(turned(U) @ e[0] - e[1] @ H, H)
            back = U @ (inner - turned(inner) + e[1])
            return back + linalg.solve(H, e[0] - U @ (turned(U) @ e[0]), left=False) if m > n else back

        return {"A": roles(instruct=lambda t: t[0] + fitted(t[1], n, n, A), error=error)}
