"""The nodes of a model in execution order: their names, ops and shapes, and which a connection may use.

A connection leads from a source to a destination; between two maps only if both have as many dimensions. Where a shape
begins with 4B, each image has 4 parts in its batch, as windows are: such a node is only connected with one of as many.
A module's own name stands for its last node. Good ends do least harm: one per stage, after an activation, rectified
where a connection ends.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from fxfeedback.commands.given import add_model, read_model
from fxfeedback.commands.text import several, sizes, table

EXAMPLES = [
    "fxfeedback nodes resnet18",
    "fxfeedback nodes alexnet --json",
    "fxfeedback nodes mnist:net --input-size 1x28x28",
    "fxfeedback nodes vit_b_16 --opened",
]
KEYS = {
    "model": "MODEL, as given",
    "door": "what traced it: fx (torch.fx) or export (torch.export)",
    "parts": "where torch.fx cannot trace the whole model: the parts that it can; connections lie inside one",
    "inputs": "the shape of each input; in shapes null stands for the batch",
    "nodes[].name": "as connections name it",
    "nodes[].op": "what it computes, or what it is",
    "nodes[].shape": "of its value; null where this is not a tensor",
    "nodes[].per_image": "how many parts of one image lie in its batch: 1, as a rule; 0: the batch has no say",
    "nodes[].source": "whether it may be a connection's source",
    "nodes[].destination": "whether it may be a connection's destination",
    "nodes[].good_source": "whether it is a good one: of its stage, after an activation; see suggest_connections",
    "nodes[].good_destination": "whether it is a good one: the last rectified node of its stage",
    "nodes[].rule": "with --opened, in their place: the rule of its op; null where no error or instruction passes it",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and what belongs to it."""
    add_model(parser)
    parser.add_argument("--opened", action="store_true", help="the ops that learning sees, and the rules they have")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Name the nodes of the model or, where torch.fx cannot trace it whole, of the parts that it can."""
    from fxfeedback.errors import InputError, TraceError
    from fxfeedback.storage.save_load import unwrap
    from fxfeedback.tracing.doors import door_of
    from fxfeedback.tracing.examples import example_for
    from fxfeedback.tracing.wrapper import Wrapper, stand_ins_of

    given: Any = read_model(arguments.model, arguments.weights)
    size = arguments.input_size
    model, _ = unwrap(given)
    examples = stand_ins_of(given) if isinstance(given, Wrapper) and not size else example_for(model, size)
    try:
        graphs = {"": _traced(model, examples)}
    except TraceError:
        graphs = {}
        for name, part in model.named_children():
            with contextlib.suppress(InputError, TraceError):
                graphs[name] = _traced(part, example_for(part, size))
        if not graphs:
            raise
    return {
        "model": arguments.model,
        "door": "export" if any(door_of(module) == "export" for module, _ in graphs.values()) else "fx",
        "parts": [name for name in graphs if name],
        "inputs": [[None, *x.shape[1:]] for _, inputs in graphs.values() for x in inputs],
        "nodes": [
            row
            for name, (module, inputs) in graphs.items()
            for row in (_opened if arguments.opened else _nodes)(name, module, inputs)
        ],
    }


def _traced(model: Any, examples: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    from fxfeedback.tracing.share import share
    from fxfeedback.tracing.trace_at_size import trace_for

    module, _ = trace_for(share(model), examples)
    return module, examples


def _nodes(part: str, module: Any, examples: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """What is said of each node of a model's or a part's graph."""
    from fxfeedback.graph.shapes import annotate_shapes
    from fxfeedback.graph.structures import unpack_tuples
    from fxfeedback.lrm.choosing import good_ends
    from fxfeedback.lrm.connections import legal_ends

    good = good_ends(module, examples, module)
    annotate_shapes(module, examples)
    unpack_tuples(module)
    sources, destinations = legal_ends(module.graph)
    for node in module.graph.nodes:
        if node.op != "output":
            row = _row(part, node, module) | {"source": node in sources, "destination": node in destinations}
            own = row["name"].removeprefix(f"{part}.") if part else row["name"]
            yield row | {"good_source": own in good[0], "good_destination": own in good[1]}


def _opened(part: str, module: Any, examples: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The same of the graph that a BU-TD network has of it."""
    from fxfeedback.graph.shapes import annotate_shapes
    from fxfeedback.graph.structures import unpack_tuples
    from fxfeedback.rules import RULES
    from fxfeedback.tracing.open_modules import open_modules
    from fxfeedback.tracing.open_operators import open_operators

    opened = open_modules(module, example_inputs=examples)
    annotate_shapes(opened, examples)
    unpack_tuples(opened)
    open_operators(opened, examples, module)
    for node in opened.graph.nodes:
        if node.op != "output":
            yield _row(part, node, opened) | {"rule": getattr(RULES.get(node.target), "name", None)}


def _row(part: str, node: Any, module: Any) -> dict[str, Any]:
    from fxfeedback.graph.nodes import name_of, spec_of, specs_of
    from fxfeedback.graph.specs import Spec
    from fxfeedback.tracing.names import op_name

    spec = spec_of(node) if isinstance(specs_of(node), Spec) else None
    return {
        "name": f"{part}.{name_of(node)}" if part else name_of(node),
        "op": op_name(node, module),
        "shape": spec and spec.sizes,
        "per_image": spec.per_sample[0] if spec and spec.shape else 0,
    }


def lines(result: dict[str, Any]) -> Iterator[str]:
    """A table."""
    by = ", traced by torch.export" if result["door"] == "export" else ""
    inputs = ", ".join(map(sizes, result["inputs"]))
    yield f"{result['model']}: {several(len(result['nodes']), 'node')}, input {inputs}{by}"
    if result["parts"]:
        parts = ", ".join(result["parts"])
        yield f"torch.fx cannot trace the whole, but {parts}: all connections must lie inside one such part"
    yield ""
    ends = ("rule",) if "rule" in result["nodes"][0] else ("source", "destination")
    rows = [
        (node["name"], node["op"], _shape(node), *(_said(node[end], node.get(f"good_{end}")) for end in ends))
        for node in result["nodes"]
    ]
    yield from table(("node", "op", "shape", *ends), rows)


def _said(answer: bool | str | None, good: bool | None) -> str:
    return "good" if good else "yes" if answer is True else answer or ""


def _shape(node: dict[str, Any]) -> str:
    return sizes(node["shape"]).replace("B", f"{node['per_image']}B" if node["per_image"] > 1 else "B")
