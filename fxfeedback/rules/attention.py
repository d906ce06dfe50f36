"""Scaled dot-product attention."""

import functools
import math

import torch
import torch.nn.functional as F

from fxfeedback.errors import RuleError
from fxfeedback.rules.core import dtype_of, fused, nothing, roles, rule, sum_to
from fxfeedback.rules.examples import C, T, call
from fxfeedback.rules.matmul import sum_batch_to
from fxfeedback.rules.ops import is_recorded

aten = torch.ops.aten


def _self_attention(x, mask=None, heads=None, **options):
    """Attention among tokens, with queries, keys and values of their own; the last tokens are queries only."""
    keys = x[..., :heads, 1:, :]
    return F.scaled_dot_product_attention(x, 2 * keys, keys.sin(), mask, **options)


@rule(
    F.scaled_dot_product_attention,
    examples=[
        call(lambda x, k, v: x + F.scaled_dot_product_attention(x, k, v), T(4, 2, 5, 3), T(1, 2, 6, 3), T(1, 2, 6, 3)),
        call(lambda x: _self_attention(x.unsqueeze(1), is_causal=True, scale=0.7), T(4, 5, 3)),
        call(lambda x: _self_attention(x.transpose(1, 2)[None]).sum(0), T(4, 5, 3)),
        call(_self_attention, T(4, 2, 5, 3), T(2, 5, 4)),
        call(_self_attention, T(4, 2, 5, 3), T(1, 1, 1, 4)),
        call(lambda x, mask: _self_attention(x, mask > 0.8), T(4, 2, 5, 3), C(5, 4)),
        call(lambda x, mask: _self_attention(x, mask > 1.2), T(4, 2, 5, 3), C(5, 4)),  # some see nothing
        call(_self_attention, T(4, 6, 5, 3), heads=2, enable_gqa=True),
    ],
)
def attention(y, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """y = p v with p = softmax(scale q kᵀ + mask); instructed, through v, as if p were uniform over the tokens"""
    if dropout_p > 0:
        raise RuleError("no rule for attention with dropout_p > 0: write it out, with the mask that it draws")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    batch, tokens = y.shape[:-2], value.shape[-2]
    shared = query.shape[-3] // key.shape[-3] if enable_gqa else 1  # query heads per head of keys and values

    def each(x):
        return x.repeat_interleave(shared, -3) if shared > 1 else x

    def back(t, x):
        if shared > 1:
            return t.unflatten(-3, (-1, shared)).sum(-3)
        return sum_batch_to(t, x, batch)

    @functools.cache
    def weights():
        scores = query @ each(key).transpose(-1, -2) * scale
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        if attn_mask is None:
            return torch.softmax(scores, -1)
        scores = torch.where(attn_mask, scores, -math.inf) if dtype_of(attn_mask) == torch.bool else scores + attn_mask
        blind = scores.amax(-1, keepdim=True) == -math.inf  # a token may see nothing at all
        return torch.softmax(torch.where(blind, 0.0, scores), -1).masked_fill(blind, 0.0)

    @functools.cache
    def to_scores(e):  # softmax's rule, with Σ over tokens of p · error of p as e · y (Dao et al. 2022, section B.2)
        return weights() * (e @ each(value).transpose(-1, -2) - (e * y).sum(-1, keepdim=True))

    def uniformly(t):
        return back(t.sum(-2, keepdim=True).expand((*batch, tokens, value.shape[-1])) / tokens, value)

    return {
        "query": roles(instruct=nothing, error=lambda e: sum_batch_to(to_scores(e) @ each(key) * scale, query, batch)),
        "key": roles(instruct=nothing, error=lambda e: back(to_scores(e).transpose(-1, -2) @ query * scale, key)),
        "value": roles(instruct=uniformly, error=lambda e: back(weights().transpose(-1, -2) @ e, value)),
        "attn_mask": roles(
            instruct=nothing,
            error=lambda e: sum_to(to_scores(e), attn_mask, (*batch, query.shape[-2], tokens)),
        ),
    }


def attend(query, key, value, is_causal, scale):
    """y and the three tensors that the backward of PyTorch's fused kernels needs; empty ones where none was taken.

    They are also empty where autograd records the call, as the kernels' backward has no derivative.
    """
    kernel = None if is_recorded() else _kernel(query, key, value)
    if kernel == "cpu":
        y, *saved = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)
    elif kernel == "flash":
        y, *saved = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
        saved = [saved[i] for i in (0, 5, 6)]
    elif kernel == "efficient":
        y, *saved = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, is_causal, scale=scale
        )
    else:
        y, saved = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale), []
    return y, *saved, *(y.new_empty(0) for _ in range(3 - len(saved)))


def attend_backward(e, y, denominators, seed, offset, query, key, value, is_causal, scale):
    """The error at queries, keys and values, by the kernel that made y or by the rule."""
    if not denominators.numel():
        table = attention.table(y, query, key, value, is_causal=is_causal, scale=scale)
        return tuple(table[name].error(e) for name in ("query", "key", "value"))
    kernel = {0: "cpu", 1: "efficient", 2: "flash"}[seed.numel()]  # whose settings may be others by now
    e, qkv = e.to(y.dtype), (query, key, value)
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            e, *qkv, y, denominators, 0.0, is_causal, scale=scale
        )
    e = e if e.stride(-1) == 1 else e.contiguous()
    if kernel == "flash":
        tokens = [None, None, query.shape[-2], key.shape[-2]]
        return aten._scaled_dot_product_flash_attention_backward(
            e, *qkv, y, denominators, *tokens, 0.0, is_causal, seed, offset, scale=scale
        )
    wanted = [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(
        e, *qkv, None, y, denominators, seed, offset, 0.0, wanted, is_causal, scale=scale
    )[:3]


def _kernel(query, key, value):
    """Which of PyTorch's fused kernels takes these: "cpu", "flash", "efficient", or None.

    On GPUs they load 16 bytes at a time. Inside torch.compile only those are taken that return nothing but tensors.
    """
    qkv, device = (query, key, value), query.device
    kinds = {x.dtype for x in qkv}
    if len(kinds) > 1 or any(x.stride(-1) != 1 for x in qkv):
        return None
    if device.type == "cpu":
        return None if torch.is_autocast_enabled("cpu") else "cpu"
    if device.type != "cuda" or query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    low = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") != query.dtype
    aligned = all(stride * x.element_size() % 16 == 0 for x in qkv for stride in (*x.stride()[:-1], x.shape[-1]))
    if low or not aligned:
        return None
    cuda = torch.backends.cuda
    fits = query.dtype != torch.float32 and query.shape[-1] <= 256 and not torch.compiler.is_compiling()
    if fits and cuda.flash_sdp_enabled() and _has_flash(device):
        return "flash"
    return "efficient" if cuda.mem_efficient_sdp_enabled() else None


@functools.cache
def _has_flash(device):
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    made = query.tracer.create_proxy("call_function", attend, (query, key, value, is_causal, scale), {})
    return made[0], (made[1], made[2], made[3])


def _is_plain(y, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    q, k, v = (getattr(x, "spec", x).shape for x in (query, key, value))
    return attn_mask is None and len(q) == 4 and q[:2] == k[:2] == v[:2] and q[3] == v[3]


@fused(attention, forward=_attend, applies=_is_plain)
def flash_attention_backward(
    e, y, saved, wanted, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    operands = (e, y, *saved, query, key, value, is_causal, scale)
    results = e.tracer.create_proxy("call_function", attend_backward, operands, {})
    return {name: results[i] for i, name in enumerate(("query", "key", "value")) if name in wanted}
