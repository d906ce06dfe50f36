"""Which nodes compute with sizes alone, so that nothing of them stays in a graph for these sizes."""

import operator
from typing import Any

from torch import fx

from fxfeedback.tracing.stand_ins import Shaped

ON_SIZES = ("_operator", "builtins", "math")
"""Modules whose functions compute sizes."""


def is_on_sizes(node: fx.Node, args: Any) -> bool:
    """Whether the node computes with sizes and structures that are known, so that nothing of it stays in the graph."""
    if node.op == "call_method":
        return isinstance(args[0], Shaped) and node.target in ("size", "dim", "ndimension", "numel")
    if node.op != "call_function" or getattr(node.target, "__module__", "") not in ON_SIZES or node.kwargs:
        return False
    if node.target is getattr:
        return isinstance(args[0], Shaped) and args[1] in ("shape", "ndim")
    if node.target is operator.getitem:
        return not isinstance(args[0], fx.Proxy)
    return not any(isinstance(arg, fx.Proxy) for arg in args)
