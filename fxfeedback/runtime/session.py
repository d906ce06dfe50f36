"""Run what `fxfeedback.export` wrote, in ONNX Runtime and without torch.

session = fxfeedback.runtime.Session("model.onnx")
outputs = session(images, steering={"source": "classifier.6", "activation": prototype, "strength": 3.0})
logits = session(images, task=[0, 1, 1])
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from fxfeedback.errors import CheckpointError, InputError, NodeNameError
from fxfeedback.file_facts import existing
from fxfeedback.files import as_path
from fxfeedback.runtime.arrays import array, cast, finite
from fxfeedback.runtime.devices import Kind, Running
from fxfeedback.runtime.providers import open_session
from fxfeedback.runtime.reopen import Opened
from fxfeedback.runtime.signature import Signature


class Session(Signature):
    """A file that `fxfeedback.export` wrote, ready to run.

    It keeps nothing between calls, so several threads may call it at once. Its pickle and its copies name the file,
    which they open again: see `__reduce__`.

    Tensors of torch, or of any library that speaks DLPack, are read where they lie if that is where the session runs,
    and outputs come back as tensors of that library, there; a contiguous one is not copied. What lies elsewhere goes
    through the host, as do truth values. No gradient passes through.

    On CUDA a tensor has to be ready in its library's current stream, as for an op of that library. Before a run that
    reads one, or that follows one whose outputs were tensors, the host waits for all that the device was given; when a
    call returns, its outputs are there, for any stream.

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
        path = existing(as_path(path), "fxfeedback.export")
        self._opened = Opened(str(path), providers, options)
        self._session, self.note = open_session(path, providers, options, str(path))
        self.providers: list[str] = self._session.get_providers()
        super().__init__(self._session, self._session.get_modelmeta().custom_metadata_map, path)
        self._run = Running(self._session, str(path))
        if self.metadata["product"] == "learner":
            raise CheckpointError(f"{path} is a learner: open it with fxfeedback.runtime.Learner")

    def __call__(self, *inputs: Any, task: Any = None, steering: Any = ()) -> Any:
        """Run the network.

        Args:
            inputs: the model's own, (B, ...): numpy arrays, lists, or tensors of any library. The first tensor among
                them says what the outputs are; without one they are numpy arrays.
            task: for an instructed network: one id, (B,) integer ids, or (B or 1, instruction size) floats.
            steering: for a file exported with steerable=True: a dict (or an object with such attributes) of source,
                activation (B or 1, ...), strength (a number or a pair, default 1) and alpha (a number, default 1), or
                several of them.

        Returns:
            A list of arrays or tensors, one per pass, for a model with connections; else the output: one, or a list in
            the order of `outputs` where there are several.

        Raises:
            InputError: an input, instruction or activation of the wrong shape, dtype or range; an instruction or a
                steering that is not finite.
            NodeNameError: a steered node that is not a source.
            CheckpointError: ONNX Runtime fails while it runs the file, as with one that is damaged.
        """
        feeds, batch = self.feeds(inputs, task, {})
        feeds |= self._steering(steering, batch)
        kind = Kind.of(inputs)
        wanted = dict.fromkeys(self.outputs, kind.where(self._run.device))
        results = [kind.back(value) for value in self._run(feeds, wanted, kind=kind)]
        several = len(results) > 1 or list(self.outputs) != ["output"]
        return results if several else results[0]

    def __reduce__(self) -> tuple[Any, ...]:
        """How pickle and copy make another one: from the file, which must be there and the same.

        Raises:
            OptionError: it was opened with options=, which cannot be pickled.
            CheckpointError: the file is gone, or another one has taken its place; also where it is opened again.
        """
        return self._opened.reduced(type(self))

    def _steering(self, steering: Any, batch: int) -> dict[str, Any]:
        several = [steering] if isinstance(steering, Mapping) or hasattr(steering, "source") else list(steering or ())
        feeds: dict[str, Any] = {}
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
                raise NodeNameError(f"{given['source']!r} is not a source; sources: {', '.join(sources)}")
            if f"{source}.alpha" in feeds:
                raise InputError(f"the source {source!r} is steered twice")
            dtype, name = self.dtypes[f"{source}.activation"], f"steering {source!r}"
            activation = cast(array(given["activation"], f"{name}: activation", self._place), dtype)
            self.checked(f"{source}.activation", finite(activation, f"{name}: activation"), {})
            if len(activation) not in (1, batch):
                raise InputError(f"{name} takes an activation of batch 1 or {batch}, not {len(activation)}")
            strength, alpha = (
                finite(cast(array(given.get(kind, 1.0), f"{name}: {kind}"), dtype), f"{name}: {kind}")
                for kind in ("strength", "alpha")
            )
            if strength.size not in (1, 2) or alpha.size != 1:
                raise InputError(f"{name}: strength is one number or two (negative, positive), alpha is one")
            feeds |= {
                f"{source}.activation": activation,
                f"{source}.strength": np.broadcast_to(strength.reshape(-1), 2).copy(),
                f"{source}.alpha": alpha.reshape(()),
            }
        return feeds
