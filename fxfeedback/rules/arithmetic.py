"""Sums and products, with broadcasting."""

import operator

import torch

from fxfeedback.rules.core import known, mean_to, roles, rule, sum_to, transpose
from fxfeedback.rules.examples import T, call


@rule(torch.add, operator.add)
def add(y, input, other, alpha=1):
    """x + α z"""
    return {
        "input": transpose(lambda t: sum_to(t, input, y)),
        "other": transpose(lambda t: sum_to(t if alpha == 1 else t * alpha, other, y)),
    }


@rule(torch.sub, operator.sub)
def sub(y, input, other, alpha=1):
    """x - α z"""
    return {
        "input": transpose(lambda t: sum_to(t, input, y)),
        "other": transpose(lambda t: sum_to(t * -alpha, other, y)),
    }


@rule(torch.mul, operator.mul)
def mul(y, input, other):
    """x z: linear in each where the other is a weight.

    Where both are BU values, the instruction goes to the larger as it is, and to the smaller (a squeeze-excitation's
    scale) averaged over what it was broadcast over.
    """
    return {
        "input": roles(
            instruct=lambda t: sum_to(t * other, input, y) if known(other) else mean_to(t, input, y),
            error=lambda e: sum_to(e * other, input, y),
        ),
        "other": roles(
            instruct=lambda t: sum_to(t * input, other, y) if known(input) else mean_to(t, other, y),
            error=lambda e: sum_to(e * input, other, y),
        ),
    }


@rule(torch.div, torch.true_divide, operator.truediv)
def div(y, input, other):
    """x / z"""
    return {
        "input": roles(
            instruct=lambda t: sum_to(t / other, input, y) if known(other) else mean_to(t, input, y),
            error=lambda e: sum_to(e / other, input, y),
        ),
        "other": roles(
            instruct=lambda t: mean_to(t, other, y),
            error=lambda e: sum_to(-e * y / other, other, y),
        ),
    }


@rule(torch.neg, operator.neg)
def neg(y, input):
    """-x"""
    return {"input": transpose(lambda t: -t)}


add.examples = [
    call(torch.add, T(4, 5, 3), T(5, 1), alpha=2),
    call(operator.add, T(4, 5), T(1, 5)),
    call(operator.add, 1.5, T(4, 5)),
]
sub.examples = [
    call(torch.sub, T(4, 5, 3), T(3), alpha=2),
    call(operator.sub, T(4, 1), T(1, 5)),
    call(operator.sub, 1.5, T(4, 5)),
]
mul.examples = [
    call(torch.mul, T(4, 5, 3), T(5, 1)),
    call(operator.mul, T(4, 1), T(1, 5)),
    call(operator.mul, 2, T(4, 5)),
]
div.examples = [
    call(torch.div, T(4, 5, 3), T(5, 1)),
    call(operator.truediv, T(4, 5), 3.0),
    call(operator.truediv, 2, T(4, 5)),
]
neg.examples = [call(operator.neg, T(4, 5))]
