"""Resizing of maps. It is linear and acts on each dimension by itself: run on the identity it gives its matrix."""

import torch
import torch.nn.functional as F

from fxfeedback.rules.core import along, as_tuple, eye_like, fused, rule, spatial, transpose
from fxfeedback.rules.examples import T, call

aten = torch.ops.aten
IN_TWO_DIMENSIONS = {"linear": "bilinear", "trilinear": "bilinear"}
"""What a mode of maps in one or three dimensions is called in two."""

KERNELS = {
    "nearest": aten.upsample_nearest2d_backward,
    "nearest-exact": aten._upsample_nearest_exact2d_backward,
}
"""Mode -> the kernel of maps in two dimensions. On a CPU those of other modes take many times as long as matrices."""


@rule(
    F.interpolate,
    examples=[
        call(F.interpolate, T(2, 3, 5), 8),
        call(F.interpolate, T(2, 3, 5, 4), scale_factor=2),
        call(F.interpolate, T(2, 3, 5, 4), (8, 3), mode="nearest-exact"),
        call(F.interpolate, T(2, 3, 7), scale_factor=0.6, mode="linear"),
        call(F.interpolate, T(2, 3, 5, 4), (8, 3), mode="bilinear"),
        call(F.interpolate, T(2, 3, 5, 4), scale_factor=(1.7, 0.6), mode="bilinear"),
        call(F.interpolate, T(2, 3, 5, 4), scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
        call(F.interpolate, T(2, 3, 5, 4), (8, 3), mode="bilinear", align_corners=True),
        call(F.interpolate, T(2, 3, 9, 8), (4, 3), mode="bilinear", antialias=True),
        call(F.interpolate, T(2, 3, 5, 4), (8, 3), mode="bicubic"),
        call(F.interpolate, T(2, 3, 5, 4), (1, 7), mode="bicubic", align_corners=True),
        call(F.interpolate, T(2, 3, 9, 8), scale_factor=0.4, mode="bicubic", antialias=True),
        call(F.interpolate, T(2, 3, 5, 7), (3, 2), mode="area"),
        call(F.interpolate, T(2, 2, 3, 4, 5), (5, 3, 7), mode="trilinear", align_corners=False),
        call(F.interpolate, T(2, 2, 3, 4, 5), scale_factor=2),
        call(lambda x: F.interpolate(x[:, :, ::2], x.shape[2:], mode="bilinear"), T(2, 3, 6, 4)),
    ],
)
def interpolate(
    y,
    input,
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
):
    """A map in another size"""
    by_size = scale_factor is None or recompute_scale_factor
    ends = y.shape[2:] if by_size else as_tuple(scale_factor, input.ndim - 2)

    def matrix(i, eye):
        return resized(eye, ends[i], by_size, mode, align_corners, antialias)

    def back(t):
        return along(t, {d: matrix(i, eye_like(t, input.shape[d])) for i, d in enumerate(spatial(input))})

    return {"input": transpose(back)}


def resized(eye, end, by_size, mode, align_corners, antialias):
    """The matrix (size before, size after) of resizing along one axis, to the size `end` or by the factor `end`."""
    how = {"size": (eye.shape[0], end)} if by_size else {"scale_factor": (1.0, end)}
    mode = IN_TWO_DIMENSIONS.get(mode, mode)
    return F.interpolate(eye[None, None], mode=mode, align_corners=align_corners, antialias=antialias, **how)[0, 0]


def interpolate_by_matrices(
    input,
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
):
    """F.interpolate. On a CPU matrices along the axes take a small part of the kernels' time."""
    by_factor = scale_factor is not None and not recompute_scale_factor
    if input.device.type != "cpu" or input.dtype not in (torch.float32, torch.float64) or "linear" not in mode:
        return F.interpolate(input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    if not by_factor and scale_factor is not None:
        size = [int(n * f) for n, f in zip(input.shape[2:], as_tuple(scale_factor, input.ndim - 2), strict=True)]
    ends = as_tuple(scale_factor if by_factor else size, input.ndim - 2)
    ones = [eye_like(input, input.shape[d]) for d in spatial(input)]
    how = (not by_factor, mode, align_corners, antialias)
    matrices = [resized(*each, *how).t() for each in zip(ones, ends, strict=True)]
    return along(input, dict(zip(spatial(input), matrices, strict=True)))


@fused(
    interpolate,
    applies=lambda y, input, size=None, scale_factor=None, mode="nearest", *options, **more: (
        input.ndim == 4 and mode in KERNELS
    ),
)
def interpolate_backward(e, y, saved, wanted, *args, **kwargs):
    given = interpolate.operands(args, kwargs)
    factors = given.get("scale_factor")
    by_size = factors is None or given.get("recompute_scale_factor")
    scales = (None, None) if by_size else as_tuple(factors, 2)
    return {"input": KERNELS[given.get("mode", "nearest")](e, y.shape[2:], given["input"].shape, *scales)}


@rule(
    torch._C._nn._upsample_bilinear2d_aa,
    aten._upsample_bilinear2d_aa,
    examples=[
        call(aten._upsample_bilinear2d_aa, T(2, 3, 9, 8), [4, 3], False),
        call(torch._C._nn._upsample_bilinear2d_aa, T(2, 3, 5, 8), [4, 9], True, 0.8, 1.2),
    ],
)
def upsample_smoothly(y, input, output_size, align_corners, scales_h=None, scales_w=None):
    """A map in another size, bilinear, over windows of as many positions as become one"""

    def along_one(i, eye):
        scale = (scales_h, scales_w)[i]
        sizes = [eye.shape[0], y.shape[2 + i]]
        scales = [None, None] if scale is None else [1.0, scale]
        return aten._upsample_bilinear2d_aa(eye[None, None], sizes, align_corners, *scales)[0, 0]

    def back(t):
        return along(t, {d: along_one(i, eye_like(t, input.shape[d])) for i, d in enumerate(spatial(input))})

    return {"input": transpose(back)}
