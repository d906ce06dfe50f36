"""Questions about single nodes: what the passes have said of them, what they are called, whose code they call.

What one pass tells the next of a node is an entry of its `meta` under a key of `KEYS`. It is said by `tell` where the
node is made, and read by the accessor beside it; no pass reads it off a node's name.
"""

import difflib
import enum
import re
import sys
import sysconfig
import types
from collections.abc import Iterable
from typing import Any, Literal

from torch import fx

from fxfeedback.errors import NodeNameError
from fxfeedback.graph.specs import Spec

STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
MADE_BY_CODE = 1 << 9
"""The flag of classes that a `class` statement made, or its like (Py_TPFLAGS_HEAPTYPE)."""
KEYS = {
    "name": "its qualified name, as users write it: layer1.0.relu (tracing/trace.py, and every pass that makes nodes)",
    "module": "the path of the torch.nn module that it calls or, once opened, is the last op of (tracing/trace.py)",
    "as_called": "it calls a copy of a module that has the attributes of this call (tracing/trace.py)",
    "spec": "the Spec of what it makes, a tuple or dict of them if several, None if no tensor (graph/shapes.py)",
    "unopened": "why its op, which has no rule, does not open into others (tracing/open_operators.py)",
    "drawn": "its op draws random numbers (graph/shapes.py)",
    "writes": "its function, the user's, writes into its arguments (graph/meta_device.py)",
    "asked_dtype": "the model's code asks for its dtype, and the graph has the answer (tracing/known_shapes.py)",
    "in_place": "it stands for an op in place, which keeps its tensor's dtype (tracing/open_modules.py)",
    "pass": "the number of the pass that computes it; none is the first (rewrite.py)",
    "instruction": "it is the input for the instruction (instructed/task_heads.py, td_graph.py)",
    "heads": "'stacked': it computes the heads of all tasks; 'chosen': it picks from these (instructed/task_heads.py)",
    "gate": "it is the input for the gate of the site of this name (instructed/gates.py)",
    "rows": "it is the input that says which of several instructions each sample has (instructed/gates.py)",
    "magnitude": "it is the input for the magnitudes of what TD reads in place of this weight (feedback_weights.py)",
    "feedback_weight": "it makes what TD reads in place of the weight of this name (feedback_weights.py)",
    "gates": "it gates the site of this name (instructed/gates.py)",
    "error": "it is the input for the error of an output (counter_hebb_pass.py)",
    "counterpart": "the name of the BU node that it is the TD counterpart of, or a part of that (td_graph.py)",
    "role": "the TD pass that it belongs to: 'instruct' or 'error' (td_graph.py)",
    "update": "the name of the parameter or input whose update it is (counter_hebb_pass.py)",
}
"""Every key of `node.meta` that the package uses: what it says of the node, and which file says it."""


def tell(node: fx.Node, **entries: Any) -> None:
    """Say something of a node to the passes that come later; the keys are those of `KEYS`."""
    assert entries.keys() <= KEYS.keys(), f"{sorted(entries.keys() - KEYS.keys())} should stand in KEYS"
    node.meta.update(entries)


def inherit(node: fx.Node, like: fx.Node, **changes: Any) -> None:
    """Say of a node what is said of another, but for `changes`."""
    node.meta = dict(like.meta)
    tell(node, **changes)


CARRIED = ("module", "asked_dtype", "magnitude", "feedback_weight")
"""What is still said of a node that stands for another in an opened graph."""


def carry(source: fx.Node, node: fx.Node) -> None:
    """Say of a node what is said of another under the keys of `CARRIED`."""
    tell(node, **{key: source.meta[key] for key in CARRIED if key in source.meta})


def tell_only(node: fx.Node, **entries: Any) -> None:
    """As `tell`, and forget whatever else was said of the node."""
    node.meta = {}
    tell(node, **entries)


def name_of(node: fx.Node) -> str:
    """Its qualified name; the name that it has in the graph's code where it has no other."""
    return node.meta.get("name", node.name)


def is_named(node: fx.Node) -> bool:
    """Whether it has a qualified name."""
    return "name" in node.meta


def module_path_of(node: fx.Node) -> str | None:
    """The path of the torch.nn module that it calls or is the last op of."""
    return node.meta.get("module")


def is_as_called(node: fx.Node) -> bool:
    """Whether it calls a copy of a module."""
    return "as_called" in node.meta


def spec_of(node: fx.Node) -> Spec:
    """The Spec of the one tensor that it makes."""
    return node.meta["spec"]


def specs_of(node: fx.Node) -> Any:
    """A Spec, or a tuple or dict of them; None if it makes no tensor, or if its graph has no shapes yet."""
    return node.meta.get("spec")


def unopened(node: fx.Node) -> str | None:
    """Why its op, which has no rule, does not open into others that have; None for every other node."""
    return node.meta.get("unopened")


def draws(node: fx.Node) -> bool:
    """Whether its op draws random numbers."""
    return "drawn" in node.meta


def writes_into_arguments(node: fx.Node) -> bool:
    """Whether it is a call of a function of the user's that writes into its arguments."""
    return "writes" in node.meta


def asked_dtype(node: fx.Node) -> bool:
    """Whether the graph was made with an answer to the question what dtype it has."""
    return "asked_dtype" in node.meta


def was_in_place(node: fx.Node) -> bool:
    """Whether it stands for an op in place of the model's."""
    return "in_place" in node.meta


def pass_of(node: fx.Node) -> int | None:
    """The number of the pass that computes it, if it is said."""
    return node.meta.get("pass")


def is_instruction(node: fx.Node) -> bool:
    """Whether it is the input for the instruction."""
    return "instruction" in node.meta


def is_error(node: fx.Node) -> bool:
    """Whether it is the input for the error of an output."""
    return "error" in node.meta


def is_own_input(node: fx.Node) -> bool:
    """Whether it is an input of the model itself: none for instructions, gates, errors and magnitudes."""
    return node.op == "placeholder" and not node.meta.keys() & {"instruction", "gate", "rows", "error", "magnitude"}


def task_heads_of(node: fx.Node) -> Literal["stacked", "chosen"] | None:
    """What it has to do with the heads of all tasks."""
    return node.meta.get("heads")


def gate_of(node: fx.Node) -> str | None:
    """Of the input for a gate: the name of the site that it gates."""
    return node.meta.get("gate")


def magnitude_of(node: fx.Node) -> str | None:
    """Of the input for magnitudes: the name of the BU weight whose signs they multiply."""
    return node.meta.get("magnitude")


def feedback_weight_of(node: fx.Node) -> str | None:
    """Of a node that makes what TD reads in place of a BU weight: the weight's name."""
    return node.meta.get("feedback_weight")


def gated_site_of(node: fx.Node) -> str | None:
    """Of the call that gates a site: the site's name."""
    return node.meta.get("gates")


def counterpart_of(node: fx.Node) -> str | None:
    """Of a TD node: the name of the BU node that it is the counterpart of, or a part of that."""
    return node.meta.get("counterpart")


def role_of(node: fx.Node) -> Literal["instruct", "error"] | None:
    """Of a TD node: the pass that it belongs to."""
    return node.meta.get("role")


def update_of(node: fx.Node) -> str | None:
    """The name of the parameter or input whose update it is."""
    return node.meta.get("update")


def find_node(graph: fx.Graph, name: str) -> fx.Node:
    """The node called `name`; a module's own name stands for its last node.

    Raises:
        NodeNameError: no such node; the message has the nearest names.
    """
    named = {name_of(node): node for node in graph.nodes if node.op != "output" and is_named(node)}
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


def is_pythons(kind: type) -> bool:
    """Whether a class is Python's own.

    One of the user's may say otherwise: code that is run without a module's name is in `builtins`, and a file may be
    called test.py or code.py, as parts of Python are.
    """
    name = kind.__module__.partition(".")[0]
    if name == "builtins":
        return not kind.__flags__ & MADE_BY_CODE
    file = getattr(sys.modules.get(name), "__file__", None)
    own = file is None or file.startswith(STANDARD_LIBRARY)
    return name in sys.stdlib_module_names and name != "__main__" and own


def is_users(function: Any) -> bool:
    """Whether a function is Python code of the model's, from outside torch."""
    if not isinstance(function, types.FunctionType) or hasattr(function, "autograd_function"):
        return False
    return function.__module__.split(".")[0] not in ("torch", "fxfeedback")
