"""What torch's exporter leaves to do: names, optional inputs, metadata, and a few better forms of its nodes."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxfeedback.deploy.exporting import label_of
from fxfeedback.deploy.program import SPATIAL, Input, Program
from fxfeedback.version import __version__

FOLDED = 64
"""What is computed from a larger tensor is left to ONNX Runtime: folded here, a weight would be stored twice."""


def finish(model: Any, program: Program, labels: Sequence[str], outputs: Sequence[str]) -> None:
    """Fold shape arithmetic, name dimensions and nodes, make inputs optional, drop what tells of this machine."""
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript import optimizer

    ir.passes.Sequential(common.InlinePass(), common.RemoveUnusedNodesPass())(model)
    optimizer.fold_constants(model, input_size_limit=FOLDED)
    _drop_wrong_biases(model.graph)
    _resize_by_products(model.graph)
    # No fusions: they would store a weight once per use, and ONNX Runtime makes them when it loads the file.
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
    _name_dimensions(model.graph, program.inputs)
    _name_nodes(model.graph, labels)
    _set_defaults(model.graph, program)
    _forget(model)
    model.producer_name, model.producer_version, model.graph.name = "fxfeedback", __version__, "fxfeedback"
    model.metadata_props.update({key: _text(value) for key, value in program.metadata.items()})


def _drop_wrong_biases(graph: Any) -> None:
    """A 3-d convolution without a bias gets one of zeros that has two dimensions (onnxscript's issue 2931)."""
    for node in graph.all_nodes():
        if node.op_type == "Conv" and len(node.inputs) == 3 and node.inputs[2] is not None:
            shape = node.inputs[2].shape
            if shape is not None and len(shape) == 2:
                node.replace_input_with(2, None)


def _resize_by_products(graph: Any) -> None:
    """A map of a known size is resized by two products of matrices: half of the time that Resize takes on a CPU."""
    import onnx_ir as ir

    for node in list(graph.all_nodes()):
        if node.op_type != "Resize":
            continue
        x, y = node.inputs[0], node.outputs[0]
        sizes = [*x.shape[2:], *y.shape[2:]]
        modes = [node.attributes.get_string(name) for name in ("mode", "coordinate_transformation_mode")]
        known = len(sizes) == 4 and all(isinstance(n, int) for n in sizes) and x.dtype == ir.DataType.FLOAT
        if modes != ["linear", "align_corners"] or not known:
            continue
        rows = _constant(graph, f"resize_rows_{sizes[0]}_to_{sizes[2]}", _resizing(sizes[0], sizes[2]).T)
        columns = _constant(graph, f"resize_columns_{sizes[1]}_to_{sizes[3]}", _resizing(sizes[1], sizes[3]))
        tall = ir.node("MatMul", [rows, x], metadata_props=node.metadata_props)
        wide = ir.node("MatMul", [tall.outputs[0], columns], metadata_props=node.metadata_props)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [tall, wide], [y], [wide.outputs[0]])


def _resizing(old: int, new: int) -> torch.Tensor:
    """The matrix (old, new) that resizes a row; as resizing is linear, it is what the unit rows become."""
    return F.interpolate(torch.eye(old)[None, None], (old, new), mode="bilinear", align_corners=True)[0, 0]


def _constant(graph: Any, name: str, tensor: torch.Tensor) -> Any:
    """The initializer of this name."""
    import onnx_ir as ir

    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(tensor.contiguous(), name=name)))
    return graph.initializers[name]


def _name_dimensions(graph: Any, inputs: Sequence[Input]) -> None:
    """The exporter's symbols for free sizes, as in s77 and 64*s77, become `batch`, `height` and `width`."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value, given in zip(graph.inputs, inputs, strict=True):
        for i, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim):
                name = SPATIAL[len(value.shape)][i - 2] if i and given.any_size else "batch"
                names.setdefault(str(dim.value), name)
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape(
                re.sub(r"\w+", lambda found: names.get(found[0], found[0]), str(d.value))
                if isinstance(d, ir.SymbolicDim)
                else d
                for d in value.shape
            )


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _name_nodes(graph: Any, labels: Sequence[str]) -> None:
    """A node is called as its step; where a step takes several, the last is, and the others `<step>/<op>`."""
    by_label: dict[str, list[Any]] = {}
    for node in graph.all_nodes():
        label = label_of(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""), labels)
        by_label.setdefault(label or "shapes", []).append(node)
    for label, nodes in by_label.items():
        seen: dict[str, int] = {}
        for node in nodes[:-1]:
            seen[node.op_type] = seen.get(node.op_type, 0) + 1
            count = seen[node.op_type]
            node.name = f"{label}/{node.op_type}" + (f"_{count}" if count > 1 else "")
        nodes[-1].name = label


def _set_defaults(graph: Any, program: Program) -> None:
    """Inputs with a batch of their own are broadcast to the batch; those with a default need not be given."""
    import onnx_ir as ir

    image = graph.inputs[0]
    for number, given in enumerate(program.inputs):
        value = graph.inputs[number]
        if given.batch not in (None, "batch") and isinstance(value.shape[0], ir.SymbolicDim):
            free = ir.Value(name=given.name, type=value.type, shape=ir.Shape([given.batch, *value.shape[1:]]))
            graph.inputs[number] = free
            ones = ir.Value(
                name=f"{given.name}.ones",
                const_value=ir.tensor([1] * (len(value.shape) - 1), ir.DataType.INT64, f"{given.name}.ones"),
            )
            graph.register_initializer(ones)
            size = ir.node("Shape", [image], {"start": 0, "end": 1}, name=f"{given.name}/Shape")
            whole = ir.node("Concat", [size.outputs[0], ones], {"axis": 0}, name=f"{given.name}/Concat")
            expanded = ir.node("Expand", [free, whole.outputs[0]], name=f"{given.name}/Expand")
            for node, suffix in ((size, "size"), (whole, "sizes"), (expanded, "expanded")):
                node.outputs[0].name = f"{given.name}.{suffix}"
            expanded.outputs[0].type, expanded.outputs[0].shape = value.type, value.shape
            ir.convenience.replace_all_uses_with(value, expanded.outputs[0])
            first = next(iter(graph), None)
            new = [size, whole, expanded]
            if first is None:
                graph.extend(new)
            else:
                graph.insert_before(first, new)
            value = free
        if given.default is not None:
            value.const_value = ir.tensor(given.default, name=given.name)
            graph.initializers[given.name] = value


def _forget(model: Any) -> None:
    """Drop stack traces and what else the exporter noted: they hold paths of the machine that exported."""
    model.doc_string = None
    for thing in (model, model.graph, *model.graph.all_nodes(), *_values(model.graph)):
        thing.metadata_props.clear()
        thing.doc_string = None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
