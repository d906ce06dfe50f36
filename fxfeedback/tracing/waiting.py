"""Which values a call may look at. For a GPU's it would have to wait, and could not be captured as a CUDA graph."""

from typing import Any

import torch

AWAY = ("cuda", "meta")
"""Types of devices whose values a call does not look at."""


def at_hand(tensor: torch.Tensor) -> bool:
    """Whether a call may look at the tensor's values."""
    return tensor.device.type not in AWAY


def is_captured(tensor: torch.Tensor) -> bool:
    """Whether what is done with the tensor now becomes a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def moved(tensor: torch.Tensor, given: Any, device: torch.device) -> torch.Tensor:
    """A tensor, made of what was given, on a device. One or two numbers are written there: copying them would wait."""
    if isinstance(given, (int, float)):
        return torch.full((), given, dtype=tensor.dtype, device=device)
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(one, (int, float)) for one in given):
        return torch.stack([torch.full((), one, dtype=tensor.dtype, device=device) for one in given])
    return tensor.to(device)
