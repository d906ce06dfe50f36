"""Pooling. Average pooling is linear and acts on each dimension by itself: run on the identity it gives its matrix."""

import math

import torch
import torch.nn.functional as F

from fxfeedback.rules.core import along, as_tuple, eye_like, fused, roles, rule, spatial, transpose
from fxfeedback.rules.examples import T, call

aten = torch.ops.aten
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
ADAPTIVE_MAX_POOL = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


@rule(
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    examples=[
        call(F.avg_pool1d, T(3, 2, 9), 3, 2, 1),
        call(F.avg_pool2d, T(3, 2, 7, 8), (3, 2), (2, 3), (1, 0)),
        call(F.avg_pool2d, T(3, 2, 7, 8), 3, 2, 1, ceil_mode=True),
        call(F.avg_pool2d, T(3, 2, 7, 8), 3, 2, 1, ceil_mode=True, count_include_pad=False),
        call(F.avg_pool2d, T(3, 2, 7, 8), 2, divisor_override=3),
        call(F.avg_pool3d, T(2, 2, 5, 4, 6), 2, 1),
    ],
)
def avg_pool(
    y, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    """The mean of every window, or its sum over divisor_override"""
    options = window(input, kernel_size, stride, padding)

    def window_mean(i, eye):
        k, s, p = options[i]
        return F.avg_pool1d(eye, k, s, p, ceil_mode, count_include_pad)

    def spread(t):
        means = matrices(t, input, window_mean)
        if divisor_override is None:
            return along(t, means)
        return along(t, {d: (mean > 0).to(t.dtype) for d, mean in means.items()}) / divisor_override

    return {"input": transpose(spread)}


@rule(
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
    examples=[
        call(F.adaptive_avg_pool1d, T(3, 2, 9), 4),
        call(F.adaptive_avg_pool2d, T(3, 2, 7, 8), (3, 5)),
        call(F.adaptive_avg_pool2d, T(3, 2, 7, 8), (1, 1)),
        call(F.adaptive_avg_pool2d, T(3, 2, 2, 3), (4, None)),
        call(F.adaptive_avg_pool3d, T(2, 2, 5, 4, 6), (2, 3, 1)),
    ],
)
def adaptive_avg_pool(y, input, output_size):
    """The mean of every one of output_size windows that cover the map"""

    def spread(t):
        if all(size == 1 for size in y.shape[2:]):
            return t.expand(input.shape) / math.prod(input.shape[2:])
        return along(t, matrices(t, input, lambda i, eye: F.adaptive_avg_pool1d(eye, y.shape[2 + i])))

    return {"input": transpose(spread)}


@rule(
    torch.max_pool1d,
    torch.max_pool2d,
    torch.max_pool3d,
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    examples=[
        call(F.max_pool1d, T(3, 2, 9), 3, 2, 1),
        call(F.max_pool2d, T(3, 2, 7, 8), 3, 2, 1),
        call(F.max_pool2d, T(3, 2, 7, 8), (2, 3), (3, 2), (1, 0), (1, 2), ceil_mode=True),
        call(F.max_pool3d, T(2, 2, 5, 4, 6), 2),
    ],
)
def max_pool(y, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """The greatest of every window; instructed, as if it were the mean of the window"""
    options = window(input, kernel_size, stride, padding, dilation)

    def window_mean(i, eye):
        k, s, p, d = options[i]
        if d == 1:
            return F.avg_pool1d(eye, k, s, p, ceil_mode)
        beyond = (y.shape[2 + i] - 1) * s + d * (k - 1) + 1 - input.shape[2 + i] - p  # ceil_mode looks over the edge
        return F.conv1d(
            F.pad(eye, (p, beyond)).unsqueeze(1), torch.ones_like(eye[:1, :k]).unsqueeze(0) / k, None, s, 0, d
        )[:, 0]

    def to_winner(e):
        _, winners = MAX_POOL[input.ndim - 2](input, kernel_size, stride, padding, dilation, ceil_mode, True)
        return scatter(e, winners, input)

    return {"input": roles(instruct=lambda t: along(t, matrices(t, input, window_mean)), error=to_winner)}


@rule(
    F.adaptive_max_pool1d,
    F.adaptive_max_pool2d,
    F.adaptive_max_pool3d,
    examples=[
        call(F.adaptive_max_pool1d, T(3, 2, 9), 4),
        call(F.adaptive_max_pool2d, T(3, 2, 7, 8), (3, 5)),
    ],
)
def adaptive_max_pool(y, input, output_size, return_indices=False):
    """The greatest of every one of output_size windows that cover the map; instructed, as if it were their mean"""

    def to_winner(e):
        _, winners = ADAPTIVE_MAX_POOL[input.ndim - 2](input, y.shape[2:], True)
        return scatter(e, winners, input)

    mean = adaptive_avg_pool.table(y, input, output_size)["input"]
    return {"input": roles(instruct=mean.instruct, error=to_winner)}


def window(input, kernel_size, stride, padding, *more):
    """(kernel, stride, padding, ...) for each spatial dimension; the stride defaults to the kernel."""
    stride = kernel_size if stride is None or stride in ((), []) else stride
    return list(
        zip(*(as_tuple(option, input.ndim - 2) for option in (kernel_size, stride, padding, *more)), strict=True)
    )


def matrices(t, input, pool):
    """Spatial dimension -> the transposed matrix of a pooling along it: pool(i, identity), (before, after)."""
    return {d: pool(i, eye_like(t, input.shape[d])) for i, d in enumerate(spatial(input))}


def scatter(e, winners, input):
    """Each error summed into the position that won its window; windows overlap, so a position may win several."""
    zeros = e.new_zeros(input.shape).flatten(2)
    return zeros.scatter_add(2, winners.flatten(2), e.flatten(2)).reshape(input.shape)


def _max_pool2d_with_winners(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    y = torch.ops.aten.max_pool2d_with_indices(input, *_pairs(kernel_size, stride, padding, dilation), ceil_mode)
    return y[0], (y[1],)


def _pairs(kernel_size, stride, padding, dilation):
    stride = kernel_size if stride is None or stride in ((), []) else stride
    return [list(as_tuple(option, 2)) for option in (kernel_size, stride, padding, dilation)]


@fused(max_pool, forward=_max_pool2d_with_winners, applies=lambda y, input, *args, **kwargs: input.ndim == 4)
def max_pool2d_backward(
    e, y, saved, wanted, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    options = _pairs(kernel_size, stride, padding, dilation)
    return {"input": aten.max_pool2d_with_indices_backward(e, input, *options, ceil_mode, saved[0])}


@fused(avg_pool, applies=lambda y, input, *args, **kwargs: input.ndim == 4)
def avg_pool2d_backward(
    e,
    y,
    saved,
    wanted,
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    kernel_size, stride, padding, _ = _pairs(kernel_size, stride, padding, 1)
    return {
        "input": aten.avg_pool2d_backward(
            e, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
    }


@fused(adaptive_avg_pool, applies=lambda y, input, *args, **kwargs: input.ndim == 4)
def adaptive_avg_pool2d_backward(e, y, saved, wanted, input, output_size):
    return {"input": aten._adaptive_avg_pool2d_backward(e, input)}
