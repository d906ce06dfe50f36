"""Nodes and arguments that hold several tensors: tuples, dicts, named tuples, dataclasses."""

import operator
from dataclasses import is_dataclass
from typing import Any

from torch import fx

from fxfeedback.graph.nodes import name_of, specs_of, tell
from fxfeedback.rules.ops import without_gradient


def is_structure(node: fx.Node) -> bool:
    """Whether the node only builds a named tuple or a dataclass of others."""
    return node.op == "call_function" and (hasattr(node.target, "_fields") or is_dataclass(node.target))


def leaves_of(structure: Any) -> list[fx.Node]:
    """The nodes in what a model returns, in order, each once; a named tuple or dataclass stands for its elements."""
    leaves: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if is_structure(node):
            fx.map_arg((node.args, node.kwargs), visit)
        else:
            leaves[node] = None

    fx.map_arg(structure, visit)
    return list(leaves)


def plain(arguments: Any) -> Any:
    """torch.fx's immutable lists and dicts as plain ones."""
    if isinstance(arguments, dict):
        return {key: plain(value) for key, value in arguments.items()}
    if isinstance(arguments, list):
        return [plain(value) for value in arguments]
    return tuple(map(plain, arguments)) if type(arguments) is tuple else arguments


def unpack_tuples(module: fx.GraphModule) -> None:
    """Where a tuple that one op makes is returned, or taken whole as in torch.cat(x.chunk(2)): a node per tensor.

    The elements of a named tuple are taken by their numbers.
    """
    graph = module.graph
    parts: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def element(node: fx.Node, i: int) -> fx.Node:
        with graph.inserting_after(node):
            part = graph.call_function(operator.getitem, (node, i))
        tell(part, spec=specs_of(node)[i], name=f"{name_of(node)}.{i}")
        return part

    def unpack(node: fx.Node) -> Any:
        if node not in tuples or is_structure(node):
            return node
        if node not in parts:
            parts[node] = tuple(element(node, i) for i in range(len(specs_of(node))))
        return parts[node]

    tuples = {node for node in graph.nodes if isinstance(specs_of(node), tuple)}
    joined = {node for node in tuples if node.target in (operator.getitem, operator.add)}
    for node in list(graph.nodes):
        if node.target is getattr and node.args[0] in tuples:
            _by_number(node)
        if node.target is operator.getitem and node.args[0] in tuples and isinstance(node.args[1], slice):
            parts[node] = unpack(node.args[0])[node.args[1]]
        elif node.target is operator.getitem and node.args[0] in joined & parts.keys():
            node.replace_all_uses_with(parts[node.args[0]][node.args[1]])
        elif node.target not in (operator.getitem, getattr, without_gradient):
            node.args, node.kwargs = fx.map_arg(node.args, unpack), fx.map_arg(node.kwargs, unpack)
        if node.target is operator.add and node in joined:
            parts[node] = operator.add(*node.args)
    module.recompile()


def _by_number(node: fx.Node) -> None:
    """torch.max(x, 1).values as torch.max(x, 1)[0]."""
    source, name = node.args
    fields = getattr(specs_of(source), "fields", ())
    if name in fields:
        node.target, node.args = operator.getitem, (source, fields.index(name))
