"""Ops that repeat values: their transposes sum the copies."""

import math

import torch

from fxfeedback.rules.core import is_one, known, listed, nothing, roles, rule, sum_to, transpose
from fxfeedback.rules.examples import T, call

Tensor = torch.Tensor


@rule(
    Tensor.expand,
    torch.expand_copy,
    torch.broadcast_to,
    examples=[
        call(lambda x: x.unsqueeze(1).expand(-1, 5, -1), T(4, 3)),
        call(lambda x, w: x + w.expand(x.shape[0], -1, -1), T(4, 5, 3), T(1, 5, 3)),
        call(lambda x, w: x + w.expand(size=(x.shape[0], 5, 3)), T(4, 5, 3), T(3)),
        call(torch.broadcast_to, T(4, 1, 3), (2, -1, 5, 3)),
    ],
)
def expand(y, input, *sizes, size=None):
    """x along new dimensions, and along those where its size is 1"""
    return {"input": transpose(lambda t: sum_to(t, input, y))}


@rule(Tensor.expand_as, examples=[call(lambda x: x[:, :1].expand_as(x) * x, T(4, 5, 3))])
def expand_as(y, input, other):
    """x in the shape of another tensor"""
    return {"input": transpose(lambda t: sum_to(t, input, y)), "other": transpose(nothing)}


@rule(
    Tensor.repeat,
    torch.tile,
    examples=[
        call(lambda x: x.repeat(1, 2, 3), T(4, 5, 1)),
        call(lambda x: x.repeat(3, 2, 1, 2), T(4, 5, 3)),
        call(lambda x, w: x + w.repeat(x.shape[0], 1, 1), T(4, 5, 3), T(1, 5, 3)),
        call(torch.tile, T(4, 5, 3), dims=(2,)),
    ],
)
def repeat(y, input, *times, repeats=None, dims=None):
    """The whole of x several times along each dimension"""
    counts = listed(times, dims if repeats is None else repeats)
    counts = [1] * (input.ndim - len(counts)) + counts
    new = len(counts) - input.ndim

    def copies_summed(t):
        t = t.sum(list(range(new))) if new else t
        for d, (size, n) in enumerate(zip(input.shape, counts[new:], strict=True)):
            if is_one(size):
                t = t.sum(d, keepdim=True)
            elif not is_one(n):
                known_n = isinstance(n, int) or not isinstance(size, int)  # -1 for both says nothing, nor for one of 0
                t = t.unflatten(d, (n if known_n else -1, size if isinstance(size, int) else -1)).sum(d)
        return t

    return {"input": transpose(copies_summed)}


@rule(
    torch.repeat_interleave,
    examples=[
        call(torch.repeat_interleave, T(4, 5, 3), 2, -2),
        call(lambda x: x.repeat_interleave(3, dim=0), T(4, 5)),
        call(lambda x, w: x + w.repeat_interleave(3), T(4, 6), T(1, 2)),
    ],
)
def repeat_interleave(y, input, repeats, dim=None, **options):
    """Every value of x `repeats` times in a row (one number, or one for each), along dim or of the flat x"""
    shape = (math.prod(input.shape),) if dim is None else input.shape
    d = 0 if dim is None else dim % input.ndim

    def copies_summed(t):
        if isinstance(repeats, int):
            return t.unflatten(d, (-1, repeats)).sum(d + 1).reshape(input.shape)
        sources = torch.arange(shape[d], device=t.device).repeat_interleave(repeats, output_size=y.shape[d])
        return t.new_zeros(shape).index_add(d, sources, t).reshape(input.shape)

    return {"input": roles(instruct=copies_summed if known(repeats) else nothing, error=copies_summed)}
