"""Optimizers' steps in plain tensor code, as torch.optim defines them; an update stands where the gradient does."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

State = dict[str, torch.Tensor]


def sgd(
    w: torch.Tensor, update: torch.Tensor, lr: torch.Tensor, state: Mapping[str, Any], momentum: float, decay: float
) -> tuple[torch.Tensor, State]:
    """v <- momentum v + update + decay w; w <- w - lr v (torch.optim.SGD)"""
    v = update + decay * w if decay else update
    if momentum:
        v = momentum * state["momentum_buffer"] + v
    return w - lr * v, {"momentum_buffer": v} if momentum else {}


def adam(
    w: torch.Tensor,
    update: torch.Tensor,
    lr: torch.Tensor,
    state: Mapping[str, Any],
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> tuple[torch.Tensor, State]:
    """m, v <- running means of g = update + decay w and of g²; w <- w - lr m̂ / (√v̂ + eps), the hats without the bias
    of their start at 0 (Kingma and Ba 2015, algorithm 1; torch.optim.Adam)"""
    g = update + decay * w if decay else update
    step = state["step"]
    m = betas[0] * state["exp_avg"] + (1 - betas[0]) * g
    v = betas[1] * state["exp_avg_sq"] + (1 - betas[1]) * g * g
    size = (v / (1 - betas[1] ** step)).sqrt() + eps
    return w - lr / (1 - betas[0] ** step) * m / size, {"exp_avg": m, "exp_avg_sq": v}


OPTIMIZERS: dict[str, tuple[Callable[..., tuple[torch.Tensor, State]], tuple[str, ...]]] = {
    "sgd": (sgd, ("momentum_buffer",)),
    "adam": (adam, ("exp_avg", "exp_avg_sq")),
}
"""name -> the step, and what it keeps for each weight, starting at zero; Adam counts its steps besides"""
