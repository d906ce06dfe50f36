"""Run what `fxfeedback.export` wrote, in ONNX Runtime and without torch.

session = fxfeedback.runtime.Session("model.onnx")
outputs = session(images, steering={"source": "classifier.6", "activation": prototype, "strength": 3.0})
logits = session(images, task=[0, 1, 1])
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from fxfeedback.errors import CheckpointError, InputError, NodeNameError
from fxfeedback.providers import open_session

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


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
        self._session, self.note = open_session(Path(path), providers, options)
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
