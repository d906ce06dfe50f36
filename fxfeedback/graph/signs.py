"""Which values are never negative, whatever the input is."""

from typing import Any

import torch
from torch import fx

from fxfeedback.graph.nodes import specs_of
from fxfeedback.graph.operands import is_floating, operand
from fxfeedback.graph.specs import Spec
from fxfeedback.rules import RULES
from fxfeedback.rules.draws import survival, surviving_channels

NEVER_NEGATIVE = {
    "relu", "relu6", "sigmoid", "hardsigmoid", "softplus", "softmax", "softmin", "exp", "exp2", "abs", "square", "sqrt",
    "vector_norm", "var", "std",
}  # fmt: skip
LOWEST = {"clamp": "min", "clamp_min": "min", "hardtanh": "min_val"}
ARITHMETIC = ("add", "mul", "div", "max", "min")
KEEP_SIGNS = {
    "add", "mul", "div", "maximum", "minimum", "mean", "sum", "amax", "max", "min", "median", "cumsum", "prod",
    "avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool", "interpolate", "pad", "dropout", "identity",
    "cut_off", "reshape", "cast", "copy", "permute", "swap", "t", "movedim", "roll", "flip", "rot90", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "unfold", "fold", "cat", "stack", "split", "tensor_split", "unbind",
    "expand", "expand_as", "repeat", "repeat_interleave", "getitem", "attribute", "narrow", "index_select", "gather",
    "take_along_dim", "diagonal", "tril", "triu", "windows", "sort", "topk",
}  # fmt: skip


def never_negative(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a graph with shapes whose values are rectified: zero or more, whatever the input is.

    By an activation, or by an op after it that keeps signs, as pooling does, or the sum of such values.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        rule = RULES.get(node.target) if node.op == "call_function" else None
        name = rule.name if rule else ""
        if name in NEVER_NEGATIVE or node.target in (survival, surviving_channels):
            found.add(node)
        elif name in LOWEST:
            lowest = operand(node, LOWEST[name])
            if lowest in found or _is_positive(lowest):
                found.add(node)
        elif name in KEEP_SIGNS and _keeps_signs(node, name):
            values = [source for source in node.all_input_nodes if _has_sign(source, name)]
            if values and found.issuperset(values):
                found.add(node)
    return found


def _keeps_signs(node: fx.Node, name: str) -> bool:
    """Whether an op of `KEEP_SIGNS`, called like this, makes nothing negative of what is not."""
    if name == "interpolate":
        return operand(node, "mode") != "bicubic"  # it overshoots
    if name == "pad":
        value = operand(node, "value")
        return value is None or _is_positive(value)
    numbers = [arg for arg in node.args if isinstance(arg, (int, float))]
    return name not in ARITHMETIC or (not node.kwargs and all(map(_is_positive, numbers)))


def _has_sign(source: fx.Node, name: str) -> bool:
    """Whether an operand's sign matters to the op: not that of positions, sizes and masks."""
    spec = specs_of(source)
    counts = isinstance(spec, Spec) and spec.dtype != torch.bool and name in ARITHMETIC
    return counts or is_floating(source)


def _is_positive(number: Any) -> bool:
    return isinstance(number, (int, float)) and number >= 0
