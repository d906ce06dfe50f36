"""Writing into a part of a tensor, or adding to it. An assignment x[index] = z is also such an op.

Where the positions are a BU value themselves, an instruction comes evenly from all of them.
"""

import torch

from fxfeedback.rules.core import as_is, known, rule, transpose
from fxfeedback.rules.examples import T, call
from fxfeedback.rules.ops import put_at


@rule(
    put_at,
    examples=[
        call(lambda x, z: put_at(x, (slice(None), slice(1, 4)), z), T(4, 5, 3), T(3, 1)),
        call(lambda x: put_at(x, (slice(None), 0), 2 * x[:, 1]), T(4, 5, 3)),
        call(lambda x: put_at(x, (slice(None), slice(0, 5, 2)), 1.5), T(4, 5)),
    ],
)
def put(y, input, index, value):
    """x with z at the index"""
    return {
        "input": transpose(lambda t: put_at(t, index, 0)),
        "value": transpose(lambda t: t[index].sum_to_size(value.shape)),
    }


@rule(
    torch.scatter,
    examples=[
        call(lambda x: x.scatter(1, x.argsort(1), x.sin()), T(4, 5)),
        call(lambda x: torch.scatter(x, -1, torch.tensor([[2, 0]]), x[:1, :2] ** 2), T(4, 5)),
        call(lambda x: x.scatter(1, (x[:, :2] > 0).long(), 0.5), T(4, 5)),
        call(lambda x: x.scatter(1, (x[:, :1] > 0).long(), value=0.5), T(4, 5)),
    ],
)
def scatter(y, input, dim, index, src=None, *, value=None):
    """x with z at the positions `index` along dim, which differ from place to place"""
    return {
        "input": transpose(lambda t: t.scatter(dim, index, 0) if known(index) else t),
        "src": transpose(lambda t: t.gather(dim, index) if known(index) else from_all(t, dim, src)),
    }


@rule(
    torch.scatter_add,
    examples=[
        call(lambda x: torch.scatter_add(x, 1, (x > 0).long(), x.sin()), T(4, 5, 2)),
        call(lambda x: torch.zeros_like(x).scatter_add_(1, (x > 0).long(), x), T(4, 5)),
    ],
)
def scatter_add(y, input, dim, index, src):
    """x with z added at the positions `index` along dim, which differ from place to place"""
    return {"input": transpose(as_is), "src": scatter.table(y, input, dim, index, src)["src"]}


@rule(
    torch.index_copy, examples=[call(lambda x, z: x.index_copy(1, torch.tensor([2, 0]), z * x[:, :2]), T(4, 5), T(2))]
)
def index_copy(y, input, dim, index, source):
    """x with z at the positions `index` along dim"""
    return {
        "input": transpose(lambda t: t.index_fill(dim, index, 0) if known(index) else t),
        "source": transpose(lambda t: t.index_select(dim, index) if known(index) else from_all(t, dim, source)),
    }


@rule(
    torch.index_add,
    examples=[
        call(lambda x: torch.index_add(x, -1, torch.tensor([2, 0, 2]), x[..., :3].sin(), alpha=-2), T(4, 5, 3)),
        call(lambda x: x.index_add(1, (x[0, :, 0] > 0).long(), x.sin()), T(4, 5, 3)),
    ],
)
def index_add(y, input, dim, index, source, *, alpha=1):
    """x with α z added at the positions `index` along dim"""
    picked = index_copy.table(y, input, dim, index, source)["source"]
    return {"input": transpose(as_is), "source": transpose(lambda t: picked.error(t) * alpha)}


@rule(
    torch.index_fill,
    examples=[
        call(lambda x, z: x.index_fill(1, torch.tensor([2, 0]), z), T(4, 5), T()),
        call(lambda x: x.index_fill(-1, torch.tensor([1]), 0.5), T(4, 5)),
    ],
)
def index_fill(y, input, dim, index, value):
    """x with a number at the positions `index` along dim"""
    return {
        "input": transpose(lambda t: t.index_fill(dim, index, 0) if known(index) else t),
        "value": transpose(lambda t: (t * torch.zeros_like(t).index_fill(dim, index, 1) if known(index) else t).sum()),
    }


def from_all(t, dim, source):
    """The mean over all positions along dim, in the shape of what was written to some of them."""
    return t.mean(dim, keepdim=True)[tuple(slice(size) for size in source.shape)].expand(source.shape)
