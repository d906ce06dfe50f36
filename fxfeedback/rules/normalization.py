"""Batch, layer, group and instance norm: y = γ (x - μ) / √(σ² + ε) + β, over different sets of positions.

The instruction is scaled by γ (batch norm: γ / √(running σ² + ε)); the error pass is exact. Norms that only divide
come last.
"""

import functools

import torch
import torch.nn.functional as F

from fxfeedback.rules.core import (
    along,
    as_is,
    channelwise,
    dtype_of,
    eye_like,
    fused,
    nothing,
    roles,
    rule,
    spatial,
    transpose,
    update,
)
from fxfeedback.rules.examples import C, T, call
from fxfeedback.rules.ops import BOUNDS_PASS, laid_out_as, mean_over_processes, synced_batch_norm, taking_errors_as
from fxfeedback.rules.reduction import slope_of_norm


def mean_over(x, dims):
    """The mean over `dims`, which are kept."""
    return x.mean(dims, keepdim=True)


def summed(x, dims):
    """The sum over `dims`, which may be none."""
    return x.sum(dims) if dims else x


def standardized(input, dims, eps, mean=mean_over):
    """(x - μ) / √(σ² + ε) and 1 / √(σ² + ε), statistics over `dims`."""
    centred = input - mean(input, dims)
    rstd = (mean(centred * centred, dims) + eps).rsqrt()
    return centred * rstd, rstd


def through_statistics(e, statistics, dims, mean=mean_over):
    """The error through x̂ = (x - μ) / σ, where μ and σ depend on x: e less its mean and its part along x̂, over σ.

    It is the chain rule of Ioffe and Szegedy (2015), section 3, with its sums collected.
    """
    normal, rstd = statistics
    return (e - mean(e, dims) - normal * mean(e * normal, dims)) * rstd


@rule(
    F.batch_norm,
    torch.batch_norm,
    channels=1,
    examples=[
        call(F.batch_norm, T(5, 3, 4, 2), C(3), C(3), T(3), T(3)),
        call(F.batch_norm, T(5, 3, 4, 2), C(3), C(3), T(3), T(3), training=True),
        call(F.batch_norm, T(5, 3), C(3), C(3)),
        call(F.batch_norm, T(5, 3, 4), None, None, T(3), T(3), training=True, eps=1e-2),
    ],
)
def batch_norm(y, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """Statistics over the batch and positions in training, the running ones otherwise"""
    if has_none(input):
        return {
            "input": transpose(as_is),
            "weight": update(lambda e: torch.zeros_like(weight)),
            "bias": update(lambda e: torch.zeros_like(bias)),
            "running_mean": update(nothing),
            "running_var": update(nothing),
        }
    return batch_norm_over(mean_over, input, running_mean, running_var, weight, training, eps)


def has_none(x):
    """Whether a tensor has no values: the fused kernel would divide by their number."""
    return any(isinstance(size, int) and size == 0 for size in x.shape)


@rule(
    synced_batch_norm,
    channels=1,
    examples=[
        call(synced_batch_norm, T(5, 3, 4, 2), C(3), C(3), T(3), T(3), training=True),
        call(synced_batch_norm, T(5, 3), None, None, training=True),
    ],
)
def synced(y, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """Batch norm with the statistics of all processes' batches in training: nn.SyncBatchNorm"""
    return batch_norm_over(mean_over_processes, input, running_mean, running_var, weight, training, eps)


def batch_norm_over(mean, input, running_mean, running_var, weight, training, eps):
    """Batch norm's table; `mean` says over whose batches."""
    dims = [0, *spatial(input)]
    channels = functools.partial(channelwise, ndim=input.ndim)

    @functools.cache
    def normal():
        if training:
            return standardized(input, dims, eps, mean)
        rstd = channels((running_var + eps).rsqrt())
        return (input - channels(running_mean)) * rstd, rstd

    def scaled(e):
        return e if weight is None else e * channels(weight)

    def instruct(t):
        return scaled(t if running_var is None else t * channels((running_var + eps).rsqrt()))

    def error(e):
        if training:
            return through_statistics(scaled(e), normal(), dims, mean)
        return instruct(e)

    return {
        "input": roles(instruct=instruct, error=error),
        "weight": update(lambda e: (e * normal()[0]).sum(dims)),
        "bias": update(lambda e: e.sum(dims)),
    }


def _native_batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    y = torch.native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
    return taking_errors_as(y[0], input), (y[1], y[2])  # empty in evaluation mode, where CUDA's kernel wants them too


@fused(batch_norm, forward=_native_batch_norm, applies=lambda y, *call, **options: not has_none(y))
def batch_norm_backward(
    e,
    y,
    saved,
    wanted,
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    mask = [name in wanted for name in ("input", "weight", "bias")]
    e = laid_out_as(e, input)  # the CPU's kernel misreads another layout, where sizes of 1 leave it open
    results = torch.ops.aten.native_batch_norm_backward(
        e, input, weight, running_mean, running_var, *saved, training, eps, mask
    )
    return {name: results[i] for i, name in enumerate(("input", "weight", "bias")) if name in wanted}


@rule(
    F.layer_norm,
    torch.layer_norm,
    channels=-1,
    examples=[
        call(F.layer_norm, T(4, 5, 6), (6,), T(6), T(6)),
        call(F.layer_norm, T(4, 5, 6), (5, 6), T(5, 6), T(5, 6), eps=1e-2),
        call(F.layer_norm, T(4, 6), (6,)),
    ],
)
def layer_norm(y, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """Statistics over the last dimensions, those of normalized_shape"""
    over = list(range(input.ndim - len(normalized_shape), input.ndim))
    others = list(range(input.ndim - len(normalized_shape)))
    normal = functools.cache(lambda: standardized(input, over, eps))

    def scaled(e):
        return e if weight is None else e * weight

    return {
        "input": roles(instruct=scaled, error=lambda e: through_statistics(scaled(e), normal(), over)),
        "weight": update(lambda e: summed(e * normal()[0], others)),
        "bias": update(lambda e: summed(e, others)),
    }


def _native_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    y = torch.native_layer_norm(input, normalized_shape, weight, bias, eps)
    return y[0], (y[1], y[2])


@fused(layer_norm, forward=_native_layer_norm)
def layer_norm_backward(e, y, saved, wanted, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    mask = [name in wanted for name in ("input", "weight", "bias")]
    results = torch.ops.aten.native_layer_norm_backward(e, input, normalized_shape, *saved, weight, bias, mask)
    return {name: results[i] for i, name in enumerate(("input", "weight", "bias")) if name in wanted}


@rule(
    F.group_norm,
    torch.group_norm,
    channels=1,
    examples=[
        call(F.group_norm, T(4, 6, 5, 3), 3, T(6), T(6)),
        call(F.group_norm, T(4, 6, 5), 2),
        call(F.group_norm, T(4, 6), 2, T(6), T(6)),
    ],
)
def group_norm(y, input, num_groups, weight=None, bias=None, eps=1e-5):
    """Statistics over each group of channels and all positions of a sample"""
    channels = functools.partial(channelwise, ndim=input.ndim)
    within = list(range(2, input.ndim + 1))
    outside = [0, *spatial(input)]

    def grouped(x):
        return x.unflatten(1, (num_groups, -1))

    normal = functools.cache(lambda: standardized(grouped(input), within, eps))

    def scaled(e):
        return e if weight is None else e * channels(weight)

    return {
        "input": roles(
            instruct=scaled,
            error=lambda e: through_statistics(grouped(scaled(e)), normal(), within).flatten(1, 2),
        ),
        "weight": update(lambda e: (e * normal()[0].flatten(1, 2)).sum(outside)),
        "bias": update(lambda e: e.sum(outside)),
    }


@rule(
    F.instance_norm,
    torch.instance_norm,
    channels=1,
    examples=[
        call(F.instance_norm, T(2, 3, 4, 5), None, None, T(3), T(3)),
        call(F.instance_norm, T(2, 3, 4), C(3), C(3), T(3), use_input_stats=False, eps=1e-2),
        call(F.instance_norm, T(2, 3, 4)),
    ],
)
def instance_norm(
    y,
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
    *_,
):
    """Statistics over the positions of each channel of a sample, or the running ones"""
    if not use_input_stats:
        return batch_norm.table(y, input, running_mean, running_var, weight, bias, False, momentum, eps)
    return group_norm.table(y, input, input.shape[1], weight, bias, eps)


@rule(
    F.rms_norm,
    torch.rms_norm,
    channels=-1,
    examples=[
        call(F.rms_norm, T(4, 5, 6), (6,), T(6), 1e-2),
        call(F.rms_norm, T(4, 5, 6), (5, 6)),
    ],
)
def rms_norm(y, input, normalized_shape, weight=None, eps=None):
    """γ x / √(mean of x² + ε) over the last dimensions"""
    over = list(range(input.ndim - len(normalized_shape), input.ndim))
    others = list(range(input.ndim - len(normalized_shape)))

    @functools.cache
    def statistics():
        floor = torch.finfo(dtype_of(input)).eps if eps is None else eps
        rstd = ((input * input).mean(over, keepdim=True) + floor).rsqrt()
        return input * rstd, rstd

    def scaled(e):
        return e if weight is None else e * weight

    def error(e):
        normal, rstd = statistics()
        return (scaled(e) - normal * (scaled(e) * normal).mean(over, keepdim=True)) * rstd

    return {
        "input": roles(instruct=scaled, error=error),
        "weight": update(lambda e: summed(e * statistics()[0], others)),
    }


@rule(
    F.normalize,
    examples=[
        call(F.normalize, T(4, 5, 3)),
        call(lambda x: F.normalize(torch.relu(x), dim=-1, eps=0.6), T(20, 3)),
        call(F.normalize, T(4, 5), 3.0, -1),
        call(F.normalize, T(4, 5), p=1, dim=1),
    ],
)
def normalize(y, input, p=2.0, dim=1, eps=1e-12, out=None):
    """x / max(n, ε), n the p-norm over dim"""

    def error(e):
        size = torch.linalg.vector_norm(input, p, dim, keepdim=True)
        n = size.clamp_min(eps)
        along_n = (e * y).sum(dim, keepdim=True)
        above = size >= eps if BOUNDS_PASS else size > eps
        return (e - torch.where(above, along_n, 0.0) * slope_of_norm(input, size, p, dim)) / n

    return {"input": roles(instruct=as_is, error=error)}


@rule(
    F.local_response_norm,
    channels=1,
    examples=[
        call(F.local_response_norm, T(4, 7, 3, 2), 5, 0.5),
        call(F.local_response_norm, T(4, 5, 3), 4, alpha=0.5, beta=0.3, k=2.0),
    ],
)
def local_response_norm(y, input, size, alpha=1e-4, beta=0.75, k=1.0):
    """x / (k + α mean of x² over `size` neighbouring channels)^β"""

    def mean(x, neighbours):
        eye = F.pad(eye_like(x, input.shape[1]), neighbours)
        return along(x, {1: F.avg_pool1d(eye, size, 1)})

    def error(e):
        before, after = size // 2, (size - 1) // 2
        d = k + alpha * mean(input * input, (after, before))
        return e * d**-beta - 2 * alpha * beta * input * mean(e * y / d, (before, after))

    return {"input": roles(instruct=as_is, error=error)}
