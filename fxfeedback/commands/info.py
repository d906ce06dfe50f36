"""Say what an exported file is: which product, its inputs and outputs, connections, tasks, checksum and sizes.

It reads the file without torch and without running it.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxfeedback.commands.text import Count, megabytes, several, table
from fxfeedback.errors import CheckpointError
from fxfeedback.file_facts import check_texts, data_files, existing, read_metadata

EXAMPLES = ["fxfeedback info lrm.onnx", "fxfeedback info learner.onnx --json"]
PRODUCTS = {
    "lrm": "the passes of a model with connections",
    "predictive": "the steps of a model with predictions",
    "instructed": "an instructed network",
    "task": "one task's network",
    "learner": "a step of learning",
}
SAID = ("passes", "connections", "tasks", "task", "instruction_size", "gating", "sites", "loss", "optimizer", "learns")
"""Keys of what a file says of itself; which ones depends on the product."""

KEYS = {
    "file": "as given",
    "bytes": "the file's size",
    "data": "name of a second file, with the weights of a large model; else null",
    "data_bytes": "that file's size; else 0",
    "product": "; ".join(f"{name}: {meaning}" for name, meaning in PRODUCTS.items()),
    "fxfeedback": "the version that wrote it",
    "weights_sha256": "checksum of the model's state_dict, as fxfeedback.runtime.checksum computes it",
    "nodes": "how many the graph has",
    "weights": "how many numbers its weights and constants are",
    "inputs[].name": "of an input",
    "inputs[].type": "float, int64, ...",
    "inputs[].shape": "a free size is a name",
    "inputs[].optional": "whether it may be left out",
    "outputs[].name": "of an output",
    "outputs[].type": "float, int64, ...",
    "outputs[].shape": "a free size is a name",
    "state": "of a learner: names of the inputs that are weights or the optimizer's, which are not among inputs[]",
    "steerable": "names of the sources that can be steered",
    "passes": "how many; this and all that follows: null where the product has no such thing",
    "connections[].source": "where a connection starts",
    "connections[].destination": "where it ends",
    "connections[].order": "as of fxfeedback.Connection",
    "connections[].norm": "as of fxfeedback.Connection",
    "connections[].resize": "as of fxfeedback.Connection",
    "connections[].activation": "as of fxfeedback.Connection",
    "connections[].init": "as of fxfeedback.Connection; it says nothing of weights that have learned",
    "connections[].mode": "as of fxfeedback.Connection",
    "tasks": "how many there are; also null where instructions are vectors over the model's outputs",
    "task": "the one task that the file is for, an id or a vector",
    "instruction_size": "the length of an instruction",
    "gating": "unit or channel",
    "sites": "names of the gating sites",
    "loss": "of a learner",
    "optimizer": "of a learner",
    "learns": "names of the parameters that a learner updates",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE."""
    parser.add_argument("file", metavar="FILE.onnx", help="what fxfeedback.export or export_learner wrote")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read the file."""
    return about(arguments.file)


def about(file: str) -> dict[str, Any]:
    """What the file is, with the keys of `KEYS`.

    Raises:
        CheckpointError: no such file, a damaged one, or one that fxfeedback did not write.
        ImportError: the package onnx is missing.
    """
    model = _read(file)
    graph = model.graph
    defaults = {tensor.name for tensor in graph.initializer}
    inputs, outputs = ([_value(value) for value in values] for values in (graph.input, graph.output))
    said = read_metadata({entry.key: entry.value for entry in model.metadata_props}, repr(file))
    learns = said["product"] == "learner"
    replaced = {value["name"].removesuffix(".new") for value in outputs if value["name"].endswith(".new")}
    state = [value["name"] for value in inputs if learns and value["name"] in replaced | defaults]
    data = next(iter(data_files(model, Path(file))), None)
    return {
        "file": file,
        "bytes": Path(file).stat().st_size,
        "data": data and data.name,
        "data_bytes": data.stat().st_size if data else 0,
        "product": said["product"],
        "fxfeedback": said["fxfeedback"],
        "weights_sha256": said["weights_sha256"],
        "nodes": len(graph.node),
        "weights": sum(math.prod(tensor.dims) for tensor in graph.initializer),
        "inputs": [value | {"optional": value["name"] in defaults} for value in inputs if value["name"] not in state],
        "outputs": [value for value in outputs if not value["name"].endswith(".new")],
        "state": state,
        "steerable": sorted(said.get("steerable") or {}),
        **{key: said.get(key) for key in SAID},
        "connections": said.get("connections") and [{"mode": "multiply"} | one for one in said["connections"]],
    }


def _read(file: str) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ImportError(f"{error}: to look into ONNX files, pip install 'fxfeedback[onnx]'") from error
    existing(Path(file), "fxfeedback.export")
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf's own
        raise CheckpointError(f"{file!r} is damaged, or no ONNX file: {error}") from error
    check_texts(model, Path(file))
    if not model.graph.node:
        raise CheckpointError(f"{file!r} is damaged, or no ONNX file: it has no nodes")
    if "fxfeedback" not in {entry.key for entry in model.metadata_props}:
        raise CheckpointError(f"{file!r} is an ONNX file, but not one that fxfeedback wrote")
    return model


def _value(value: Any) -> dict[str, Any]:
    import onnx

    tensor = value.type.tensor_type
    types = {number: name for name, number in onnx.TensorProto.DataType.items()}
    return {
        "name": value.name,
        "type": types.get(tensor.elem_type, "undefined").lower(),
        "shape": [size.dim_param or size.dim_value for size in tensor.shape.dim],
    }


def lines(result: dict[str, Any]) -> Iterator[str]:
    """A summary, and a table of inputs and outputs."""
    written = f"written by fxfeedback {result['fxfeedback']}"
    yield f"{result['file']}: {PRODUCTS.get(result['product'], result['product'])}, {written}"
    beside = f" and {megabytes(result['data_bytes'])} in {result['data']}" if result["data"] else ""
    numbers = f"{several(result['nodes'], 'node')}, {Count(result['weights'])} weights and constants"
    yield f"{megabytes(result['bytes'])}{beside}, {numbers}"
    yield f"sha256 of the state_dict: {result['weights_sha256']}"
    for connection in result["connections"] or ():
        steered = ", steerable" if connection["source"] in result["steerable"] else ""
        added = ", added" if connection["mode"] == "add" else ""
        yield f"connection: {connection['source']} -> {connection['destination']}{added}{steered}"
    for key in ("passes", "tasks", "task", "gating", "loss", "optimizer"):
        if result[key] is not None:
            yield f"{key}: {result[key]}"
    if result["sites"] is not None:
        yield f"sites: {len(result['sites'])}"
    if result["learns"] is not None:
        yield f"learns: {several(len(result['learns']), 'parameter tensor')}, among {len(result['state'])} kept ones"
    yield ""
    rows = [(v["name"], v["type"], _sizes(v), "input" + ", optional" * v["optional"]) for v in result["inputs"]]
    rows += [(v["name"], v["type"], _sizes(v), "output") for v in result["outputs"]]
    yield from table(("name", "type", "shape", ""), rows)


def _sizes(value: dict[str, Any]) -> str:
    return f"({', '.join(map(str, value['shape']))})"
