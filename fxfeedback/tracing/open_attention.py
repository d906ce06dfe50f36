"""Attention in ops that have rules: linear maps, softmax(q kᵀ / √d + mask) v, linear map.

Masks are what torch takes: a boolean one of `nn.MultiheadAttention` is true where attention is not allowed, of
`F.scaled_dot_product_attention` where it is; a floating-point one is added.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfeedback.tracing.stand_ins import Shaped


def encoder(
    module: nn.TransformerEncoder, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None
) -> Any:
    """Layer by layer, as the module does with gradients; whether a mask is causal, which it looks up, is only a hint.

    Without gradients torch may leave padded tokens out, which then come back as zeros.
    """
    for layer in module.layers:
        kwargs = {"src_mask": mask, "src_key_padding_mask": src_key_padding_mask, "is_causal": bool(is_causal)}
        src = src.tracer.open_module(layer, src, **kwargs)
    return src if module.norm is None else src.tracer.open_module(module.norm, src)


def decoder(
    module: nn.TransformerDecoder,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: Any = None,
    memory_is_causal: bool = False,
) -> Any:
    """Layer by layer, as `encoder`."""
    masks = {"tgt_mask": tgt_mask, "memory_mask": memory_mask}
    paddings = {"tgt_key_padding_mask": tgt_key_padding_mask, "memory_key_padding_mask": memory_key_padding_mask}
    hints = {"tgt_is_causal": bool(tgt_is_causal), "memory_is_causal": memory_is_causal}
    for layer in module.layers:
        tgt = tgt.tracer.open_module(layer, tgt, memory, **masks, **paddings, **hints)
    return tgt if module.norm is None else tgt.tracer.open_module(module.norm, tgt)


def multi_head(
    module: nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """(y, weights of attention or None), as the module's forward returns them; `is_causal` only repeats attn_mask."""
    if query.ndim != 3:
        raise ValueError("inputs without a batch are not supported")
    first = (lambda x: x) if module.batch_first else (lambda x: x.transpose(0, 1))  # batch first
    q, k, v = (_heads(first(x), module.num_heads) for x in _projected(module, query, key, value))
    batch, heads, length, size = q.shape
    mask = _additive(attn_mask, q)
    if mask is not None and mask.ndim == 3:
        mask = mask.reshape(batch, heads, length, -1)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q).unsqueeze(1).unsqueeze(1)
        mask = padding if mask is None else mask + padding
    if module.bias_k is not None:  # one more key and value, the same for all
        both = [_proxy(bias, query).expand(batch, 1, heads * size) for bias in (module.bias_k, module.bias_v)]
        k, v = (torch.cat([x, _heads(bias, heads)], 2) for x, bias in zip((k, v), both, strict=True))
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    more = (module.bias_k is not None) + module.add_zero_attn
    mask = mask if mask is None or not more else F.pad(mask, (0, more))
    dropout = module.dropout if module.training else 0.0
    if need_weights:
        y, weights = _weighted(q, k, v, mask, dropout, 1 / math.sqrt(size))
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        y, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout), None
    # As in torch, the result lies in memory with its length first: in that order a dropout after it draws.
    y = y.permute(2, 0, 1, 3).reshape(length, batch, heads * size)
    y = F.linear(y, module.out_proj.weight, module.out_proj.bias)
    return y.transpose(0, 1) if module.batch_first else y, weights


def _projected(module: nn.MultiheadAttention, query: Any, key: Any, value: Any) -> Any:
    """q, k, v; by one linear map where all are of the same input."""
    if module.in_proj_weight is not None and query is key is value:
        projected = F.linear(query, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
        return [projected[i] for i in range(3)]
    if module.in_proj_weight is not None:
        weights = _proxy(module.in_proj_weight, query).chunk(3)
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    biases = [None] * 3 if module.in_proj_bias is None else _proxy(module.in_proj_bias, query).chunk(3)
    return [F.linear(x, weights[i], biases[i]) for i, x in enumerate((query, key, value))]


def _proxy(parameter: Any, like: Any) -> Any:
    """The node of a parameter; inside a module that is being opened it is one already."""
    return parameter if issubclass(type(parameter), fx.Proxy) else like.tracer.parameter(parameter)


def dot_product(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`F.scaled_dot_product_attention` has a rule, but for dropout, whose mask the kernel keeps to itself.

    Where sizes are not known, no rule will be asked, and the kernel stays.
    """
    if not dropout_p or not isinstance(query, Shaped):
        return NotImplemented
    if enable_gqa:
        shared = query.shape[-3] // key.shape[-3]  # query heads per head of keys and values
        key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
    if is_causal:
        ones = query.new_ones((query.shape[-2], key.shape[-2]), dtype=torch.bool)
        attn_mask = ones.tril()
    if attn_mask is not None and _is_boolean(attn_mask):
        attn_mask = _additive(attn_mask.logical_not(), query)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _weighted(query, key, value, attn_mask, dropout_p, scale)[0]


def _weighted(q: Any, k: Any, v: Any, mask: Any, dropout: float, scale: float) -> tuple[Any, Any]:
    """(w v, w) with w = dropout(softmax(q kᵀ scale + mask)), scaled before the product as torch does."""
    scores = (q * scale) @ k.transpose(-2, -1)
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    weights = F.dropout(weights, dropout)
    return weights @ v, weights


def _heads(x: Any, heads: int) -> Any:
    """(batch, length, heads * size) -> (batch, heads, length, size)"""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(1, 2)


def _additive(mask: Any, like: Any) -> Any:
    """A mask to add to scores: -inf where a boolean one is true."""
    if mask is None or not _is_boolean(mask):
        return mask
    return like.new_zeros(mask.shape).masked_fill(mask, -math.inf)


def _is_boolean(mask: Any) -> bool:
    return getattr(mask, "small", mask).dtype == torch.bool
