"""What a call does besides returning its result: it writes in place, advances statistics, or must stay in a graph."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfeedback.graph.nodes import draws, is_users
from fxfeedback.graph.operands import operand
from fxfeedback.rules.draws import drawn_like, dropped
from fxfeedback.rules.ops import ADVANCES, cumulative_momentum, filled_from, put_at

OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}
"""Operators in place, as x += y, and the same out of place. (x @= y makes a new tensor.)"""
FILLING = {
    "zero_": torch.zeros_like,
    "fill_": torch.full_like,
    "bernoulli_": drawn_like,
    "copy_": filled_from,
    "dropout_": dropped,
}
"""Ops in place whose twin out of place has another name."""
ONLY_MARKS = ("requires_grad_", "share_memory_")
"""Methods that leave a tensor's values as they are."""
LOGICAL = (operator.and_, operator.or_, operator.not_)
"""Functions that are called as if they were in place."""


def is_in_place(target: Any) -> bool:
    """Whether a function or method writes into its first argument, which its name or table says."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return target in OPERATORS or (name.endswith("_") and target not in LOGICAL)


def out_of_place(target: Any) -> Any:
    """relu_ -> relu, add_ -> add, operator.iadd -> operator.add; a target without such a twin as it is."""
    if not is_in_place(target) or is_users(target):
        return target
    if target in OPERATORS:
        return OPERATORS[target]
    name = target if isinstance(target, str) else target.__name__
    if name.endswith("__"):
        return target
    if name in FILLING:
        return FILLING[name]
    if isinstance(target, str):  # but not requires_grad_, whose namesake is not a method
        return name[:-1] if callable(getattr(torch.Tensor, name[:-1], None)) else target
    return getattr(torch, name[:-1], None) or getattr(F, name[:-1], target)


def has_twin(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node of a traced graph works in place, in a way that opening it turns into one out of place."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    return bool(node.kwargs.get("inplace")) or out_of_place(node.target) is not node.target


def writes_into_first(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node of a traced graph writes into its first argument, with or without such a twin.

    What advances statistics writes into these.
    """
    if node.op not in ("call_function", "call_method") or node.target in (*ONLY_MARKS, *ADVANCES.values()):
        return has_twin(node, root)
    return has_twin(node, root) or (is_in_place(node.target) and not is_users(node.target))


def has_effect(node: fx.Node) -> bool:
    """Whether the node of an opened graph matters although it is unused: inputs, outputs, in-place ops."""
    calls = node.op in ("call_function", "call_method")
    return node.op in ("placeholder", "output") or (calls and is_in_place(node.target))


def has_effect_as_traced(node: fx.Node, module: nn.Module | None) -> bool:
    """The same in a graph as it was traced, where modules and the user's functions are closed.

    Assertions about shapes have none: they have done their work in tracing.

    module: what the node calls, if it calls one.
    """
    if module is not None:
        counts = module.training and getattr(module, "running_mean", None) is not None  # a norm that is unused
        return counts or bool(getattr(module, "inplace", False))
    writes = has_effect(node) or bool(node.kwargs.get("inplace")) or node.target is put_at
    return writes or is_users(node.target)  # who knows what it does


def counts_batches(node: fx.Node) -> bool:
    """Whether the node is a batch norm in training mode that keeps running statistics."""
    keeps = node.target in ADVANCES and operand(node, "running_mean") is not None
    return keeps and operand(node, "training") is True


def keeps_statistics(node: fx.Node) -> bool:
    """Whether the node is an instance norm in training mode that keeps running statistics: its kernel advances them."""
    keeps = node.target is F.instance_norm and operand(node, "running_mean") is not None
    return keeps and operand(node, "use_input_stats") is True


def is_new_in_every_pass(node: fx.Node) -> bool:
    """Whether passes may not share the node although its inputs are the same."""
    counts = node.target is cumulative_momentum
    return draws(node) or counts or has_effect(node) or keeps_statistics(node)


def drop_unused(graph: fx.Graph) -> None:
    """Erase the nodes of an opened graph that are unused and have no effect."""
    graph.eliminate_dead_code(is_impure_node=lambda node: has_effect(node) or counts_batches(node))
