"""The law for convolutions and poolings of any size, stride, padding, dilation and number of groups."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fxfeedback
from fxfeedback.rules import RULES, T, call

CONV = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}

some = settings(
    deadline=None, max_examples=25, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def obeys_the_law(example) -> None:
    fxfeedback.check_rule(replace(RULES[example.function], examples=[example]))


@st.composite
def geometry(draw, dilated=True, half_padded=False):
    """Dimensions, and for each of them: kernel, stride, padding, dilation, and a size that holds the kernel.

    half_padded: as pooling wants it, padding of at most half the kernel, and a size that holds it without padding.
    """
    n = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(n))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(n))
    dilation = tuple(draw(st.integers(1, 2 if dilated else 1)) for _ in range(n))
    padding = tuple(draw(st.integers(0, k // 2 if half_padded else 3)) for k in kernel)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    least = reach if half_padded else [max(1, r - 2 * p) for r, p in zip(reach, padding, strict=True)]
    size = tuple(draw(st.integers(m, m + 5)) for m in least)
    return n, kernel, stride, padding, dilation, size


@some
@given(geometry(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.booleans())
def test_convolution(shape, groups, inputs, outputs, bias):
    n, kernel, stride, padding, dilation, size = shape
    x, w = T(2, groups * inputs, *size), T(groups * outputs, inputs, *kernel)
    b = T(groups * outputs) if bias else None
    obeys_the_law(call(CONV[n], x, w, b, stride, padding, dilation, groups))


@some
@given(geometry(), st.data(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2))
def test_transposed_convolution(shape, data, groups, inputs, outputs):
    n, kernel, stride, padding, dilation, size = shape
    rest = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    lengths = [
        (m - 1) * s - 2 * p + d * (k - 1) + r + 1
        for m, s, p, d, k, r in zip(size, stride, padding, dilation, kernel, rest, strict=True)
    ]
    if min(lengths) < 1:
        padding, lengths = (0,) * n, [1]
    x, w = T(2, groups * inputs, *size), T(groups * inputs, outputs, *kernel)
    obeys_the_law(call(CONV_TRANSPOSE[n], x, w, None, stride, padding, rest, groups, dilation))


@some
@given(geometry(dilated=False, half_padded=True), st.booleans(), st.booleans())
def test_average_pooling(shape, ceil_mode, count_include_pad):
    n, kernel, stride, padding, _, size = shape
    obeys_the_law(call(AVG_POOL[n], T(2, 3, *size), kernel, stride, padding, ceil_mode, count_include_pad))


@some
@given(geometry(half_padded=True), st.booleans())
def test_max_pooling(shape, ceil_mode):
    n, kernel, stride, padding, dilation, size = shape
    obeys_the_law(call(MAX_POOL[n], T(2, 3, *size), kernel, stride, padding, dilation, ceil_mode))
