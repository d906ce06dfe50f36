"""Learn where the network is deployed: in ONNX Runtime, from the file that `fxfeedback.export_learner` wrote.

learner = fxfeedback.runtime.Learner("learner.onnx")
loss = learner.step(images, labels, task=tasks, lr=0.05)
logits = learner.predict(images, task=tasks)
"""

import functools
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fxfeedback.errors import CheckpointError, InputError
from fxfeedback.file_facts import read_metadata
from fxfeedback.files import as_path, replace_whole
from fxfeedback.runtime.arrays import array, cast, finite
from fxfeedback.runtime.devices import Device, Kind
from fxfeedback.runtime.learner_file import NEW, read_learner
from fxfeedback.runtime.learner_sessions import FINITE, Sessions
from fxfeedback.runtime.reopen import Opened
from fxfeedback.runtime.step_inputs import StepInputs
from fxfeedback.version import __version__

if TYPE_CHECKING:
    import onnxruntime as ort


def _whole(method: Any) -> Any:
    """The method, while no other thread is in one of the same learner's."""

    @functools.wraps(method)
    def call(self: "Learner", *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return call


class Learner(StepInputs):
    """A network that learns in ONNX Runtime. Weights and optimizer state stay on the device between steps.

    Tensors stay on the device, too, and streams are waited for, as `Session` says. What a step fetches is two numbers,
    the loss and whether all values are finite (without which the step would not be known to count), and of a target or
    an instruction that is a tensor one each, whether its values are in range. Ids of tasks are read on the host.

    Several threads may share a learner: one lock lets their calls run one after the other, each as a whole. So no step
    is lost, a prediction is that of one state between two steps, and so is what `state_dict`, `optimizer_state` and
    `save` return or write. (Two calls are not one: for weights and optimizer state of the same moment take `save`, and
    `logits` are of the last step of any thread.)

    Its pickle and its copies name the file, which they open again, and bring the present weights, optimizer state and
    logits along; the file must be there and the same. See `__reduce__`.

    providers: the providers that it runs on, as ONNX Runtime names them, the first preferred.
    note: why CUDA was not taken, where that was tried; else empty.
    metadata: what the file says of itself: loss, optimizer and its settings, which parameters learn, tasks, version.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: str | Sequence[Any] | None = None,
        options: "ort.SessionOptions | None" = None,
        finite: bool = True,
        seed: int | None = None,
    ) -> None:
        """Load a file.

        Args:
            path: the .onnx file.
            providers: names of ONNX Runtime's execution providers, or (name, options) pairs, the preferred first;
                "cuda" and "cpu" will do. None: CUDA where it works, else the CPU.
            options: ONNX Runtime's, for its threads, say.
            seed: of the random magnitudes that a file takes whose TD reads signs; None: others every time.
            finite: whether a step that would bring NaN or infinite values into the weights is an error, and leaves all
                as it was. It costs one look at every value that is fed or new, on the device.

        Raises:
            CheckpointError: there is no such file; it is damaged, or fxfeedback.export_learner did not write it.
            OptionError: a provider that is not there or cannot be loaded; the message says which library is missing.
        """
        path = as_path(path)
        self._lock = threading.RLock()
        self._opened = Opened(str(path), providers, options, {"finite": finite, "seed": seed})
        self._model, state = read_learner(path)
        self._path, self._providers, self._options, self._finite = str(path), providers, options, finite
        outputs = [output.name for output in self._model.graph.output]
        self._changing = [name.removesuffix(NEW) for name in outputs if name.endswith(NEW)]
        self._kept = [name for name in self._changing if name not in state]
        self._prediction = "prediction" if "prediction" in outputs else "logits"
        self._fixed = {name: value for name, value in state.items() if name not in self._changing}
        self._names = list(state)
        self._sessions = self._open()
        self.note, self.providers = self._sessions.note, self._sessions.providers
        said = {entry.key: entry.value for entry in self._model.metadata_props}
        drawn = [f"{name}.magnitude" for name in read_metadata(said, path).get("magnitudes", ())]
        self.NOT_OWN = {"instruction", "target", "lr", *drawn, *self._names, *self._kept}
        self._random = np.random.default_rng(seed)
        super().__init__(self._sessions.stepping.session, said, path)
        zeros = {name: np.zeros(self.inputs[name], self.dtypes[name]) for name in self._kept}  # type: ignore[arg-type]
        state |= zeros
        start = {name: state[name] for name in self._changing}
        self._now, self._next = self._sessions.on_device(start), self._sessions.on_device(start)
        self._logits: Any = None

    @property
    @_whole
    def logits(self) -> Any:
        """Of the last step, (B, ...), as its inputs were given; None before the first. Fetched when they are read."""
        if isinstance(self._logits, functools.partial):
            self._logits = self._logits()
        return self._logits

    @_whole
    def step(
        self, *inputs_and_target: Any, lr: float, task: Any = None, magnitudes: Mapping[str, Any] | None = None
    ) -> float:
        """Learn from one batch.

        Args:
            inputs_and_target: the model's own inputs, (B, ...), and the target: (B, ...) class ids for cross_entropy
                (-100: leave out; where all are left out, the loss is NaN and the updates are 0, as in torch), else
                floats shaped like the logits. Numpy arrays, lists or tensors of any library.
            lr: the learning rate, a number, finite and not negative.
            task: for an instructed network: one id, (B,) integer ids, or (B or 1, instruction size) floats.
            magnitudes: by weight name, where TD reads signs times random magnitudes; the rest is drawn.

        Returns:
            The loss before the step; the logits are in `logits`.

        Raises:
            InputError: an input, target, learning rate or instruction of the wrong shape, dtype or range; with
                finite=True also inputs, a loss or new values that are not finite. Nothing was learned.
        """
        *inputs, target = inputs_and_target or (None,)
        sizes: dict[str, int] = {}
        feeds, _ = self.feeds(inputs, task, sizes)
        feeds |= {"target": self.target(target, sizes), "lr": self.rate(lr)}
        feeds |= self.magnitudes(magnitudes, self._random)
        stepping, host, kind = self._sessions.stepping, Device(), Kind.of(inputs)
        wanted = {"logits": stepping.device, "loss": host} | ({FINITE: host} if self._finite else {})
        onto = {name + NEW: value for name, value in self._next.items()}
        logits, *looks = stepping(feeds | self._state(), wanted, onto, kind)
        loss = float(looks[0].numpy())
        if self._finite:
            self.check_finite(loss, float(looks[1].numpy()), feeds)
        self._now, self._next, self._logits = self._next, self._now, functools.partial(kind.back, logits)
        return loss

    @_whole
    def predict(self, *inputs: Any, task: Any = None) -> Any:
        """The logits (B, ...) in evaluation mode, with the present weights, as the inputs were given.

        Raises:
            InputError: an input or instruction of the wrong shape, dtype or range.
        """
        feeds, _ = self.feeds(inputs, task, {})
        predicting, kind = self._sessions.predicting, Kind.of(inputs)
        wanted = {self._prediction: kind.where(predicting.device)}
        return kind.back(predicting(feeds | self._state(), wanted, kind=kind)[0])

    @_whole
    def state_dict(self) -> dict[str, np.ndarray]:
        """The network's parameters and buffers under torch's names; `BUTD.load_state_dict` takes it."""
        state = {name: self._value(name) for name in self._names}
        return state | {name: state[first] for name, first in self.metadata["tied"].items()}

    @_whole
    def optimizer_state(self) -> dict[str, np.ndarray]:
        """What the optimizer keeps: `<parameter>.momentum_buffer`, `<parameter>.exp_avg`, ..., `optimizer.step`."""
        return {name: self._value(name) for name in self._kept}

    @_whole
    def load_state_dict(self, state: Mapping[str, Any], optimizer_state: Mapping[str, Any] | None = None) -> None:
        """Take over the parameters and buffers of a network, arrays or tensors, under torch's names.

        Args:
            state: a whole state_dict of the network that was exported.
            optimizer_state: as `optimizer_state()` returned it; None: the optimizer starts anew.

        Raises:
            CheckpointError: entries that are missing, unknown or of another shape; with finite=True also values of what
                changes that are not finite. Nothing was taken over.
        """
        for what, given in (("state_dict", state), ("optimizer's state", optimizer_state or {})):
            if not isinstance(given, Mapping):
                raise CheckpointError(f"a {what} is a dict of names and arrays, not a {type(given).__name__}")
        tied = self.metadata["tied"]
        given = {name: value for name, value in state.items() if name not in tied}
        zeros = {name: np.zeros_like(self._value(name)) for name in self._kept}
        kept = zeros if optimizer_state is None else optimizer_state
        self._check_names("state_dict", given, self._names)
        self._check_names("optimizer's state", kept, self._kept)
        values = {name: self._fitting(name, value) for name, value in {**given, **kept}.items()}
        now = self._sessions.on_device({name: values[name] for name in self._changing})
        fixed = {name: values[name] for name in self._fixed}
        if any(not np.array_equal(fixed[name], self._fixed[name]) for name in fixed):
            before, self._fixed = self._fixed, fixed
            try:
                self._sessions = self._open()  # what never changes is part of them
            except BaseException:
                self._fixed = before
                raise
        self._now = now

    @_whole
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and optimizer state as a safetensors file; an old one is replaced atomically."""
        from safetensors.numpy import save_file

        tensors = self._tensors()
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
        self._take(tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        """How pickle and copy make another one: from the file, with the present state.

        Raises:
            OptionError: it was opened with options=, which cannot be pickled.
            CheckpointError: the file is gone, or another one has taken its place; also where it is opened again.
        """
        with self._lock:
            return self._opened.reduced(type(self), (self._tensors(), self.logits, self._random))

    def __setstate__(self, state: tuple[dict[str, np.ndarray], Any, np.random.Generator]) -> None:
        tensors, self._logits, self._random = state
        self._take(tensors)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, np.ndarray]:
        """The whole state: parameters, buffers, and what the optimizer keeps."""
        return {name: self._value(name) for name in (*self._names, *self._kept)}

    def _take(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take over what `_tensors` returned."""
        kept = {name: value for name, value in tensors.items() if name in self._kept}
        self.load_state_dict({name: value for name, value in tensors.items() if name not in kept}, kept)

    def _open(self) -> Sessions:
        how = self._prediction, self._finite, self._providers, self._options, self._path
        return Sessions(self._model, self._fixed, *how)

    def _state(self) -> dict[str, Any]:
        """What lies on the device."""
        return {**self._sessions.beside, **self._now}

    def _value(self, name: str) -> np.ndarray:
        return np.array(self._now[name].numpy() if name in self._now else self._fixed[name])

    def _check_names(self, what: str, given: Iterable[str], expected: Sequence[str]) -> None:
        missing, unknown = [n for n in expected if n not in given], [n for n in given if n not in expected]
        if missing or unknown:
            found = ", ".join([f"{n!r} is missing" for n in missing[:3]] + [f"{n!r} is unknown" for n in unknown[:3]])
            raise CheckpointError(f"the {what} is of another network or optimizer: {found}")

    def _fitting(self, name: str, value: Any) -> np.ndarray:
        like = self._now.get(name)
        shape, dtype = (like.shape(), self.dtypes[name]) if like else (self._fixed[name].shape, self._fixed[name].dtype)
        try:
            value = array(value, repr(name))
            if list(value.shape) != list(shape):
                raise CheckpointError(f"{name!r} has shape {tuple(value.shape)}, the network's {tuple(shape)}")
            return finite(cast(value, dtype), repr(name)) if like and self._finite else cast(value, dtype)
        except InputError as error:
            raise CheckpointError(str(error)) from None
