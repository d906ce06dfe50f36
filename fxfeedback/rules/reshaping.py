"""Ops that move values and compute nothing: each has its inverse for a transpose."""

import torch

from fxfeedback.rules.core import as_is, rule, transpose

Tensor = torch.Tensor


@rule(
    torch.reshape,
    torch.flatten,
    torch.unflatten,
    torch.squeeze,
    torch.unsqueeze,
    Tensor.view,
    Tensor.reshape,
    Tensor.view_as,
    Tensor.reshape_as,
    Tensor.unflatten,
)
def reshape(y, input, *shape, **options):
    """The same values in another shape"""
    return {"input": transpose(lambda t: t.reshape(input.shape))}


@rule(torch.clone, Tensor.contiguous)
def copy(y, input, **options):
    """The same values"""
    return {"input": transpose(as_is)}


@rule(torch.permute, Tensor.permute)
def permute(y, input, *dims):
    """Dimensions reordered"""
    order = [d % input.ndim for d in (dims[0] if isinstance(dims[0], (tuple, list)) else dims)]
    return {"input": transpose(lambda t: t.permute([order.index(d) for d in range(input.ndim)]))}


@rule(torch.transpose, torch.swapaxes)
def swap(y, input, dim0, dim1):
    """Two dimensions exchanged"""
    return {"input": transpose(lambda t: t.transpose(dim0, dim1))}


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


@rule(torch.chunk, torch.split, Tensor.split)
def split(y, input, sections, dim=0):
    """A tensor cut along one dimension"""
    return {"input": transpose(lambda ts: torch.cat(ts, dim))}


@rule(torch.unbind)
def unbind(y, input, dim=0):
    """A tensor's slices along one dimension"""
    return {"input": transpose(lambda ts: torch.stack(ts, dim))}
