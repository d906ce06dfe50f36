"""The LRM block: how one connection modulates its destination (Konkle and Alvarez, "Cognitive Steering in Deep Neural
Networks via Long-Range Modulatory Feedback Connections", NeurIPS 2023).

    z    = resize(tanh(N(a)))             a: the source's activation; resized to the destination's present size
    P(z) = neg_scale z where z < 0, pos_scale z elsewhere
    m    = conv1x1(P(z))                  the source's channels -> the destination's

The destination y becomes relu(y + y Σ m), the sum running over its connections (see rewrite.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxfeedback.errors import OptionError

ORDERS = ("norm-squash-resize", "resize-norm-squash")
NORMS = ("layer", "channel")
RESIZES = ("bilinear", "bicubic", "area")
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def resize(x: torch.Tensor, size: Sequence[int], mode: str = "bilinear") -> torch.Tensor:
    """Resize a map (B, C, ...) to `size`: "bilinear" (linear in 1, trilinear in 3 dimensions), "bicubic" or "area".

    The corners are aligned, as in the published models; a map resized to one position thus takes its corner.
    """
    if mode == "area":
        return F.interpolate(x, size, mode="area")
    mode = LINEAR[x.ndim - 2] if mode == "bilinear" else mode
    return F.interpolate(x, size, mode=mode, align_corners=True)


class Norm(nn.Module):
    """Layer norm of a vector or a map, eps 1e-5.

    over "layer": over (C, ...) together; weight and bias are (C, *size), resized to the map's present size.
    over "channel": over the channels of each position; weight and bias are (C,). A vector has no other norm.
    """

    def __init__(self, channels: int, size: Sequence[int], over: str) -> None:
        super().__init__()
        self.over = over if size else "channel"
        shape = (channels, *size) if self.over == "layer" else (channels,)
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """a: (B, C, ...)."""
        if self.over == "channel":
            return F.layer_norm(a.movedim(1, -1), self.weight.shape, self.weight, self.bias).movedim(-1, 1)
        weight, bias = (resize(p.unsqueeze(0), a.shape[2:]).squeeze(0) for p in (self.weight, self.bias))
        return F.layer_norm(a, a.shape[1:], weight, bias)


class Modulation(nn.Module):
    """The block of one connection.

    Args:
        channels: of source and destination.
        source_size: spatial size of the source, () for a vector.
        size: spatial size of the destination when the model is built, () for a vector.
        order: "norm-squash-resize", or "resize-norm-squash".
        norm: "layer", or "channel".
        resize: "bilinear", "bicubic" or "area".
    """

    def __init__(
        self,
        channels: tuple[int, int],
        source_size: Sequence[int],
        size: Sequence[int],
        order: str = "norm-squash-resize",
        norm: str = "layer",
        resize: str = "bilinear",
    ) -> None:
        super().__init__()
        for name, value, choices in (("order", order, ORDERS), ("norm", norm, NORMS), ("resize", resize, RESIZES)):
            if value not in choices:
                raise OptionError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}")
        self.order, self.resize = order, resize
        self.of_vector, self.onto_vector = not source_size, not size
        one_position = all(n == 1 for n in source_size)
        positions = [1] * len(source_size) if self.onto_vector else list(size)
        self.norm = Norm(channels[0], () if one_position else positions, norm)
        self.neg_scale = nn.Parameter(torch.ones(1))
        self.pos_scale = nn.Parameter(torch.ones(1))
        self.modulation = nn.Conv2d(channels[0], channels[1], 1)

    def forward(self, a: torch.Tensor, y: torch.Tensor, strength: Any = None) -> torch.Tensor:
        """The connection's share of the modulation of y.

        Args:
            a: the source's activation, (B, C) or (B, C, ...).
            y: the destination, of which only the size matters.
            strength: factors on the two scales, a tensor (2,): negative, positive.

        Returns:
            (B, C_y), or (B, C_y, ...) that broadcasts to y.
        """
        z = a[(...,) + (None,) * max(y.ndim - 2, 1)] if self.of_vector else a
        size = [1] * (z.ndim - 2) if self.onto_vector else y.shape[2:]
        if self.order == "norm-squash-resize":
            z = self._resize(torch.tanh(self.norm(z)), size)
        else:
            z = torch.tanh(self.norm(self._resize(z, size)))
        neg, pos = self.neg_scale, self.pos_scale
        if strength is not None:
            neg, pos = neg * strength[0], pos * strength[1]
        m = self._project(torch.where(z < 0, neg * z, pos * z))
        return m.flatten(1) if self.onto_vector else m

    def _resize(self, z: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return z if self.of_vector else resize(z, size, self.resize)  # a vector is broadcast

    def _project(self, z: torch.Tensor) -> torch.Tensor:
        """conv1x1 for maps of any number of dimensions."""
        weight = self.modulation.weight.flatten(1)
        if z.ndim == 4:
            return self.modulation(z)
        return F.linear(z.movedim(1, -1), weight, self.modulation.bias).movedim(-1, 1)
