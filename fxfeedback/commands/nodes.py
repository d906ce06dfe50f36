"""The nodes of a model in execution order: their names, ops and shapes, and which a connection may use.

A connection leads from a source to a destination. Where a shape begins with 4B, each image has 4 parts in its batch, as
windows are; such a node can only be connected with one of as many parts. A module's own name stands for its last node.
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
]
KEYS = {
    "model": "MODEL, as given",
    "parts": "where torch.fx cannot trace the whole model: the parts that it can; connections lie inside one",
    "inputs": "the shape of each input; in shapes null stands for the batch",
    "nodes[].name": "as connections name it",
    "nodes[].op": "what it computes, or what it is",
    "nodes[].shape": "of its value; null where this is no tensor",
    "nodes[].per_image": "how many parts of one image lie in its batch: 1, as a rule; 0: the batch has no say",
    "nodes[].source": "whether it may be a connection's source",
    "nodes[].destination": "whether it may be a connection's destination",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and what belongs to it."""
    add_model(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Name the nodes of the model or, where torch.fx cannot trace it whole, of the parts that it can."""
    from fxfeedback.errors import InputError, TraceError
    from fxfeedback.storage import _unwrap
    from fxfeedback.trace import example_for
    from fxfeedback.wrapper import Wrapper

    given: Any = read_model(arguments.model, arguments.weights)
    size = arguments.input_size
    model, _ = _unwrap(given)
    parts: list[str] = []
    try:
        saved = isinstance(given, Wrapper) and not size
        inputs, nodes = _nodes("", model, given._stand_ins() if saved else example_for(model, size))
    except TraceError:
        inputs, nodes = [], []
        for name, part in model.named_children():
            with contextlib.suppress(InputError, TraceError):
                shapes, inside = _nodes(f"{name}.", part, example_for(part, size))
                parts, inputs, nodes = [*parts, name], inputs + shapes, nodes + inside
        if not parts:
            raise
    return {"model": arguments.model, "parts": parts, "inputs": inputs, "nodes": nodes}


def _nodes(prefix: str, model: Any, examples: Sequence[Any]) -> tuple[list[Any], list[dict[str, Any]]]:
    """The shapes of a model's inputs, and its nodes."""
    from fxfeedback.feedback import legal_ends
    from fxfeedback.names import info_of, named_graph
    from fxfeedback.trace import Spec

    module = named_graph(model, examples)
    sources, destinations = legal_ends(module.graph)
    rows = []
    for node in module.graph.nodes:
        if node.op != "output":
            info, spec = info_of(node, module), node.meta["spec"]
            rows.append(
                {
                    "name": prefix + node.meta["name"],
                    "op": info.op,
                    "shape": info.shape,
                    "per_image": spec.per_sample[0] if isinstance(spec, Spec) and spec.shape else 0,
                    "source": node in sources,
                    "destination": node in destinations,
                }
            )
    return [[None, *x.shape[1:]] for x in examples], rows


def lines(result: dict[str, Any]) -> Iterator[str]:
    """A table."""
    yield f"{result['model']}: {several(len(result['nodes']), 'node')}, input {', '.join(map(sizes, result['inputs']))}"
    if result["parts"]:
        parts = ", ".join(result["parts"])
        yield f"torch.fx cannot trace the whole, but {parts}: all connections must lie inside one such part"
    yield ""
    rows = [
        (node["name"], node["op"], _shape(node), *("yes" if node[end] else "" for end in ("source", "destination")))
        for node in result["nodes"]
    ]
    yield from table(("node", "op", "shape", "source", "destination"), rows)


def _shape(node: dict[str, Any]) -> str:
    return sizes(node["shape"]).replace("B", f"{node['per_image']}B" if node["per_image"] > 1 else "B")
