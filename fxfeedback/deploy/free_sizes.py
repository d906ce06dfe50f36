"""Adaptive pooling of maps whose size is free: torch's exporter would write the windows of the example's size.

Of a dimension with L positions, window i of n has the positions floor(i L / n) to ceil((i + 1) L / n) - 1.
"""

from collections.abc import Sequence
from typing import Any

import torch


def average(x: torch.Tensor, size: Sequence[Any]) -> torch.Tensor:
    """Adaptive average pooling of the last dimensions to `size`, as products with matrices of the windows' shares."""
    for dim, n in enumerate(size, x.ndim - len(size)):
        inside = _windows(n, x.shape[dim], x.device).to(x.dtype)
        x = (x.movedim(dim, -1) @ (inside / inside.sum(1, keepdim=True)).T).movedim(-1, dim)
    return x


def largest(x: torch.Tensor, size: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Adaptive max pooling of the last dimensions to `size`: the values, and where they are in the flattened map."""
    at, stride = torch.zeros_like(x, dtype=torch.long), 1
    for dim in range(x.ndim - 1, x.ndim - 1 - len(size), -1):
        length = x.shape[dim]
        inside = _windows(size[dim - x.ndim], length, x.device)
        windows = torch.where(inside, x.movedim(dim, -1).unsqueeze(-2), -torch.inf)
        values, winners = windows.max(-1)
        x, winners = values.movedim(-1, dim), winners.movedim(-1, dim)
        at = at.gather(dim, winners) + winners * stride
        stride = stride * length
    return x, at


def _windows(n: Any, length: Any, device: torch.device) -> torch.Tensor:
    """(n, length): whether a position is in a window."""
    window, position = torch.arange(n, device=device).unsqueeze(1), torch.arange(length, device=device)
    return (position >= window * length // n) & (position < ((window + 1) * length + n - 1) // n)


def _where_free(pool: Any) -> Any:
    """`pool` for sizes that are not known; where they are, the exporter's own form is right, and faster."""

    def pooled(x: torch.Tensor, size: Sequence[Any]) -> Any:
        free = any(isinstance(n, torch.SymInt) for n in x.shape[-len(size) :])
        everything = all(isinstance(n, int) and n == 1 for n in size)  # which needs no windows
        return pool(x, size) if free and not everything else NotImplemented

    return pooled


_aten = torch.ops.aten
FREE_SIZES = {
    op.default: _where_free(pool)
    for pool, ops in {
        average: (_aten.adaptive_avg_pool1d, _aten.adaptive_avg_pool2d, _aten.adaptive_avg_pool3d),
        largest: (_aten.adaptive_max_pool1d, _aten.adaptive_max_pool2d, _aten.adaptive_max_pool3d),
    }.items()
    for op in ops
}
"""ATen op -> what it is decomposed to in an exported program."""
