"""Values written to, combined at, or picked from positions that tensors give.

Where the positions are a BU value themselves, an instruction passes as it is to what lies around them, and evenly from
all positions to what is written, as far as one dimension holds them.
"""

import math

import torch
import torch.nn.functional as F

from fxfeedback.errors import GradientError, RuleError
from fxfeedback.rules.core import as_is, known, nothing, roles, rule, transpose
from fxfeedback.rules.examples import T, call
from fxfeedback.rules.indexing import from_places, getitem
from fxfeedback.rules.ops import one_node, put_at, records
from fxfeedback.rules.writing import from_all

aten = torch.ops.aten


def here():
    """Positions, for the examples."""
    return torch.tensor([[2, 0], [1, 2]])


def rows():
    """Positions in one dimension, one of them twice."""
    return torch.tensor([2, 0, 2])


# -- at tuples of positions -------------------------------------------------------------------------------------------


@rule(
    aten.index.Tensor,
    torch._unsafe_index,
    name="index",
    examples=[
        call(lambda x: aten.index.Tensor(x, [None, rows()]), T(4, 5, 3)),
        call(lambda x: torch._unsafe_index(x.mT, [rows(), rows()]) * x.sum(), T(4, 5, 3)),
    ],
)
def index(y, input, indices):
    """x[indices], in which None stands for a whole dimension"""
    return getitem.table(y, input, as_index(indices))


def as_index(indices):
    """A list of tensors and None, as aten has it -> what stands in x[...]."""
    return tuple(slice(None) if one is None else one for one in indices)


@rule(
    torch.index_put,
    torch._unsafe_index_put,
    aten.index_put.default,  # whose indices may be None
    examples=[
        call(lambda x, z: x.index_put((torch.tensor([3, 1]), torch.tensor([0, -1])), z), T(4, 5), T(2)),
        call(lambda x, z: torch.index_put(x, (here()[0],), z.sin(), accumulate=True), T(4, 5), T(1, 5)),
        call(lambda x: aten.index_put.default(x, [None, rows()], x[:, :3].exp(), True), T(4, 5)),
        call(lambda x, z: x.index_put((x.detach() > 0,), z), T(4, 5), T()),
    ],
)
def index_put(y, input, indices, values, accumulate=False):
    """x with z at the indices, or with z added there"""
    index = as_index(indices)
    return {
        "input": transpose(as_is if accumulate else lambda t: put_at(t, index, 0) if all(map(is_known, index)) else t),
        "values": roles(
            instruct=(lambda t: t[index].sum_to_size(values.shape)) if all(map(is_known, index)) else nothing,
            error=lambda e: e[index].sum_to_size(values.shape),
        ),
    }


def is_known(entry):
    """Whether an entry of an index has a value in this role."""
    return isinstance(entry, slice) or known(entry)


# -- at positions of the flat tensor ----------------------------------------------------------------------------------


@rule(
    torch.take,
    examples=[
        call(lambda x: torch.take(x, here() - 3) * x.sum(), T(4, 5)),
        call(lambda x: x.take(x.argmax()) * x, T(4, 5)),
    ],
)
def take(y, input, index):
    """x.flatten()[index]"""

    def back(t):
        places = from_start(index, math.prod(input.shape))
        return t.new_zeros(input.shape).flatten().index_add(0, places, t.flatten()).reshape(input.shape)

    return {"input": roles(instruct=back if known(index) else nothing, error=back)}


@rule(
    torch.put,
    examples=[
        call(lambda x, z: torch.put(x, here() - 3, z), T(4, 5), T(4)),
        call(lambda x, z: x.put(rows(), z * z, accumulate=True), T(4, 5), T(3)),
    ],
)
def put_flat(y, input, index, source, accumulate=False):
    """x with z at positions of the flat x, or with z added there"""

    def to_input(t):
        flat = t.flatten()
        return flat.index_fill(0, from_start(index, math.prod(input.shape)), 0).reshape(input.shape)

    def to_source(t):
        return t.flatten().index_select(0, from_start(index, math.prod(input.shape))).reshape(source.shape)

    return {
        "input": transpose(as_is if accumulate or not known(index) else to_input),
        "source": roles(instruct=to_source if known(index) else nothing, error=to_source),
    }


def from_start(index, size):
    """Positions, flat and counted from the start."""
    return torch.where(index < 0, index + size, index).flatten()


@rule(
    torch.masked_scatter,
    examples=[
        call(lambda x, z: x.masked_scatter(x > 0, z), T(4, 5), T(3, 8)),
        call(lambda x, z: torch.masked_scatter(x, torch.tensor([True, False, True]), z.exp()), T(4, 3), T(3, 8)),
    ],
)
def masked_scatter(y, input, mask, source):
    """x with the values of z, one after the other, where the mask is set"""

    def to_input(t):
        return torch.where(mask, 0.0, t).sum_to_size(input.shape)

    def to_source(t):
        wide = torch.logical_and(mask, torch.ones_like(t, dtype=torch.bool)).flatten()
        places = torch.where(wide, wide.long().cumsum(0), 0)  # 0 is where the others go
        size = math.prod(source.shape)
        return t.new_zeros([size + 1]).index_add(0, places, t.flatten())[1:].reshape(source.shape)

    return {
        "input": roles(instruct=to_input if known(mask) else lambda t: t.sum_to_size(input.shape), error=to_input),
        "source": roles(instruct=to_source if known(mask) else nothing, error=to_source),
    }


# -- combined along a dimension ---------------------------------------------------------------------------------------


def _reduced(reduce, **options):
    """A call of scatter_reduce on values of which some are equal, and one of those that meet may be zero."""

    def reduced(x):
        z = torch.cat([torch.relu(x[:, :1]), x[:, 1:4] if reduce == "prod" else torch.relu(x[:, 1:4])], 1)
        return torch.relu(x + 0.5).scatter_reduce(1, (x[:, :4] > 0).long(), z, reduce, **options)

    return call(reduced, T(40, 5))


@one_node
def with_one_zero(product, zeros):
    """`product`, of which no second derivative is known where several factors are zero."""
    if records(product) and bool((zeros > 1).any()):
        raise GradientError(
            "no second derivative of a product by index (scatter_reduce, index_reduce, segment_reduce), several "
            "of whose factors are zero: PyTorch has none either"
        )
    return product


@rule(
    torch.scatter_reduce,
    examples=[
        _reduced("sum", include_self=False),
        _reduced("mean"),
        _reduced("mean", include_self=False),
        _reduced("prod"),
        _reduced("prod", include_self=False),
        _reduced("amax"),
        _reduced("amin", include_self=False),
        call(lambda x: x.scatter_reduce(-1, here(), x[:2, :2].sin(), reduce="amax"), T(4, 5)),
    ],
)
def scatter_reduce(y, input, dim, index, src, reduce, *, include_self=True):
    """x with z combined into it at the positions `index` along dim; ties share the error; instructed, as a mean"""

    def without(t):
        return t if include_self else t.scatter(dim, index, 0)

    def shares(t):
        """How many values each result is the mean of."""
        ones = torch.ones_like(t) if include_self else torch.zeros_like(t)
        return ones.scatter_add(dim, index, torch.ones_like(t).gather(dim, index)).clamp_min(1)

    def mean(t):
        return t / shares(t)

    def ties(e):
        here = (input == y).to(e.dtype).scatter_add(dim, index, (src == y.gather(dim, index)).to(e.dtype))
        return torch.where(here == 0, 0.0, e / torch.where(here == 0, 1.0, here))

    def product_of_others(e):
        zero = src == 0
        zeros = torch.zeros_like(y).scatter_add(dim, index, zero.to(y.dtype)).gather(dim, index)
        alone = zero & (zeros == 1)
        rest = input.scatter_reduce(dim, index, torch.where(alone, 1.0, src), "prod", include_self=include_self)
        by_value = with_one_zero((e * y).gather(dim, index), zeros) / torch.where(zero, 1.0, src)
        return torch.where(alone, (e * rest).gather(dim, index), by_value)

    picked = {
        "sum": (as_is, lambda e: e.gather(dim, index)),
        "mean": (mean, lambda e: mean(e).gather(dim, index)),
        "prod": (lambda e: e * torch.ones_like(y).scatter_reduce(dim, index, src, "prod"), product_of_others),
        **dict.fromkeys(
            ("amax", "amin"),
            (
                lambda e: ties(e) * (input == y),
                lambda e: ties(e).gather(dim, index) * (src == y.gather(dim, index)),
            ),
        ),
    }
    if reduce not in picked:
        raise RuleError(f"no rule for scatter_reduce with reduce={reduce!r}: expected one of {', '.join(picked)}")
    to_input, to_src = picked[reduce]
    instruct = as_is if reduce == "sum" else mean
    return {
        "input": roles(
            instruct=lambda t: without(instruct(t)) if known(index) else t, error=lambda e: without(to_input(e))
        ),
        "src": roles(
            instruct=lambda t: instruct(t).gather(dim, index) if known(index) else from_all(t, dim, src), error=to_src
        ),
    }


@rule(
    torch.index_reduce,
    examples=[
        call(lambda x, z: x.index_reduce(1, rows(), z * x[:, :3], "mean"), T(4, 5), T(3)),
        call(lambda x, z: x.index_reduce(1, rows(), z * x[:, :3], "mean", include_self=False), T(4, 5), T(3)),
        call(
            lambda x: torch.relu(x).index_reduce(1, rows(), torch.cat([torch.relu(x[:, :1]), x[:, 1:3]], 1), "prod"),
            T(40, 5),
        ),
        call(lambda x: torch.index_reduce(x, -1, rows(), x[:, :3].relu(), "amax"), T(40, 5)),
        call(lambda x: x.index_reduce(1, (x[0, :3] > 0).long(), x[:, :3], "amin", include_self=False), T(4, 5)),
    ],
)
def index_reduce(y, input, dim, index, source, reduce, *, include_self=True):
    """x with z combined into it at the positions `index` along dim"""
    if known(index):
        shape = [1] * source.ndim
        shape[dim : dim + 1 or None] = [-1] if source.ndim else []
        index = index.reshape(shape).expand(source.shape)
    table = scatter_reduce.table(y, input, dim, index, source, reduce, include_self=include_self)
    return {"input": table["input"], "source": table["src"]}


@rule(
    torch.segment_reduce,
    name="segment_reduce",
    examples=[
        call(lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([2, 0, 1, 3]), axis=0), T(6, 3)),
        call(
            lambda x: torch.segment_reduce(torch.relu(x).t(), "max", offsets=torch.tensor([0, 2, 5]), axis=0),
            T(40, 5),
        ),
        call(lambda x: torch.segment_reduce(x, "mean", lengths=torch.tensor([[2, 3], [1, 4]]), axis=1), T(2, 5, 3)),
        call(
            lambda x: torch.segment_reduce(
                torch.cat([torch.relu(x[:, :1]), x[:, 1:]], 1).t(),
                "prod",
                lengths=torch.tensor([2, 0, 3]),
                axis=0,
                initial=0.5,
            ),
            T(40, 5),
        ),
    ],
)
def segment_reduce(y, data, reduce, *, lengths=None, indices=None, offsets=None, axis=0, unsafe=False, initial=None):
    """x combined over runs of positions along an axis; ties share the error; instructed, as a mean"""
    given, own = lengths if offsets is None else offsets, {"max": "amax", "min": "amin"}.get(reduce, reduce)
    start = {"max": -math.inf, "min": math.inf, "prod": 1.0 if initial is None else initial}.get(reduce, 0.0)
    others = data.ndim - axis - 1

    def and_none(t):
        """With a place at the end for positions that are in no run."""
        return F.pad(t, [0, 0] * others + [0, 1])

    def table():
        starts = F.pad(lengths.cumsum(-1), (1, 0)) if offsets is None else offsets
        positions = torch.arange(data.shape[axis], device=starts.device)
        runs = (positions.unsqueeze(-1) >= starts.unsqueeze(-2)).sum(-1) - 1
        runs = torch.where(runs < 0, y.shape[axis], runs)
        runs = runs.reshape([*data.shape[: axis + 1], *[1] * others]).expand(data.shape)
        empty = and_none(torch.full_like(y, start)) if known(y) else None
        y_and_none = and_none(y) if known(y) else None
        return scatter_reduce.table(y_and_none, empty, axis, runs, data, own, include_self=own != "mean")["src"]

    return {
        "data": roles(
            instruct=lambda t: table().instruct(and_none(t)) if known(given) else from_all(t, axis, data),
            error=lambda e: table().error(and_none(e)),
        )
    }


# -- diagonals and strides --------------------------------------------------------------------------------------------


@rule(
    torch.diagonal_scatter,
    examples=[
        call(lambda x, w: x.diagonal_scatter(x[:, :, 0] * w, 1, 1, 2), T(4, 3, 5), T(3)),
        call(lambda x, w: x * w.diagonal_scatter(w[:4, 0].exp(), -1).sum(1), T(4, 5), T(5, 4)),
    ],
)
def diagonal_scatter(y, input, src, offset=0, dim1=0, dim2=1):
    """x with z on a diagonal"""
    return {
        "input": transpose(lambda t: t.diagonal_scatter(t.new_zeros(src.shape), offset, dim1, dim2)),
        "src": transpose(lambda t: t.diagonal(offset, dim1, dim2)),
    }


@rule(
    torch.diag_embed,
    examples=[call(torch.diag_embed, T(4, 3)), call(torch.diag_embed, T(4, 3, 2), -1, 1, 2)],
)
def diag_embed(y, input, offset=0, dim1=-2, dim2=-1):
    """Zeros with x on a diagonal"""
    return {"input": transpose(lambda t: t.diagonal(offset, dim1, dim2))}


@rule(
    torch.diag,
    examples=[
        call(lambda x, w: x * torch.diag(w, 1)[:3].sum(0) * w.sum(), T(4, 5), T(4)),
        call(lambda x, w: x * w.diag(-1), T(4, 3), T(4, 3)),
    ],
)
def diag(y, input, diagonal=0):
    """A matrix with x on a diagonal; of a matrix, its diagonal"""
    if input.ndim == 1:
        return diag_embed.table(y, input, diagonal)
    return {"input": transpose(lambda t: t.new_zeros(input.shape).diagonal_scatter(t, diagonal))}


@rule(torch.diagflat, examples=[call(lambda x, w: x * torch.diagflat(w, 1).sum(0), T(4, 5), T(2, 2))])
def diagflat(y, input, offset=0):
    """A matrix with the values of x on a diagonal"""
    return {"input": transpose(lambda t: t.diagonal(offset).reshape(input.shape))}


@rule(torch.trace, examples=[call(lambda x, w: x * torch.trace(w), T(4, 3), T(3, 5))])
def trace(y, input):
    """The sum of a matrix's diagonal"""
    size = min(input.shape)
    return {"input": transpose(lambda t: t.new_zeros(input.shape).diagonal_scatter(t.expand(size)))}


@one_node
def unstrided(e, input, size, stride, offset=None):
    """The transpose of input.as_strided(size, stride, offset): each error summed into its place in input's memory.

    Places that several values of input share spread it evenly over them, as torch has it.
    """
    offset = input.storage_offset() if offset is None else offset
    ends = [
        start + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True)) + 1
        for start, sizes, steps in ((offset, size, stride), (input.storage_offset(), input.shape, input.stride()))
    ]
    memory = torch.arange(max(*ends, 1), device=e.device)
    own = memory.as_strided(input.shape, input.stride(), input.storage_offset()).flatten()
    whole = e.new_zeros(memory.shape).index_add(0, memory.as_strided(size, stride, offset).flatten(), e.flatten())
    shared = e.new_zeros(memory.shape).index_add(0, own, e.new_ones(own.shape))
    return (whole / shared.clamp_min(1)).index_select(0, own).reshape(input.shape)


@rule(
    torch.as_strided,
    torch.as_strided_copy,
    examples=[
        call(lambda x: x.as_strided((x.shape[0], 4, 2), (5, 1, 1)), T(4, 5)),
        call(lambda x: torch.as_strided(x.t(), (3, 2), (1, 4), 2), T(4, 5)),
        call(lambda x: torch.as_strided(x[:, None].expand(-1, 3, -1), (3, 2), (2, 4), 1), T(4, 5)),
    ],
)
def as_strided(y, input, size, stride, storage_offset=None):
    """x's memory, read in steps; instructed, as if x lay in it as it is indexed"""
    start = storage_offset or 0
    return {
        "input": roles(
            instruct=lambda t: from_places(t, input, lambda places: places.as_strided(y.shape, stride, start)),
            error=lambda e: unstrided(e, input, size, stride, storage_offset),
        )
    }


@rule(
    torch.as_strided_scatter,
    examples=[call(lambda x, z: x.detach().as_strided_scatter(z * x.sum(), (2, 3), (5, 2), 1), T(4, 5), T(2, 3))],
)
def as_strided_scatter(y, input, src, size, stride, storage_offset=None):
    """x with z in its memory, in steps

    By x there is none: PyTorch's own gradient is zero where nothing is written, which is not this function's.
    """

    return {
        "src": transpose(lambda t: t.contiguous().as_strided(size, stride, storage_offset)),
    }
