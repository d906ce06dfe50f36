"""Where values lie: ONNX Runtime reads a tensor where it is, and its outputs come back as tensors of the same library.

Libraries meet by DLPack, so none of them is imported. What ONNX Runtime cannot read where it is goes through the host.
"""

import contextlib
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from fxfeedback.runtime.arrays import array, lies
from fxfeedback.runtime.providers import CUDA, cannot_run

DLPACK = {"cpu": 1, "cuda": 2}
"""DLPack's numbers of kinds of devices."""


@dataclass(frozen=True)
class Device:
    """Where values lie. kind: "cpu" or "cuda". number: which of them."""

    kind: str = "cpu"
    number: int = 0

    @classmethod
    def of(cls, session: Any) -> "Device":
        """That of an ONNX Runtime session, by its own providers' options."""
        if session.get_providers()[0] != CUDA:
            return cls()
        return cls("cuda", int(session.get_provider_options()[CUDA].get("device_id", 0)))

    @property
    def place(self) -> tuple[int, int] | None:
        """In DLPack's words; None where this onnxruntime, one before 1.26, shares no memory by DLPack."""
        return (DLPACK[self.kind], self.number) if hasattr(ort.OrtValue, "from_dlpack") else None

    def copies(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Copies of arrays here."""
        make = ort.OrtValue.ortvalue_from_numpy
        return {name: make(np.array(value), self.kind, self.number) for name, value in values.items()}


@dataclass(frozen=True)
class Kind:
    """What outputs come back as.

    library: the module that has `from_dlpack` and whose tensors they are; None: numpy's arrays. place: where these lie,
    in DLPack's words; device: in the library's.
    """

    library: Any = None
    place: tuple[int, int] | None = None
    device: Any = None

    @classmethod
    def of(cls, values: Iterable[Any]) -> "Kind":
        """That of the first tensor of a library; else numpy's arrays."""
        for value in values:
            place = lies(value)
            library = _library(value) if place else None
            if library:
                return cls(library, place, getattr(value, "device", None))
        return cls()

    def where(self, device: Device) -> Device:
        """Where outputs are wanted of a session that runs on `device`: there or on the host."""
        return device if self.place and self.place == device.place else Device()

    def back(self, value: Any) -> Any:
        """An output as what went in, where that lay: without a copy where it lies there already."""
        if self.library is None:
            return value.numpy()
        there = hasattr(value, "__dlpack_device__") and tuple(value.__dlpack_device__()) == self.place
        made = self.library.from_dlpack(value if there else value.numpy())
        if there and value.data_type() == "tensor(bool)":
            made = made != 0  # ONNX Runtime gives them away as bytes
        return made if there or not hasattr(made, "to") else made.to(self.device)

    def current(self) -> AbstractContextManager[Any]:
        """Torch gives away tensors of its current device only, and ONNX Runtime changes which one that is."""
        cuda: Any = getattr(self.library, "cuda", None)
        if self.place and self.place[0] == DLPACK["cuda"] and hasattr(cuda, "device_of"):
            return cuda.device(self.device)
        return contextlib.nullcontext()


NUMPY = Kind()


class Running:
    """An ONNX Runtime session that is run on values where they lie.

    On CUDA it runs in a stream of its own, of which no other library knows. So where a tensor comes in, and after one
    has gone out, the host waits until the device has done all that it was given, in every stream: what makes a tensor
    is done before it is read, and what reads an output is done before its memory is used anew. A run ends when its
    outputs are there, so any stream may read them.

    session: ONNX Runtime's. device: where it runs.
    """

    def __init__(self, session: Any, path: str) -> None:
        self.session, self.device, self._path = session, Device.of(session), path
        taken = (*session.get_inputs(), *session.get_overridable_initializers())
        self._takes, self._gave_away = {given.name for given in taken}, False

    def __call__(
        self,
        feeds: Mapping[str, Any],
        wanted: Mapping[str, Device],
        onto: Mapping[str, Any] | None = None,
        kind: Kind = NUMPY,
    ) -> list[Any]:
        """Run: the values of the outputs in `wanted`, each on its device.

        Args:
            feeds: arrays, tensors that lie on the device, or values of ONNX Runtime's, by name; those of its inputs
                are taken.
            wanted: which outputs, and where.
            onto: values that other outputs are written to.
            kind: what `wanted` will come back as.

        Raises:
            InputError: a tensor that neither ONNX Runtime nor numpy can read.
            CheckpointError: ONNX Runtime cannot run.
        """
        with kind.current():
            binding = self.session.io_binding()
            if self.device.kind != "cpu" and (self._gave_away or self.device.place in map(lies, feeds.values())):
                binding.synchronize_inputs()
            values = {name: _value(value, repr(name)) for name, value in feeds.items() if name in self._takes}
            try:
                for name, value in values.items():
                    binding.bind_ortvalue_input(name, value)
                for name, device in wanted.items():
                    binding.bind_output(name, device.kind, device.number)
                for name, value in (onto or {}).items():
                    binding.bind_ortvalue_output(name, value)
                self.session.run_with_iobinding(binding)
                made = binding.get_outputs()[: len(wanted)]
            except Exception as error:  # of a dozen classes
                raise cannot_run(self._path, error) from error
        self._gave_away |= kind.library is not None
        return made


def _value(value: Any, what: str) -> Any:
    """A value of ONNX Runtime's that shares the memory of an array or a tensor."""
    if isinstance(value, ort.OrtValue):
        return value
    if not isinstance(value, np.ndarray):
        try:
            return ort.OrtValue.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError):  # it takes no bool, for one
            value = array(value, what)
    return ort.OrtValue.ortvalue_from_numpy(np.asarray(value, order="C"), "cpu")


def _library(value: Any) -> Any:
    """The module whose `from_dlpack` makes such tensors, or None."""
    if hasattr(value, "__array_namespace__"):
        return value.__array_namespace__()
    packages = (sys.modules.get(kind.__module__.partition(".")[0]) for kind in type(value).__mro__)
    return next((package for package in packages if hasattr(package, "from_dlpack")), None)
