"""How maps are resized, and the transpose of that."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fxfeedback.graph.layout import LINEAR

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def resize(x: torch.Tensor, size: Sequence[int], mode: str = "bilinear") -> torch.Tensor:
    """Resize a map (B, C, ...) to `size`: "bilinear" (linear in 1, trilinear in 3 dimensions), "bicubic" or "area".

    The corners are aligned, as in the published models; a map resized to one position thus takes its corner.
    """
    x = channels_last(x) if x.is_cuda is True and x.ndim == 4 else x  # a proxy is not True
    if mode == "area":
        return F.interpolate(x, size, mode="area")
    mode = LINEAR[x.ndim - 2] if mode == "bilinear" else mode
    return F.interpolate(x, size, mode=mode, align_corners=True)


def channels_last(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A map with its channels last in memory, which resizes fastest: on a GPU a thread makes one value, and with
    channels first those of one position in the whole batch."""
    return x.to(dtype or x.dtype, memory_format=CHANNELS_LAST.get(x.ndim, torch.contiguous_format))


def resize_by_axis(x: torch.Tensor, size: Sequence[int], mode: str = "bilinear") -> torch.Tensor:
    """`resize`, one axis after the other by a matrix: faster where the channels are first in memory."""
    return _along(x, [_matrix(n, m, mode, x).t() for n, m in zip(x.shape[2:], size, strict=True)])


def resize_transposed(error: torch.Tensor, size: Sequence[int], mode: str = "bilinear") -> torch.Tensor:
    """The error of a map (B, C, *size), from that of the map resized.

    By matrices, as fast as torch's kernels on a CPU; those on a GPU add value by value, in the precision of the map
    and in any order.
    """
    return _along(error, [_matrix(n, m, mode, error) for n, m in zip(size, error.shape[2:], strict=True)])


def _along(x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """A map times a matrix along each of its axes; it stays as it lies in memory."""
    last = x.ndim in CHANNELS_LAST and x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim])
    x = x.movedim(1, -1) if last else x
    for dim, matrix in enumerate(matrices, 1 if last else 2):
        shape = (*x.shape[:dim], len(matrix), *x.shape[dim + 1 :])
        if dim == x.ndim - 1:
            x = (x.flatten(0, -2) @ matrix.t()).view(shape)
        else:
            x = x.reshape(x.shape[:dim].numel(), x.shape[dim], -1)
            x = torch.bmm(matrix.expand(x.shape[0], *matrix.shape), x).view(shape)
    return x.movedim(-1, 1) if last else x


def _matrix(n: int, resized: int, mode: str, like: torch.Tensor) -> torch.Tensor:
    """(n, resized), the transpose of resizing along one axis."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    unit = torch.eye(n, dtype=dtype, device=like.device)[None, :, :, None]
    return resize(unit, (resized, 1), mode)[0, :, :, 0].to(like.dtype)
