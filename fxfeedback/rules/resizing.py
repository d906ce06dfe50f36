"""Resizing of maps. It is linear and acts on each dimension by itself: run on the identity it gives its matrix."""

import torch
import torch.nn.functional as F

from fxfeedback.rules.core import along, as_tuple, eye_like, fused, rule, spatial, transpose
from fxfeedback.rules.examples import T, call

aten = torch.ops.aten
IN_TWO_DIMENSIONS = {"linear": "bilinear", "trilinear": "bilinear"}
"""What a mode of maps in one or three dimensions is called in two."""

KERNELS = {
    ("nearest", False): aten.upsample_nearest2d_backward,
    ("nearest-exact", False): aten._upsample_nearest_exact2d_backward,
    ("bilinear", False): aten.upsample_bilinear2d_backward,
    ("bicubic", False): aten.upsample_bicubic2d_backward,
    ("bilinear", True): aten._upsample_bilinear2d_aa_backward,
    ("bicubic", True): aten._upsample_bicubic2d_aa_backward,
}
"""(mode, antialias) -> the kernel of maps in two dimensions."""


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
    factors = as_tuple(scale_factor, input.ndim - 2)

    def resized(i, eye):
        sizes = {"size": (input.shape[2 + i], y.shape[2 + i])} if by_size else {"scale_factor": (1.0, factors[i])}
        one_map = IN_TWO_DIMENSIONS.get(mode, mode)
        return F.interpolate(eye[None, None], mode=one_map, align_corners=align_corners, antialias=antialias, **sizes)[
            0, 0
        ]

    def back(t):
        return along(t, {d: resized(i, eye_like(t, input.shape[d])) for i, d in enumerate(spatial(input))})

    return {"input": transpose(back)}


@fused(
    interpolate,
    applies=lambda y, input, size=None, scale_factor=None, mode="nearest", *options, **more: (
        input.ndim == 4 and mode != "area"
    ),
)
def interpolate_backward(e, y, saved, wanted, *args, **kwargs):
    given = interpolate.operands(args, kwargs)
    mode, factors = given.get("mode", "nearest"), given.get("scale_factor")
    corners = [] if mode.startswith("nearest") else [bool(given.get("align_corners"))]
    by_size = factors is None or given.get("recompute_scale_factor")
    kernel = KERNELS[mode, given.get("antialias", False)]
    scales = (None, None) if by_size else as_tuple(factors, 2)
    return {"input": kernel(e, y.shape[2:], given["input"].shape, *corners, *scales)}


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
