"""Modules and functions that draw random numbers, written in ops that have rules and draw the same.

`DRAWS` is the table, a part of `OPENINGS`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torchvision.ops import stochastic_depth

from fxfeedback.rules.core import as_tuple
from fxfeedback.rules.draws import drawn_slopes, dropout_by_factor, dropped, survival, surviving_channels
from fxfeedback.rules.ops import leaky_by
from fxfeedback.tracing.stand_ins import Shaped, call, lacks_batch


def _dropout(input: fx.Proxy, p: float = 0.5, training: bool = True, inplace: bool = False) -> fx.Proxy:
    """Dropout hands out the mask that it draws; the random stream is F.dropout's, which is another one in place."""
    if not training or p == 0:
        return input
    if p == 1:
        return input * torch.zeros_like(input)  # without a draw
    return (call(dropout_by_factor, input, p, True) if inplace else torch.native_dropout(input, p, True))[0]


def _stochastic_depth(input: fx.Proxy, p: float, mode: str, training: bool = True) -> fx.Proxy:
    return input * call(survival, input, p, mode) if training and p > 0 else input


def _feature_dropout(input: fx.Proxy, p: float = 0.5, training: bool = True, inplace: bool = False) -> fx.Proxy:
    return input * call(surviving_channels, input, p) if training and p > 0 else input


def _dropout_of_maps(ndim: int) -> Callable[..., Any]:
    """Channel dropout of maps that have `ndim` dimensions with their batch."""

    def dropout(input: fx.Proxy, p: float = 0.5, training: bool = True, inplace: bool = False) -> fx.Proxy:
        if lacks_batch(input, ndim):
            return _feature_dropout(input.unsqueeze(0), p, training).squeeze(0)
        return _feature_dropout(input, p, training)

    return dropout


def _alpha_dropout(input: fx.Proxy, p: float = 0.5, training: bool = False, inplace: bool = False) -> fx.Proxy:
    """Who drops out becomes α, SELU's lowest value; then mean 0 and variance 1 again (Klambauer et al. 2017)."""
    if not training or p == 0:
        return input
    return input * torch.zeros_like(input) if p == 1 else _to_alpha(input, torch.empty_like(input), p)


def _feature_alpha_dropout(input: Any, p: float = 0.5, training: bool = False, inplace: bool = False) -> Any:
    """The same of whole channels."""
    if not isinstance(input, Shaped):
        return NotImplemented
    if not training or p in (0, 1):
        return _alpha_dropout(input, p, training)
    return _to_alpha(input, input.new_empty((input.shape[0], input.shape[1]) + (1,) * (input.ndim - 2)), p)


def _to_alpha(input: fx.Proxy, empty: fx.Proxy, p: float) -> fx.Proxy:
    """The input, where a draw of `empty`'s size lets it stay."""
    alpha = -1.7580993408473766
    scale = 1 / math.sqrt((1 + alpha * alpha * p) * (1 - p))
    stays = empty.bernoulli_(1 - p)
    return input * (stays * scale) + ((1 - stays) * (alpha * scale) - alpha * scale * p)


def _gumbel_softmax(logits: fx.Proxy, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Any:
    """A sample of categories, softly; with `hard` one of them, with the gradient of the soft one."""
    noise = -torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_().log()
    soft = ((logits + noise) / tau).softmax(dim)
    if not hard:
        return soft
    one = torch.zeros_like(logits).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
    return one - soft.detach() + soft


def _fractional_max_pool(pool: Callable[..., Any], n: int, with_positions: bool) -> Callable[..., Any]:
    """Pooling over windows of random steps, which a node of its own draws, as torch's function does."""

    def opening(
        input: Any,
        kernel_size: Any,
        output_size: Any = None,
        output_ratio: Any = None,
        return_indices: bool = False,
        _random_samples: Any = None,
    ) -> Any:
        if not isinstance(input, Shaped):
            return NotImplemented
        alone = lacks_batch(input, n + 2)
        x = input.unsqueeze(0) if alone else input
        if output_size is None:
            factors = as_tuple(output_ratio, n)
            output_size = [int(size * factor) for size, factor in zip(input.shape[-n:], factors, strict=True)]
        samples = (
            torch.rand_like(x.flatten(2)[:, :, :1].expand(-1, -1, n)) if _random_samples is None else _random_samples
        )
        values, positions = pool(x, kernel_size, list(as_tuple(output_size, n)), samples)
        if alone:
            values, positions = values.squeeze(0), positions.squeeze(0)
        return (values, positions) if with_positions else values

    return opening


def _rrelu(
    input: fx.Proxy, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Any:
    """A leaky ReLU whose slopes are drawn; in evaluation mode all are their mean."""
    if not training:
        return F.leaky_relu(input, (lower + upper) / 2)
    return leaky_by(input, call(drawn_slopes, input, lower, upper))


DRAWS: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _dropout,
    dropped: functools.partial(_dropout, inplace=True),
    F.dropout1d: _dropout_of_maps(3),
    F.dropout2d: _feature_dropout,  # which takes three dimensions for a batch of sequences
    F.dropout3d: _dropout_of_maps(5),
    torch.feature_dropout: _feature_dropout,
    F.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout: _alpha_dropout,
    F.feature_alpha_dropout: _feature_alpha_dropout,
    torch.feature_alpha_dropout: _feature_alpha_dropout,
    F.gumbel_softmax: _gumbel_softmax,
    F.fractional_max_pool2d: _fractional_max_pool(torch._C._nn.fractional_max_pool2d, 2, False),
    F.fractional_max_pool3d: _fractional_max_pool(torch._C._nn.fractional_max_pool3d, 3, False),
    F.fractional_max_pool2d_with_indices: _fractional_max_pool(torch._C._nn.fractional_max_pool2d, 2, True),
    F.fractional_max_pool3d_with_indices: _fractional_max_pool(torch._C._nn.fractional_max_pool3d, 3, True),
    F.rrelu: _rrelu,
    torch.rrelu: _rrelu,
    stochastic_depth: _stochastic_depth,
}
"""Function -> the same in ops that have rules, or NotImplemented."""
