"""Functions of ours that stand in a graph as one node each, as torch has none that does the same."""

from typing import Any

import torch
from torch import fx
from torchvision.ops import stochastic_depth


def same(input: torch.Tensor) -> torch.Tensor:
    """The input itself: what is left of dropout in evaluation mode, and of nn.Identity."""
    return input


def survival(input: torch.Tensor, p: float, mode: str) -> torch.Tensor:
    """Stochastic depth's factor: 0 or 1 / (1 - p) per sample ("row") or per batch, drawn as torchvision draws it."""
    samples = input.shape[0] if mode == "row" else 1
    ones = torch.ones((samples,) + (1,) * (input.ndim - 1), dtype=input.dtype, device=input.device)
    return stochastic_depth(ones, p, mode, True)


def surviving_channels(input: torch.Tensor, p: float) -> torch.Tensor:
    """Channel dropout's factor, (N, C, 1, ...): 0 or 1 / (1 - p), drawn as F.dropout2d draws it."""
    return torch.feature_dropout(input.new_ones(input.shape[:2] + (1,) * (input.ndim - 2)), p, True)


def cumulative_momentum(num_batches_tracked: torch.Tensor) -> float:
    """The momentum that makes running statistics a plain average: 1 / number of batches."""
    return 1.0 if num_batches_tracked.is_meta else 1.0 / num_batches_tracked.item()


def put_at(input: Any, index: Any, value: Any) -> Any:
    """A copy of `input` in which `index` has `value`."""
    for argument in (input, value):
        if isinstance(argument, fx.Proxy):
            return argument.tracer.create_proxy("call_function", put_at, (input, index, value), {})
    output = input.clone()
    output[index] = value
    return output


@torch.no_grad()
def advance_(input: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor, momentum: float) -> None:
    """Advance batch norm's running statistics, in place, by the batch `input` (N, C, ...)."""
    var, mean = torch.var_mean(input, [0, *range(2, input.ndim)])
    # Through .data, as the kernel of batch norm itself: no backward pass reads the statistics.
    running_mean.data.lerp_(mean, momentum)
    running_var.data.lerp_(var, momentum)
