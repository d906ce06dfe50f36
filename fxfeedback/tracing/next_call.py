"""Whether a model's next call computes what its first did: comparing two graphs, and what to say where they differ."""

import linecache
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from fxfeedback.errors import TraceError
from fxfeedback.graph.effects import is_in_place, is_new_in_every_pass
from fxfeedback.graph.nodes import is_torchs
from fxfeedback.tracing.attributes import NOT_THEIR_OWN, plain_value, proxies_in, settings


def of_parameters(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are functions of parameters and buffers alone, which nothing writes into."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        pure = node.op == "get_attr" or (node.op in ("call_function", "call_method") and not is_new_in_every_pass(node))
        written = any(is_in_place(user.target) or user.kwargs.get("inplace") for user in node.users)
        if pure and not written and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def carry_over(modules: Iterable[nn.Module], tracer: fx.Tracer, kept: Collection[fx.Node]) -> None:
    """Give a tracer of the next call the values of parameters that forward has left on modules: a cache, say.

    kept: the nodes of the first call's graph whose values stay the same as long as the parameters do.
    """
    made: dict[fx.Node, fx.Node] = {}

    def carried(value: Any) -> Any:
        if issubclass(type(value), fx.Proxy) and value.node in kept:
            return tracer.proxy(_copied(value.node, tracer.graph, made))
        if type(value) is dict:
            return {key: carried(part) for key, part in value.items()}
        return type(value)(map(carried, value)) if type(value) in (list, tuple) else value

    for module in modules:
        for name, value in vars(module).items():
            if name not in NOT_THEIR_OWN and any(True for _ in proxies_in(value)):
                vars(module)[name] = carried(value)


def _copied(node: fx.Node, graph: fx.Graph, made: dict[fx.Node, fx.Node]) -> fx.Node:
    if node not in made:
        for source in node.all_input_nodes:
            _copied(source, graph, made)
        made[node] = graph.node_copy(node, made.__getitem__)
    return made[node]


def difference(first: Sequence[Any], second: Sequence[Any]) -> fx.Node | None:
    """The first node of the second of two graphs, given by `meaning`, that the first graph has not."""
    for (one, _), (other, node) in zip(first, second, strict=False):
        if one != other:
            return node
    longer = max(first, second, key=len)
    return longer[min(len(first), len(second))][1] if len(first) != len(second) else None


def meaning(
    graph: fx.Graph, root: nn.Module, given: Sequence[torch.Tensor], called: dict[fx.Node, nn.Module | None]
) -> list[tuple[str, fx.Node]]:
    """What each node of a graph computes, to compare graphs of one model.

    given: the model's own tensors, which go by their names; what forward put in their places goes by its values.
    called: the modules that are called with other attributes than `root` has.
    """
    rows: list[tuple[str, fx.Node]] = []
    numbers: dict[fx.Node, str] = {}
    own = {id(tensor) for tensor in given}
    alike = of_parameters(graph)  # these go by what they compute: the next call may have them from the first
    for node in graph.nodes:
        args = fx.map_arg((node.args, node.kwargs), numbers.__getitem__)
        what: Any = getattr(node.target, "__qualname__", node.target)
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            tensor = getattr(root.get_submodule(path), leaf)
            what = what if id(tensor) in own else plain_value(tensor)
        changed = called.get(node)
        state = settings(changed) if changed is not None else None
        row = repr((node.op, what, args, state))
        numbers[node] = f"function of parameters {hash(row)}" if node in alike else f"node {len(rows)}"
        if node not in alike:
            rows.append((row, node))
    return rows


@contextmanager
def noting_lines() -> Iterator[dict[tuple[int, str], str]]:
    """(id of a module, name of an attribute) -> where the user's code set it."""
    original, lines = nn.Module.__setattr__, {}

    def note(module: nn.Module, name: str, value: Any) -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and is_torchs(frame.f_code.co_filename):
            frame = frame.f_back
        file, number = frame.f_code.co_filename, frame.f_lineno
        lines[id(module), name] = f", set at {file}:{number}: {linecache.getline(file, number).strip()}"
        original(module, name, value)

    with mock.patch.object(nn.Module, "__setattr__", note):
        yield lines


def state_is_kept(names: Sequence[str], where: str) -> TraceError:
    """What is wrong with a forward that leaves something to the next call."""
    return TraceError(
        f"the model's forward keeps state from call to call, in {' or '.join(map(repr, names[:3]))}{where}, which a "
        "graph would drop: make it an input and return it, or a buffer that forward writes into in place "
        "(register_buffer, then self.name.copy_(...) or .add_(1))"
    )
