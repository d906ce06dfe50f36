"""Functions of ours that draw random numbers as torch's functions do: of each generator the same, on every device."""

from typing import Any

import torch
import torch.nn.functional as F
from torchvision.ops import stochastic_depth


def drawn_like(input: torch.Tensor, p: Any = 0.5, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """x.bernoulli_(p) out of place: x.bernoulli(p) draws in another order where x is not contiguous, and x.bernoulli()
    takes x for p."""
    return torch.empty_like(input).bernoulli_(p, generator=generator)


def dropout_by_factor(input: torch.Tensor, p: float, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.native_dropout, drawn as F.dropout(x, p, inplace=True) draws it: CUDA has a kernel for the other only."""
    stays = torch.empty_like(input).bernoulli_(1 - p)
    return input * (stays / (1 - p)), stays.bool()


DROPOUTS = (torch.native_dropout, dropout_by_factor)
"""What dropout that is on opens into: each returns its value and its mask."""


def dropped(input: Any, p: float, train: bool) -> Any:
    """torch.dropout_ out of place: it opens as F.dropout with inplace=True does."""
    return F.dropout(input.clone(), p, train, inplace=True)


def survival(input: torch.Tensor, p: float, mode: str) -> torch.Tensor:
    """Stochastic depth's factor: 0 or 1 / (1 - p) per sample ("row") or per batch, drawn as torchvision draws it."""
    samples = input.shape[0] if mode == "row" else 1
    ones = torch.ones((samples,) + (1,) * (input.ndim - 1), dtype=input.dtype, device=input.device)
    return stochastic_depth(ones, p, mode, True)


def surviving_channels(input: torch.Tensor, p: float) -> torch.Tensor:
    """Channel dropout's factor, (N, C, 1, ...): 0 or 1 / (1 - p), drawn as F.dropout2d draws it."""
    return torch.feature_dropout(input.new_ones(input.shape[:2] + (1,) * (input.ndim - 2)), p, True)


def drawn_slopes(input: torch.Tensor, lower: float, upper: float) -> torch.Tensor:
    """RReLU's factors: 1 where x > 0, elsewhere drawn between the bounds, as F.rrelu draws them."""
    slopes = torch.zeros_like(input, memory_format=torch.contiguous_format)  # which the kernel takes it for
    torch.ops.aten.rrelu_with_noise(input.detach(), slopes, lower, upper, True)
    return slopes
