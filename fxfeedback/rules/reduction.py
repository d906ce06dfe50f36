"""Sums and means over dimensions."""

import math

import torch

from fxfeedback.rules.core import rule, transpose
from fxfeedback.rules.examples import T, call


@rule(torch.mean)
def mean(y, input, dim=None, keepdim=False):
    """Σ x / n over dim"""
    dims = dimensions(input, dim)
    count = math.prod(input.shape[d] for d in dims)
    return {"input": transpose(lambda t: spread(t, input, dims, keepdim) / count)}


@rule(torch.sum)
def sum(y, input, dim=None, keepdim=False):
    """Σ x over dim"""
    return {"input": transpose(lambda t: spread(t, input, dimensions(input, dim), keepdim))}


def dimensions(input, dim):
    """`dim` as torch takes it (None, a number, several) -> sorted non-negative dimensions."""
    if dim is None or dim == ():
        return list(range(input.ndim))
    return sorted(d % input.ndim for d in (dim if isinstance(dim, (tuple, list)) else (dim,)))


def spread(t, input, dims, keepdim):
    """`t` broadcast back to the dimensions that a reduction of `input` took away."""
    for d in [] if keepdim else dims:
        t = t.unsqueeze(d)
    return t.expand(input.shape)


mean.examples = [
    call(torch.mean, T(4, 5, 3), (1, -1)),
    call(torch.mean, T(4, 5, 3), 2, True),
    call(torch.mean, T(4, 5, 3)),
]
sum.examples = [call(torch.sum, T(4, 5, 3), dim=1), call(torch.sum, T(4, 5, 3), (0, 2), keepdim=True)]
