"""Automatic mixed precision, as it is at work now."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on, on the tensor's device."""
    device = tensor.device.type
    return _has_autocast(device) and torch.is_autocast_enabled(device)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype of autocast on the tensor's device, where that is on."""
    return torch.get_autocast_dtype(tensor.device.type) if is_autocast(tensor) else None


def same_autocast(device: str) -> Callable[..., Any]:
    """What makes the present autocast again; without its cache, in which weights have lost their history."""
    if not _has_autocast(device):
        return lambda enabled=False: contextlib.nullcontext()
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return functools.partial(torch.autocast, device, dtype=dtype, enabled=enabled, cache_enabled=False)


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
