"""Losses and their errors, the gradients at the logits, in plain tensor code; torch.nn.functional has them by name."""

from collections.abc import Callable

import torch

Loss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def cross_entropy(z: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log softmax(z)[target], mean over samples and positions; its error (softmax(z) - one-hot) / number.

    z: (B, C, ...). target: (B, ...) class ids; where it is -100 nothing is learned. Where all are -100, the mean over
    none is NaN and its error 0, as in torch.
    """
    classes = torch.arange(z.shape[1], device=z.device).reshape(-1, *(1,) * (z.ndim - 2))
    one_hot = (target.unsqueeze(1) == classes).to(z.dtype)
    log_p, number = z.log_softmax(1), one_hot.sum()
    error = (log_p.exp() * one_hot.sum(1, keepdim=True) - one_hot) / number.clamp(min=1)
    return -(one_hot * log_p).sum() / number, error


def mse(z: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(z - target)², mean over all elements; its error 2 (z - target) / number."""
    difference = z - target
    return (difference * difference).mean(), 2 * difference / z.numel()


def bce_with_logits(z: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-target log σ(z) - (1 - target) log(1 - σ(z)), mean over all elements; its error (σ(z) - target) / number."""
    losses = z.relu() - z * target + (-z.abs()).exp().log1p()
    return losses.mean(), (z.sigmoid() - target) / z.numel()


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mse, "bce_with_logits": bce_with_logits}
"""name -> (logits, target) -> loss () and error, shaped like the logits"""
