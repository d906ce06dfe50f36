"""Maps that are read at computed positions: spatial transformers, warping by optical flow.

An instruction passes to the map, not to the positions, as in attention to the values. Where the positions are not known
it goes evenly to all of them.
"""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F

from fxfeedback.errors import RuleError
from fxfeedback.rules.core import eye_like, fused, known, nothing, roles, rule, spatial, transpose
from fxfeedback.rules.examples import T, call

aten = torch.ops.aten
MODES, PADDING = ["bilinear", "nearest"], ["zeros", "border"]  # in the order of torch's kernels


def _moved(**options):
    """A map read at positions that it computes, some of them outside."""
    return lambda x, w: F.grid_sample(x, (1.2 * x[:, :2].movedim(1, -1) @ w).tanh() * 1.3, **options)


@rule(
    F.grid_sample,
    examples=[
        call(
            lambda x, w: F.grid_sample(x, w.expand(x.shape[0], 3, 6, 2), align_corners=False), T(2, 3, 5, 4), T(3, 6, 2)
        ),
        call(_moved(align_corners=False), T(2, 3, 5, 4), T(2, 2)),
        call(_moved(align_corners=True, padding_mode="border"), T(2, 3, 5, 4), T(2, 2)),
        call(_moved(align_corners=False, padding_mode="border"), T(2, 3, 5, 4), T(2, 2)),
        call(_moved(align_corners=False, mode="nearest"), T(2, 3, 5, 4), T(2, 2)),
        call(
            lambda x, w: F.grid_sample(x, (x[:, :2].movedim(1, -1) @ w).tanh(), align_corners=True),
            T(2, 3, 3, 4, 5),
            T(2, 3),
        ),
    ],
)
def grid_sample(y, input, grid, mode="bilinear", padding_mode="zeros", align_corners=None):
    """y = Σ over the corners around a position of weight * x there; outside of the map 0, or the border's value"""
    if mode not in MODES or padding_mode not in PADDING:
        raise RuleError(f"no rule for grid_sample with mode={mode!r}, padding_mode={padding_mode!r}")
    sizes = [input.shape[d] for d in spatial(input)]

    def corners():
        return around(grid, sizes, mode, padding_mode, align_corners)

    def to_input(t):
        whole = t.new_zeros(input.shape).flatten(2)
        for place, weight, _ in corners():
            whole = whole.scatter_add(2, place.expand(t.flatten(2).shape), (t * weight).flatten(2))
        return whole.reshape(input.shape)

    def to_grid(e):
        whole = 0
        for place, _, slope in corners():
            value = input.flatten(2).gather(2, place.expand(e.flatten(2).shape)).reshape(e.shape)
            whole = whole + (e * value).sum(1).unsqueeze(-1) * slope
        return whole

    def evenly(t):
        positions = list(spatial(t))
        return t.sum(positions, keepdim=True).expand(input.shape) / math.prod(sizes)

    return {
        "input": roles(instruct=lambda t: to_input(t) if known(grid) else evenly(t), error=to_input),
        "grid": roles(instruct=nothing, error=to_grid),
    }


def around(grid, sizes, mode, padding_mode, align_corners):
    """Of every corner (of "nearest" the only one) around each position of a grid (N, ..., dimensions), from -1 to 1:
    where it lies in the flattened map (N, 1, P), its weight (N, 1, ...), and the weight's slope by the position."""
    pixels, inner = [], []
    for d, size in enumerate(sizes):
        scale = (size - 1) / 2 if align_corners else size / 2
        pixel = (grid[..., -1 - d] + 1) * scale - (0 if align_corners else 0.5)
        inside = (pixel > 0) & (pixel < size - 1) if padding_mode == "border" else torch.ones_like(pixel)
        pixels.append(pixel.clamp(0, size - 1) if padding_mode == "border" else pixel)
        inner.append(inside * scale)
    for offsets in itertools.product((0, 1) if mode == "bilinear" else (None,), repeat=len(sizes)):
        place: Any = 0
        there: Any = 1.0
        weights, slopes = [], []
        for pixel, size, offset, slope in zip(pixels, sizes, offsets, inner, strict=True):
            corner = pixel.round() if offset is None else pixel.floor() + offset
            place = place * size + corner.clamp(0, size - 1).long()
            there = there * ((corner >= 0) & (corner < size))
            weights.append(torch.ones_like(pixel) if offset is None else 1 - (pixel - corner).abs())
            slopes.append(slope * (0 if offset is None else 2 * offset - 1))
        others = [math.prod([w for j, w in enumerate(weights) if j != d]) for d in range(len(sizes))]
        by_position = torch.stack([there * s * o for s, o in zip(slopes, others, strict=True)][::-1], -1)
        yield place.flatten(1).unsqueeze(1), (there * math.prod(weights)).unsqueeze(1), by_position


def _has_kernel(y, input, grid, mode="bilinear", padding_mode="zeros", align_corners=None):
    return input.ndim == 4 and mode in MODES and padding_mode in PADDING


@fused(grid_sample, applies=_has_kernel)
def grid_sample_backward(e, y, saved, wanted, input, grid, mode="bilinear", padding_mode="zeros", align_corners=None):
    how = MODES.index(mode), PADDING.index(padding_mode), bool(align_corners)
    both = aten.grid_sampler_2d_backward(e, input, grid, *how, ["input" in wanted, "grid" in wanted])
    return {"input": both[0], "grid": both[1]}


@rule(
    F.affine_grid,
    examples=[
        call(lambda x: F.affine_grid(x, [x.shape[0], 3, 5, 4], align_corners=False), T(3, 2, 3)),
        call(lambda x: F.affine_grid(x, [x.shape[0], 3, 2, 5, 4], align_corners=True), T(3, 3, 4)),
    ],
)
def affine_grid(y, theta, size, align_corners=None):
    """y = θ (position, 1), for every position of a map of that size"""
    d = theta.shape[1]

    def back(t):
        identity = eye_like(t, d + 1)[None, :d]
        positions = F.affine_grid(identity, [1, 1, *y.shape[1:-1]], align_corners).reshape(-1, d)
        return t.flatten(1, -2).transpose(1, 2) @ torch.cat([positions, torch.ones_like(positions[:, :1])], 1)

    return {"theta": transpose(back)}
