"""Sums, means and extremes over dimensions. An instruction treats every reduction except a sum as a mean."""

import math

import torch
import torch.nn.functional as F

from fxfeedback.errors import RuleError
from fxfeedback.rules.core import as_is, eye_like, nothing, roles, rule, sum_to, transpose
from fxfeedback.rules.elementwise import maximum, minimum
from fxfeedback.rules.examples import T, call
from fxfeedback.rules.indexing import picked, to_positions


@rule(
    torch.mean,
    examples=[
        call(torch.mean, T(4, 5, 3), (1, -1)),
        call(torch.mean, T(4, 5, 3), 2, True),
        call(torch.mean, T(4, 5, 3)),
    ],
)
def mean(y, input, dim=None, keepdim=False, **options):
    """Σ x / n over dim"""
    dims = dimensions(input, dim)
    count = math.prod(input.shape[d] for d in dims)
    return {"input": transpose(lambda t: spread(t, input, dims, keepdim) / count)}


@rule(
    torch.sum,
    name="sum",
    examples=[call(torch.sum, T(4, 5, 3), dim=1), call(torch.sum, T(4, 5, 3), (0, 2), keepdim=True)],
)
def total(y, input, dim=None, keepdim=False, **options):
    """Σ x over dim"""
    return {"input": transpose(lambda t: spread(t, input, dimensions(input, dim), keepdim))}


def dimensions(input, dim):
    """`dim` as torch takes it (None, a number, several) -> sorted non-negative dimensions."""
    if dim is None or dim in ((), []) or input.ndim == 0:
        return list(range(input.ndim))
    return sorted(d % input.ndim for d in (dim if isinstance(dim, (tuple, list)) else (dim,)))


def spread(t, input, dims, keepdim):
    """`t` broadcast back to the dimensions that a reduction of `input` took away."""
    for d in [] if keepdim else dims:
        t = t.unsqueeze(d)
    return t.expand(input.shape)


def averaging(input, dim, keepdim, error):
    """The table of a reduction that an instruction treats as a mean."""
    return {"input": roles(instruct=mean.table(None, input, dim, keepdim)["input"].instruct, error=error)}


@rule(
    torch.amax,
    torch.amin,
    examples=[
        call(torch.amax, T(4, 5, 3), (1, -1)),
        call(lambda x: torch.relu(x).amin(-1, keepdim=True), T(40, 3)),
    ],
)
def amax(y, input, dim=(), keepdim=False):
    """The greatest (smallest) over dim; ties share the error"""
    dims = dimensions(input, dim)

    def share(e):
        ties = (input == spread(y, input, dims, keepdim)).to(input.dtype)
        return ties * spread(e, input, dims, keepdim) / ties.sum(dims, keepdim=True)

    return averaging(input, dim, keepdim, share)


@rule(
    torch.max,
    name="max",
    examples=[
        call(lambda x: torch.relu(x).max(1)[0], T(20, 3, 2)),
        call(lambda x: x.max(dim=-1, keepdim=True).values, T(4, 5, 3)),
        call(torch.max, T(4, 5)),
        call(torch.max, T(4, 5, 3), T(5, 1)),
    ],
)
def greatest(y, input, dim=None, keepdim=False, *, other=None):
    """The greatest of all; over dim, with its position; or of two values"""
    return extreme(maximum, y, input, dim, keepdim, other)


@rule(
    torch.min,
    name="min",
    examples=[
        call(lambda x: x.min(1)[0], T(4, 5, 3)),
        call(lambda x: torch.relu(x).min(), T(4, 5)),
        call(lambda x: torch.min(x, other=2 * x), T(4, 5)),
    ],
)
def smallest(y, input, dim=None, keepdim=False, *, other=None):
    """The smallest of all; over dim, with its position; or of two values"""
    return extreme(minimum, y, input, dim, keepdim, other)


@rule(
    torch.median,
    torch.nanmedian,
    examples=[
        call(lambda x: x * torch.median(x), T(4, 5)),
        call(torch.median, T(4, 6, 3), 1),
        call(lambda x: x.median(-1, keepdim=True).values, T(4, 5)),
    ],
)
def median(y, input, dim=None, keepdim=False):
    """The middle value, the lower of two; of all, or over dim, with its position"""
    return amax.table(y, input) if dim is None else picked(y, input, dim, keepdim)


@rule(
    torch.kthvalue,
    examples=[call(torch.kthvalue, T(4, 6, 3), 2, 1), call(lambda x: x.kthvalue(3, keepdim=True).values, T(4, 5))],
)
def kthvalue(y, input, k, dim=-1, keepdim=False):
    """The k-th smallest over dim, and its position"""
    return picked(y, input, dim, keepdim)


@rule(
    torch.mode,
    examples=[call(lambda x: torch.mode(x.relu(), 1), T(4, 6, 3)), call(lambda x: x.mode(keepdim=True)[0], T(4, 5))],
)
def mode(y, input, dim=-1, keepdim=False):
    """The most frequent value over dim, and its position"""
    return picked(y, input, dim, keepdim)


def extreme(of_two, y, input, dim, keepdim, other):
    """The table of torch.max or torch.min, whose second argument is a dimension or the other value."""
    if isinstance(dim, int):
        return picked(y, input, dim, keepdim)
    if dim is None and other is None:
        return amax.table(y, input)
    second = of_two.table(y, input, other if dim is None else dim)
    return {"input": second["input"], "dim": second["other"], "other": second["other"]}


@rule(
    torch.var,
    examples=[
        call(torch.var, T(4, 5, 3), (1, -1)),
        call(lambda x: x.var(1, False), T(4, 5, 3)),
        call(torch.var, T(4, 5, 3), -1, correction=0, keepdim=True),
        call(torch.var, T(4, 5), False),
        call(torch.var, T(4, 5)),
    ],
)
def var(y, input, dim=None, unbiased=True, keepdim=False, *, correction=None):
    """Σ (x - μ)² / (n - correction) over dim"""
    dims, per = spreading(input, dim, unbiased, correction)

    def error(e):
        centred = input - input.mean(dims, keepdim=True)
        return spread(e, input, dims, keepdim) * centred * 2 / per

    return averaging(input, dims, keepdim, error)


@rule(
    torch.std,
    examples=[
        call(torch.std, T(4, 5, 3), 1, keepdim=True),
        call(lambda x: torch.relu(x).std((1, 2), unbiased=False), T(9, 2, 1)),
    ],
)
def std(y, input, dim=None, unbiased=True, keepdim=False, *, correction=None):
    """√var; nothing passes where it is zero"""
    squared = var.table(y, input, dim, unbiased, keepdim, correction=correction)["input"]
    return {
        "input": roles(instruct=squared.instruct, error=lambda e: squared.error(torch.where(y == 0, 0.0, e / (2 * y))))
    }


@rule(
    torch.var_mean,
    examples=[
        call(lambda x: torch.var_mean(x, dim=[1, 2], keepdim=True, correction=0), T(4, 5, 3)),
        call(lambda x: torch.var_mean(x, 1)[0], T(4, 5)),
    ],
)
def var_mean(y, input, dim=None, unbiased=True, keepdim=False, *, correction=None):
    """var and mean"""
    return moments(var, y, input, dim, unbiased, keepdim, correction)


@rule(torch.std_mean, examples=[call(lambda x: torch.std_mean(x, (1, 2), False), T(4, 5, 3))])
def std_mean(y, input, dim=None, unbiased=True, keepdim=False, *, correction=None):
    """std and mean"""
    return moments(std, y, input, dim, unbiased, keepdim, correction)


def moments(of, y, input, dim, unbiased, keepdim, correction):
    """The table of an op that returns a variance or deviation, and the mean."""

    def first(y):
        return of.table(y, input, dim, unbiased, keepdim, correction=correction)["input"]

    second = mean.table(y, input, None if isinstance(dim, bool) else dim, keepdim)["input"]
    return {
        "input": roles(
            instruct=lambda t: first(None).instruct(t[0]) + second.instruct(t[1]),
            error=lambda e: first(y[0]).error(e[0]) + second.error(e[1]),
        )
    }


def spreading(input, dim, unbiased, correction):
    """The dimensions that a variance is taken over, and what it divides by."""
    unbiased, dim = (dim, None) if isinstance(dim, bool) else (unbiased, dim)
    dims = dimensions(input, dim)
    return dims, math.prod(input.shape[d] for d in dims) - (int(unbiased) if correction is None else correction)


@rule(
    torch.linalg.vector_norm,
    examples=[
        call(torch.linalg.vector_norm, T(4, 5, 3), dim=(1, 2)),
        call(lambda x: torch.linalg.vector_norm(torch.relu(x), 2, -1, True), T(20, 3)),
        call(torch.linalg.vector_norm, T(4, 5), 3.5, -1),
        call(lambda x: torch.linalg.vector_norm(torch.relu(x), 3, 1), T(20, 3)),
        call(torch.linalg.vector_norm, T(4, 5), math.inf, 1),
    ],
)
def vector_norm(y, input, ord=2, dim=None, keepdim=False, **options):
    """(Σ |x|ᵖ)^(1/p) over dim; nothing passes where it is zero"""
    dims = dimensions(input, dim)

    def error(e):
        e, n = spread(e, input, dims, keepdim), spread(y, input, dims, keepdim)
        return e * slope_of_norm(input, n, ord, dims)

    return averaging(input, dim, keepdim, nothing if ord == 0 else error)  # a count


@rule(
    torch.linalg.norm,
    examples=[
        call(torch.linalg.norm, T(4, 5, 3), dim=1),
        call(torch.linalg.norm, T(4, 5), 3, 1),
        call(torch.linalg.norm, T(4, 5, 3), "nuc", (-1, 1)),
    ],
)
def linalg_norm(y, input, ord=None, dim=None, keepdim=False, **options):
    """vector_norm, or the nuclear norm of matrices; "fro" is the one with p = 2"""
    if ord == "nuc":
        return nuclear_norm(input, dim, keepdim)
    if ord not in (None, "fro") and not isinstance(dim, int) and input.ndim > 1:
        raise RuleError(f"no rule for a matrix norm: torch.linalg.norm with ord={ord!r}")
    return vector_norm.table(y, input, 2 if ord in (None, "fro") else ord, dim, keepdim)


@rule(
    torch.norm,
    examples=[
        call(lambda x: x.norm(dim=-1, keepdim=True), T(4, 5, 3)),
        call(torch.norm, T(4, 5, 3), p=2, dim=(2, 1)),
        call(torch.norm, T(4, 5), 1, 1),
        call(torch.norm, T(4, 3, 5), "nuc", (1, 2)),
        call(torch.norm, T(4, 5)),
    ],
)
def norm(y, input, p="fro", dim=None, keepdim=False, **options):
    """vector_norm, or the nuclear norm of matrices; "fro" is the one with p = 2"""
    if p == "nuc":
        return nuclear_norm(input, dim, keepdim)
    return vector_norm.table(y, input, 2 if p in ("fro", None) else p, dim, keepdim)


def nuclear_norm(input, dim, keepdim):
    """The table of the sum of singular values, of matrices U S Vᵀ: the error goes to them along U Vᵀ"""
    dims = dimensions(input, dim)

    def error(e):
        U, _, Vh = torch.linalg.svd(input.movedim(dims, (-2, -1)), full_matrices=False)
        return spread(e, input, dims, keepdim) * (U @ Vh).movedim((-2, -1), dims)

    return averaging(input, dim, keepdim, error)


def slope_of_norm(x, n, p, dims):
    """∂n / ∂x of n = (Σ |x|ᵖ)^(1/p) over dims, n in x's shape.

    Where x is 0 torch takes 0, also for p < 1, for which it is unbounded. No power is taken there: its derivative would
    spoil the second derivative.
    """
    if p == 0:
        return torch.zeros_like(x)
    if p == 2:
        return torch.where(n == 0, 0.0, x / torch.where(n == 0, 1.0, n))  # 0 / 0 would spoil the derivative
    if p == 1:
        return torch.sign(x)
    if p in (math.inf, -math.inf):
        ties = (x.abs() == n).to(x.dtype)
        return torch.sign(x) * ties / ties.sum(dims, keepdim=True)
    none = (n == 0) | (x == 0)
    part = torch.where(none, 1.0, x.abs() / torch.where(n == 0, 1.0, n))
    return torch.where(none, 0.0, torch.sign(x) * part ** (p - 1))


@rule(
    torch.cdist,
    examples=[
        call(torch.cdist, T(4, 5, 3), T(2, 3)),
        call(torch.cdist, T(4, 5, 3), T(1, 2, 3), p=1.0),
        call(lambda x: torch.cdist(x, x[:, :2].sin(), 3.5), T(4, 5, 3)),
        call(torch.cdist, T(4, 5, 3), T(2, 3), math.inf),
        call(lambda x: torch.cdist(x, x), T(4, 3, 2)),
        call(lambda x: torch.cdist(torch.cat([x, -x], -1), torch.cat([x, 2 * x], -1), math.inf), T(4, 3, 1)),
    ],
)
def cdist(y, x1, x2, p=2.0, compute_mode=None):
    """|x - z| by the norm p, for all pairs of rows; instructed, to each evenly over its columns"""
    columns = x1.shape[-1]
    rows, others = (*x1.shape[:-1], 1, columns), (*x2.shape[:-2], 1, *x2.shape[-2:])
    wide = (*y.shape, columns)

    def evenly(t):
        return t.unsqueeze(-1).expand(wide) / columns

    def error(e):
        apart, n = x1.unsqueeze(-2) - x2.unsqueeze(-3), y.unsqueeze(-1)
        if p == math.inf:  # here PyTorch gives the whole error to each of several greatest
            return e.unsqueeze(-1) * torch.sign(apart) * (apart.abs() == n)
        return e.unsqueeze(-1) * slope_of_norm(apart, n, p, [-1])

    def to(x, shape, sign):
        return roles(
            instruct=lambda t: sum_to(evenly(t), shape, wide).reshape(x.shape),
            error=lambda e: sum_to(sign * error(e), shape, wide).reshape(x.shape),
        )

    return {"x1": to(x1, rows, 1), "x2": to(x2, others, -1)}


@rule(
    torch.pdist,
    examples=[
        call(lambda x, w: x * F.pdist(w).sum() + F.pdist(w.relu(), 3.5)[0], T(4, 5), T(4, 3)),
        call(lambda x, w: x * F.pdist(w, 1.0).sum() + F.pdist(w, math.inf)[0], T(4, 5), T(4, 3)),
    ],
)
def pdist(y, input, p=2.0):
    """|x[i] - x[j]| by the norm p, for all pairs of rows i < j: they are samples, to which no instruction passes"""

    def to_rows(e, of_pairs):
        first, second = torch.triu_indices(input.shape[0], input.shape[0], 1, device=e.device).unbind()
        each = of_pairs(e, first, second)
        zeros = each.new_zeros(input.shape)
        return zeros.index_add(0, first, each) - zeros.index_add(0, second, each)

    def error(e, first, second):
        apart, n = input.index_select(0, first) - input.index_select(0, second), y.unsqueeze(-1)
        if p == math.inf:  # here PyTorch gives the whole error to each of several greatest
            return e.unsqueeze(-1) * torch.sign(apart) * (apart.abs() == n)
        return e.unsqueeze(-1) * slope_of_norm(apart, n, p, [-1])

    return {"input": roles(instruct=nothing, error=lambda e: to_rows(e, error))}


@rule(
    torch.logsumexp,
    examples=[call(torch.logsumexp, T(4, 5, 3), (1, 2)), call(lambda x: x.logsumexp(-1, True), T(4, 5))],
)
def logsumexp(y, input, dim, keepdim=False):
    """log Σ exp x over dim"""
    dims = dimensions(input, dim)

    def error(e):
        return spread(e, input, dims, keepdim) * torch.exp(input - spread(y, input, dims, keepdim))

    return averaging(input, dim, keepdim, error)


@rule(torch.cumsum, examples=[call(torch.cumsum, T(4, 5, 3), -2)])
def cumsum(y, input, dim, **options):
    """Σ of the values so far along dim"""
    return {"input": transpose(lambda t: t.flip(dim).cumsum(dim).flip(dim))}


@rule(torch.cumprod, examples=[call(lambda x: torch.relu(x).cumprod(1), T(40, 3, 2)), call(torch.cumprod, T(4, 5), -1)])
def cumprod(y, input, dim, **options):
    """Π of the values so far along dim; instructed, as it is"""
    if input.ndim == 0:
        return {"input": transpose(as_is)}
    size = input.shape[dim]

    def error(e):
        others = torch.where(eye_like(input, size) == 1, 1.0, input.movedim(dim, -1).unsqueeze(-2)).cumprod(-1)
        return (others.triu() * e.movedim(dim, -1).unsqueeze(-2)).sum(-1).movedim(-1, dim)

    return {"input": roles(instruct=as_is, error=error)}


@rule(
    torch.logcumsumexp,
    examples=[call(torch.logcumsumexp, T(4, 5, 3), 1), call(lambda x: torch.logcumsumexp(100 * x, -1), T(4, 5))],
)
def logcumsumexp(y, input, dim):
    """log Σ exp of the values so far along dim; instructed, as it is"""
    if input.ndim == 0:
        return {"input": transpose(as_is)}
    size = input.shape[dim]

    def error(e):
        x, sums, e = (v.movedim(dim, -1) for v in (input, y, e))
        later = torch.ones((size, size), dtype=torch.bool, device=e.device).triu()
        shares = torch.where(later & (sums.unsqueeze(-2) > -math.inf), x.unsqueeze(-1) - sums.unsqueeze(-2), -math.inf)
        return (torch.exp(shares) * e.unsqueeze(-2)).sum(-1).movedim(-1, dim)

    return {"input": roles(instruct=as_is, error=error)}


@rule(
    torch.cummax,
    torch.cummin,
    examples=[
        call(torch.cummax, T(4, 5, 3), 1),
        call(lambda x: x.relu().cummin(-1).values, T(4, 5)),
        call(lambda x: x.relu().cummax(-1).values, T(4, 9)),
    ],
)
def cummax(y, input, dim):
    """The greatest (smallest) of the values so far along dim, and its position; instructed, as it is"""
    if input.ndim == 0:
        return {"input": roles(instruct=lambda t: t[0], error=lambda e: e[0])}
    return {"input": roles(instruct=lambda t: t[0], error=lambda e: to_positions(e[0], input, dim, y[1]))}


@rule(
    torch.prod,
    examples=[
        call(lambda x: torch.relu(x).prod(1), T(40, 2, 3)),
        call(lambda x: x.prod(-1, keepdim=True), T(4, 5, 3)),
        call(lambda x: x * torch.relu(x + 2).prod(), T(3, 2, 2)),
    ],
)
def prod(y, input, dim=None, keepdim=False, **options):
    """Π x over dim, or of all; the product of the others is computed as such, as a value may be zero"""
    dim = None if input.ndim == 0 else dim
    dims, size = dimensions(input, dim), math.prod(input.shape) if dim is None else input.shape[dim]

    def others(x, dim):
        return torch.where(eye_like(x, size) == 1, 1.0, x.movedim(dim, -1).unsqueeze(-2)).prod(-1).movedim(-1, dim)

    def error(e):
        rest = others(input.flatten(), 0).reshape(input.shape) if dim is None else others(input, dim)
        return spread(e, input, dims, keepdim) * rest

    return averaging(input, dim, keepdim, error)
