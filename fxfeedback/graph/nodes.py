"""Questions about single nodes: what they are called, which of the user's lines made them, whose code they call."""

import difflib
import enum
import keyword
import operator
import re
import types
from collections.abc import Iterable
from typing import Any

from torch import fx
from torch.fx.node import base_types

from fxfeedback.errors import NodeNameError, TraceError

NAME = re.compile("[A-Za-z0-9_-]+")
"""Of a module, a parameter or a buffer: torch.fx writes it into the code of a graph, where nothing else is safe."""
NAMES = "and names of modules, parameters and buffers are of letters from a to z, digits, '_' and '-'"


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
    name = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"_{name}" if name[:1].isdigit() or name == "self" else name


def input_node(graph: fx.Graph, name: str) -> fx.Node:
    """An input called `name`: a.b_c and a_b.c are one Python name, and inputs of a function have different ones."""
    node = graph.placeholder(identifier(name))
    node.target = node.name
    return node


def built_in(value: Any) -> Any:
    """A number or a string of a class of the user's as Python's own: torch.fx writes its repr into a graph's code."""
    if isinstance(value, enum.Enum):
        return value
    kind = next((kind for kind in (bool, int, float, complex, str) if isinstance(value, kind)), None)
    return value if kind is None or type(value) is kind else kind(value)


def refuse_unwritable(graph: fx.Graph) -> None:
    """Refuse what torch.fx cannot write into a graph's code: it takes names and constants there as they are.

    Raises:
        TraceError: a name or a constant that would be read as something else.
    """
    for node in graph.nodes:
        steps = str(node.target).split(".")
        if node.op in ("call_module", "get_attr"):
            words = [step for step in steps if keyword.iskeyword(step)]
            if words:
                raise TraceError(
                    f"the model's {node.target!r} is called like Python's own word {words[0]!r}, which the code of a "
                    f"graph cannot say: rename it, for example to {words[0] + '_'!r}"
                )
            if not all(map(NAME.fullmatch, steps)):
                raise TraceError(f"the model has {node.target!r}, {NAMES}: rename it.")
        names = [str(node.target).lstrip("*")] if node.op in ("call_method", "placeholder") else []
        names += [node.args[1]] if node.target is getattr and isinstance(node.args[1], str) else []
        for name in [*names, *node.kwargs]:
            if not name.isidentifier() or keyword.iskeyword(name):
                raise TraceError(
                    f"{node.name!r} has {name!r} as a name{user_line(node)}, which the code of a graph cannot say: use "
                    "names that Python's own code can have"
                )
        _check_constants((node.args, node.kwargs), node)


def _check_constants(value: Any, node: fx.Node) -> None:
    if isinstance(value, (tuple, list)):
        for item in value:
            _check_constants(item, node)
    elif isinstance(value, dict):
        _check_constants([*value, *value.values()], node)
    elif isinstance(value, (slice, range)):
        _check_constants((value.start, value.stop, value.step), node)
    elif isinstance(value, enum.Enum):
        if not value.name.isidentifier():
            raise TraceError(f"{value!r} is a constant{user_line(node)} that the code of a graph cannot say")
    elif not isinstance(value, (fx.Node, type(None), type(...))) and type(value) not in base_types:
        raise TraceError(
            f"a {type(value).__name__} is a constant{user_line(node)}, which the code of a graph cannot say: give "
            "numbers, strings and tensors"
        )


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
