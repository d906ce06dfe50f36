"""An exported graph without graphs inside of it: torch.export puts what runs under torch.no_grad() into one."""

import operator
from typing import Any

import torch
from torch import fx

from fxfeedback.errors import TraceError
from fxfeedback.graph.nodes import inherit, user_line
from fxfeedback.rules.ops import without_gradient
from fxfeedback.tracing.aten_calls import may_share, writes
from fxfeedback.tracing.refusals import Refusal

INLINED = {torch.ops.higher_order.wrap_with_set_grad_enabled: 1, torch.ops.higher_order.wrap_with_autocast: 4}
"""Ops that run a graph inside of a context: how many of their arguments come before the graph."""


def flattened(module: Any, graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, with those that it runs under torch.no_grad() in their places."""
    flat = fx.Graph()
    places = [node for node in graph.nodes if node.op == "placeholder"]
    flat.output(_copied(module, graph, flat, {node: flat.node_copy(node) for node in places}))
    return flat


def _copied(module: Any, graph: fx.Graph, flat: fx.Graph, made: dict[fx.Node, Any]) -> Any:
    """Copy a graph's nodes into another one; `made` has those of its inputs. What the graph returns."""
    for node in graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], made.__getitem__)
        if node.op == "placeholder" or node.op == "get_attr":
            continue
        if node.target in INLINED:
            made[node] = _inlined(module, node, flat, made)
        elif any(source.op == "get_attr" for source in node.all_input_nodes):
            raise TraceError(f"its graph has {node.target}{user_line(node)}, a choice that is left to the call")
        elif node.target is operator.getitem and isinstance(made[node.args[0]], (tuple, list)):
            made[node] = made[node.args[0]][node.args[1]]
        else:
            made[node] = flat.node_copy(node, made.__getitem__)
    raise AssertionError("a graph has an output")


def _refuse_writing(inside: fx.Graph, given: dict[fx.Node, Any]) -> None:
    """Refuse what writes under torch.no_grad(): it changes a value, and leaves its gradient as it was."""
    for node in inside.nodes:
        source: Any = node
        while source.op == "call_function" and source.args and (source is node or may_share(source)):
            source = source.args[0]
        if writes(node) and source in given and given[source].op != "placeholder":
            raise Refusal(
                "it writes under torch.no_grad() into a value that it computed with gradients, which has them from "
                "before: write it out of place"
            )


def _inlined(module: Any, node: fx.Node, flat: fx.Graph, made: dict[fx.Node, Any]) -> list[Any]:
    """What a graph that runs inside of a context returns."""
    n = INLINED[node.target]
    context, (inner, *given) = node.args[:n], node.args[n:]
    if n > 1 and context[2]:  # device_type, dtype, enabled, cache_enabled
        raise Refusal("it switches autocast on, which a graph cannot hold: call what is returned under autocast")
    inside = getattr(module, str(inner.target))  # type: ignore[union-attr]
    places = [place for place in inside.graph.nodes if place.op == "placeholder"]
    values = [fx.map_arg(value, made.__getitem__) for value in given]
    if n == 1 and not context[0]:
        _refuse_writing(inside.graph, dict(zip(places, values, strict=True)))
    returned = _copied(inside, inside.graph, flat, dict(zip(places, values, strict=True)))
    if n > 1 or context[0]:
        return list(returned)
    out = []
    for value in returned:
        out.append(flat.call_function(without_gradient, (value,)))
        inherit(out[-1], value)
    return out
