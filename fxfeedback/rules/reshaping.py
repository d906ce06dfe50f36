"""Ops that move values and compute nothing: each has its inverse for a transpose."""

import torch
import torch.nn.functional as F

from fxfeedback.rules.core import as_is, rule, transpose
from fxfeedback.rules.examples import T, call

Tensor = torch.Tensor


@rule(
    torch.reshape,
    torch.flatten,
    torch.unflatten,
    torch.squeeze,
    torch.unsqueeze,
    Tensor.view,
    Tensor.view_as,
    Tensor.reshape_as,
)
def reshape(y, input, *shape, **options):
    """The same values in another shape"""
    return {"input": transpose(lambda t: t.reshape(input.shape))}


@rule(torch.clone, Tensor.contiguous)
def copy(y, input, **options):
    """The same values"""
    return {"input": transpose(as_is)}


@rule(torch.permute)
def permute(y, input, *dims):
    """Dimensions reordered"""
    order = [d % input.ndim for d in (dims[0] if isinstance(dims[0], (tuple, list)) else dims)]
    return {"input": transpose(lambda t: t.permute([order.index(d) for d in range(input.ndim)]))}


@rule(torch.transpose, torch.swapaxes)
def swap(y, input, dim0, dim1):
    """Two dimensions exchanged"""
    return {"input": transpose(lambda t: t.transpose(dim0, dim1))}


@rule(F.pad)
def pad(y, input, pad, mode="constant", value=None):
    """Positions added around a tensor, or taken away: constants, or copies of its own"""
    widths = {input.ndim - 1 - i: (pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)}

    def cut(t):
        if mode == "constant":
            return F.pad(t, [-width for width in pad])
        for dim, (before, after) in widths.items():
            size = input.shape[dim]
            copied = F.pad(torch.arange(size, device=t.device).view(1, 1, -1).to(t.dtype), (before, after), mode)
            zeros = torch.zeros_like(t.narrow(dim, 0, size))
            t = zeros.index_add(dim, copied.flatten().long(), t)
        return t

    return {"input": transpose(cut)}


@rule(torch.cat, torch.concat)
def cat(y, tensors, dim=0):
    """Tensors one behind the other"""

    def parts(t):
        pieces = t.split([x.shape[dim] for x in tensors], dim)
        return [pieces[i] for i in range(len(tensors))]

    return {"tensors": transpose(parts)}


@rule(torch.stack)
def stack(y, tensors, dim=0):
    """Tensors along a new dimension"""
    return {"tensors": transpose(lambda t: [t.select(dim, i) for i in range(len(tensors))])}


@rule(torch.chunk, torch.split)
def split(y, input, sections, dim=0):
    """A tensor cut along one dimension"""
    return {"input": transpose(lambda ts: torch.cat(ts, dim))}


@rule(torch.unbind)
def unbind(y, input, dim=0):
    """A tensor's slices along one dimension"""
    return {"input": transpose(lambda ts: torch.stack(ts, dim))}


reshape.examples = [
    call(torch.flatten, T(4, 5, 3), 1),
    call(torch.reshape, T(4, 6), (-1, 2, 3)),
    call(torch.unflatten, T(4, 6), 1, (2, 3)),
    call(torch.unsqueeze, T(4, 6), 1),
    call(torch.squeeze, T(4, 1, 6), 1),
    call(lambda x: x.view(x.shape[0] * 2, -1), T(4, 6)),
]
copy.examples = [call(torch.clone, T(4, 5)), call(lambda x: x.contiguous(), T(4, 5))]
permute.examples = [call(torch.permute, T(4, 5, 3), (2, 0, -2)), call(lambda x: x.permute(0, 2, 1), T(4, 5, 3))]
swap.examples = [call(torch.transpose, T(4, 5, 3), 1, -1)]
cat.examples = [
    call(lambda x: torch.cat([x, 2 * x], 1), T(4, 5)),
    call(lambda x, w: torch.cat([w, x]), T(4, 5), T(2, 5)),
]
stack.examples = [call(lambda x: torch.stack([x, 2 * x], -1), T(4, 5))]
split.examples = [
    call(torch.chunk, T(4, 5), 2, 1),
    call(lambda x: torch.chunk(x, 2, 1)[1], T(4, 5)),
    call(torch.split, T(4, 5), [1, 4], dim=1),
    call(torch.split, T(4, 5), 2, 1),
]
unbind.examples = [call(torch.unbind, T(4, 3), 1)]
pad.examples = [
    call(F.pad, T(3, 2, 4, 5), (1, 0, 2, 3)),
    call(F.pad, T(3, 2, 4, 5), (1, -1), value=2.0),
    call(F.pad, T(3, 2, 4, 5), (1, 2, 3, 0), "reflect"),
    call(F.pad, T(3, 2, 4), (1, 2), "circular"),
    call(F.pad, T(3, 2, 4), (3, 1), "replicate"),
]
