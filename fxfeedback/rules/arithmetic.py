"""Sums and products, with broadcasting."""

import operator

import torch
import torch.nn.functional as F

from fxfeedback.rules.core import after, is_one, known, mean_to, nothing, roles, rule, sum_to, transpose
from fxfeedback.rules.examples import T, call


@rule(
    torch.add,
    operator.add,
    examples=[
        call(torch.add, T(4, 5, 3), T(5, 1), alpha=2),
        call(operator.add, T(4, 5), T(1, 5)),
        call(operator.add, 1.5, T(4, 5)),
    ],
)
def add(y, input, other, alpha=1):
    """x + α z"""
    return {
        "input": transpose(lambda t: sum_to(t, input, y)),
        "other": transpose(lambda t: sum_to(t if alpha == 1 else t * alpha, other, y)),
    }


@rule(
    torch.sub,
    operator.sub,
    examples=[
        call(torch.sub, T(4, 5, 3), T(3), alpha=2),
        call(operator.sub, T(4, 1), T(1, 5)),
        call(operator.sub, 1.5, T(4, 5)),
    ],
)
def sub(y, input, other, alpha=1):
    """x - α z"""
    return {
        "input": transpose(lambda t: sum_to(t, input, y)),
        "other": transpose(lambda t: sum_to(t * -alpha, other, y)),
    }


@rule(
    torch.mul,
    operator.mul,
    examples=[
        call(torch.mul, T(4, 5, 3), T(5, 1)),
        call(operator.mul, T(4, 1), T(1, 5)),
        call(operator.mul, 2, T(4, 5)),
    ],
)
def mul(y, input, other):
    """x z: linear in each where the other is a weight.

    Where both are BU values, the instruction goes to the larger as it is, and to the smaller (a squeeze-excitation's
    scale) averaged over what it was broadcast over.
    """
    return {"input": times(other, input, y), "other": times(input, other, y)}


def times(factor, x, y):
    """To x, where ∂y / ∂x is a factor: an instruction is averaged where that is a BU value."""

    def to_x(t):
        return sum_to(t * factor, x, y)

    return roles(instruct=to_x if known(factor) else lambda t: mean_to(t, x, y), error=to_x)


@rule(
    torch.div,
    torch.true_divide,
    operator.truediv,
    examples=[
        call(torch.div, T(4, 5, 3), T(5, 1)),
        call(operator.truediv, T(4, 5), 3.0),
        call(operator.truediv, 2, T(4, 5)),
    ],
)
def div(y, input, other, *, rounding_mode=None):
    """x / z; nothing passes where it is rounded"""
    if rounding_mode is not None:
        return {
            "input": roles(instruct=nothing, error=lambda e: sum_to(torch.zeros_like(e), input, y)),
            "other": roles(instruct=nothing, error=lambda e: sum_to(torch.zeros_like(e), other, y)),
        }
    return {
        "input": roles(
            instruct=lambda t: sum_to(t / other, input, y) if known(other) else mean_to(t, input, y),
            error=lambda e: sum_to(e / other, input, y),
        ),
        "other": roles(
            instruct=lambda t: mean_to(t, other, y),
            error=lambda e: sum_to(-e * input / (other * other), other, y),
        ),
    }


@rule(torch.neg, torch.negative, operator.neg, examples=[call(operator.neg, T(4, 5))])
def neg(y, input):
    """-x"""
    return {"input": transpose(lambda t: -t)}


@rule(torch.rsub, examples=[call(lambda x, w: torch.rsub(x, w, alpha=2), T(4, 5), T(5)), call(torch.rsub, T(4, 5), 1)])
def rsub(y, input, other, *, alpha=1):
    """z - α x"""
    table = sub.table(y, other, input, alpha)
    return {"input": table["other"], "other": table["input"]}


@rule(torch.addcmul, examples=[call(lambda x, w: torch.addcmul(w, x, x[:, :1], value=0.5), T(4, 5), T(5))])
def addcmul(y, input, tensor1, tensor2, *, value=1):
    """x + α z w"""
    return plus(y, input, mul.table(y, tensor1, tensor2), value)


@rule(torch.addcdiv, examples=[call(lambda x, w: torch.addcdiv(x, x, w, value=2), T(4, 5), T(1, 5))])
def addcdiv(y, input, tensor1, tensor2, *, value=1):
    """x + α z / w"""
    return plus(y, input, div.table(y, tensor1, tensor2), value)


def plus(y, input, table, value):
    """The table of x + α f(tensor1, tensor2), given that of f."""
    return {
        "input": transpose(lambda t: sum_to(t, input, y)),
        "tensor1": after(table["input"], lambda t: t * value),
        "tensor2": after(table["other"], lambda t: t * value),
    }


@rule(
    torch.lerp,
    examples=[
        call(torch.lerp, T(4, 5), T(5), 0.3),
        call(lambda x, w: torch.lerp(x, x * x, w), T(4, 5, 3), T(5, 1)),
    ],
)
def lerp(y, input, end, weight):
    """x + w (z - x)"""
    return {
        "input": roles(
            instruct=lambda t: sum_to(t * (1 - weight), input, y) if known(weight) else mean_to(t, input, y),
            error=lambda e: sum_to(e * (1 - weight), input, y),
        ),
        "end": times(weight, end, y),
        "weight": roles(
            instruct=lambda t: mean_to(t, weight, y),
            error=lambda e: sum_to(e * (end - input), weight, y),
        ),
    }


@rule(
    F.cosine_similarity,
    examples=[
        call(F.cosine_similarity, T(4, 5, 3), T(1, 5, 3)),
        call(lambda x, w: F.cosine_similarity(x.unsqueeze(1), w, dim=-1), T(4, 5), T(3, 5)),
        call(F.cosine_similarity, T(4, 5, 3), T(1, 3), dim=2),
        call(lambda x, w: F.cosine_similarity(5e-9 * x, w), T(4, 3), T(1, 3)),  # some of which are shorter than eps
    ],
)
def cosine_similarity(y, x1, x2, dim=1, eps=1e-8):
    """x · z / (|x| |z|) over dim; instructed, to each evenly over dim"""
    dim = dim - y.ndim - 1 if dim >= 0 else dim  # counted from the end, x1 and x2 may have different dimensions
    lengths = [x.shape[dim] for x in (x1, x2) if x.ndim >= -dim]
    length = next((size for size in lengths if not is_one(size)), 1)
    wide = list(y.shape)
    wide.insert(y.ndim + 1 + dim, length)

    def at_least(size):
        """As torch clamps: past autograd, to which it is the size still."""
        return size + (size.clamp_min(eps) - size).detach()

    def to(x, z):
        def error(e):
            a, b = x.expand(wide), z.expand(wide)
            a_size, b_size = (torch.linalg.vector_norm(v, 2, dim, True) for v in (a, b))
            along_a = y.unsqueeze(dim) * torch.where(a_size == 0, 0.0, a / a_size)
            return sum_to(e.unsqueeze(dim) * (b / at_least(b_size) - along_a) / at_least(a_size), x, wide)

        return roles(instruct=lambda t: sum_to(t.unsqueeze(dim).expand(wide) / length, x, wide), error=error)

    return {"x1": to(x1, x2), "x2": to(x2, x1)}
