"""Solutions of linear systems. They are linear in the right-hand side, where an instruction passes by the transpose if
the matrix is a weight; to the matrix it goes averaged over the right-hand sides, to each of its columns.
"""

import torch

from fxfeedback.rules.core import as_is, known, mean_to, roles, rule, sum_to
from fxfeedback.rules.examples import T, call
from fxfeedback.rules.linear_algebra import element, first_of, regular, turned
from fxfeedback.rules.matmul import sum_batch_to

linalg = torch.linalg


def solution(y, A, B, left, solve, part=lambda g: g):
    """The table of the solution y of A y = B, or y A = B where it is on the left.

    solve: (the right-hand sides e) -> the solution for the transpose of A.
    part: of a matrix, what the system reads of A.
    """
    column = y.ndim == A.ndim - 1
    batch = y.shape[: y.ndim - (1 if column else 2)]

    def whole(t):
        return t.unsqueeze(-1) if column else t

    def to_B(e):
        g = solve(whole(e))
        return sum_batch_to(g, B, batch) if not column else sum_to(g.squeeze(-1), B, y)

    def to_A(e):
        g = solve(whole(e))
        return sum_batch_to(-part(g @ turned(whole(y)) if left else turned(whole(y)) @ g), A, batch)

    def over_columns(t):
        columns = whole(t).mean(-1 if left else -2, keepdim=True)
        return sum_batch_to(columns.expand((*batch, *A.shape[-2:])), A, batch)

    return {
        "A": roles(instruct=over_columns, error=to_A),
        "B": roles(instruct=to_B if known(A) else lambda t: mean_to(t, B, y), error=to_B),
    }


@rule(
    linalg.solve,
    name="solve",
    examples=[
        call(lambda x, b: linalg.solve(regular(x), b), T(4, 3, 3), T(3, 2)),
        call(lambda x, b: linalg.solve(regular(x), b, left=False), T(4, 3, 3), T(1, 2, 3)),
        call(lambda x: linalg.solve(regular(x), x[..., 0]), T(4, 3, 3)),
        call(lambda x, w: linalg.solve(regular(w), x), T(4, 3, 2), T(3, 3)),
        call(lambda x, b: linalg.solve(regular(x)[0], b) + x, T(4, 3, 3), T(3)),
    ],
)
def solve(y, A, B, *, left=True):
    """A⁻¹ B, or B A⁻¹"""
    return solution(y, A, B, left, lambda e: linalg.solve(turned(A), e, left=left))


@rule(
    linalg.solve_ex,
    torch._linalg_solve_ex,
    name="solve_ex",
    examples=[
        call(lambda x, b: linalg.solve_ex(regular(x), b, left=False).result, T(4, 3, 3), T(1, 2, 3)),
        call(lambda x: torch._linalg_solve_ex(regular(x), x[..., 0])[0], T(4, 3, 3)),
    ],
)
def solve_ex(y, A, B, *, left=True, check_errors=False):
    """A⁻¹ B, or B A⁻¹, and whether A has an inverse"""
    return first_of(solve.table(y[0], A, B, left=left))


def triangle(upper, unit):
    """What a system reads of a triangular matrix; `unit`: ones are taken for its diagonal."""
    return lambda g: torch.triu(g, int(unit)) if upper else torch.tril(g, -int(unit))


@rule(
    linalg.solve_triangular,
    name="solve_triangular",
    examples=[
        call(lambda x, b: linalg.solve_triangular(regular(x), b, upper=True), T(4, 3, 3), T(3, 2)),
        call(lambda x, b: linalg.solve_triangular(regular(x), b, upper=False, left=False), T(4, 3, 3), T(1, 2, 3)),
        call(lambda x, w: linalg.solve_triangular(w, x, upper=False, unitriangular=True), T(4, 3, 2), T(3, 3)),
    ],
)
def solve_triangular(y, A, B, *, upper, left=True, unitriangular=False):
    """A⁻¹ B, or B A⁻¹, for a triangular A"""

    def solve(e):
        return linalg.solve_triangular(turned(A), e, upper=not upper, left=left, unitriangular=unitriangular)

    return solution(y, A, B, left, solve, triangle(upper, unitriangular))


@rule(
    torch.triangular_solve,
    examples=[
        call(lambda x, w: torch.triangular_solve(x, regular(w)), T(4, 3, 2), T(3, 3)),
        call(lambda x, w: torch.triangular_solve(x, w, False, True, True).solution, T(4, 3, 2), T(1, 3, 3)),
    ],
)
def triangular_solve(y, input, A, upper=True, transpose=False, unitriangular=False):
    """A⁻¹ b, or A⁻ᵀ b, for a triangular A, and A itself"""

    def solve(e):
        return torch.triangular_solve(e, A, upper, not transpose, unitriangular)[0]

    read = triangle(upper, unitriangular)
    table = solution(y[0], A, input, True, solve, lambda g: read(turned(g) if transpose else g))
    to_A, batch = table["A"], y[0].shape[:-2]
    return {
        "input": element(table["B"], 0),
        "A": roles(
            instruct=lambda t: to_A.instruct(t[0]) + sum_batch_to(t[1], A, batch),
            error=lambda e: to_A.error(e[0]) + sum_batch_to(e[1], A, batch),
        ),
    }


def solve_by_factors(x, b, **options):
    """The solution for the matrices x, by their factors."""
    factors = linalg.lu_factor(regular(x))
    return linalg.lu_solve(factors[0], factors[1], b, **options)


def solve_by_own_factors(x):
    """A⁻¹ of factors that the rule of torch.lu_solve is tried with."""
    factors = linalg.lu_factor(regular(x))
    return torch.lu_solve(x, factors[0], factors[1])


@rule(
    linalg.lu_solve,
    name="lu_solve",
    examples=[
        call(lambda x, b: solve_by_factors(x, b), T(4, 3, 3), T(3, 2)),
        call(lambda x, b: solve_by_factors(x, b, adjoint=True), T(4, 3, 3), T(1, 3, 2)),
        call(lambda x, b: solve_by_factors(x, b, left=False), T(4, 3, 3), T(2, 3)),
        call(lambda x, b: solve_by_factors(x, b, left=False, adjoint=True), T(4, 3, 3), T(2, 3)),
        call(lambda x, w: solve_by_factors(w, x), T(4, 3, 2), T(3, 3)),
    ],
)
def lu_solve(y, LU, pivots, B, *, left=True, adjoint=False):
    """A⁻¹ B, or B A⁻¹, of A or its transpose, for A = P L U as lu_factor gives it"""
    batch = y.shape[:-2]

    def solve(e):
        return linalg.lu_solve(LU, pivots, e, left=left, adjoint=not adjoint)

    def to_LU(e):
        g, x = (solve(e), y) if not adjoint else (y, solve(e))
        moved = g @ turned(x) if left else turned(x) @ g
        P, L, U = torch.lu_unpack(LU, pivots)
        moved = turned(P) @ moved
        upper, lower = torch.triu(turned(L) @ moved), torch.tril(moved @ turned(U), -1)
        return sum_batch_to(-(upper + lower), LU, batch)

    table = solution(y, LU, B, left, solve)
    return {"LU": roles(instruct=table["A"].instruct, error=to_LU), "B": table["B"]}


@rule(torch.lu_solve, name="lu_solve_of", examples=[call(solve_by_own_factors, T(4, 3, 3))])
def torch_lu_solve(y, input, LU_data, LU_pivots):
    """A⁻¹ b, for A = P L U as lu_factor gives it"""
    table = lu_solve.table(y, LU_data, LU_pivots, input)
    return {"input": table["B"], "LU_data": table["LU"]}


@rule(
    torch.cholesky_solve,
    examples=[
        call(lambda x, w: torch.cholesky_solve(x, regular(w)), T(4, 3, 2), T(3, 3)),
        call(lambda x, w: torch.cholesky_solve(x, regular(w), True), T(4, 3, 2), T(1, 3, 3)),
    ],
)
def cholesky_solve(y, input, input2, upper=False):
    """(L Lᵀ)⁻¹ b"""
    batch = y.shape[:-2]
    table = solution(y, input2, input, True, lambda e: torch.cholesky_solve(e, input2, upper))
    to_input, to_input2 = table["B"], table["A"]

    def to_factor(e):
        moved = torch.cholesky_solve(e, input2, upper) @ turned(y)
        moved = moved + turned(moved)
        return sum_batch_to(-(input2 @ moved if upper else moved @ input2), input2, batch)

    return {"input": to_input, "input2": roles(instruct=to_input2.instruct, error=to_factor)}


@rule(
    torch.cholesky_inverse,
    examples=[
        call(lambda x: torch.cholesky_inverse(regular(x)), T(4, 3, 3)),
        call(lambda x: torch.cholesky_inverse(regular(x), upper=True), T(4, 3, 3)),
    ],
)
def cholesky_inverse(y, input, upper=False):
    """(L Lᵀ)⁻¹; instructed, as it is"""

    def error(e):
        moved = y @ (e + turned(e)) @ y
        return -(input @ moved if upper else moved @ input)

    return {"input": roles(instruct=as_is, error=error)}
