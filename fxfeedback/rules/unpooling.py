"""Pooling that also returns where in the flat map the greatest of every window lies, and its way back.

An instruction treats these as the mean of the window, whatever lies in it.
"""

from typing import Any

import torch
import torch.nn.functional as F

from fxfeedback.rules.core import known, roles, rule
from fxfeedback.rules.examples import T, call
from fxfeedback.rules.pooling import adaptive_avg_pool, max_pool, scatter

nn_ops = torch._C._nn
AVERAGES: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def to_positions(y, input, instruct):
    """The table of a pooling that returns the greatest of every window and where each was."""
    return {"input": roles(instruct=lambda t: instruct(t[0]), error=lambda e: scatter(e[0], y[1], input))}


@rule(
    torch.max_pool1d_with_indices,
    F.max_pool1d_with_indices,
    F.max_pool2d_with_indices,
    F.max_pool3d_with_indices,
    nn_ops.max_pool2d_with_indices,
    nn_ops.max_pool3d_with_indices,
    examples=[
        call(F.max_pool1d, T(3, 2, 9), 3, 2, 1, return_indices=True),
        call(lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True)[0], T(3, 2, 7, 8)),
        call(lambda x: nn_ops.max_pool3d_with_indices(x, [2, 2, 2])[0], T(2, 2, 5, 4, 6)),
    ],
)
def max_pool_with_positions(
    y, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=True
):
    """The greatest of every window, and where it is in the flat map"""

    def mean(t):
        options = (kernel_size, stride, padding, dilation, ceil_mode)
        return max_pool.table(t, input, *options)["input"].instruct(t)

    return to_positions(y, input, mean)


@rule(
    torch.adaptive_max_pool1d,
    F.adaptive_max_pool1d_with_indices,
    F.adaptive_max_pool2d_with_indices,
    F.adaptive_max_pool3d_with_indices,
    nn_ops.adaptive_max_pool2d,
    nn_ops.adaptive_max_pool3d,
    examples=[
        call(lambda x: F.adaptive_max_pool1d(x, 4, return_indices=True)[0], T(3, 2, 9)),
        call(F.adaptive_max_pool2d, T(3, 2, 7, 8), (3, 5), return_indices=True),
    ],
)
def adaptive_max_pool_with_positions(y, input, output_size, return_indices=True):
    """The greatest of every one of output_size windows that cover the map, and where it is in the flat map"""
    return to_positions(y, input, lambda t: adaptive_avg_pool.table(t, input, output_size)["input"].instruct(t))


@rule(
    nn_ops.fractional_max_pool2d,
    nn_ops.fractional_max_pool3d,
    examples=[
        call(F.fractional_max_pool2d, T(3, 2, 7, 8), 2, (4, 3)),
        call(F.fractional_max_pool3d, T(2, 2, 5, 6, 7), (2, 1, 2), output_ratio=0.5, return_indices=True),
    ],
)
def fractional_max_pool(y, input, kernel_size, output_size, random_samples):
    """The greatest of windows of drawn steps, and where it is in the flat map; instructed, of even steps"""
    return to_positions(y, input, lambda t: adaptive_avg_pool.table(t, input, output_size)["input"].instruct(t))


def _unpool(n, *functions, examples):
    """The rule of the op that puts values back into maps of n dimensions."""

    @rule(*functions, name=f"max_unpool{n}d", examples=examples)
    def max_unpool(y, input, indices, *options, **more):
        """Zeros, with x at positions of the flat map"""

        def pick(t):
            return t.flatten(-n).gather(-1, indices.flatten(-n)).reshape(input.shape)

        def mean(t):
            return AVERAGES[n](t, input.shape[-n:])

        return {"input": roles(instruct=pick if known(indices) else mean, error=pick)}

    return max_unpool


def _pooled(n, **options):
    """A call of max_unpool on what a max-pool found."""
    functions: Any = [(F.max_pool1d, F.max_unpool1d), (F.max_pool2d, F.max_unpool2d), (F.max_pool3d, F.max_unpool3d)]
    pool, unpool = functions[n - 1]

    def pooled(x):
        values, positions = pool(x, 2, return_indices=True, **options)
        return unpool(values.sin(), positions, 2, output_size=x.shape[2:], **options)

    return pooled


PUT_BACK = [
    _unpool(1, F.max_unpool1d, examples=[call(_pooled(1), T(3, 2, 7))]),
    _unpool(2, F.max_unpool2d, nn_ops.max_unpool2d, examples=[call(_pooled(2, stride=1), T(3, 2, 4, 5))]),
    _unpool(3, F.max_unpool3d, nn_ops.max_unpool3d, examples=[call(_pooled(3), T(2, 2, 5, 4, 6))]),
]
"""The ways back, by the dimensions of the map."""
