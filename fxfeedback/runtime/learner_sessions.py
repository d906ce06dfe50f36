"""The ONNX Runtime sessions of a learner, and what lies on their device."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fxfeedback.files import LARGEST
from fxfeedback.runtime.learner_file import NEW
from fxfeedback.runtime.providers import CUDA, cannot_run, open_session

FINITE = "fxfeedback.finite"
"""An output of the session of a step: 0 where all new values are finite, else NaN."""


class Sessions:
    """The sessions of a step and of a prediction: two parts of one graph.

    What never changes is a constant of both, which ONNX Runtime prepares once; where a graph cannot hold it, it is an
    input that lies on the device.

    stepping, predicting: the sessions. providers: those that they run on. note: why CUDA was not taken; else empty.
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
        self.path = path
        constants = fixed if sum(value.nbytes for value in fixed.values()) <= LARGEST else {}
        sessions = [
            open_session(part, providers, options, path) for part in _parts(model, constants, prediction, finite)
        ]
        (self.stepping, self.note), (self.predicting, _) = sessions
        self.providers: list[str] = self.stepping.get_providers()
        self._beside = {} if constants else self.on_device(fixed)

    def run(
        self,
        session: Any,
        feeds: Mapping[str, np.ndarray],
        now: Mapping[str, Any],
        wanted: Sequence[str],
        onto: Mapping[str, Any],
    ) -> list[np.ndarray]:
        """Run on the values that lie on the device: what is `wanted`, as arrays; what changes is written to `onto`.

        Raises:
            CheckpointError: ONNX Runtime cannot.
        """
        binding, there = session.io_binding(), {**self._beside, **now}
        try:
            for given in session.get_inputs():
                if given.name in feeds:
                    binding.bind_cpu_input(given.name, np.asarray(feeds[given.name], order="C"))
                else:
                    binding.bind_ortvalue_input(given.name, there[given.name])
            for name in wanted:
                binding.bind_output(name)
            for name, value in onto.items():
                binding.bind_ortvalue_output(name + NEW, value)
            session.run_with_iobinding(binding)
            return [value.numpy() for value in binding.get_outputs()[: len(wanted)]]
        except Exception as error:  # of a dozen classes
            raise cannot_run(self.path, error) from error

    def on_device(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Copies of the values."""
        import onnxruntime as ort

        device = "cuda" if self.providers[0] == CUDA else "cpu"
        return {name: ort.OrtValue.ortvalue_from_numpy(np.array(value), device) for name, value in values.items()}


def _parts(model: Any, constants: Mapping[str, np.ndarray], prediction: str, finite: bool) -> list[bytes]:
    """The graphs of a step and of a prediction."""
    from onnx import ModelProto, numpy_helper
    from onnx.utils import Extractor

    whole = ModelProto()
    whole.CopyFrom(model)
    whole.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    if finite:
        _look_at_new_values(whole.graph)
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


def _look_at_new_values(graph: Any) -> None:
    """Add the output `FINITE`: the sum of x - x over all new values x (and lr: there may be none that are new)."""
    from onnx import TensorProto, helper

    parts = []
    new = [output for output in graph.output if output.name.endswith(NEW)]
    for output in (*new, *(given for given in graph.input if given.name == "lr")):
        if output.type.tensor_type.elem_type in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16):
            zero, total, part = (f"{FINITE}/{output.name}/{step}" for step in ("zero", "sum", "cast"))
            graph.node.append(helper.make_node("Sub", [output.name, output.name], [zero]))
            graph.node.append(helper.make_node("ReduceSum", [zero], [total], keepdims=0))
            graph.node.append(helper.make_node("Cast", [total], [part], to=TensorProto.FLOAT))
            parts.append(part)
    graph.node.append(helper.make_node("Sum", parts, [FINITE]))
    graph.output.append(helper.make_tensor_value_info(FINITE, TensorProto.FLOAT, []))
