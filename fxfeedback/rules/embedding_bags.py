"""Sums, means and extremes over bags of rows of a table."""

import torch
import torch.nn.functional as F

from fxfeedback.errors import RuleError
from fxfeedback.rules.core import known, nothing, roles, rule, update
from fxfeedback.rules.examples import C, T, call


def ids():
    """Five rows of a table, for the examples."""
    return torch.tensor([1, 0, 2, 2, 0])


def bags(*more):
    """Where three bags of them begin."""
    return torch.tensor([0, 2, *(more or [2])])


def _bags(input, offsets, number, like):
    """The number of each entry's bag, flat."""
    if input.ndim == 2:
        rows = torch.ones_like(like[:, :1], dtype=torch.long).cumsum(0) - 1
        return rows.expand(input.shape).flatten()
    positions = torch.arange(input.shape[0], device=like.device)
    return (positions.unsqueeze(1) >= offsets).sum(1).sub(1).clamp(max=number - 1)


def _counted(input, padding, e):
    """1 for each entry that counts, (entries, 1); 0 for padding."""
    ids = input.flatten().unsqueeze(1)
    return torch.ones_like(ids, dtype=e.dtype) if padding is None else (ids != padding).to(e.dtype)


def _firsts(y, rows, bag, counts):
    """1 for the first entry of a bag that has its greatest value, of the rows of all entries."""
    wins = (rows == y.index_select(0, bag)) & (counts > 0)
    number = torch.ones_like(rows).cumsum(0)
    before = torch.where(wins, number, torch.inf)
    first = torch.full_like(y, torch.inf).scatter_reduce(0, bag.unsqueeze(1).expand(rows.shape), before, "amin")
    return (before == first.index_select(0, bag)).to(y.dtype) * wins


@rule(
    F.embedding_bag,
    examples=[
        call(lambda x, w: F.embedding_bag((x > 0).long(), w) * x.sum(), T(4, 5), T(2, 3)),
        call(
            lambda x, w: F.embedding_bag(ids(), w, bags(), mode="mean", padding_idx=-1).sin().sum(0) * x,
            T(4, 3),
            T(3, 3),
        ),
        call(lambda x, w: F.embedding_bag(ids(), w, bags(), mode="max").sin().sum(0) * x, T(4, 3), T(3, 3)),
        call(
            lambda x, w: F.embedding_bag((x > 0).long(), w.relu(), mode="max", padding_idx=0) + x[:, :3],
            T(9, 5),
            T(2, 3),
        ),
        call(
            lambda x, w, c: F.embedding_bag((x > 0).long(), w, mode="sum", per_sample_weights=x.exp() * c),
            T(4, 5),
            T(2, 3),
            C(5),
        ),
        call(
            lambda x, w, z: (
                F.embedding_bag(ids(), w, bags(5), mode="sum", per_sample_weights=z, include_last_offset=True)
                .sin()
                .sum(0)
                * x
            ),
            T(4, 3),
            T(3, 3),
            T(5),
        ),
    ],
)
def embedding_bag(
    y,
    input,
    weight,
    offsets=None,
    max_norm=None,
    norm_type=2,
    scale_grad_by_freq=False,
    mode="mean",
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
):
    """Sums, means or the greatest values over bags of rows of a table; the row of padding_idx is in no bag"""
    if scale_grad_by_freq or max_norm is not None:
        raise RuleError(
            "no rule for an embedding_bag with scale_grad_by_freq=True or max_norm: use neither, or normalise the table"
        )

    padding = None if padding_idx is None else padding_idx % weight.shape[0]

    def share(e):
        """What each entry has of e, (entries, columns)."""
        bag, counts = _bags(input, offsets, y.shape[0], e), _counted(input, padding, e)
        each = e.index_select(0, bag) * counts
        if mode == "sum":
            return each if per_sample_weights is None else each * per_sample_weights.flatten().unsqueeze(1)
        if mode == "mean":
            sizes = e.new_zeros(e.shape[:1]).index_add(0, bag, counts.flatten()).clamp_min(1)
            return each / sizes.index_select(0, bag).unsqueeze(1)
        rows = weight.index_select(0, input.flatten())
        return each * _firsts(y, rows, bag, counts)

    def to_rows(e):
        return e.new_zeros(weight.shape).index_add(0, input.flatten(), share(e))

    def to_weights(e):
        each = e.index_select(0, _bags(input, offsets, y.shape[0], e)) * _counted(input, padding, e)
        return (each * weight.index_select(0, input.flatten())).sum(1).reshape(per_sample_weights.shape)

    def evenly(t):
        return t.index_select(0, _bags(input, offsets, y.shape[0], t)).mean(1).reshape(per_sample_weights.shape)

    found = input.ndim == 2 or known(offsets)
    return {
        "weight": update(to_rows),
        "per_sample_weights": roles(instruct=evenly if found else nothing, error=to_weights),
    }
