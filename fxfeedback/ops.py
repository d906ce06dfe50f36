"""Functions of ours that stand in a graph as one node each, as torch has none that does the same."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torchvision.ops import stochastic_depth


def one_node(function: Callable[..., Any]) -> Callable[..., Any]:
    """The decorated function, which a call with proxies puts into the graph as a whole."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, fx.Proxy):
                return argument.tracer.create_proxy("call_function", call, args, kwargs)
        return function(*args, **kwargs)

    return call


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


@one_node
def put_at(input: Any, index: Any, value: Any) -> Any:
    """A copy of `input` in which `index` has `value`."""
    output = input.clone()
    output[index] = value
    return output


@one_node
def or_zeros(update: Any, rows: Any) -> Any:
    """`update` with so many rows: for an empty batch, torch's convolution makes none."""
    return update if len(update) else update.new_zeros(rows, *update.shape[1:])


@one_node
def laid_out_as(e: Any, x: Any) -> Any:
    """`e` in the memory layout of `x`."""
    return e if e.stride() == x.stride() else torch.empty_like(x, dtype=e.dtype).copy_(e)


@torch.no_grad()
def advance_(input: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor, momentum: float) -> None:
    """Advance batch norm's running statistics, in place, by the batch `input` (N, C, ...)."""
    var, mean = torch.var_mean(input, [0, *range(2, input.ndim)])
    # Through .data, as the kernel of batch norm itself: no backward pass reads the statistics.
    running_mean.data.lerp_(mean, momentum)
    running_var.data.lerp_(var, momentum)
