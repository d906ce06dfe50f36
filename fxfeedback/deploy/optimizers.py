"""Optimizers' steps in plain tensor code, as torch.optim defines them; an update stands where the gradient does."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxfeedback.errors import OptionError

State = dict[str, torch.Tensor]


def sgd(
    w: torch.Tensor,
    update: torch.Tensor,
    lr: torch.Tensor,
    state: Mapping[str, Any],
    momentum: float,
    weight_decay: float,
) -> tuple[torch.Tensor, State]:
    """v <- momentum v + update + weight_decay w; w <- w - lr v (torch.optim.SGD)"""
    v = update + weight_decay * w if weight_decay else update
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
    weight_decay: float,
) -> tuple[torch.Tensor, State]:
    """m, v <- running means of g = update + weight_decay w and of g²; w <- w - lr m̂ / (√v̂ + eps), the hats without the
    bias of their start at 0 (Kingma and Ba 2015, algorithm 1; torch.optim.Adam)"""
    g = update + weight_decay * w if weight_decay else update
    step = state["step"]
    m = betas[0] * state["exp_avg"] + (1 - betas[0]) * g
    v = betas[1] * state["exp_avg_sq"] + (1 - betas[1]) * g * g
    size = (v / (1 - betas[1] ** step)).sqrt() + eps
    return w - lr / (1 - betas[0] ** step) * m / size, {"exp_avg": m, "exp_avg_sq": v}


OPTIMIZERS: dict[str, Callable[..., tuple[torch.Tensor, State]]] = {"sgd": sgd, "adam": adam}
"""Name -> the step."""


def settings_of(
    optimizer: Any, momentum: Any, weight_decay: Any, betas: Any, eps: Any
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings of an optimizer, checked, by torch.optim's names; and what it keeps for each weight.

    What is kept starts at zero; Adam counts its steps as well.

    Raises:
        OptionError: there is no such optimizer, or a setting has a value that torch.optim would not take.
    """
    if optimizer not in list(OPTIMIZERS):
        raise OptionError(f"optimizer={optimizer!r}: choose one of {', '.join(map(repr, OPTIMIZERS))}")
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay), ("eps", eps)):
        if not _is_number(value) or value < 0:
            raise OptionError(f"{name}={value!r}: give a number, finite and not negative")
    pair = betas if isinstance(betas, (tuple, list)) and len(betas) == 2 else ()
    if not pair or not all(_is_number(beta) and 0 <= beta < 1 for beta in pair):
        raise OptionError(f"betas={betas!r}: give two numbers, each at least 0 and less than 1")
    if optimizer == "sgd":
        kept = ("momentum_buffer",) if momentum else ()
        return {"weight_decay": weight_decay, "momentum": momentum}, kept
    if momentum:
        raise OptionError(f"momentum= belongs to sgd; {optimizer} has betas=")
    return {"weight_decay": weight_decay, "betas": tuple(betas), "eps": eps}, ("exp_avg", "exp_avg_sq")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
