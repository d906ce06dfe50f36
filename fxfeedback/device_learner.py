"""Learn where the network is deployed: in ONNX Runtime, from the file that `fxfeedback.export_learner` wrote.

learner = fxfeedback.runtime.Learner("learner.onnx")
loss = learner.step(images, labels, task=tasks, lr=0.05)
logits = learner.predict(images, task=tasks)
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fxfeedback.errors import CheckpointError, InputError
from fxfeedback.files import LARGEST, replace_whole
from fxfeedback.providers import CUDA, open_session
from fxfeedback.signature import Signature, array
from fxfeedback.version import __version__

if TYPE_CHECKING:
    import onnxruntime as ort

NEW = ".new"
"""Ends the name of an output that takes the place of an input in the next step."""


class Learner(Signature):
    """A network that learns in ONNX Runtime. Weights and optimizer state stay on the device between steps.

    providers: the providers that it runs on, as ONNX Runtime names them, the first preferred.
    note: why CUDA was not taken, where that was tried; else empty.
    logits: of the last step, (B, ...); None before the first.
    metadata: what the file says of itself: loss, optimizer and its settings, which parameters learn, tasks, version.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: str | Sequence[Any] | None = None,
        options: "ort.SessionOptions | None" = None,
    ) -> None:
        """Load a file.

        Args:
            path: the .onnx file.
            providers: names of ONNX Runtime's execution providers, or (name, options) pairs, the preferred first;
                "cuda" and "cpu" will do. None: CUDA where it works, else the CPU.
            options: ONNX Runtime's, for its threads, say.

        Raises:
            CheckpointError: there is no such file; it is damaged, or fxfeedback.export_learner did not write it.
            OptionError: a provider that is not there or cannot be loaded; the message says which library is missing.
        """
        self._model, state = _read(Path(path))
        self._path, self._providers, self._options = str(path), providers, options
        outputs = [output.name for output in self._model.graph.output]
        self._changing = [name.removesuffix(NEW) for name in outputs if name.endswith(NEW)]
        self._kept = [name for name in self._changing if name not in state]
        self._prediction = "prediction" if "prediction" in outputs else "logits"
        self._fixed = {name: value for name, value in state.items() if name not in self._changing}
        self._names = list(state)
        self._open()
        super().__init__(self._stepping, {entry.key: entry.value for entry in self._model.metadata_props}, path)
        self.NOT_OWN = {"instruction", "target", "lr", *self._names, *self._kept}
        zeros = {name: np.zeros(self.inputs[name], self.dtypes[name]) for name in self._kept}  # type: ignore[arg-type]
        state |= zeros
        start = {name: state[name] for name in self._changing}
        self._now, self._next = self._on_device(start), self._on_device(start)
        self.logits: np.ndarray | None = None

    def step(self, *inputs_and_target: Any, lr: float, task: Any = None) -> float:
        """Learn from one batch.

        Args:
            inputs_and_target: the model's own inputs, (B, ...), and the target: (B, ...) class ids for cross_entropy
                (-100: leave out), else floats shaped like the logits. Numpy arrays, lists or tensors.
            lr: the learning rate.
            task: for an instructed network: one id, (B,) integer ids, or (B or 1, instruction size) floats.

        Returns:
            The loss before the step; the logits are in `logits`.

        Raises:
            InputError: an input, target or instruction of the wrong shape, dtype or range. Nothing was learned.
        """
        *inputs, target = inputs_and_target or (None,)
        sizes: dict[str, int] = {}
        feeds, _ = self.feeds(inputs, task, sizes)
        feeds["target"] = self._target(target, sizes)
        feeds["lr"] = np.asarray(lr, self.dtypes["lr"])
        loss, self.logits = self._run(self._stepping, feeds, ["loss", "logits"], self._next)
        self._now, self._next = self._next, self._now
        return float(loss)

    def predict(self, *inputs: Any, task: Any = None) -> np.ndarray:
        """The logits (B, ...) in evaluation mode, with the present weights.

        Raises:
            InputError: an input or instruction of the wrong shape, dtype or range.
        """
        feeds, _ = self.feeds(inputs, task, {})
        return self._run(self._predicting, feeds, [self._prediction], {})[0]

    def state_dict(self) -> dict[str, np.ndarray]:
        """The network's parameters and buffers under torch's names; `BUTD.load_state_dict` takes it."""
        state = {name: self._value(name) for name in self._names}
        return state | {name: state[first] for name, first in self.metadata["tied"].items()}

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """What the optimizer keeps: `<parameter>.momentum_buffer`, `<parameter>.exp_avg`, ..., `optimizer.step`."""
        return {name: self._value(name) for name in self._kept}

    def load_state_dict(self, state: Mapping[str, Any], optimizer_state: Mapping[str, Any] | None = None) -> None:
        """Take over the parameters and buffers of a network, arrays or tensors, under torch's names.

        Args:
            state: a whole state_dict of the network that was exported.
            optimizer_state: as `optimizer_state()` returned it; None: the optimizer starts anew.

        Raises:
            CheckpointError: entries that are missing, unknown or of another shape. Nothing was taken over.
        """
        tied = self.metadata["tied"]
        given = {name: value for name, value in state.items() if name not in tied}
        zeros = {name: np.zeros_like(self._value(name)) for name in self._kept}
        kept = zeros if optimizer_state is None else optimizer_state
        self._check_names("state_dict", given, self._names)
        self._check_names("optimizer's state", kept, self._kept)
        values = {name: self._fitting(name, value) for name, value in {**given, **kept}.items()}
        now = self._on_device({name: values[name] for name in self._changing})
        fixed = {name: values[name] for name in self._fixed}
        if any(not np.array_equal(fixed[name], self._fixed[name]) for name in fixed):
            before, self._fixed = self._fixed, fixed
            try:
                self._open()  # what never changes is part of the sessions
            except BaseException:
                self._fixed = before
                raise
        self._now = now

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and optimizer state as a safetensors file; an old one is replaced whole or not at all."""
        from safetensors.numpy import save_file

        tensors = {name: self._value(name) for name in (*self._names, *self._kept)}
        about = {"fxfeedback": __version__, "product": "learner"}
        replace_whole(Path(path), lambda new: save_file(tensors, new, about))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over what `save` wrote.

        Raises:
            CheckpointError: no such file, a damaged one, or weights of another network. Nothing was taken over.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        kept = {name: tensors.pop(name) for name in self._kept if name in tensors}
        self.load_state_dict(tensors, kept)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """The sessions of a step and of a prediction: two parts of one graph.

        What never changes is a constant of both, which ONNX Runtime prepares once; where a graph cannot hold it, it is
        an input that lies on the device.
        """
        from onnx import ModelProto, numpy_helper
        from onnx.utils import Extractor

        model = ModelProto()
        model.CopyFrom(self._model)
        constants = self._fixed if sum(value.nbytes for value in self._fixed.values()) <= LARGEST else {}
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
        extractor = Extractor(model)
        inputs = [given.name for given in model.graph.input if given.name not in constants]
        outputs = [output.name for output in model.graph.output if output.name != "prediction"]
        sessions = []
        for wanted in (outputs, [self._prediction]):
            part = extractor.extract_model(inputs, wanted)
            used = {*wanted, *(name for node in part.graph.node for name in node.input)}
            needed = [given for given in part.graph.input if given.name in used or wanted is outputs]
            del part.graph.input[:]
            part.graph.input.extend(needed)
            sessions.append(open_session(part.SerializeToString(), self._providers, self._options, self._path))
        (self._stepping, self.note), (self._predicting, _) = sessions
        self.providers: list[str] = self._stepping.get_providers()
        self._beside = {} if constants else self._on_device(self._fixed)

    def _run(
        self, session: Any, feeds: Mapping[str, np.ndarray], wanted: Sequence[str], onto: Mapping[str, Any]
    ) -> list[np.ndarray]:
        """Run on the values that lie on the device: what is `wanted`, as arrays; what changes is written to `onto`."""
        binding, there = session.io_binding(), {**self._beside, **self._now}
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

    def _on_device(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Copies of the values."""
        import onnxruntime as ort

        device = "cuda" if self.providers[0] == CUDA else "cpu"
        return {name: ort.OrtValue.ortvalue_from_numpy(np.array(value), device) for name, value in values.items()}

    def _value(self, name: str) -> np.ndarray:
        return np.array(self._now[name].numpy() if name in self._now else self._fixed[name])

    def _target(self, target: Any, sizes: dict[str, int]) -> np.ndarray:
        dtype = np.dtype(self.dtypes["target"])  # type: ignore[arg-type]
        target = array(target)
        if np.issubdtype(target.dtype, np.floating) != np.issubdtype(dtype, np.floating) or target.dtype == bool:
            raise InputError(f"the target of {self.metadata['loss']} is of {dtype}, not {target.dtype}")
        target = self.checked("target", target.astype(dtype), sizes)
        classes = self.outputs["logits"][1] if np.issubdtype(dtype, np.integer) else None
        if classes is not None and not np.isin(target, (*range(int(classes)), -100)).all():
            raise InputError(f"target: class ids lie between 0 and {int(classes) - 1}; -100 leaves one out")
        return target

    def _check_names(self, what: str, given: Iterable[str], expected: Sequence[str]) -> None:
        missing, unknown = [n for n in expected if n not in given], [n for n in given if n not in expected]
        if missing or unknown:
            found = ", ".join([f"{n!r} is missing" for n in missing[:3]] + [f"{n!r} is unknown" for n in unknown[:3]])
            raise CheckpointError(f"the {what} is of another network or optimizer: {found}")

    def _fitting(self, name: str, value: Any) -> np.ndarray:
        like = self._now.get(name)
        shape, dtype = (like.shape(), self.dtypes[name]) if like else (self._fixed[name].shape, self._fixed[name].dtype)
        value = array(value)
        if list(value.shape) != list(shape):
            raise CheckpointError(f"{name!r} has shape {tuple(value.shape)}, the network's {tuple(shape)}")
        return value.astype(dtype)


def _read(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """The file's graph without the values of the state, and these by name."""
    try:
        import onnx
    except ImportError as error:
        raise ImportError(f"{error}: to learn in ONNX Runtime, pip install 'fxfeedback[runtime]'") from error
    if not path.is_file():
        raise CheckpointError(f"there is no file {str(path)!r}: give the file that fxfeedback.export_learner wrote")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's own, and whatever external data may raise
        raise CheckpointError(f"{str(path)!r} cannot be loaded: it is damaged, or no ONNX file: {error}") from error
    if {"product": "learner"}.items() - {entry.key: entry.value for entry in model.metadata_props}.items():
        raise CheckpointError(f"{str(path)!r} was not written by fxfeedback.export_learner")
    inputs = {given.name for given in model.graph.input}
    state = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name in inputs}
    constants = [tensor for tensor in model.graph.initializer if tensor.name not in state]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    return model, state
