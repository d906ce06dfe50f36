"""Maps that are read at computed positions: spatial transformers, warping by optical flow.

An instruction passes to the map, not to the positions, as in attention to the values. Where the positions are not known
it goes evenly to all of them.
"""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F

from fxfeedback.rules.core import eye_like, fused, known, nothing, roles, rule, spatial, transpose, without_derivative
from fxfeedback.rules.examples import T, call

aten = torch.ops.aten
MODES, PADDING = ["bilinear", "nearest", "bicubic"], ["zeros", "border", "reflection"]  # as torch's kernels count them


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
        call(_moved(align_corners=True, padding_mode="reflection"), T(2, 3, 5, 4), T(2, 2)),
        call(_moved(align_corners=False, padding_mode="reflection"), T(2, 3, 5, 4), T(2, 2)),
        call(_moved(align_corners=False, mode="bicubic"), T(2, 3, 5, 4), T(2, 2)),
        call(_moved(align_corners=True, mode="bicubic", padding_mode="reflection"), T(2, 3, 5, 4), T(2, 2)),
    ],
)
def grid_sample(y, input, grid, mode="bilinear", padding_mode="zeros", align_corners=None):
    """y = Σ over the corners around a position of weight * x there; outside of the map 0, the border's value, or
    that of the position reflected at the border"""
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
    lines = []
    for d, size in enumerate(sizes):
        scale = (size - 1) / 2 if align_corners else size / 2
        pixel, slope = (grid[..., -1 - d] + 1) * scale - (0 if align_corners else 0.5), scale
        if mode != "bicubic":  # which moves the corners into the map, and not the position
            pixel, inner = into_map(pixel, size, padding_mode, align_corners)
            slope = inner * scale
        corners = WEIGHTS[mode](pixel)
        if mode == "bicubic":
            corners = [(into_map(corner, size, padding_mode, align_corners)[0], w, by) for corner, w, by in corners]
        lines.append([(corner, size, weight, by * slope) for corner, weight, by in corners])
    for corners in itertools.product(*lines):
        place: Any = 0
        there: Any = 1.0
        for corner, size, _, _ in corners:
            place = place * size + corner.clamp(0, size - 1).long()
            there = there * ((corner >= 0) & (corner < size))
        weights = [weight for _, _, weight, _ in corners]
        others = [math.prod([w for j, w in enumerate(weights) if j != d]) for d in range(len(sizes))]
        slopes = [there * slope * o for (_, _, _, slope), o in zip(corners, others, strict=True)]
        yield (
            place.flatten(1).unsqueeze(1),
            (there * math.prod(weights)).unsqueeze(1),
            torch.stack(slopes[::-1], -1),
        )


def into_map(pixel, size, padding_mode, align_corners):
    """Positions along a dimension, moved into the map where the padding says so, and the slope of that."""
    if padding_mode == "zeros":
        return pixel, torch.ones_like(pixel)
    slope: Any = 1
    if padding_mode == "reflection":
        low, span = (0, size - 1) if align_corners else (-0.5, size)
        if span == 0:
            return torch.zeros_like(pixel), torch.zeros_like(pixel)
        turns = torch.floor((pixel - low).abs() / span)
        beyond = (pixel - low).abs() - turns * span
        odd = turns - 2 * torch.floor(turns / 2) > 0
        slope = torch.where(pixel < low, -1.0, 1.0) * torch.where(odd, -1.0, 1.0)
        pixel = torch.where(odd, span - beyond, beyond) + low
    return pixel.clamp(0, size - 1), slope * ((pixel > 0) & (pixel < size - 1))


def nearest(pixel):
    """The corners around positions along a dimension, their weights, and the weights' slopes: only one corner."""
    return [(pixel.round(), torch.ones_like(pixel), torch.zeros_like(pixel))]


def linear(pixel):
    """The same of two corners."""
    corners = [(pixel.floor() + offset, 2 * offset - 1) for offset in (0, 1)]
    return [(corner, 1 - (pixel - corner).abs(), slope) for corner, slope in corners]


def cubic(pixel):
    """The same of four corners; Keys (1981) with a = -3/4."""
    a, t = -0.75, pixel - pixel.floor()

    def near(x):
        return ((a + 2) * x - (a + 3)) * x * x + 1, (3 * (a + 2) * x - 2 * (a + 3)) * x

    def far(x):
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a, (3 * a * x - 10 * a) * x + 8 * a

    weights = [(*far(t + 1), 1), (*near(t), 1), (*near(1 - t), -1), (*far(2 - t), -1)]
    return [(pixel.floor() + i - 1, weight, sign * slope) for i, (weight, slope, sign) in enumerate(weights)]


WEIGHTS = {"bilinear": linear, "nearest": nearest, "bicubic": cubic}


@rule(
    torch.grid_sampler,
    torch.grid_sampler_2d,
    torch.grid_sampler_3d,
    examples=[
        call(lambda x: torch.grid_sampler_2d(x, x[:, :2].movedim(1, -1).tanh(), 0, 2, False), T(2, 3, 5, 4)),
        call(lambda x: torch.grid_sampler_3d(x, x[:, :3].movedim(1, -1).tanh(), 0, 1, True), T(2, 3, 2, 3, 4)),
    ],
)
def grid_sampler(y, input, grid, interpolation_mode, padding_mode, align_corners):
    """grid_sample, whose modes are numbers"""
    return grid_sample.table(y, input, grid, MODES[interpolation_mode], PADDING[padding_mode], align_corners)


def _has_kernel(y, input, grid, mode="bilinear", padding_mode="zeros", align_corners=None):
    return input.ndim == 4


@fused(grid_sample, applies=_has_kernel)
def grid_sample_backward(e, y, saved, wanted, input, grid, mode="bilinear", padding_mode="zeros", align_corners=None):
    how = MODES.index(mode), PADDING.index(padding_mode), bool(align_corners)
    both = _grid_sampler_2d_error(e, input, grid, *how, ["input" in wanted, "grid" in wanted])
    return {"input": both[0], "grid": both[1]}


def _by_formula(e, input, grid, mode, padding, align_corners, wanted):
    operands = grid_sample.table(e, input, grid, MODES[mode], PADDING[padding], align_corners)
    return operands["input"].error(e), operands["grid"].error(e)


_grid_sampler_2d_error = without_derivative(aten.grid_sampler_2d_backward, _by_formula)  # torch 2.11 cannot


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
