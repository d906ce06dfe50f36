"""Add connections to a model, and say what comes of it: which pass computes what again, and what it costs.

A pass shares with those before it what it would compute exactly as they did: what lies below every destination.
Operations are those of one image, a multiplication and an addition counted as two.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from fxfeedback.commands.given import add_connections, add_model, read_network
from fxfeedback.commands.text import Count, Percent, operations, sizes, table

EXAMPLES = [
    "fxfeedback feedback resnet50 --connect layer4:layer3.0.relu",
    "fxfeedback feedback alexnet --connect classifier.6:features.9 features.12:features.1 --passes 3",
    "fxfeedback feedback alexnet --connect classifier.6:features.9 --save steered",
    "fxfeedback feedback mnist:net --input-size 1x28x28 --connect 8:0 --code",
]
KEYS = {
    "model": "MODEL, as given",
    "part": "the part of the model that has the connections; empty: the whole",
    "inputs": "the shape of each input; in shapes null stands for the batch",
    "parameters": "of the model",
    "parameters_added": "of the connections",
    "connections[].source": "where it starts",
    "connections[].destination": "where it ends",
    "connections[].kind": "feedback: the source runs after the destination; skip: before",
    "connections[].mode": "multiply or add",
    "connections[].source_shape": "of the source's value",
    "connections[].destination_shape": "of the destination's value",
    "connections[].parameters": "of its block",
    "passes[].computed": "names of the nodes that this pass computes",
    "passes[].shared": "names of the nodes whose value it takes from a pass before",
    "passes[].operations": "floating-point operations of one image",
    "code": "with --code: the unrolled graph as Python code; else null",
    "saved": "with --save: the directory; else null",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, its connections, what else to do."""
    add_model(parser)
    add_connections(parser)
    parser.add_argument("--code", action="store_true", help="also print the unrolled graph's code")
    parser.add_argument("--save", metavar="DIR", help="save the model for fxfeedback.load")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Add the connections, and look at the unrolled graph."""
    import fxfeedback
    from fxfeedback.commands.networks import input_shapes, parameters, part_with
    from fxfeedback.lrm.choosing import operations_of_passes

    model = read_network(arguments, fxfeedback.FeedbackModel)
    part, network = part_with(model, fxfeedback.FeedbackModel)
    if arguments.save:
        fxfeedback.save(model, arguments.save)
    added = parameters(network.modulations)
    unrolled = network.unrolled()
    passes = zip(_computed(unrolled.graph, network.passes), operations_of_passes(network), strict=True)
    everything = _computed(unrolled.graph, 1)[0]
    return {
        "model": arguments.model,
        "part": part,
        "inputs": input_shapes(network),
        "parameters": parameters(model) - added,
        "parameters_added": added,
        "connections": _connections(network),
        "passes": [
            {"computed": names, "shared": [name for name in everything if name not in names], "operations": count}
            for names, count in passes
        ],
        "code": unrolled.code if arguments.code else None,
        "saved": arguments.save,
    }


def _computed(graph: Any, passes: int) -> list[list[str]]:
    """For each pass the names of the model's nodes that it computes, where these are tensors."""
    from fxfeedback.graph.nodes import is_named, name_of, pass_of, specs_of
    from fxfeedback.graph.specs import Spec

    calls = (node for node in graph.nodes if node.op.startswith("call") and is_named(node))
    named = [node for node in calls if isinstance(specs_of(node), Spec)]
    return [[name_of(n) for n in named if (pass_of(n) or 1) == number] for number in range(1, passes + 1)]


def _connections(network: Any) -> list[dict[str, Any]]:
    from fxfeedback.commands.networks import parameters
    from fxfeedback.graph.nodes import find_node, spec_of
    from fxfeedback.lrm.feedback_model import bottom_up_of

    graph = bottom_up_of(network).graph
    order = list(graph.nodes)
    rows = []
    for connection in network.connections:
        source, destination = find_node(graph, connection.source), find_node(graph, connection.destination)
        rows.append(
            {
                "source": connection.source,
                "destination": connection.destination,
                "kind": "skip" if order.index(source) < order.index(destination) else "feedback",
                "mode": connection.mode,
                "source_shape": spec_of(source).sizes,
                "destination_shape": spec_of(destination).sizes,
                "parameters": parameters(network.modulation(connection.source, connection.destination)),
            }
        )
    return rows


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Two tables, and the code."""
    where = f", connected inside {result['part']}" if result["part"] else ""
    yield f"{result['model']}{where}: input {', '.join(map(sizes, result['inputs']))}"
    share = Percent(result["parameters_added"] / max(result["parameters"], 1))
    yield f"{Count(result['parameters'])} parameters, {Count(result['parameters_added'])} added ({share})"
    yield ""
    rows = [
        (
            f"{c['source']} -> {c['destination']}",
            c["kind"] + (", added" if c["mode"] == "add" else ""),
            f"{sizes(c['source_shape'])} -> {sizes(c['destination_shape'])}",
            Count(c["parameters"]),
        )
        for c in result["connections"]
    ]
    yield from table(("connection", "kind", "shapes", "parameters"), rows)
    yield ""
    passes = [
        (
            number,
            len(p["computed"]),
            len(p["shared"]),
            next(iter(p["computed"]), "nothing"),
            operations(p["operations"]),
        )
        for number, p in enumerate(result["passes"], 1)
    ]
    yield from table(("pass", "nodes computed", "shared", "computed from", "operations"), passes)
    if result["code"]:
        yield ""
        yield from result["code"].strip().splitlines()
    if result["saved"]:
        yield ""
        yield f"saved: fxfeedback.load({result['saved']!r})"
