"""Products of Householder reflections I - t v vᵀ, a step per reflection, down and up again."""

import torch
import torch.nn.functional as F

from fxfeedback.rules.core import as_is, eye_like, known, roles, rule
from fxfeedback.rules.examples import T, call
from fxfeedback.rules.factorizations import fitted, sizes
from fxfeedback.rules.linear_algebra import turned

linalg = torch.linalg


def reflections(A, tau, m):
    """The columns v and factors t of the reflections I - t v vᵀ that the lower triangle of A and `tau` stand for."""
    k = tau.shape[-1]
    vectors = torch.tril(A[..., :k], -1) + eye_like(A, m)[:, :k]
    return [(vectors[..., i : i + 1], tau[..., i : i + 1].unsqueeze(-1)) for i in range(k)]


def slope_of_reflections(e, x, pairs):
    """The errors at the vectors and factors of reflections, and at x, on which the last of them acts first."""
    seen, vectors, factors = [x], [], []
    for v, t in reversed(pairs[1:]):
        seen.append(seen[-1] - t * v @ (turned(v) @ seen[-1]))
    for v, t in pairs:
        before = seen.pop()
        there, back = e @ (turned(before) @ v), before @ (turned(e) @ v)
        vectors.append(-t * (there + back))
        factors.append(-(turned(v) @ there).squeeze(-1))
        e = e - t * v @ (turned(v) @ e)
    return vectors, factors, e


@rule(
    linalg.householder_product,
    torch.orgqr,
    name="householder_product",
    examples=[
        call(lambda x: linalg.householder_product(x, x[..., 0, :2]), T(4, 5, 3)),
        call(lambda x, w: x + linalg.householder_product(w, w[0]).sum(0), T(4, 3), T(3, 3)),
    ],
)
def householder_product(y, input, tau):
    """The first columns of Π (I - t v vᵀ), for the columns v of a lower triangle; instructed, as it is"""
    m, n, _ = sizes(input)

    def error(e):
        vectors, factors, _ = slope_of_reflections(e, eye_like(e, m)[:, :n], reflections(input, tau, m))
        return of_columns(vectors, input), joined(factors, tau)

    return {
        "input": roles(instruct=as_is, error=lambda e: error(e)[0]),
        "tau": roles(instruct=lambda t: over_factors(t, tau), error=lambda e: error(e)[1]),
    }


def of_columns(vectors, input):
    """Errors at the vectors of reflections as the error at the lower triangle that holds them."""
    if not vectors:
        return torch.zeros_like(input)
    return F.pad(torch.tril(torch.cat(vectors, -1), -1), [0, input.shape[-1] - len(vectors)])


def joined(factors, tau):
    """Errors at the factors of reflections in one tensor."""
    return torch.cat(factors, -1) if factors else torch.zeros_like(tau)


def over_factors(t, tau):
    """The mean of matrices, for each of the factors of their reflections."""
    return t.mean((-2, -1)).unsqueeze(-1).expand(tau.shape)


@rule(
    torch.ormqr,
    examples=[
        call(lambda x: torch.ormqr(x, x[..., 0, :], x.sin()), T(4, 3, 2)),
        call(lambda x: torch.ormqr(x, x[..., 0, :], x.sin(), True, True), T(4, 3, 2)),
        call(lambda x, t, w: x + torch.ormqr(w, t, x[0], left=False, transpose=True), T(4, 2, 3), T(2), T(3, 2)),
        call(lambda x: torch.ormqr(x, x[..., 0], x, left=False), T(4, 3, 3)),
    ],
)
def ormqr(y, input, input2, input3, left=True, transpose=False):
    """Q z, Qᵀ z, z Q or z Qᵀ, for the product Q of the reflections in `input`, of which input2 has the factors"""
    m, order = sizes(input)[0], -1 if left == transpose else 1

    def error(e):
        e, x = (e, input3) if left else (turned(e), turned(input3))
        pairs = reflections(input, input2, m)[::order]
        vectors, factors, e = slope_of_reflections(e, x, pairs)
        return of_columns(vectors[::order], input), joined(factors[::order], input2), e if left else turned(e)

    def to_input3(t):
        return torch.ormqr(input, input2, t, left, not transpose)

    return {
        "input": roles(instruct=lambda t: fitted(t, y.shape[-2], y.shape[-1], input), error=lambda e: error(e)[0]),
        "input2": roles(instruct=lambda t: over_factors(t, input2), error=lambda e: error(e)[1]),
        "input3": roles(instruct=to_input3 if known(input) and known(input2) else as_is, error=to_input3),
    }
