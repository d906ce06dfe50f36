"""A file of an instructed network that may be given its gates: for an instruction that was met before, they are known.

The instruction pass becomes the one branch of an If, which is not computed where gates are given. Weights stay outside
of it, as the BU pass reads the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fxfeedback.runtime.signature import GIVEN, gate_in, gate_out


def keep_gates(model: Any, labels: Mapping[str, Sequence[str]]) -> None:
    """Give an `onnx_ir.Model` optional inputs for its gates, and outputs with them, in place.

    Args:
        model: with nodes that `export` has named.
        labels: site -> names, of which the first that a node has makes the gate.
    """
    import onnx_ir as ir

    graph, sites = model.graph, list(labels)
    by_name = {node.name: node for node in graph}
    gates = [next(by_name[name] for name in labels[site] if name in by_name).outputs[0] for site in sites]
    nodes = _only_for(graph, gates)
    made = [ir.Value(name=f"gate/{site}/made", type=gate.type) for site, gate in zip(sites, gates, strict=True)]
    given = [
        _input(graph, gate_in(site), gate.type, [f"{gate_in(site)}.{d}" for d in range(len(gate.shape))])
        for site, gate in zip(sites, gates, strict=True)
    ]
    whether = _input(graph, GIVEN, ir.TensorType(ir.DataType.BOOL), [])

    taken = [ir.node("Identity", [value], name=f"{gate.name}/given") for value, gate in zip(given, gates, strict=True)]
    for node, gate in zip(taken, gates, strict=True):
        node.outputs[0].name, node.outputs[0].type = node.name, gate.type
    for value, gate in zip(made, gates, strict=True):
        ir.convenience.replace_all_uses_with(gate, value)
    for node in nodes:
        graph.remove(node)
    for node in nodes:  # among themselves they read what they compute
        for i, value in enumerate(node.inputs):
            if value in made:
                node.replace_input_with(i, gates[made.index(value)])
    branches = {
        "then_branch": ir.Graph([], [node.outputs[0] for node in taken], nodes=taken, name="given"),
        "else_branch": ir.Graph([], gates, nodes=nodes, name="instruction_pass"),
    }
    first = next(node for node in graph if any(value in made for value in node.inputs))
    choice = ir.node("If", [whether], branches, outputs=made, name="gates")
    graph.insert_before(first, choice)
    _forget_batches(graph, set(made))
    for site, value, gate in zip(sites, made, gates, strict=True):
        copy = ir.node("Identity", [value], name=gate_out(site))
        copy.outputs[0].name, copy.outputs[0].type = gate_out(site), value.type
        copy.outputs[0].shape = ir.Shape(["instructions", *gate.shape[1:]])
        graph.append(copy)
        graph.outputs.append(copy.outputs[0])


def _only_for(graph: Any, gates: list[Any]) -> list[Any]:
    """The nodes that nothing but the gates needs, in order."""
    wanted = {gate.producer() for gate in gates}
    for node in reversed(list(graph)):
        users = {use.node for value in node.outputs for use in value.uses()}
        if users and users <= wanted and not any(value.is_graph_output() for value in node.outputs):
            wanted.add(node)
    return [node for node in graph if node in wanted]


def _forget_batches(graph: Any, of_gates: set[Any]) -> None:
    """What is computed from gates alone has as many rows as they: one for all samples, or one for each."""
    for node in graph:
        computed = [value for value in node.inputs if value is not None and value.const_value is None]
        if computed and all(value in of_gates for value in computed):
            of_gates |= set(node.outputs)
            for value in node.outputs:
                value.shape = None


def _input(graph: Any, name: str, kind: Any, shape: list[str]) -> Any:
    """An optional input, of any size; what it is when it is left out says nothing."""
    import onnx_ir as ir

    value = ir.Value(name=name, type=kind, shape=ir.Shape(shape))
    nothing: Any = False if kind.dtype == ir.DataType.BOOL else 0.0
    for _ in shape:
        nothing = [nothing]
    value.const_value = ir.tensor(nothing, kind.dtype, name)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value
