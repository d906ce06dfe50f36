"""Questions about single nodes: what they are called, which of the user's lines made them, whose code they call."""

import difflib
import operator
import re
import types
from collections.abc import Iterable
from typing import Any

from torch import fx

from fxfeedback.errors import NodeNameError


def find_node(graph: fx.Graph, name: str) -> fx.Node:
    """The node called `name`; a module's own name stands for its last node.

    Raises:
        NodeNameError: no such node; the message has the nearest names.
    """
    named = {node.meta["name"]: node for node in graph.nodes if node.op != "output" and "name" in node.meta}
    if name in named:
        return named[name]
    inside = [node for key, node in named.items() if key.startswith(name + ".")]
    if inside and name:
        return inside[-1]
    steps = [key.split(".") for key in named]
    modules = [".".join(path[:i]) for path in steps for i in range(1, len(path))]
    hint = nearest(name, dict.fromkeys([*modules, *named]))
    raise NodeNameError(f"no node is called {name!r}{hint}. fxfeedback.node_names(model) lists all names.")


def identifier(name: str) -> str:
    """A node or parameter name as a Python name: layer1.0.conv1 -> layer1_0_conv1."""
    name = re.sub(r"\W", "_", name)
    return f"_{name}" if name[:1].isdigit() else name


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean ...?' with the names nearest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def user_line(node: fx.Node) -> str:
    """', called at FILE:LINE: CODE' of the model's source that made `node`, or nothing where it is not known."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s+(.*)', node.stack_trace or "")
    own = [frame for frame in frames if not is_torchs(frame[0])]
    return f", called at {own[-1][0]}:{own[-1][1]}: {own[-1][2]}" if own else ""


def is_torchs(file: str) -> bool:
    """Whether a source file is torch's, torchvision's tracer or ours, and no user's."""
    return (
        bool(re.search(r"[/\\](torch|fxfeedback)[/\\]", file))
        or "feature_extraction.py" in file
        or file.startswith("<")
    )


def is_users(function: Any) -> bool:
    """Whether a function is Python code of the model's, from outside torch."""
    if not isinstance(function, types.FunctionType) or hasattr(function, "autograd_function"):
        return False
    return function.__module__.split(".")[0] not in ("torch", "fxfeedback")


def is_operator_in_place(target: Any) -> bool:
    """Whether `target` is operator.iadd or one of its kind: x += y."""
    return target in (operator.iadd, operator.isub, operator.imul, operator.itruediv)
