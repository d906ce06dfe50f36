"""Read what `fxfeedback.export_learner` wrote: the graph of a step, and the values of its state."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fxfeedback.errors import CheckpointError
from fxfeedback.file_facts import check_texts, data_files, existing, read_metadata

NEW = ".new"
"""Ends the name of an output that takes the place of an input in the next step."""


def read_learner(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """The file's graph without the values of the state, and these by name.

    Raises:
        CheckpointError: there is no such file, it is damaged, or fxfeedback.export_learner did not write it.
        ImportError: the package onnx is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError(f"{error}: to learn in ONNX Runtime, pip install 'fxfeedback[runtime]'") from error
    existing(path, "fxfeedback.export_learner")
    try:
        model = onnx.load(path, load_external_data=False)
        check_texts(model, path)
        data_files(model, path)
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except CheckpointError:
        raise
    except Exception as error:  # protobuf's own, and whatever external data may raise
        raise CheckpointError(f"{str(path)!r} cannot be loaded: it is damaged, or no ONNX file: {error}") from error
    said = {entry.key: entry.value for entry in model.metadata_props}
    if said.get("product") != "learner" or "fxfeedback" not in said:
        raise CheckpointError(f"{str(path)!r} was not written by fxfeedback.export_learner")
    tied = read_metadata(said, path)["tied"]
    inputs = {given.name for given in model.graph.input}
    try:
        state = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name in inputs}
    except Exception as error:  # of a tensor whose values are not as many as its shape says
        raise CheckpointError(f"{str(path)!r} is damaged: a weight cannot be read: {error}") from error
    _check_names(model, state, tied, path)
    constants = [tensor for tensor in model.graph.initializer if tensor.name not in state]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    return model, state


def _check_names(model: Any, state: Mapping[str, np.ndarray], tied: Mapping[str, str], path: Path) -> None:
    """Refuse a graph that is not a step of learning: one whose inputs, outputs and state do not fit together."""
    graph = model.graph
    made = [name for node in graph.node for name in node.output if name]
    for names in (made, [given.name for given in graph.input], [given.name for given in graph.output]):
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise CheckpointError(f"{str(path)!r} is damaged: {twice[0]!r} is there twice")
    inputs = {given.name: given.type.tensor_type.shape.dim for given in model.graph.input}
    outputs = [output.name for output in model.graph.output]
    missing = [f"an input {name!r}" for name in ("target", "lr") if name not in inputs]
    missing += [f"an output {name!r}" for name in ("loss", "logits") if name not in outputs]
    changing = [name.removesuffix(NEW) for name in outputs if name.endswith(NEW)]
    missing += [f"an input {name!r}" for name in changing if name not in inputs]
    missing += [f"a weight {name!r}" for name in tied.values() if name not in state]
    largest = max((value.size for value in state.values()), default=0)
    for name in changing:
        sizes = [size.dim_value for size in inputs.get(name, ())]
        if name not in state and (min(sizes, default=1) < 1 or math.prod(sizes) > max(1, largest)):
            missing.append(f"a state {name!r} that is not larger than the weights")
    if missing:
        raise CheckpointError(f"{str(path)!r} is damaged: its graph lacks {missing[0]}")
