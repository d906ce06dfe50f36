"""What small sources make of a large destination, with a backward pass that keeps only what is small.

    below = min(resize(z), 0)                          the source's channels at the destination's size
    m     = Σ resize(low) + below weightᵀ, + rest      low, weight: see `Modulation.enlarged`; rest: what vectors make
    out   = relu(y + y m), or relu(y + m)

All of it runs in slices of the batch, forward and backward. The backward pass computes `below` and m again.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fxfeedback.graph.layout import Layout
from fxfeedback.lrm.resizing import channels_last, resize, resize_by_axis, resize_transposed
from fxfeedback.tracing.autocast import autocast_dtype, is_autocast

Tensors = Sequence[Any]
"""y; rest and what modulates class tokens, or None; then z, low and weight of each source."""


@dataclass(frozen=True)
class How:
    """destination: its layout; rectified: whether a ReLU follows; added: m is added and not multiplied; modes: how each
    source is resized; samples: at a time."""

    destination: Layout
    rectified: bool
    added: bool
    modes: tuple[str, ...]
    samples: int


def enlarged(how: How, *tensors: torch.Tensor | None) -> torch.Tensor:
    """The destination modulated; it keeps its dtype.

    Args:
        how: what is no tensor.
        tensors: see `Tensors`; all have y's batch, or one for all.
    """
    return _Enlarged.apply(how, *tensors) if torch.is_grad_enabled() else _forward(how, tensors)


class _Enlarged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: How, *tensors: torch.Tensor | None) -> torch.Tensor:
        ctx.how = how
        ctx.save_for_backward(*tensors)
        return _forward(how, tensors)

    @staticmethod
    def backward(ctx: Any, error: torch.Tensor) -> Any:
        errors = _differentiable if torch.is_grad_enabled() else _backward
        with _exact(error):
            return None, *errors(ctx.how, error, ctx.saved_tensors)


def working_dtype(y: torch.Tensor) -> torch.dtype:
    """The dtype that m is computed in: autocast's, or y's own."""
    low = autocast_dtype(y)
    return y.dtype if low is None or y.dtype == torch.float64 else low


def _exact(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Without autocast: everything has the dtype already that it is computed in."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else contextlib.nullcontext()


def _slices(samples: int, batch: int, tensors: Tensors) -> Iterator[list[Any]]:
    """The tensors, some samples at a time; a weight and what is one for all samples, always."""
    for start in range(0, batch, samples):
        yield [x if x is None or len(x) == 1 else x[start : start + samples] for x in tensors]


def _forward(how: How, tensors: Tensors) -> torch.Tensor:
    y = tensors[0]
    out = torch.empty_like(y)
    with torch.no_grad(), _exact(y):
        for into, *part in _slices(how.samples, len(y), (out, *tensors)):
            _with(how, part[0], _modulation(how, part)[0], into)
            if how.rectified:
                into.relu_()
    return out


def _with(how: How, y: torch.Tensor, m: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return torch.add(y, m, out=out) if how.added else torch.addcmul(y, y, m, out=out)


def _modulation(how: How, tensors: Tensors) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """m in y's layout, and as y lies in memory; and `below` of each source."""
    y, rest, of_class, *terms = tensors
    total: Any = None
    size, belows = how.destination.sizes_of(y), []
    last = how.destination.to_map(y)[0].stride(1) == 1
    for z, low, weight, mode in zip(terms[::3], terms[1::3], terms[2::3], how.modes, strict=True):
        whole = resize(channels_last(low), size, mode) if last else resize_by_axis(low.contiguous(), size, mode)
        whole, weight = whole if total is None else total + whole, weight.expand(len(z), -1, -1)
        belows.append(_below(z, size, mode))
        rows = _rows(belows[-1])
        total = _added(_rows(whole), rows, weight.mT).mT if last else _added(whole.flatten(2), weight, rows.mT)
        total = total.unflatten(2, size)
    m = how.destination.from_map(total, of_class, how.destination.class_tokens(y))
    return m if rest is None else m + rest, belows


def _added(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a b, in place where no derivatives are wanted."""
    return torch.baddbmm(total, a, b, out=None if torch.is_grad_enabled() else total)


def _below(z: torch.Tensor, size: Sequence[int], mode: str) -> torch.Tensor:
    """min(resize(z), 0). Of the clamps only this one has the same derivative at 0, none, in every version of torch."""
    return F.hardtanh(resize(channels_last(z), size, mode), -math.inf, 0.0, inplace=not torch.is_grad_enabled())


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, ...) as (B, positions, C)"""
    return x.flatten(2).mT


def _differentiable(how: How, error: torch.Tensor, tensors: Tensors) -> list[Any]:
    """The errors of the tensors, by autograd, which differentiates them once more."""
    tensors = [None if x is None else x.view_as(x) for x in tensors]  # apart, where one is made of another
    value = _with(how, tensors[0], _modulation(how, tensors)[0]).to(tensors[0].dtype)
    value = torch.relu(value) if how.rectified else value
    wanted = [x for x in tensors if x is not None and x.requires_grad]
    errors = iter(torch.autograd.grad(value, wanted, error, create_graph=True))
    return [next(errors) if x is not None and x.requires_grad else None for x in tensors]


def _backward(how: How, error: torch.Tensor, tensors: Tensors) -> list[Any]:
    """The errors of the tensors, slice by slice; of weights and of what is one for all samples they are summed."""
    y, n = tensors[0], len(tensors)
    errors = [None if x is None else torch.zeros_like(x, dtype=_wide(x) if len(x) == 1 else None) for x in tensors[1:]]
    errors = [torch.empty_like(y), *errors]
    for of_out, *both in _slices(how.samples, len(y), (error, *errors, *tensors)):
        _add_errors(how, of_out, both[n:], both[:n])
    return errors


def _wide(x: torch.Tensor) -> torch.dtype:
    """The dtype for sums."""
    return torch.promote_types(x.dtype, torch.float32)


def _add_errors(how: How, error: torch.Tensor, tensors: Tensors, errors: Tensors) -> None:
    """Of some samples, given the error of `out`: the error of y is set, and those of all others are added."""
    y, rest, of_class, *terms = tensors
    m, belows = _modulation(how, tensors)
    if how.rectified:
        error = torch.ops.aten.threshold_backward(error, _with(how, y, m), 0)
    if how.added:
        errors[0].copy_(error)
        error = error.to(m.dtype)
    else:
        torch.addcmul(error, error, m, out=errors[0])
        error = (error * y).to(m.dtype)
    if rest is not None:
        errors[1].add_(error.sum_to_size(rest.shape))
    if of_class is not None:
        errors[2].add_(error[:, : how.destination.class_tokens(y)].sum(1).sum_to_size(of_class.shape))
    error, _ = how.destination.to_map(error)
    parts = belows, terms[::3], terms[1::3], terms[2::3], errors[3::3], errors[4::3], errors[5::3], how.modes
    for below, z, low, weight, of_z, of_low, of_weight, mode in zip(*parts, strict=True):
        of_low.copy_(resize_transposed(error, low.shape[2:], mode))
        of_weight.add_(torch.bmm(error.flatten(2), _rows(below)).sum(0, dtype=of_weight.dtype))
        of_below = torch.bmm(_rows(error), weight.expand(len(z), -1, -1)).mT.unflatten(2, below.shape[2:])
        torch.ops.aten.hardtanh_backward.grad_input(of_below, below, -math.inf, 0.0, grad_input=of_below)
        of_z.copy_(resize_transposed(of_below, z.shape[2:], mode))
