"""What an ONNX file says of itself and where its data lies, checked: the file may be damaged, or come from anybody."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fxfeedback.errors import CheckpointError

PRODUCTS = ("lrm", "predictive", "instructed", "task", "learner")


def existing(path: Path, made_by: str) -> Path:
    """The path of a file that is there.

    Raises:
        CheckpointError: there is none, or it is a folder.
    """
    if path.is_dir():
        raise CheckpointError(f"{str(path)!r} is a folder: give the .onnx file that {made_by} wrote")
    if not path.is_file():
        raise CheckpointError(f"there is no file {str(path)!r}: give the file that {made_by} wrote")
    return path


def read_metadata(said: Mapping[str, str], path: Any) -> dict[str, Any]:
    """What the file says of itself, by key.

    Raises:
        CheckpointError: fxfeedback did not write it; or a field is missing or is not what fxfeedback writes there.
    """
    if "fxfeedback" not in said:
        raise CheckpointError(f"{path} was not written by fxfeedback; open it with onnxruntime itself")
    known = {name: text if CHECKS.get(name) is _is_text else _decoded(text, name, path) for name, text in said.items()}
    product = known.get("product")
    if product not in PRODUCTS:
        raise CheckpointError(f"{path} is damaged, or of a later version: its field 'product' is {product!r}")
    instructed = product in ("instructed", "task") or "instruction_size" in known
    needed = [*NEEDED["all"], *NEEDED[product], *(NEEDED["instructed"] if instructed else ())]
    for name in needed:
        if name not in known:
            raise CheckpointError(f"{path} is damaged: its field {name!r} is missing")
    for name, value in known.items():
        if name in CHECKS and not CHECKS[name](value):
            raise CheckpointError(f"{path} is damaged: its field {name!r} is not what fxfeedback writes there")
    return known


def _decoded(text: str, name: str, path: Any) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{path} is damaged: its field {name!r} is nested too deep") from None
    except ValueError:
        return text


def check_texts(model: Any, path: Path) -> None:
    """Refuse an ONNX file with names that are not text, which protobuf hands on as bytes.

    Raises:
        CheckpointError: there is one.
    """
    graph = model.graph
    names = [value.name for value in (*graph.input, *graph.output, *graph.initializer, *graph.node)]
    names += [name for node in graph.node for name in (*node.input, *node.output)]
    names += [text for entry in model.metadata_props for text in (entry.key, entry.value)]
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{str(path)!r} is damaged, or no ONNX file: a name in it is not text")


def data_files(model: Any, path: Path) -> list[Path]:
    """The files beside an ONNX file in which its weights lie.

    Raises:
        CheckpointError: one that is not there, or that does not lie in the file's own folder.
    """
    entries = (entry for tensor in _tensors(model) for entry in tensor.external_data)
    names = dict.fromkeys(entry.value for entry in entries if entry.key == "location")
    for name in names:
        beside = path.parent / name
        if not beside.resolve().is_relative_to(path.parent.resolve()):
            raise CheckpointError(f"the weights of {str(path)!r} lie in {name!r}, outside of its folder: not read")
        if not beside.is_file():
            raise CheckpointError(f"the weights of {str(path)!r} lie in {name!r}, which is not beside it")
    return [path.parent / name for name in names]


def _tensors(model: Any) -> Iterator[Any]:
    yield from _tensors_of_graph(model.graph)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)


def _tensors_of_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Any) -> Iterator[Any]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            if graph.node or graph.initializer:
                yield from _tensors_of_graph(graph)


# -- what is right ----------------------------------------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _are_connections(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and _is_text(one.get("source")) and _is_text(one.get("destination")) for one in value
    )


def _are_predictions(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) and _is_text(one.get("node")) for one in value)


def _are_bounds(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(b) and 0 <= b < math.inf for b in value.values())


def _is_task(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and all(map(_is_number, value)))


CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("fxfeedback", "product", "weights_sha256", "gating", "loss", "optimizer", "dtype"), _is_text),
    "connections": _are_connections,
    "passes": _is_count,
    "predictions": _are_predictions,
    "steps": _is_count,
    "steerable": _is_mapping,
    **dict.fromkeys(("state", "readout"), _are_texts),
    "tasks": lambda value: value is None or _is_count(value),
    "instruction_size": _is_count,
    **dict.fromkeys(("takes_ids", "keeps_gates"), lambda value: type(value) is bool),
    "sites": _are_texts,
    "task": _is_task,
    "learns": _are_texts,
    "keeps": _are_texts,
    "tied": _is_mapping,
    "magnitudes": _are_bounds,
}
"""Key of what a file says of itself -> whether a value may be one. Texts are stored as they are, all else as JSON."""
NEEDED = {
    "all": ("weights_sha256",),
    "lrm": ("connections", "passes", "steerable"),
    "predictive": ("predictions", "steps"),
    "instructed": ("tasks", "instruction_size", "takes_ids", "gating", "sites"),
    "task": ("task",),
    "learner": ("loss", "optimizer", "learns", "tied"),
}
