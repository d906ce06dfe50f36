"""Predictors as they are run, not exported: the same values in less time."""

from typing import Any

import torch.nn.functional as F
from torch import fx

from fxfeedback.graph.nodes import spec_of
from fxfeedback.graph.operands import operand
from fxfeedback.rewrite import Passes
from fxfeedback.rules.convolution import CONV, CONV_TRANSPOSE, turned
from fxfeedback.rules.core import as_tuple
from fxfeedback.rules.resizing import interpolate_by_matrices

AS_CONVOLUTION = {CONV_TRANSPOSE[ndim]: CONV[ndim] for ndim in CONV}


def hasten(node: fx.Node, passes: Passes) -> None:
    """Change an emitted node into one that computes the same faster, where there is one.

    A linear resizing becomes products with matrices, and a transposed convolution of stride 1 the convolution that it
    is, whose turned kernel all steps share.
    """
    if node.target is F.interpolate:
        node.target = interpolate_by_matrices
    elif node.target in AS_CONVOLUTION:
        _convolve(node, passes)


def _convolve(node: fx.Node, passes: Passes) -> None:
    weight: Any = operand(node, "weight")
    kernel = spec_of(weight).shape[2:]

    def given(name: str, default: int) -> tuple[int, ...]:
        value = operand(node, name)
        return as_tuple(default if value is None else value, len(kernel))

    stride, output_padding, dilation = given("stride", 1), given("output_padding", 0), given("dilation", 1)
    padding = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, given("padding", 0), strict=True))
    if set(stride) != {1} or any(output_padding) or min(padding) < 0:
        return
    groups = operand(node, "groups") or 1
    with passes.graph.inserting_before(node):
        kernel = passes.once(turned, weight, groups)
    node.args = (operand(node, "input"), kernel, operand(node, "bias"), 1, padding, dilation, groups)
    node.kwargs, node.target = {}, AS_CONVOLUTION[node.target]
