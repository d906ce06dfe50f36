"""The ONNX Runtime sessions of a learner, and what lies on their device."""

from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from fxfeedback.files import LARGEST
from fxfeedback.runtime.devices import Running
from fxfeedback.runtime.learner_file import NEW
from fxfeedback.runtime.providers import open_session

FINITE = "fxfeedback.finite"
"""An output of the session of a step: 0 where all that is fed and all new values are finite, else NaN."""


class Sessions:
    """The sessions of a step and of a prediction: two parts of one graph.

    What never changes is a constant of both, which ONNX Runtime prepares once; where a graph cannot hold it, it is an
    input that lies on the device.

    stepping, predicting: the sessions. providers: those that they run on. note: why CUDA was not taken;
    else empty.
    """

    def __init__(
        self,
        model: Any,
        fixed: Mapping[str, np.ndarray],
        prediction: str,
        finite: bool,
        providers: Any,
        options: Any,
        path: str,
    ) -> None:
        """Open them.

        Args:
            model: the graph of a step, without the values of its state.
            fixed: what never changes, by name.
            prediction: the output that is the logits in evaluation mode.
            finite: whether a step has the output `FINITE`.
            providers: as for `open_session`, with `options`.
            options: ONNX Runtime's, or None.
            path: what errors call the file.
        """
        constants = fixed if sum(value.nbytes for value in fixed.values()) <= LARGEST else {}
        (step, self.note), (predict, _) = [
            open_session(part, providers, options, path) for part in _parts(model, fixed, constants, prediction, finite)
        ]
        self.providers: list[str] = step.get_providers()
        self.stepping, self.predicting = Running(step, path), Running(predict, path)
        self.beside = {} if constants else self.on_device(fixed)

    def on_device(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Copies of the values where the sessions run."""
        return self.stepping.device.copies(values)


def _parts(
    model: Any, fixed: Mapping[str, Any], constants: Mapping[str, np.ndarray], prediction: str, finite: bool
) -> list[bytes]:
    """The graphs of a step and of a prediction."""
    from onnx import ModelProto, numpy_helper
    from onnx.utils import Extractor

    whole = ModelProto()
    whole.CopyFrom(model)
    whole.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    if finite:
        _look_at_values(whole.graph, fixed)
    extractor = Extractor(whole)
    inputs = [given.name for given in whole.graph.input if given.name not in constants]
    outputs = [output.name for output in whole.graph.output if output.name != "prediction"]
    parts = []
    for wanted in (outputs, [prediction]):
        part = extractor.extract_model(inputs, wanted)
        used = {*wanted, *(name for node in part.graph.node for name in node.input)}
        needed = [given for given in part.graph.input if given.name in used or wanted is outputs]
        del part.graph.input[:]
        part.graph.input.extend(needed)
        parts.append(part.SerializeToString())
    return parts


def _look_at_values(graph: Any, fixed: Container[str]) -> None:
    """Add the output `FINITE`: the sum of x - x over all values x that are fed (lr among them) or new."""
    from onnx import TensorProto, helper

    parts = []
    new = [output for output in graph.output if output.name.endswith(NEW)]
    kept = {output.name.removesuffix(NEW) for output in new}
    for output in (*new, *(given for given in graph.input if given.name not in kept and given.name not in fixed)):
        if output.type.tensor_type.elem_type in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16):
            zero, total, part = (f"{FINITE}/{output.name}/{step}" for step in ("zero", "sum", "cast"))
            graph.node.append(helper.make_node("Sub", [output.name, output.name], [zero]))
            graph.node.append(helper.make_node("ReduceSum", [zero], [total], keepdims=0))
            graph.node.append(helper.make_node("Cast", [total], [part], to=TensorProto.FLOAT))
            parts.append(part)
    graph.node.append(helper.make_node("Sum", parts, [FINITE]))
    graph.output.append(helper.make_tensor_value_info(FINITE, TensorProto.FLOAT, []))
