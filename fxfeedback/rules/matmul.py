"""Matrix products and Einstein sums.

Linear in each operand where the others are weights. Of two BU values an instruction treats the first as a uniform
attention (1 / K for each of the K that are summed), and goes to the second by the transpose of that attention.
"""

import math
import operator
import string

import torch
import torch.nn.functional as F

from fxfeedback.errors import RuleError
from fxfeedback.rules.core import after, is_one, known, nothing, roles, rule, stretched, sum_to, transpose, update
from fxfeedback.rules.examples import C, T, call


@rule(
    torch.matmul,
    operator.matmul,
    torch.dot,
    examples=[
        call(torch.matmul, T(4, 5, 3), T(3, 2)),
        call(operator.matmul, T(4, 1, 5, 3), T(2, 3, 1)),
        call(torch.matmul, T(4, 5, 3), T(3)),
        call(lambda x, w: w @ x, T(4, 3, 2), T(5, 3)),
        call(lambda x, w: w @ x, T(4, 3, 2), T(3)),
        call(lambda x: x @ x.transpose(-1, -2), T(4, 2, 5, 3)),
        call(lambda x: torch.dot(x, 2 * x), T(4)),
        call(lambda x: (x.softmax(-1) @ x[:, :1]) * 2, T(4, 3, 1)),
    ],
)
def matmul(y, input, other):
    """x z = Σ_k x[..., n, k] z[..., k, m]; a vector x is one row, a vector z one column"""
    row, column = input.ndim == 1, other.ndim == 1
    batch = y.shape[: y.ndim - (not row) - (not column)]

    def whole(t):
        t = t.unsqueeze(-1) if column else t
        return t.unsqueeze(-2) if row else t

    def to_input(t):
        columns = other.unsqueeze(-1) if column else other
        return sum_batch_to(whole(t) @ columns.transpose(-1, -2), input, batch)

    def to_other(t):
        rows = input.unsqueeze(0) if row else input
        if other.ndim == 2 and input.ndim > 2:
            return rows.flatten(0, -2).t() @ t.flatten(0, -2)
        return sum_batch_to(rows.transpose(-1, -2) @ whole(t), other, batch)

    def uniformly(t):
        k, m = other.shape[0 if column else -2], 1 if column else other.shape[-1]
        return sum_batch_to(whole(t).sum(-2, keepdim=True).expand((*batch, k, m)) / k, other, batch)

    return {
        "input": roles(instruct=to_input if known(other) else nothing, error=to_input),
        "other": roles(instruct=to_other if known(input) else uniformly, error=to_other),
    }


def sum_batch_to(t, x, batch):
    """Matrices `t` (*batch, n, m), summed over the dimensions along which x was broadcast, in x's shape."""
    dims = stretched(x.shape[:-2], batch)
    t = t.sum(dims, keepdim=True) if dims else t
    return t.reshape(x.shape) if dims or x.ndim < 2 else t


@rule(
    torch.bmm,
    torch.mm,
    examples=[call(lambda x: torch.bmm(x.transpose(1, 2), mat2=x), T(4, 5, 3)), call(torch.mm, T(4, 3), T(3, 2))],
)
def mm(y, input, mat2):
    """x z"""
    product = matmul.table(y, input, mat2)
    return {"input": product["input"], "mat2": product["other"]}


@rule(torch.mv, examples=[call(torch.mv, T(4, 3), T(3))])
def mv(y, input, vec):
    """x z"""
    product = matmul.table(y, input, vec)
    return {"input": product["input"], "vec": product["other"]}


@rule(torch.addmm, examples=[call(lambda x, b, w: torch.addmm(b, x, w, beta=0.5, alpha=3), T(4, 3), T(1, 1), T(3, 5))])
def addmm(y, input, mat1, mat2, *, beta=1, alpha=1):
    """β x + α z w"""
    product = matmul.table(y, mat1, mat2)
    return {
        "input": transpose(lambda t: sum_to(t * beta, input, y)),
        "mat1": after(product["input"], lambda t: t * alpha),
        "mat2": after(product["other"], lambda t: t * alpha),
    }


@rule(
    torch.baddbmm,
    examples=[
        call(lambda x, b, w: torch.baddbmm(b, x, batch2=w * x[:, :1, :1], beta=-1), T(4, 2, 3), T(1, 5), T(1, 3, 5)),
    ],
)
def baddbmm(y, input, batch1, batch2, *, beta=1, alpha=1):
    """β x + α z w"""
    table = addmm.table(y, input, batch1, batch2, beta=beta, alpha=alpha)
    return {"input": table["input"], "batch1": table["mat1"], "batch2": table["mat2"]}


@rule(
    torch.einsum,
    examples=[
        call(lambda x, w: torch.einsum("bnc,dc->bnd", x, w), T(4, 5, 3), T(2, 3)),
        call(lambda x: torch.einsum("bhnk, bhmk -> bhnm", x, 2 * x), T(4, 2, 5, 3)),
        call(lambda x, w: torch.einsum("...hc,...hc", x, w), T(4, 5, 2, 3), T(1, 2, 3)),
        call(lambda x, w, z: torch.einsum("bij,jk,bl->bk", x, w, z), T(4, 5, 3), T(3, 2), T(1, 6)),
        call(lambda x, w: torch.einsum("bi,ji", x, w), T(4, 3), T(5, 3)),
        call(lambda x: torch.einsum("bij->bji", x), T(4, 5, 3)),
        call(lambda x, w: torch.einsum("bij,wj->biw", x, w), T(4, 5, 3), C(2, 1)),
    ],
)
def einsum(y, equation, *operands):
    """Σ x[letters] z[letters] ... over the letters that the output lacks"""
    terms, out = letters(equation, operands)

    def back(t, to, others):
        own, x = terms[to], operands[to]
        used = "".join([out, *(terms[i] for i in others)])
        kept = [letter for letter, size in zip(own, x.shape, strict=True) if letter in used and not is_one(size)]
        left = ",".join([out, *(terms[i] for i in others)])
        t = torch.einsum(f"{left}->{''.join(kept)}", t, *(operands[i] for i in others))
        for dim, letter in enumerate(own):
            t = t if letter in kept else t.unsqueeze(dim)
        return t.expand(x.shape)

    def error(e):
        return [back(e, to, [i for i in range(len(operands)) if i != to]) for to in range(len(operands))]

    def instruct(t):
        weights = [i for i, x in enumerate(operands) if known(x)]
        values = [i for i, x in enumerate(operands) if not known(x)]
        last = values[-1]
        summed = [size for letter, size in zip(terms[last], operands[last].shape, strict=True) if letter not in out]
        t = back(t, last, weights)
        t = t / math.prod(summed) if len(values) > 1 else t
        return [t if i == last else None for i in range(len(operands))]

    return {"operands": roles(instruct=instruct, error=error)}


def letters(equation, operands):
    """The letters of each operand and of the output, with `...` written out and an implicit output made explicit."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms, free = left.split(","), [letter for letter in string.ascii_letters if letter not in equation]
    missing = [x.ndim - len(term.replace("...", "")) for x, term in zip(operands, terms, strict=True)]
    dots = "".join(free[: max(missing)])
    if not arrow:
        once = sorted(letter for letter in set(left) if letter.isalpha() and left.count(letter) == 1)
        out = "".join(["..." if "..." in left else "", *once])
    terms = [term.replace("...", dots[len(dots) - n :]) for term, n in zip(terms, missing, strict=True)]
    if any(len(set(term)) < len(term) for term in terms):
        raise RuleError(f"einsum({equation!r}): no rule for a letter that one operand has twice; use torch.diagonal")
    return terms, out.replace("...", dots)


@rule(
    torch.tensordot,
    examples=[
        call(torch.tensordot, T(4, 5, 3), T(5, 3, 2)),
        call(torch.tensordot, T(4, 5, 3), T(2, 5), dims=([1], [-1])),
        call(lambda x, w: torch.tensordot(w, x, ([0, 1], [2, 1])), T(4, 5, 3), T(3, 5)),
    ],
)
def tensordot(y, a, b, dims=2, out=None):
    """Σ x[..., k] z[k, ...] over the dimensions k that are named, or as many: an Einstein sum"""
    summed, others = (range(a.ndim - dims, a.ndim), range(dims)) if isinstance(dims, int) else dims
    left, right = list(string.ascii_lowercase[: a.ndim]), list(string.ascii_uppercase[: b.ndim])
    for i, j in zip(summed, others, strict=True):
        right[j] = left[i]
    kept = [letter for letter in left + right if (letter in left) != (letter in right)]
    table = einsum.table(y, f"{''.join(left)},{''.join(right)}->{''.join(kept)}", a, b)
    return {"a": element(table["operands"], 0), "b": element(table["operands"], 1)}


@rule(
    F.bilinear,
    examples=[
        call(lambda x, w, b: F.bilinear(x, x[..., :2].sin(), w, b), T(4, 5, 3), T(6, 3, 2), T(6)),
        call(lambda x, w: F.bilinear(x, x.sin(), w), T(4, 3), T(2, 3, 3)),
    ],
)
def bilinear(y, input1, input2, weight, bias=None):
    """y[o] = Σ x[i] W[o, i, j] z[j] + b: an Einstein sum"""
    table = einsum.table(y, "...i,oij,...j->...o", input1, weight, input2)
    return {
        **{name: element(table["operands"], i) for i, name in enumerate(["input1", "weight", "input2"])},
        "bias": update(lambda e: sum_to(e, bias, y)),
    }


@rule(
    torch._trilinear,
    examples=[
        call(lambda x, w: torch._trilinear(x, w, x.sin(), [1, 3], [0], [1, 2], [2, 3]), T(4, 3), T(5, 3, 3)),
    ],
)
def trilinear(y, i1, i2, i3, expand1, expand2, expand3, sumdim, unroll_dim=1):
    """Σ x[...] z[...] w[...] over sumdim, each with dimensions of size 1 at its `expand`: an Einstein sum"""
    ndim = i1.ndim + len(expand1)
    terms = ["".join(string.ascii_letters[d] for d in range(ndim) if d not in e) for e in (expand1, expand2, expand3)]
    kept = "".join(string.ascii_letters[d] for d in range(ndim) if d not in sumdim)
    table = einsum.table(y, f"{','.join(terms)}->{kept}", i1, i2, i3)
    return {name: element(table["operands"], i) for i, name in enumerate(["i1", "i2", "i3"])}


def element(way, number):
    """Of a way to several operands, that to one of them."""
    return roles(instruct=lambda t: way.instruct(t)[number], error=lambda e: way.error(e)[number])


@rule(torch.outer, torch.ger, examples=[call(torch.outer, T(4), T(3)), call(lambda x: torch.outer(x, x.sin()), T(4))])
def outer(y, input, vec2):
    """x[i] z[j]"""
    return {
        "input": roles(
            instruct=lambda t: (t * vec2).sum(1) if known(vec2) else t.mean(1), error=lambda e: (e * vec2).sum(1)
        ),
        "vec2": roles(
            instruct=lambda t: (t.t() * input).sum(1) if known(input) else t.mean(0),
            error=lambda e: (e.t() * input).sum(1),
        ),
    }
