"""Ops that move values and compute nothing: each has its inverse for a transpose."""

import operator

import torch
import torch.nn.functional as F

from fxfeedback.rules.core import as_is, known, listed, rule, transpose
from fxfeedback.rules.examples import T, call

Tensor = torch.Tensor


@rule(
    torch.reshape,
    torch.flatten,
    torch.unflatten,
    torch.squeeze,
    torch.unsqueeze,
    torch.squeeze_copy,
    torch.unsqueeze_copy,
    torch.view_copy,
    torch.ravel,
    Tensor.view,
    Tensor.view_as,
    Tensor.reshape_as,
    examples=[
        call(torch.flatten, T(4, 5, 3), 1),
        call(torch.reshape, T(4, 6), (-1, 2, 3)),
        call(torch.unflatten, T(4, 6), 1, (2, 3)),
        call(torch.unsqueeze, T(4, 6), 1),
        call(torch.squeeze, T(4, 1, 6), 1),
        call(lambda x: x.view(x.shape[0] * 2, -1), T(4, 6)),
        call(lambda x: x.flatten().view_as(x), T(4, 6)),
    ],
)
def reshape(y, input, *shape, **options):
    """The same values in another shape"""
    return {"input": transpose(lambda t: t.reshape(input.shape)), "shape": transpose(lambda t: [None] * len(shape))}


@rule(
    Tensor.to,
    Tensor.type,
    Tensor.type_as,
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    examples=[
        call(lambda x: (2 * x).to(torch.float).double() * x, T(4, 5)),
        call(lambda x: x.float().type_as(x).to(x), T(4, 5)),
    ],
)
def cast(y, input, *dtype, **options):
    """The same values in another dtype"""
    return {
        "input": transpose(as_is),
        "dtype": transpose(lambda t: [None] * len(dtype)),
    }


@rule(
    torch.clone,
    torch.alias_copy,
    torch.detach_copy,
    Tensor.contiguous,
    torch.positive,
    operator.pos,
    examples=[call(torch.clone, T(4, 5)), call(lambda x: x.contiguous(), T(4, 5))],
)
def copy(y, input, **options):
    """The same values"""
    return {"input": transpose(as_is)}


@rule(
    torch.permute,
    torch.permute_copy,
    examples=[
        call(torch.permute, T(4, 5, 3), (2, 0, -2)),
        call(lambda x: x.permute(0, 2, 1).permute(dims=(0, 2, 1)), T(4, 5, 3)),
    ],
)
def permute(y, input, *order, dims=None):
    """Dimensions reordered"""
    before = [d % input.ndim for d in listed(order, dims)]
    return {"input": transpose(lambda t: t.permute([before.index(d) for d in range(input.ndim)]))}


@rule(
    torch.transpose,
    torch.transpose_copy,
    torch.swapaxes,
    torch.swapdims,
    examples=[call(torch.transpose, T(4, 5, 3), 1, -1)],
)
def swap(y, input, dim0, dim1):
    """Two dimensions exchanged"""
    return {"input": transpose(lambda t: t.transpose(dim0, dim1))}


@rule(torch.t, torch.t_copy, examples=[call(torch.t, T(4, 5))])
def t(y, input):
    """xᵀ"""
    return {"input": transpose(lambda t: t.t())}


@rule(
    torch.movedim,
    torch.moveaxis,
    examples=[
        call(torch.movedim, T(4, 5, 3), 1, -1),
        call(lambda x: x.moveaxis((1, 2), (-1, 1)), T(4, 5, 3, 2)),
    ],
)
def movedim(y, input, source, destination):
    """Dimensions moved elsewhere"""
    return {"input": transpose(lambda t: t.movedim(destination, source))}


@rule(
    torch.roll,
    examples=[
        call(torch.roll, T(4, 5, 3), shifts=(2, -1), dims=(1, -1)),
        call(lambda x: x.roll(2, 1), T(4, 5)),
        call(torch.roll, T(4, 5), 3),
    ],
)
def roll(y, input, shifts, dims=()):
    """Values shifted along dimensions, around the end"""
    back = [-shift for shift in listed([shifts])]
    return {"input": transpose(lambda t: t.roll(back, dims))}


@rule(torch.flip, examples=[call(lambda x: x.flip(1, -1), T(4, 5, 3)), call(torch.flip, T(4, 5), dims=(1,))])
def flip(y, input, *order, dims=None):
    """Dimensions in reverse order"""
    return {"input": transpose(lambda t: t.flip(listed(order, dims)))}


@rule(torch.rot90, examples=[call(torch.rot90, T(4, 5, 3), 1, (1, 2))])
def rot90(y, input, k=1, dims=(0, 1)):
    """k quarter turns"""
    return {"input": transpose(lambda t: t.rot90(-k, dims))}


@rule(F.pixel_shuffle, torch.pixel_shuffle, examples=[call(F.pixel_shuffle, T(2, 8, 3, 2), 2)])
def pixel_shuffle(y, input, upscale_factor):
    """Channels into positions: (r² C, H, W) -> (C, r H, r W)"""
    return {"input": transpose(lambda t: F.pixel_unshuffle(t, upscale_factor))}


@rule(F.pixel_unshuffle, torch.pixel_unshuffle, examples=[call(torch.pixel_unshuffle, T(2, 3, 4, 6), 2)])
def pixel_unshuffle(y, input, downscale_factor):
    """Positions into channels: (C, r H, r W) -> (r² C, H, W)"""
    return {"input": transpose(lambda t: F.pixel_shuffle(t, downscale_factor))}


@rule(F.channel_shuffle, torch.channel_shuffle, examples=[call(F.channel_shuffle, T(2, 6, 4, 3), 3)])
def channel_shuffle(y, input, groups):
    """(groups, C / groups) channels transposed"""
    return {"input": transpose(lambda t: F.channel_shuffle(t, input.shape[1] // groups))}


@rule(
    F.unfold, examples=[call(F.unfold, T(2, 3, 5, 6), (3, 2), padding=1, stride=2), call(F.unfold, T(2, 3, 5, 6), 2, 2)]
)
def unfold(y, input, kernel_size, dilation=1, padding=0, stride=1):
    """Sliding blocks of a map, one after the other"""
    return {"input": transpose(lambda t: F.fold(t, input.shape[-2:], kernel_size, dilation, padding, stride))}


@rule(F.fold, examples=[call(F.fold, T(2, 12, 20), (5, 6), 2)])
def fold(y, input, output_size, kernel_size, dilation=1, padding=0, stride=1):
    """Sliding blocks summed into a map"""
    return {"input": transpose(lambda t: F.unfold(t, kernel_size, dilation, padding, stride))}


@rule(
    F.pad,
    examples=[
        call(F.pad, T(3, 2, 4, 5), (1, 0, 2, 3)),
        call(F.pad, T(3, 2, 4, 5), (1, -1), value=2.0),
        call(F.pad, T(3, 2, 4, 5), (1, 2, 3, 0), "reflect"),
        call(F.pad, T(3, 2, 4), (1, 2), "circular"),
        call(F.pad, T(3, 2, 4), (3, 1), "replicate"),
        call(lambda x: F.pad(x, (x.shape[-1] // 2, 0, x.shape[-2] - 1, x.shape[-1])), T(3, 2, 4, 5)),
    ],
)
def pad(y, input, pad, mode="constant", value=None):
    """Positions added around a tensor, or taken away: constants, or copies of its own"""
    widths = {d: (pad[2 * i], pad[2 * i + 1]) for i, d in enumerate(reversed(range(input.ndim))) if 2 * i < len(pad)}
    for dim, (before, after) in widths.items():
        if not (known(before) and known(after)):  # computed from sizes of the input, which do not exist yet
            grown = y.shape[dim] - input.shape[dim]
            before = before if known(before) else grown - after if known(after) else grown // 2
            widths[dim] = (before, grown - before)

    def cut(t):
        if mode == "constant":
            return F.pad(t, [-width for pair in widths.values() for width in pair])
        sizes = list(y.shape)
        for dim, (before, after) in widths.items():
            sizes[dim] = size = input.shape[dim]
            copied = F.pad(torch.arange(size, device=t.device).view(1, 1, -1).to(t.dtype), (before, after), mode)
            t = t.new_zeros(sizes).index_add(dim, copied.flatten().long(), t)
        return t

    return {"input": transpose(cut)}


@rule(
    torch.cat,
    torch.concat,
    torch.concatenate,
    examples=[
        call(lambda x: torch.cat([x, 2 * x], 1), T(4, 5)),
        call(lambda x, w: torch.cat([w, x]), T(4, 5), T(2, 5)),
        call(lambda x: torch.cat([x, x.new_zeros(0), 2 * x], 1), T(4, 5)),
    ],
)
def cat(y, tensors, dim=0):
    """Tensors one after the other; torch takes an empty vector along with tensors of any shape"""
    left_out = [y.ndim > 1 and x.ndim == 1 for x in tensors]

    def parts(t):
        pieces = t.split([0 if out else x.shape[dim] for x, out in zip(tensors, left_out, strict=True)], dim)
        return [t.new_zeros(0) if out else pieces[i] for i, out in enumerate(left_out)]

    return {"tensors": transpose(parts)}


@rule(torch.stack, examples=[call(lambda x: torch.stack([x, 2 * x], -1), T(4, 5))])
def stack(y, tensors, dim=0):
    """Tensors along a new dimension"""
    return {"tensors": transpose(lambda t: [t.select(dim, i) for i in range(len(tensors))])}


@rule(
    torch.tensor_split,
    examples=[
        call(lambda x: x.tensor_split(3, dim=-1)[0], T(4, 5)),
        call(lambda x: torch.tensor_split(x, indices=(1,), dim=1)[1], T(4, 5)),
    ],
)
def tensor_split(y, input, indices_or_sections=None, dim=0, indices=None, sections=None):
    """A tensor cut along one dimension, at indices or into as many parts"""
    return {"input": transpose(lambda ts: torch.cat(ts, dim))}


@rule(
    torch.chunk,
    torch.split,
    torch.split_with_sizes,
    torch.split_copy,
    torch.split_with_sizes_copy,
    examples=[
        call(torch.chunk, T(4, 5), 2, 1),
        call(lambda x: torch.chunk(x, 2, 1)[1], T(4, 5)),
        call(torch.split, T(4, 5), [1, 4], dim=1),
        call(torch.split, T(4, 5), 2, 1),
    ],
)
def split(y, input, sections, dim=0):
    """A tensor cut along one dimension"""
    return {"input": transpose(lambda ts: torch.cat(ts, dim))}


@rule(torch.unbind, torch.unbind_copy, examples=[call(torch.unbind, T(4, 3), 1)])
def unbind(y, input, dim=0):
    """A tensor's slices along one dimension"""
    return {"input": transpose(lambda ts: torch.stack(ts, dim))}
