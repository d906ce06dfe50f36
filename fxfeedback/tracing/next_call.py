"""Whether a model's next call computes what its first did: comparing two graphs, and what to say where they differ."""

import linecache
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from fxfeedback.errors import TraceError
from fxfeedback.graph.nodes import is_torchs
from fxfeedback.tracing.attributes import plain_value, settings


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
    for node in graph.nodes:
        args = fx.map_arg((node.args, node.kwargs), numbers.__getitem__)
        what: Any = getattr(node.target, "__qualname__", node.target)
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            tensor = getattr(root.get_submodule(path), leaf)
            what = what if id(tensor) in own else plain_value(tensor)
        changed = called.get(node)
        state = settings(changed) if changed is not None else None
        numbers[node] = f"node {len(rows)}"
        rows.append((repr((node.op, what, args, state)), node))
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
