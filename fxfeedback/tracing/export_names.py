"""Names for the nodes of an exported graph, as torchvision's NodePathTracer gives them to those of a traced one.

A torch.nn module's own name is that of the node that makes its value; every other node has the name of the innermost
module that it was made in, and its op's.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import fx, nn

from fxfeedback.graph.nodes import tell
from fxfeedback.tracing.aten_calls import Operator, base_name

SPELLED = {"slice": "getitem", "index": "getitem", "select": "getitem", "_to_copy": "to", "sym_size": "size"}
"""What Python's code says for an op."""


class Place(NamedTuple):
    """The call of a module that a node was made in: its path, and what tells it from the module's other calls."""

    path: str
    call: str


def place_of(node: fx.Node, prefix: str) -> Place:
    """The innermost call of a module that an exported node was made in; prefix: the model's own path."""
    stack = list((node.meta.get("nn_module_stack") or {}).items())
    call, (path, _) = stack[-1] if stack else ("", ("", ""))
    inside = path == prefix.rstrip(".") or path.startswith(prefix)
    return Place(path.removeprefix(prefix.rstrip(".")).removeprefix("."), call) if inside else Place("", "")


def give_names(graph: fx.Graph, origin: Mapping[fx.Node, fx.Node], prefix: str, model: nn.Module) -> None:
    """Name every node of a translated graph.

    Args:
        origin: of each node that calls something: the exported one that it was made for.
        prefix: what the paths of the exported program begin with.
        model: whose modules these are.
    """
    places = {node: place_of(origin[node], prefix) for node in graph.nodes if node in origin}
    calls: dict[Place, list[fx.Node]] = defaultdict(list)
    for node, place in places.items():
        calls[place].append(node)
    made_by: dict[fx.Node, Place] = {}
    for place, nodes in calls.items():
        tensors = [node for node in nodes if isinstance(origin[node].meta.get("val"), torch.Tensor)]
        returned = [node for node in tensors if any(places.get(user) != place for user in node.users)]
        if len(returned) == 1 and place.path and _is_leaf(model.get_submodule(place.path)):
            made_by[returned[0]] = place
    given: dict[str, int] = {}
    for node in graph.nodes:
        if node in made_by:
            path = made_by[node].path
            tell(node, name=_counted(path, given), module=path)
        elif node in places:
            path, op = places[node].path, _op_name(node, origin[node])
            tell(node, name=_counted(f"{path}.{op}" if path else op, given))
        elif node.op != "output":
            tell(node, name=str(node.target))


def _is_leaf(module: nn.Module) -> bool:
    """Whether torch.fx keeps the module closed."""
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential)


def _op_name(node: fx.Node, source: fx.Node) -> str:
    if isinstance(source.target, Operator):
        name = base_name(source.target)
        return SPELLED.get(name, name)
    return node.name if isinstance(node.target, type) else getattr(node.target, "__name__", str(node.target))


def _counted(name: str, given: dict[str, int]) -> str:
    """A name that comes again is followed by _1, _2, as torchvision counts; its own number is not part of it."""
    name = re.sub(r"_[0-9]+$", "", name)
    given[name] = given.get(name, -1) + 1
    return f"{name}_{given[name]}" if given[name] else name
