"""Ops that pick values: slices, rows of a table, chosen positions. Their transposes put the values back among zeros.

Where the positions along a dimension are a BU value themselves, an instruction goes evenly to all of them.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F

from fxfeedback.errors import RuleError
from fxfeedback.rules.core import as_is, dtype_of, known, nothing, roles, rule, shape_of, sum_to, transpose, update
from fxfeedback.rules.examples import C, T, call

Tensor = torch.Tensor


@rule(
    operator.getitem,
    examples=[
        call(lambda x: x[:, 1], T(4, 5, 3)),
        call(lambda x: x[:, -2, None, 1:, ...], T(4, 5, 3)),
        call(lambda x: x[..., 1::2, 0:7:3, :], T(4, 5, 8, 2)),
        call(lambda x: x[:, -100:-1, :-1], T(4, 5, 3)),
        call(lambda x: x[:, 5:, None], T(4, 5, 3)),
        call(lambda x: x[1:], T(4, 5)),
        call(lambda x: x[0] + x, T(4, 5)),
        call(lambda x: x[:, : x.shape[1] - 1, x.shape[2] // 2 :], T(4, 5, 3)),
        call(lambda x, table: x + table[torch.tensor([1, -1, 2, 1, 0])], T(4, 5), T(3)),
        call(lambda x, table: x + table[torch.tensor([[1, 0, -2]])], T(4, 3, 2), T(2, 2)),
        call(lambda x: x[:, torch.tensor([[1, 0], [1, -1]]), :], T(4, 5, 3)),
        call(lambda x: x[..., [0, -1, 0]], T(4, 5, 3)),
        call(lambda x: x[:, torch.tensor([0, 2]), None, torch.tensor([-1, 1])], T(4, 5, 3)),
        call(lambda x: x[:, 0, :, [1, 2]], T(4, 5, 2, 3)),
        call(lambda x: x + x[:, x.shape[1] - 1 : x.shape[1]], T(4, 5)),
    ],
)
def getitem(y, input, index):
    """x[index], with numbers, slices, None, ..., and with tensors or lists of positions

    No instruction passes where an entry is a BU value, or a size from which the start cannot be told.
    """
    entries = written_out(index, input.ndim)
    chosen = [d for d, entry in enumerate(entries) if not is_basic(entry)]
    alone = len(chosen) == 1 and all(is_whole(entry) for d, entry in enumerate(entries) if d not in chosen)

    def back(t):
        if not chosen:
            return unsliced(t, entries, input, y)
        if alone and dtype_of(entries[chosen[0]]) is not None:
            return from_rows(t, input, chosen[0], entries[chosen[0]])
        return from_places(t, input, lambda places: places[index])

    return {"input": roles(instruct=back if all(map(exists, entries)) else nothing, error=back)}


def written_out(index, ndim):
    """An index as a list with an entry for every None and every dimension: `:` where it says nothing."""
    entries = list(index) if isinstance(index, tuple) else [index]
    taken = sum(entry is not None and entry is not Ellipsis for entry in entries)
    dots = next((i for i, entry in enumerate(entries) if entry is Ellipsis), len(entries))
    return [*entries[:dots], *[slice(None)] * (ndim - taken), *entries[dots + 1 :]]


def is_basic(entry):
    """Whether an entry of an index is None, a number or a slice whose start the sizes of x and y tell."""
    if isinstance(entry, slice):
        return entry.start is None or isinstance(entry.start, int) or entry.stop is entry.step is None
    return entry is None or isinstance(entry, int)


def is_whole(entry):
    """Whether an entry of an index is `:`."""
    return isinstance(entry, slice) and entry.start is entry.stop is entry.step is None


def exists(entry):
    """Whether an entry of an index has a value in this role, or needs none."""
    return known(entry) and (is_basic(entry) or not isinstance(entry, slice))


def unsliced(t, entries, input, y):
    """The transpose of y = x[entries] without tensors: zeros around t, and between its values where a step skips."""
    sizes, slices, counts = list(y.shape), [], []  # the last two: for every dimension of x
    for entry in entries:
        size = 1 if isinstance(entry, int) else sizes.pop(0)
        if entry is not None:
            slices.append(entry)
            counts.append(size)
    t = t if len(slices) == len(entries) == y.ndim else t.reshape(counts)
    widths: list[Any] = []
    for d, (entry, count) in enumerate(zip(slices, counts, strict=True)):
        step = getattr(entry, "step", None) or 1
        if step > 1:
            t = F.pad(t.unsqueeze(d + 1), [0, 0] * (input.ndim - 1 - d) + [0, step - 1]).flatten(d, d + 1)
        before = start_of(entry, input.shape[d], count)
        widths = [0, 0, *widths] if is_whole(entry) else [before, input.shape[d] - before - count * step, *widths]
    first = next((d for d, entry in enumerate(slices) if not is_whole(entry)), input.ndim)
    return F.pad(t, widths[: 2 * (input.ndim - first)]) if first < input.ndim else t


def start_of(entry, size, count):
    """The first of the `count` positions that a number or slice takes from a dimension of this size."""
    start = entry.start if isinstance(entry, slice) else entry
    if start is None:
        return 0
    if not isinstance(start, int):
        return size - count
    if isinstance(entry, slice) and isinstance(size, int):
        return slice(start, None).indices(size)[0]
    return start if start >= 0 else size + start


def from_rows(t, input, dim, positions):
    """The transpose of picking positions along one dimension, as rows of a table: each summed where it came from."""
    if not input.ndim:
        return t.sum()
    if positions.ndim != 1:
        t = t.flatten(dim, dim + positions.ndim - 1) if positions.ndim else t.unsqueeze(dim)
    positions = positions.reshape(-1)
    places = torch.where(positions < 0, positions + input.shape[dim], positions)
    return t.new_zeros(input.shape).index_add(dim, places, t)


def from_places(t, input, pick):
    """The transpose of any op that only picks values: pick(number of every place of input) says where each was."""
    zeros = t.new_zeros(input.shape)
    places = torch.ones_like(zeros, dtype=torch.long).flatten().cumsum(0).sub(1).reshape(input.shape)
    return zeros.flatten().index_add(0, pick(places).flatten(), t.flatten()).reshape(input.shape)


def evenly(t, input, dim):
    """Over all positions along dim, as if each value of t were their mean."""
    if not input.ndim:
        return t.sum()
    return t.sum(dim, keepdim=True).expand(input.shape) / input.shape[dim]


def put_back(way, positions, input, dim):
    """The table of an op that picks positions along dim, given its transpose: where they are known, it serves both."""
    return {"input": roles(instruct=way if known(positions) else lambda t: evenly(t, input, dim), error=way)}


@rule(
    torch.select,
    torch.select_copy,
    torch.narrow,
    torch.narrow_copy,
    examples=[
        call(torch.select, T(4, 5, 3), -2, -1),
        call(torch.narrow, T(4, 5, 3), 1, 2, 3),
        call(lambda x: x.narrow(-1, start=-2, length=2), T(4, 5, 3)),
        call(lambda x: x.narrow(1, 1, x.shape[1] - 2) + x.narrow(1, x.shape[1] - 3, 3), T(4, 5, 3)),
    ],
)
def narrow(y, input, dim, start, length=None):
    """x at one position along dim, or at `length` of them"""
    entries = [slice(None)] * input.ndim
    if length is None:
        entries[dim] = start
    elif isinstance(start, int) and isinstance(length, int):
        entries[dim] = slice(start, start + length or None)  # up to the end where start = -length
    else:
        entries[dim] = slice(start, start + length if known(start) and known(length) else length)
    return getitem.table(y, input, tuple(entries))


@rule(
    torch.index_select,
    examples=[
        call(lambda x: x.index_select(-1, torch.tensor([2, 0, 2])), T(4, 5, 3)),
        call(lambda x, w: x * w.index_select(0, torch.tensor([0])), T(4), T()),
    ],
)
def index_select(y, input, dim, index):
    """x at the positions `index` along dim"""
    if input.ndim == 0:
        return {"input": transpose(lambda t: t.reshape(()))}
    dim = dim % input.ndim
    return put_back(lambda t: from_rows(t, input, dim, index), index, input, dim)


@rule(
    torch.gather,
    examples=[
        call(lambda x: x.gather(1, x.argsort(1)), T(4, 5)),
        call(lambda x: x[:2].gather(-1, torch.tensor([[0, 0], [1, 4]])), T(4, 5)),
    ],
)
def gather(y, input, dim, index, **options):
    """x at the positions `index` along dim, which differ from place to place"""
    return put_back(lambda t: to_positions(t, input, dim, index), index, input, dim)


@rule(
    torch.take_along_dim,
    examples=[
        call(lambda x: torch.take_along_dim(x, x.argmax(1, keepdim=True), 1), T(4, 5)),
        call(lambda x, w: torch.take_along_dim(x * w, torch.tensor([[[2, 0]]]), dim=-1), T(4, 5, 3), T(1, 5, 3)),
        call(lambda x, w: torch.take_along_dim(w, (x > 0).long(), 1) + x, T(4, 5), T(1, 2)),
    ],
)
def take_along_dim(y, input, indices, dim=None):
    """x at the positions `indices` along dim; both are broadcast in the other dimensions. Without dim, of the flat x"""
    if dim is None:

        def flat(t):
            return from_places(t, input, lambda places: torch.take_along_dim(places, indices))

        return {"input": roles(instruct=flat if known(indices) else nothing, error=flat)}
    wide = list(y.shape)
    wide[dim] = input.shape[dim]

    def back(t):
        positions = torch.where(indices < 0, indices + input.shape[dim], indices)
        return sum_to(to_positions(t, wide, dim, positions.expand(y.shape)), input, wide)

    return put_back(back, indices, input, dim)


def to_positions(t, input, dim, positions):
    """The transpose of picking positions along dim that differ from place to place."""
    return t.new_zeros(shape_of(input)).scatter_add(dim, positions, t)


@rule(
    F.embedding,
    examples=[
        call(lambda x, table: x + F.embedding((x[..., 0] > 0).long(), table), T(4, 5, 3), T(2, 3)),
        call(lambda x, table: x + F.embedding((x[..., 0] > 0).long(), table, padding_idx=0), T(4, 5, 3), T(2, 3)),
    ],
)
def embedding(y, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    """Rows of a table; the row of padding_idx gets no update"""
    if scale_grad_by_freq:
        raise RuleError("no rule for an embedding with scale_grad_by_freq=True: its gradients are not exact")

    def rows(e):
        e = e if padding_idx is None else e * (input != padding_idx).unsqueeze(-1)
        return from_rows(e, weight, 0, input)

    return {"weight": update(rows)}


@rule(
    torch.where,
    examples=[
        call(lambda x, w: torch.where(w > 0, x, w), T(4, 5, 3), T(5, 1)),
        call(lambda x: torch.where(x > 0, x * x, 0.5), T(4, 5)),
    ],
)
def where(y, condition, input, other):
    """x where the condition holds, z elsewhere; instructed, both as they are where it is not known"""
    return {
        "input": roles(
            instruct=lambda t: sum_to(torch.where(condition, t, 0.0) if known(condition) else t, input, y),
            error=lambda e: sum_to(torch.where(condition, e, 0.0), input, y),
        ),
        "other": roles(
            instruct=lambda t: sum_to(torch.where(condition, 0.0, t) if known(condition) else t, other, y),
            error=lambda e: sum_to(torch.where(condition, 0.0, e), other, y),
        ),
    }


@rule(Tensor.where, examples=[call(lambda x: x.where(x > 0, 2 * x), T(4, 5))])
def tensor_where(y, input, condition, other):
    """torch.where(condition, x, z)"""
    return where.table(y, condition, input, other)


@rule(
    torch.masked_fill,
    examples=[
        call(lambda x, c: x.masked_fill(c > 1, -1.0), T(4, 5, 3), C(5, 3)),
        call(lambda x, w: x.masked_fill(x > 1, w), T(4, 5), T()),
    ],
)
def masked_fill(y, input, mask, value):
    """A number where the mask is set, x elsewhere"""
    table = where.table(y, mask, value, input)
    return {"input": table["other"], "value": table["input"]}


@rule(torch.tril, examples=[call(torch.tril, T(4, 3, 5), 1)])
def tril(y, input, diagonal=0):
    """Zeros above a diagonal"""
    return {"input": transpose(lambda t: t.tril(diagonal))}


@rule(torch.triu, examples=[call(torch.triu, T(4, 3, 5))])
def triu(y, input, diagonal=0):
    """Zeros below a diagonal"""
    return {"input": transpose(lambda t: t.triu(diagonal))}


@rule(
    torch.diagonal,
    torch.diagonal_copy,
    examples=[call(torch.diagonal, T(4, 3, 5), 1, -1, 1), call(lambda x: (x @ x.t()).diagonal(), T(4, 3))],
)
def diagonal(y, input, offset=0, dim1=0, dim2=1):
    """x[i, i + offset] along dim1, dim2, as the last dimension"""
    return {"input": transpose(lambda t: from_places(t, input, lambda p: p.diagonal(offset, dim1, dim2)))}


@rule(Tensor.unfold, torch.unfold_copy, examples=[call(lambda x: x.unfold(1, 3, 2), T(4, 8, 2))])
def windows(y, input, dimension, size, step):
    """Sliding windows along a dimension, each a new last dimension"""
    return {"input": transpose(lambda t: from_places(t, input, lambda p: p.unfold(dimension, size, step)))}


@rule(
    torch.slice_scatter,
    examples=[
        call(lambda x: x.slice_scatter(2 * x[:, 1:3], 1, 0, 4, 2), T(4, 5, 3)),
        call(torch.slice_scatter, T(4, 5, 3), T(1, 5, 3), start=-1),
    ],
)
def slice_scatter(y, input, src, dim=0, start=None, end=None, step=1):
    """x with z in the place of x[start:end:step]"""
    index = [slice(None)] * input.ndim
    index[dim] = slice(start, end, step)
    return {
        "input": transpose(lambda t: t.slice_scatter(t.new_zeros(src.shape), dim, start, end, step)),
        "src": transpose(lambda t: t[tuple(index)]),
    }


@rule(torch.select_scatter, examples=[call(lambda x: x.select_scatter(x[:, 0] * x[:, 1], 1, -1), T(4, 5, 3))])
def select_scatter(y, input, src, dim, index):
    """x with z in the place of its position `index` along dim"""
    return {
        "input": transpose(lambda t: t.select_scatter(t.new_zeros(src.shape), dim, index)),
        "src": transpose(lambda t: t.select(dim, index)),
    }


@rule(
    torch.sort,
    examples=[call(lambda x: torch.sort(x, 1)[0], T(4, 5, 3)), call(lambda x: x.sort(descending=True), T(4, 5))],
)
def sort(y, input, dim=-1, descending=False, *, stable=False):
    """x along dim in order, and the positions that the values had"""
    return picked(y, input, dim)


@rule(torch.topk, examples=[call(torch.topk, T(4, 5, 3), 2, 1), call(lambda x: x.topk(2).values, T(4, 5))])
def topk(y, input, k, dim=-1, largest=True, sorted=True):
    """The k greatest of x along dim, and their positions"""
    return picked(y, input, dim)


def picked(y, input, dim, keepdim=True):
    """For an op that returns values of x along dim and their positions."""

    def grown(t):
        return t if keepdim else t.unsqueeze(dim)

    return {
        "input": roles(
            instruct=lambda t: evenly(grown(t[0]), input, dim),
            error=lambda e: to_positions(grown(e[0]), input, dim, grown(y[1])),
        )
    }


@rule(
    getattr,
    examples=[
        call(lambda x: x.T, T(4, 3)),
        call(lambda x: x.mT, T(4, 3, 2)),
        call(lambda x: x.H.T, T(4, 3)),
        call(lambda x: x.mH, T(4, 3, 2)),
    ],
)
def attribute(y, input, name):
    """x.T, x.mT; of real numbers, x.H and x.mH are the same"""
    ways = {
        "T": lambda t: t.permute(list(reversed(range(y.ndim)))),
        "mT": lambda t: t.transpose(-2, -1),
        "H": lambda t: t.mH,
        "mH": lambda t: t.mH,
        "real": as_is,
        "imag": lambda t: t * 1j,
    }
    if dtype_of(input) is not None and not dtype_of(input).is_complex:
        ways |= {"H": ways["T"], "mH": ways["mT"]}
    if name not in ways:
        raise RuleError(f"no rule for the attribute .{name} of a tensor: use a function of torch")
    return {"input": transpose(ways[name])}
