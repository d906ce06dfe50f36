"""What torch.fx can write into the code of a graph."""

import enum
import keyword
import re
from typing import Any

from torch import fx
from torch.fx.node import base_types

from fxfeedback.errors import TraceError
from fxfeedback.graph.nodes import user_line

NAME = re.compile("[A-Za-z0-9_-]+")
"""Of a module, a parameter or a buffer: torch.fx writes it into the code of a graph, where nothing else is safe."""
NAMES = "and names of modules, parameters and buffers are of letters from a to z, digits, '_' and '-'"


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
