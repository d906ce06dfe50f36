"""Convolutions in 1, 2 and 3 dimensions, and transposed ones."""

import itertools

import torch
import torch.nn.functional as F

from fxfeedback.rules.core import as_tuple, fused, rule, spatial, transpose, update
from fxfeedback.rules.examples import T, call
from fxfeedback.rules.ops import or_zeros

CONV = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}
CONV_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


@rule(
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    weight="weight",
    channels=1,
    examples=[
        call(torch.conv1d, T(3, 4, 9), T(6, 2, 3), T(6), stride=2, padding=1, groups=2),
        call(torch.conv2d, T(2, 4, 8, 7), T(6, 4, 3, 2), T(6)),
        call(torch.conv2d, T(2, 4, 9, 8), T(6, 2, 3, 3), None, (2, 3), (1, 2), (2, 1), 2),
        call(torch.conv2d, T(2, 4, 5, 5), T(4, 1, 5, 5), None, 3, 4, 1, 4),
        call(torch.conv2d, T(2, 3, 6, 6), T(5, 3, 1, 1), T(5)),
        call(torch.conv2d, T(2, 3, 7, 6), T(5, 3, 3, 2), T(5), padding="same", dilation=2),
        call(torch.conv2d, T(2, 3, 7, 6), T(5, 3, 4, 3), T(5), padding="same"),
        call(torch.conv2d, T(2, 3, 7, 6), T(5, 3, 3, 2), padding="valid"),
        call(lambda x: x + torch.conv2d(x, x[:1, :, :3], padding=1), T(4, 3, 5, 3)),
        call(torch.conv2d, T(2, 16, 9, 8), T(6, 8, 3, 2), None, (2, 3), (1, 2), (2, 1), 2),
        call(torch.conv3d, T(2, 8, 5, 6, 4), T(3, 8, 2, 3, 3), T(3), stride=(1, 2, 2), padding=1),
        call(torch.conv3d, T(2, 2, 5, 6, 4), T(3, 2, 2, 3, 3), T(3), stride=(1, 2, 2), padding=1),
    ],
)
def convolution(y, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """y[p] = Σ_k W[k] x[stride p + dilation k - padding] + b"""
    n = input.ndim - 2
    stride, padding, dilation = as_tuple(stride, n), as_tuple(padding, n), as_tuple(dilation, n)

    def backwards(t):
        reach = [
            s * (m - 1) + d * (k - 1) + 1
            for s, m, d, k in zip(stride, y.shape[2:], dilation, weight.shape[2:], strict=True)
        ]
        left_over = [size + 2 * p - r for size, p, r in zip(input.shape[2:], padding, reach, strict=True)]
        return CONV_TRANSPOSE[input.ndim](t, weight, None, stride, padding, left_over, groups, dilation)

    return {
        "input": transpose(backwards),
        "weight": update(lambda e: correlate(input, e, weight.shape[2:], stride, padding, dilation, groups)),
        "bias": update(lambda e: e.sum([0, *spatial(y)])),
    }


@rule(
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    weight="weight",
    channels=1,
    examples=[
        call(F.conv_transpose1d, T(3, 4, 5), T(4, 3, 3), T(6), stride=2, padding=1, output_padding=1, groups=2),
        call(F.conv_transpose2d, T(2, 4, 5, 4), T(4, 3, 3, 2), T(3)),
        call(F.conv_transpose2d, T(2, 4, 5, 4), T(4, 3, 3, 3), None, (2, 1), 1, (1, 2), 1, (2, 3)),
        call(F.conv_transpose2d, T(2, 4, 5, 4), T(4, 8, 3, 3), None, (2, 1), 1, (1, 2), 1, (2, 3)),
        call(F.conv_transpose3d, T(2, 2, 3, 3, 2), T(2, 3, 2, 2, 3), T(3), stride=2),
    ],
)
def transposed_convolution(y, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """y[stride p + dilation k - padding] = Σ W[k] x[p] + b: the convolution that runs from y to x, run backwards."""
    n = input.ndim - 2
    stride, padding, dilation = as_tuple(stride, n), as_tuple(padding, n), as_tuple(dilation, n)

    def forwards(t):
        t = CONV[input.ndim](t, weight, None, stride, padding, dilation, groups)
        return crop(t, input.shape[2:])  # output_padding >= stride makes room for positions that x does not have

    return {
        "input": transpose(forwards),
        "weight": update(lambda e: correlate(e, input, weight.shape[2:], stride, padding, dilation, groups)),
        "bias": update(lambda e: e.sum([0, *spatial(y)])),
    }


def correlate(x, e, kernel, stride, padding, dilation, groups):
    """W[k] = Σ e[p] x[stride p + dilation k - padding]ᵀ: the update of a convolution from x to e.

    x (B, groups * I, ...) and e (B, groups * O, ...) give (groups * O, I, *kernel). One product of matrices for each
    position of the kernel.
    """
    if x.shape[1] // groups < THIN:
        return correlate_thin(x, e, kernel, stride, padding, dilation, groups)
    sizes, e = e.shape[2:], e.transpose(0, 1).flatten(1).unflatten(0, (groups, -1))  # (groups, O, B * positions)
    x = F.pad(x, [p for p in reversed(padding) for _ in range(2)]).transpose(0, 1)

    def at(*k):
        starts = [d * i for d, i in zip(dilation, k, strict=True)]
        met = [slice(a, a + s * (m - 1) + 1, s) for a, s, m in zip(starts, stride, sizes, strict=True)]
        return e @ x[(slice(None), slice(None), *met)].flatten(1).unflatten(0, (groups, -1)).transpose(1, 2)

    products = [at(*k) for k in itertools.product(*map(range, kernel))]
    return torch.stack(products, -1).flatten(0, 1).unflatten(-1, tuple(kernel))


THIN = 8
"""Input channels per group below which products of matrices are too thin to be fast."""


def correlate_thin(x, e, kernel, stride, padding, dilation, groups):
    """`correlate` as one convolution in which batch and channels trade places."""
    x_by_channel = x.unflatten(1, (groups, -1)).transpose(0, 2).flatten(1, 2)  # (I, groups * B, ...)
    w = CONV[len(kernel) + 2](x_by_channel, e.transpose(0, 1), None, dilation, padding, stride, groups)
    return or_zeros(crop(w, kernel).transpose(0, 1), e.shape[1])


def turned(weight, groups):
    """The kernel of the convolution that a transposed one of stride 1 is."""
    weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flip(tuple(spatial(weight)))


def crop(t, sizes):
    """The first `sizes` positions of t (N, C, ...) in each spatial dimension."""
    for i, size in enumerate(sizes):
        t = t.narrow(2 + i, 0, size)
    return t


@fused(convolution)
def convolution_backward(e, y, saved, wanted, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return _convolution_backward(e, wanted, input, weight, stride, padding, dilation, False, 0, groups)


@fused(transposed_convolution)
def transposed_convolution_backward(
    e, y, saved, wanted, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    return _convolution_backward(e, wanted, input, weight, stride, padding, dilation, True, output_padding, groups)


def _convolution_backward(e, wanted, input, weight, stride, padding, dilation, transposed, output_padding, groups):
    n, operands = input.ndim - 2, ("input", "weight", "bias")
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    stride, padding, dilation = as_tuple(stride, n), as_tuple(padding, n), as_tuple(dilation, n)
    mask = [name in wanted for name in operands]
    options = ([channels], stride, padding, dilation, transposed, as_tuple(output_padding, n), groups, mask)
    results = torch.ops.aten.convolution_backward(e, input, weight, *options)
    return {name: results[i] for i, name in enumerate(operands) if name in wanted}
