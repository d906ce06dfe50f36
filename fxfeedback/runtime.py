"""Run what `fxfeedback.export` wrote, in ONNX Runtime and without torch.

session = fxfeedback.runtime.Session("model.onnx")
outputs = session(images, steering={"source": "classifier.6", "activation": prototype, "strength": 3.0})
logits = session(images, task=[0, 1, 1])
"""

import contextlib
import ctypes
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from fxfeedback.errors import CheckpointError, InputError, NodeNameError, OptionError

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class Session:
    """A file that `fxfeedback.export` wrote, ready to run.

    providers: the providers that it runs on, as ONNX Runtime names them, the first preferred.
    note: why CUDA was not taken, where that was tried; else empty.
    inputs, optional, outputs: name -> shape; a batch dimension is a name. Optional inputs steer.
    metadata: what the file says of itself: product, connections, passes, tasks, checksum of the weights.
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
            CheckpointError: there is no such file; it is damaged, or fxfeedback.export did not write it.
            OptionError: a provider that is not there or cannot be loaded; the message says which library is missing.
        """
        self._session, self.note = _open(Path(path), providers, options)
        self.providers: list[str] = self._session.get_providers()
        custom = self._session.get_modelmeta().custom_metadata_map
        if "fxfeedback" not in custom:
            raise CheckpointError(f"{path} was not written by fxfeedback.export; open it with onnxruntime itself")
        self.metadata = {key: _decoded(value) for key, value in custom.items()}
        given, optional = self._session.get_inputs(), self._session.get_overridable_initializers()
        self._dtypes = {x.name: DTYPES.get(x.type) for x in (*given, *optional)}
        self.inputs: dict[str, list[int | str]] = {x.name: x.shape for x in given}
        self.optional: dict[str, list[int | str]] = {x.name: x.shape for x in optional}
        self.outputs: dict[str, list[int | str]] = {x.name: x.shape for x in self._session.get_outputs()}

    def __call__(self, *inputs: Any, task: Any = None, steering: Any = ()) -> Any:
        """Run the network.

        Args:
            inputs: the model's own, (B, ...), numpy arrays or tensors.
            task: for an instructed network: one id, (B,) integer ids, or (B or 1, instruction size) floats.
            steering: for a file exported with steerable=True: a dict (or an object with such attributes) of source,
                activation (B or 1, ...), strength (a number or a pair, default 1) and alpha (a number, default 1), or
                several of them.

        Returns:
            A list of arrays, one per pass, for a model with connections; else the output: an array, or a list of
            arrays in the order of `outputs` where there are several.

        Raises:
            InputError: an input, instruction or activation of the wrong shape, dtype or range.
            NodeNameError: a steered node that is no source.
        """
        own = [name for name in self.inputs if name != "instruction"]
        if len(inputs) != len(own):
            raise InputError(f"the network takes {len(own)} inputs ({', '.join(own)}), not {len(inputs)}")
        feeds: dict[str, np.ndarray] = {}
        sizes: dict[str, int] = {}  # of the named dimensions
        for name, value in zip(own, inputs, strict=True):
            feeds[name] = self._checked(name, _array(value), sizes)
        batch = len(feeds[own[0]])
        if "instruction" in self.inputs:
            feeds["instruction"] = self._instruction(task, batch)
        elif task is not None:
            raise InputError("this network takes no instruction: it was exported without tasks, or for one task")
        feeds |= self._steering(steering, batch)
        results = self._session.run(None, feeds)
        several = len(results) > 1 or list(self.outputs) != ["output"]
        return results if several else results[0]

    def _checked(self, name: str, value: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """The value, if it has the dtype and the shape of the input `name`; `sizes` grows by its named dimensions."""
        shape, dtype = {**self.inputs, **self.optional}[name], self._dtypes[name]
        if dtype is None:
            raise InputError(f"{name!r} has a dtype that numpy does not know")
        if value.dtype != dtype:
            raise InputError(f"{name!r} takes {np.dtype(dtype)}, not {value.dtype}")
        fits = value.ndim == len(shape) and all(
            size == wanted if isinstance(wanted, int) else size == sizes.setdefault(wanted, size)
            for size, wanted in zip(value.shape, shape, strict=True)
        )
        if not fits or 0 in value.shape:
            raise InputError(f"{name!r} takes a shape of ({_shown(shape, sizes)}), not {value.shape}")
        return value

    def _instruction(self, task: Any, batch: int) -> np.ndarray:
        dtype, size = self._dtypes["instruction"], int(self.inputs["instruction"][1])
        if task is None:
            raise InputError(f"the network takes an instruction: task=ids or task=vectors (batch, {size})")
        task = _array(task)
        rows = (1,) if isinstance(self.inputs["instruction"][0], int) else (1, batch)
        if np.issubdtype(task.dtype, np.floating):
            if task.ndim != 2 or task.shape[1] != size or len(task) not in rows:
                raise InputError(f"an instruction vector has shape ({batch}, {size}), not {task.shape}")
            return task.astype(dtype)
        if not self.metadata["takes_ids"]:
            raise InputError(f"an instruction is a float vector ({batch}, {size}) here, not ids")
        if not np.issubdtype(task.dtype, np.integer) or task.ndim > 1 or (task.ndim == 1 and len(task) != batch):
            raise InputError(
                f"instructions are ({batch},) integer ids or ({batch}, {size}) floats, "
                f"not {task.dtype} of shape {task.shape}"
            )
        if task.size and not 0 <= task.min() <= task.max() < size:
            raise InputError(f"instruction ids lie between 0 and {size - 1}; got {task.min()} to {task.max()}")
        return np.eye(size, dtype=dtype)[task.reshape(-1)]

    def _steering(self, steering: Any, batch: int) -> dict[str, np.ndarray]:
        several = [steering] if isinstance(steering, Mapping) or hasattr(steering, "source") else list(steering or ())
        feeds: dict[str, np.ndarray] = {}
        sources = self.metadata.get("steerable") or {}
        if several and not sources:
            raise InputError("this network cannot be steered: export it with steerable=True")
        for one in several:
            given = one if isinstance(one, Mapping) else vars(one)
            unknown = set(given) - {"source", "activation", "strength", "alpha"}
            if unknown or not {"source", "activation"} <= set(given):
                raise InputError("a steering has source, activation and, if wanted, strength and alpha")
            source = sources.get(given["source"])
            if source is None:
                raise NodeNameError(f"{given['source']!r} is no source; sources: {', '.join(sources)}")
            if f"{source}.alpha" in feeds:
                raise InputError(f"the source {source!r} is steered twice")
            activation = _array(given["activation"])
            dtype = self._dtypes[f"{source}.activation"]
            self._checked(f"{source}.activation", activation.astype(dtype), {})
            if len(activation) not in (1, batch):
                raise InputError(
                    f"steering {source!r} takes an activation of batch 1 or {batch}, not {len(activation)}"
                )
            strength, alpha = (_array(given.get(name, 1.0)).astype(dtype) for name in ("strength", "alpha"))
            if strength.size not in (1, 2) or alpha.size != 1:
                raise InputError(
                    f"steering {source!r}: strength is one number or two (negative, positive), alpha is one"
                )
            feeds |= {
                f"{source}.activation": activation.astype(dtype),
                f"{source}.strength": np.broadcast_to(strength.reshape(-1), 2).copy(),
                f"{source}.alpha": alpha.reshape(()),
            }
        return feeds


def _array(value: Any) -> np.ndarray:
    """A numpy array of an array, a number, a list, or a tensor on any device."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InputError(f"this is no array: {error}") from None


def _shown(shape: Iterable[int | str], sizes: Mapping[str, int]) -> str:
    return ", ".join(str(sizes.get(size, size)) if isinstance(size, str) else str(size) for size in shape)


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# -- providers --------------------------------------------------------------------------------------------------------


def _open(path: Path, providers: Any, options: Any) -> tuple[Any, str]:
    """An ONNX Runtime session, and why it does not run on CUDA where that was tried."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {str(path)!r}: give the file that fxfeedback.export wrote")
    if options is None:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors: that an optional input is no constant is meant so
    if providers is not None:
        wanted = [_full(provider) for provider in ([providers] if isinstance(providers, str) else providers)]
        for name in map(_name, wanted):
            reason = _not_there(name) or (_missing_libraries() if name == CUDA else "")
            if reason:
                raise OptionError(f"the provider {name} cannot be used: {reason}")
        session = _load(path, wanted, options)
        for name in map(_name, wanted):
            if name not in session.get_providers():
                raise OptionError(f"the provider {name} cannot be used: {_broken(name)}")
        return session, ""
    note = _not_there(CUDA) or _missing_libraries()
    if not note:
        try:
            session = _load(path, [CUDA, CPU], options)
            if CUDA in session.get_providers():
                return session, ""
            note = _broken(CUDA)
        except OptionError as error:
            note = str(error)
    return _load(path, [CPU], options), note


def _load(path: Path, providers: list[Any], options: Any) -> Any:
    try:
        return ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # of a dozen classes, some of them no subclasses of anything useful
        message = str(error).strip().split("\n")[0]
        if len(providers) > 1 or _name(providers[0]) != CPU:
            _load(path, [CPU], options)  # the file is at fault if the CPU cannot take it, either
            raise OptionError(f"the provider {_name(providers[0])} cannot run {str(path)!r}: {message}") from error
        raise CheckpointError(f"{str(path)!r} cannot be loaded: it is damaged, or no ONNX file: {message}") from error


def _full(provider: Any) -> Any:
    return {"cpu": CPU, "cuda": CUDA}.get(provider, provider) if isinstance(provider, str) else provider


def _name(provider: Any) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _not_there(name: str) -> str:
    """Why this onnxruntime does not have the provider, or nothing."""
    there = ort.get_available_providers()
    if name in there:
        return ""
    hint = " (pip install onnxruntime-gpu)" if name == CUDA else ""
    return f"this onnxruntime has {', '.join(there)}{hint}"


def _missing_libraries() -> str:
    """Load CUDA's and cuDNN's libraries from where pip or the system put them; those that are missing, or nothing."""
    if not hasattr(ort, "preload_dlls"):
        return ""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()
    failed = [line.removeprefix("Failed to load ") for line in said.getvalue().split("\n") if "Failed to load" in line]
    return "; ".join(failed)


def _broken(name: str) -> str:
    """Why a provider that was asked for is not in the session: the library that its own library misses."""
    kind = name.removesuffix("ExecutionProvider").lower()
    pattern = {"win32": "onnxruntime_providers_{}.dll", "darwin": "libonnxruntime_providers_{}.dylib"}
    file = pattern.get(sys.platform, "libonnxruntime_providers_{}.so").format(kind)
    library = Path(ort.__file__).parent / "capi" / file
    if library.is_file():
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            return str(error)
    return "ONNX Runtime could not start it: is there a device and a driver for it?"
