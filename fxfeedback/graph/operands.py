"""What a call of an op with a rule takes and makes."""

import operator
from typing import Any

from torch import fx

from fxfeedback.graph.nodes import specs_of
from fxfeedback.graph.specs import Spec
from fxfeedback.rules import RULES
from fxfeedback.rules.core import CONSTANT


def operand(node: fx.Node, name: str) -> Any:
    """What a call gives to the operand that the op's rule calls `name`: a node, a number, or None."""
    return RULES[node.target].operands(node.args, node.kwargs).get(name)


def weight_of(node: fx.Node) -> fx.Node:
    """The weight of a linear layer or convolution, as a node of the BU graph."""
    return operand(node, RULES[node.target].weight or "")


def rectifies(node: fx.Node) -> bool:
    """Whether the node is an activation whose output is a gating site."""
    rule = RULES.get(node.target) if node.op == "call_function" else None
    return rule is not None and rule.rectifies


def is_element(node: fx.Node) -> bool:
    """Whether the node picks one of several tensors that another makes."""
    source = node.args[0] if node.args else None
    return node.target is operator.getitem and isinstance(source, fx.Node) and isinstance(specs_of(source), tuple)


def passes(node: fx.Node) -> bool:
    """Whether a counter neuron can pass through the node: it computes floating-point tensors, and not by chance."""
    return node.op == "call_function" and node.target not in CONSTANT and is_floating(node)


def is_floating(node: fx.Node) -> bool:
    """Whether the node's value is a floating-point tensor, or holds one; complex numbers count also."""
    specs: list[Any] = [specs_of(node)]
    if isinstance(specs[0], tuple):
        specs = list(specs[0])
    return any(isinstance(spec, Spec) and (spec.dtype.is_floating_point or spec.dtype.is_complex) for spec in specs)


def is_complex(node: fx.Node) -> bool:
    """Whether the node's value is a tensor of complex numbers, or holds one."""
    specs = specs_of(node)
    parts = specs if isinstance(specs, tuple) else [specs]
    return any(isinstance(spec, Spec) and spec.dtype.is_complex for spec in parts)


def batch_norm_of(node: fx.Node) -> str | None:
    """For a batch norm that follows a convolution directly: the name of the convolution's weight."""
    if node.op != "call_function" or getattr(RULES.get(node.target), "name", "") != "batch_norm":
        return None
    source = node.args[0]
    rule = RULES.get(source.target) if isinstance(source, fx.Node) else None
    return str(weight_of(source).target) if rule and rule.weight and rule.channels == 1 else None
