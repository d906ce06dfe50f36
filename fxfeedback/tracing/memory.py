"""Which values of an opened graph share memory, so that an op in place may not become one out of place."""

from collections.abc import Collection, Iterable
from typing import Any

import networkx as nx
import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxfeedback.errors import RuleError
from fxfeedback.graph.effects import has_twin
from fxfeedback.graph.nodes import is_users, name_of, user_line
from fxfeedback.tracing.known_shapes import Shapes

CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long"}
"""Methods that return the tensor itself where it has the dtype already."""
OF_SEVERAL = {"broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d"}
"""Functions that make views of several tensors."""
VIEWS = CASTS | {"getitem", "same", "pos", "T", "H", "data"}
VIEWS |= {
    schema.name.removeprefix("aten::")
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("aten::") and any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
}
"""Functions, methods and attributes that make a view of their first tensor, or may make one."""

Write = tuple[fx.Node, fx.Node]
"""The node whose value an op in place overwrites, and the node that has the new value."""


def is_view(node: fx.Node) -> bool:
    """Whether the node makes a view of its first input, or may make one."""
    name = node.args[1] if node.target is getattr else getattr(node.target, "__name__", node.target)
    return node.op in ("call_function", "call_method") and name in VIEWS


def base_of(node: fx.Node) -> fx.Node:
    """What the node is a view of, or the node itself."""
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def refuse_writing(node: fx.Node, root: nn.Module, made_so: Collection[fx.Node]) -> None:
    """Refuse what writes under torch.no_grad(): it changes a value, and leaves its gradient as it was.

    made_so: the nodes that were made under torch.no_grad() themselves.
    """
    written = node.args[0] if has_twin(node, root) else None
    if isinstance(written, fx.Node) and written not in made_so and base_of(written).op != "get_attr":
        raise ValueError(
            "it writes under torch.no_grad() into a value that it computed with gradients, which has them from before: "
            "write it out of place"
        )


def refuse_out(node: fx.Node) -> None:
    """Refuse what writes its result into another tensor."""
    if isinstance(node.kwargs.get("out"), fx.Node):
        raise ValueError("it gives an op out=, which a graph cannot hold: let the op return its result")


def check_overwriting(graph: fx.Graph, writes: Iterable[Write], shapes: Shapes | None) -> None:
    """Refuse an op in place that changes memory which is read later under another name: as a view, or by a view.

    Args:
        graph: an opened graph, in the order in which it runs.
        writes: of the ops in place in the model, which are out of place in the graph.
        shapes: what its nodes are, where that is known.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    writes = [(old, new) for old, new in writes if old in order and new in order]
    if not writes:
        return
    sharing = _sharing(graph, writes, shapes)
    parts = _parts(graph)
    for old, new in writes:
        if base_of(old).op == "get_attr":
            raise RuleError(
                f"the in-place op at node {name_of(new)!r}{user_line(new)} writes into {base_of(old).target!r} through "
                "a view of it: write into the whole, as by copy_, under torch.no_grad()"
            )
        for other in sorted(nx.node_connected_component(sharing, old), key=order.__getitem__):
            read_later = any(order[user] > order[new] for user in other.users)
            if order[other] < order[new] and read_later and not _are_apart(parts[old], parts[other]):
                raise RuleError(
                    f"the in-place op at node {name_of(new)!r}{user_line(new)} overwrites memory that is read "
                    f"again as {name_of(other)!r}: write it out of place (x = x + y, not x.add_(y))"
                )


def _sharing(graph: fx.Graph, writes: Iterable[Write], shapes: Shapes | None) -> nx.Graph:
    """An edge joins two nodes whose values lie in the same memory, or may."""
    sharing = nx.Graph(writes)
    for node in graph.nodes:
        if is_view(node):
            sources = node.all_input_nodes[:1]
        elif is_users(node.target) or getattr(node.target, "__name__", "") in OF_SEVERAL:
            sources = node.all_input_nodes
        else:
            continue
        sharing.add_edges_from((node, source) for source in sources if _may_share(node, source, shapes))
    return sharing


def _may_share(node: fx.Node, source: fx.Node, shapes: Shapes | None) -> bool:
    made, given = (shapes and shapes.of(each) for each in (node, source))
    if not made or not given:
        return True
    if getattr(node.target, "__name__", "") in CASTS:
        return made[0].dtype == given[0].dtype
    return is_view(node) or not _storages(made[0]).isdisjoint(_storages(given[0]))


def _storages(value: Any) -> set[int]:
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _parts(graph: fx.Graph) -> dict[fx.Node, dict[fx.Node, int]]:
    """For views: of which values they are only one element or row, and which."""
    parts: dict[fx.Node, dict[fx.Node, int]] = {}
    for node in graph.nodes:
        source = node.all_input_nodes[0] if is_view(node) and node.all_input_nodes else None
        parts[node] = dict(parts[source]) if source is not None else {}
        if source is not None and getattr(node.target, "__name__", "") == "getitem" and type(node.args[1]) is int:
            parts[node][source] = node.args[1]
    return parts


def _are_apart(some: dict[fx.Node, int], others: dict[fx.Node, int]) -> bool:
    """Whether two views are of different elements."""
    pairs = [(i, others[node]) for node, i in some.items() if node in others]
    return any(i != j and (i < 0) == (j < 0) for i, j in pairs)
