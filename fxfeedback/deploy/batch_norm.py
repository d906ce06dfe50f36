"""Batch norm in training mode, out of place: what it would write into its running statistics, it returns."""

from typing import Any

from fxfeedback.rules.core import channelwise, spatial
from fxfeedback.rules.normalization import standardized


def batch_norm_in_training(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = True,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, Any, Any]:
    """F.batch_norm with the statistics of the batch; the running statistics, advanced, are returned beside the value.

    The rule of batch norm computes mean and deviation in the same words, so that the file has them once.
    """
    normal, _ = standardized(input, [0, *spatial(input)], eps)
    y = normal if weight is None else normal * channelwise(weight, input.ndim)
    y = y if bias is None else y + channelwise(bias, input.ndim)
    return y, *(advanced(input, running_mean, running_var, momentum) if running_mean is not None else (None, None))


def advanced(input: Any, running_mean: Any, running_var: Any, momentum: Any) -> tuple[Any, Any]:
    """Running statistics, advanced by the batch `input` (N, C, ...); torch's running variance is the unbiased one."""
    dims = [0, *spatial(input)]
    mean = input.mean(dims, keepdim=True)
    centred = input - mean
    var = (centred * centred).mean(dims)
    number = input.numel() // input.shape[1]
    unbiased = var * (number / (number - 1))
    return running_mean + momentum * (mean.flatten() - running_mean), running_var + momentum * (unbiased - running_var)
