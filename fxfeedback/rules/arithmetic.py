"""Sums and products, with broadcasting."""

import operator

import torch

from fxfeedback.rules.core import known, mean_to, roles, rule, sum_to, transpose


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
    """x z; where one is a weight, linear in the other; where both are BU values, the instruction goes to the larger as it
    is and to the smaller (a squeeze-excitation's scale) averaged over what it was broadcast over"""
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
