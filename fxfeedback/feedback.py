"""`add_feedback`: long-range modulatory connections between named nodes of any traceable model."""

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fxfeedback.errors import ActivationWarning, HeavyWarning, SizeWarning, TraceError
from fxfeedback.lrm.choosing import heavy, sized
from fxfeedback.lrm.connections import Connection, new_rectifications, read_connections
from fxfeedback.lrm.feedback_model import FeedbackModel, bottom_up_of
from fxfeedback.lrm.readout import Readout
from fxfeedback.lrm.steering import Steering
from fxfeedback.tracing.doors import both, is_final
from fxfeedback.tracing.examples import example_for, examples_of
from fxfeedback.tracing.share import put
from fxfeedback.tracing.wrapper import want_door

__all__ = ["Connection", "FeedbackModel", "Readout", "Steering", "add_feedback"]


def add_feedback(
    model: nn.Module,
    connections: Iterable[Any],
    passes: int = 2,
    *,
    input_size: Sequence[int] | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    checkpoint: bool = False,
    door: str | None = None,
    verify: bool = True,
) -> Any:
    """Add long-range modulatory connections to a model and run it in several passes.

    In each pass a destination y becomes relu(y + y Σ m), or as its `Connection` says. m is computed from its
    sources' values: those of the previous pass for a source that runs later (feedback), of the present pass for one
    that runs earlier (skip). A destination without a signal is not changed, so the first pass of a feedback-only model
    is the model ("Cognitive Steering in Deep Neural Networks via Long-Range Modulatory Feedback Connections",
    NeurIPS 2023).

    Args:
        model: any module that torch.fx can trace. It is not changed. Its parameters are shared with the result; its
            attributes and modes are copied.
        connections: pairs (source, destination), dicts, or `Connection`s; names as `node_names` gives them.
        passes: how many passes a call makes by default.
        input_size: size of one input without its batch; default 224 by 224 with the first convolution's channels.
        example_inputs: instead of input_size, for several inputs: tensors with a batch dimension; a dict gives them by
            name.
        checkpoint: train in less memory and more time, as torch.utils.checkpoint does: the backward pass computes the
            activations again. Also an attribute of what is returned. torch.compile decides for itself what it keeps.
        door: how the model becomes a graph: "fx", by torch.fx's symbolic tracing; "export", by torch.export; None: by
            torch.export where torch.fx can trace neither the model nor a part of it that has all connections.
        verify: compare the graph with the model once, on one random sample in evaluation mode. It costs two forward
            passes of that sample.

    Returns:
        A `FeedbackModel`. Where torch.fx cannot trace the whole model, but a part that has all the connections: a copy
        of the model with its own call, in which that part is a `FeedbackModel` that returns its last pass.

    Raises:
        NodeNameError: a name that no node has, or one that cannot be source or destination.
        OptionError: options that do not exist or do not go together, a connection given twice.
        TraceError: torch.fx cannot trace the model, it does not run at this size, or its graph computes something else.

    Warns:
        ActivationWarning: a destination is rectified in the passes that have a signal, and in no others (see
            `Connection`).
        HeavyWarning: a connection has more than a tenth of the model's parameters.
        SizeWarning: neither input_size nor example_inputs is given, and a layer norm's parameters depend on it.
    """
    made = read_connections(connections)
    try:
        examples = examples_of(model, input_size, example_inputs)
        whole: nn.Module
        whole = rewritten = FeedbackModel(model, made, passes, examples, True, checkpoint, verify, door or "fx")
        want_door(rewritten, door)
    except TraceError as error:
        if door == "export":
            raise
        try:
            whole, rewritten = _add_feedback_inside(model, made, passes, input_size, checkpoint, verify, door, error)
        except TraceError as neither:
            if door == "fx" or is_final(error):
                raise
            whole = rewritten = _exported(model, made, passes, examples, checkpoint, verify, neither)
    for message in new_rectifications(bottom_up_of(rewritten).graph, rewritten.connections):
        warnings.warn(message, ActivationWarning, stacklevel=2)
    for message in heavy(rewritten):
        warnings.warn(message, HeavyWarning, stacklevel=2)
    for message in sized(rewritten) if input_size is None and example_inputs is None else ():
        warnings.warn(message, SizeWarning, stacklevel=2)
    return whole


def _exported(
    model: nn.Module,
    connections: Sequence[Connection],
    passes: int,
    examples: Any,
    checkpoint: bool,
    verify: bool,
    neither: TraceError,
) -> FeedbackModel:
    """The whole model by torch.export, as torch.fx takes neither it nor a part that has all connections."""
    try:
        return FeedbackModel(model, connections, passes, examples, True, checkpoint, verify, "export")
    except TraceError as by_export:
        raise both(neither, by_export) from neither


def _add_feedback_inside(
    model: nn.Module,
    connections: Sequence[Connection],
    passes: int,
    input_size: Any,
    checkpoint: bool,
    verify: bool,
    door: str | None,
    whole: TraceError,
) -> tuple[nn.Module, FeedbackModel]:
    """A copy of a model that cannot be traced, with the largest traceable part that has all connections rewritten.

    And that part.
    """
    names = [name for c in connections for name in (c.source, c.destination)]
    steps = zip(*(name.split(".")[:-1] for name in names), strict=False)
    path = [step[0] for step in itertools.takewhile(lambda step: len(set(step)) == 1, steps)]
    for part in itertools.accumulate(path, "{}.{}".format):
        inside = len(part) + 1
        try:
            module = model.get_submodule(part)
            moved = [replace(c, source=c.source[inside:], destination=c.destination[inside:]) for c in connections]
            example = example_for(module, input_size)
            made = FeedbackModel(module, moved, passes, example, False, checkpoint, verify, "fx")
        except (AttributeError, TraceError):
            continue
        want_door(made, door)
        return put(model, part, made), made
    raise TraceError(
        f"{whole} Or let all connections lie inside one part of the model that can be traced, such as its backbone: "
        "that part is then rewritten alone."
    ) from whole
