"""What torch.nn's modules and composite functions do, written in ops that have rules.

`OPENINGS` is the table; `open_modules` uses it. Every module that is not in it opens by its own forward.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfeedback.errors import TraceError
from fxfeedback.rules.convolution import CONV
from fxfeedback.rules.core import as_tuple
from fxfeedback.rules.ops import (
    ADVANCES,
    cumulative_momentum,
    filled_from,
    synced_batch_norm,
)
from fxfeedback.tracing.open_attention import decoder, dot_product, encoder, multi_head
from fxfeedback.tracing.open_draws import DRAWS
from fxfeedback.tracing.open_recurrent import cell, sequence
from fxfeedback.tracing.stand_ins import Shaped, call, lacks_batch


def _batch_norm(module: Any, input: fx.Proxy) -> fx.Proxy:
    """y = (x - mean) / sqrt(var + eps) * gamma + beta; forward itself looks at the input's dimensions."""
    known = module.running_mean is not None
    tracks = known and (
        module.track_running_stats or not module.training
    )  # a norm that stops tracking keeps them in eval mode
    training = module.training or not known
    momentum, norm = module.momentum, F.batch_norm
    if isinstance(module, nn.SyncBatchNorm) and training:
        if module.process_group is not None:
            raise TraceError("SyncBatchNorm over a group of its own does not open: leave out process_group")
        norm = synced_batch_norm
    if module.training and tracks:
        count = input.tracer.parameter(module.num_batches_tracked)
        call(torch.Tensor.add_, count, 1)
        momentum = call(cumulative_momentum, count) if momentum is None else momentum
        if not input.tracer.present.users:  # nothing reads the value, but the statistics advance
            call(ADVANCES[norm], input, module.running_mean, module.running_var, momentum)
            return input
    return call(
        norm,
        input,
        module.running_mean if tracks else None,
        module.running_var if tracks else None,
        module.weight,
        module.bias,
        training,
        0.0 if momentum is None else momentum,
        module.eps,
    )


def _instance_norm(module: Any, input: fx.Proxy) -> fx.Proxy:
    """Forward itself looks at the input's dimensions."""
    if lacks_batch(input, module._get_no_batch_dim() + 1):
        return _instance_norm(module, input.unsqueeze(0)).squeeze(0)
    own = module.training or not module.track_running_stats
    momentum = 0.0 if module.momentum is None else module.momentum
    statistics = (module.running_mean, module.running_var)
    return F.instance_norm(input, *statistics, module.weight, module.bias, own, momentum, module.eps)


def _batched(function: Callable[..., Any], ndim: int) -> Callable[..., Any]:
    """The opening of an op of maps that have `ndim` dimensions with their batch."""

    def opening(input: Any, *args: Any, **kwargs: Any) -> Any:
        return function(input.unsqueeze(0), *args, **kwargs).squeeze(0) if lacks_batch(input, ndim) else NotImplemented

    return opening


def _with_positions(function: Callable[..., Any], ndim: int) -> Callable[..., Any]:
    """The same of an op that returns maps and the positions of their values."""

    def opening(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not lacks_batch(input, ndim):
            return NotImplemented
        values, positions = function(input.unsqueeze(0), *args, **kwargs)
        return values.squeeze(0), positions.squeeze(0)

    return opening


def _matrix_norm(input: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    """torch.linalg.norm has a rule, but for matrices, of which it is another function's name."""
    of_matrix = isinstance(dim, (list, tuple)) and len(dim) == 2
    if dim is None and ord is not None and isinstance(input, Shaped):
        of_matrix, dim = input.ndim == 2, (-2, -1)
    if not of_matrix or ord in (None, "fro", "nuc"):
        return NotImplemented
    return call(torch.linalg.matrix_norm, input, ord, dim, keepdim)


def _convolution(
    input: fx.Proxy,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """padding="same" and "valid" in numbers; an uneven "same" pads once more at the far end, as torch does."""
    ndim = weight.ndim if isinstance(weight, (Shaped, torch.Tensor)) else 0
    if lacks_batch(input, ndim):
        return CONV[ndim](input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    shape = _shape(weight)
    if not isinstance(padding, str) or shape is None:
        return NotImplemented
    kernel = shape[2:]
    total = [
        0 if padding == "valid" else d * (k - 1) for d, k in zip(as_tuple(dilation, len(kernel)), kernel, strict=True)
    ]
    odd = [extra for t in reversed(total) for extra in (0, t % 2)]
    x = F.pad(input, odd) if any(odd) else input
    return CONV[len(kernel) + 2](x, weight, bias, stride, [t // 2 for t in total], dilation, groups)


def _shape(weight: Any) -> tuple[int, ...] | None:
    """The shape of a weight: a tensor, its node, or what forward computes from it; None where sizes are not known."""
    if not issubclass(type(weight), fx.Proxy):
        return tuple(weight.shape)
    if weight.node.op == "get_attr":
        return tuple(weight.tracer.tensors.by_name[weight.node.target].shape)
    return tuple(weight.small.shape) if isinstance(weight, Shaped) else None


OPS_OF_MAPS = {
    3: (F.conv_transpose1d, F.avg_pool1d, F.max_pool1d, torch.max_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d),
    4: (F.conv_transpose2d, F.avg_pool2d, F.max_pool2d, torch.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
    5: (F.conv_transpose3d, F.avg_pool3d, F.max_pool3d, torch.max_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d),
}
"""How many dimensions a map has with its batch -> ops that also take it without; their rules do not."""

WITH_POSITIONS: dict[int, tuple[Any, ...]] = {
    3: (F.max_pool1d_with_indices, F.adaptive_max_pool1d_with_indices),
    4: (F.max_pool2d_with_indices, F.adaptive_max_pool2d_with_indices),
    5: (F.max_pool3d_with_indices, F.adaptive_max_pool3d_with_indices),
}
"""The same of ops that also return positions."""

OPENINGS: dict[Any, Callable[..., Any]] = {
    nn.modules.batchnorm._BatchNorm: _batch_norm,
    nn.modules.instancenorm._InstanceNorm: _instance_norm,
    nn.MultiheadAttention: multi_head,
    nn.TransformerEncoder: encoder,
    nn.TransformerDecoder: decoder,
    nn.RNNBase: sequence,
    nn.RNNCellBase: cell,
    F.scaled_dot_product_attention: dot_product,
    nn.ReLU6: lambda module, input: F.relu6(input),  # its own forward is a hardtanh
    filled_from: filled_from,
    **DRAWS,
    torch.linalg.norm: _matrix_norm,
    torch.fliplr: lambda input: input.flip(1),
    torch.flipud: lambda input: input.flip(0),
    **dict.fromkeys(CONV.values(), _convolution),
    **{op: _batched(op, ndim) for ndim, ops in OPS_OF_MAPS.items() for op in ops},
    **{op: _with_positions(op, ndim) for ndim, ops in WITH_POSITIONS.items() for op in ops},
}
"""nn.Module class or function -> the same in ops that have rules, or NotImplemented.

Every other module opens by its own forward.
"""
