"""What a file takes: its inputs' names, shapes and dtypes, and the checks of what a call brings."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fxfeedback.errors import CheckpointError, InputError
from fxfeedback.file_facts import read_metadata
from fxfeedback.runtime.arrays import array, cast, dtype_of, finite, has, is_floating, is_integer
from fxfeedback.runtime.devices import Device

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


GIVEN = "gates.given"
"""The optional input that says whether gates are given."""


def gate_in(site: str) -> str:
    """The name of the optional input with the gates of a site."""
    return f"{site}.given_gate"


def gate_out(site: str) -> str:
    """The name of the output with the gates of a site."""
    return f"{site}.gate"


class Signature:
    """The inputs of a file that fxfeedback wrote, and what it says of itself.

    inputs, optional, outputs: name -> shape; a batch dimension is a name. Optional inputs have defaults.
    metadata: product, connections, passes, tasks, checksum of the weights.
    """

    NOT_OWN: Container[str] = ("instruction",)
    """The inputs that are not the model's own."""

    def __init__(self, session: Any, custom: Mapping[str, str], path: Any) -> None:
        self.metadata = read_metadata(custom, path)
        self._place = Device.of(session).place
        try:
            given, optional = session.get_inputs(), session.get_overridable_initializers()
            self.dtypes = {x.name: DTYPES.get(x.type) for x in (*given, *optional)}
            self.inputs: dict[str, list[int | str]] = {x.name: x.shape for x in given}
            self.optional: dict[str, list[int | str]] = {x.name: x.shape for x in optional}
            self.outputs: dict[str, list[int | str]] = {x.name: x.shape for x in session.get_outputs()}
        except Exception as error:  # ONNX Runtime's own, where one is not a tensor
            raise CheckpointError(f"{path} is damaged: an input or output is not a tensor: {error}") from error
        self._check_graph(path)

    def _check_graph(self, path: Any) -> None:
        """Refuse a file whose graph does not have what its metadata speaks of."""
        own = [name for name in self.inputs if name not in self.NOT_OWN]
        missing = [] if any(self.inputs[name] for name in own) else ["an input with a batch"]
        if "instruction" in self.inputs:
            shape = self.inputs["instruction"]
            fits = len(shape) == 2 and type(shape[1]) is int and self.dtypes["instruction"] is not None
            missing += [] if fits and "takes_ids" in self.metadata else ["an instruction with a size"]
        for source in set((self.metadata.get("steerable") or {}).values()):
            for name in (f"{source}.activation", f"{source}.strength", f"{source}.alpha"):
                if self.dtypes.get(name) is None or name not in self.optional:
                    missing.append(f"an optional input {name!r}")
        for source in self.metadata.get("state") or ():
            if (
                not {f"{source}.state", "state.given"} <= self.optional.keys()
                or f"{source}.next_state" not in self.outputs
            ):
                missing.append(f"the state of {source!r}")
        for name in self.metadata.get("readout") or ():
            if f"{name}_1" not in self.outputs:
                missing.append(f"an output {f'{name}_1'!r}")
        for site in self.kept_sites():
            if not {gate_in(site), GIVEN} <= self.optional.keys() or gate_out(site) not in self.outputs:
                missing.append(f"the gate of {site!r}")
        if missing:
            raise CheckpointError(f"{path} is damaged: its graph lacks {missing[0]}, of which its metadata speaks")

    def kept_sites(self) -> list[str]:
        """The sites whose gates the file takes."""
        return self.metadata.get("sites", []) if self.metadata.get("keeps_gates") else []

    def feeds(self, inputs: Sequence[Any], task: Any, sizes: dict[str, int]) -> tuple[dict[str, Any], int]:
        """What is fed for the model's own inputs and the instruction, checked; and the batch size.

        Args:
            inputs: the model's own, in order.
            task: ids, vectors or None.
            sizes: of the named dimensions; it grows.

        Raises:
            InputError: an input or instruction of the wrong number, shape, dtype or range.
        """
        own = [name for name in self.inputs if name not in self.NOT_OWN]
        if len(inputs) != len(own):
            raise InputError(f"the network takes {len(own)} inputs ({', '.join(own)}), not {len(inputs)}")
        feeds = {
            name: self.checked(name, array(value, repr(name), self._place), sizes)
            for name, value in zip(own, inputs, strict=True)
        }
        batch = next(len(feeds[name]) for name in own if feeds[name].ndim)
        if "instruction" in self.inputs:
            feeds["instruction"] = self.instruction(task, batch)
        elif task is not None:
            raise InputError("this network takes no instruction: it was exported without tasks, or for one task")
        return feeds, batch

    def checked(self, name: str, value: Any, sizes: dict[str, int]) -> Any:
        """The value, if it has the dtype and the shape of the input `name`; `sizes` grows by its named dimensions."""
        shape, dtype = {**self.inputs, **self.optional}[name], self.dtypes[name]
        if dtype is None:
            raise InputError(f"{name!r} has a dtype that numpy does not know")
        if not has(value, dtype):
            raise InputError(f"{name!r} takes {np.dtype(dtype)}, not {dtype_of(value)}")
        fits = value.ndim == len(shape) and all(
            size == wanted if isinstance(wanted, int) else size == sizes.setdefault(wanted, size)
            for size, wanted in zip(value.shape, shape, strict=True)
        )
        if not fits or 0 in value.shape:
            raise InputError(f"{name!r} takes a shape of ({_shown(shape, sizes)}), not {tuple(value.shape)}")
        return value

    def instruction(self, task: Any, batch: int) -> Any:
        """The instruction vectors (B or 1, size) of ids or vectors; ids are looked at on the host."""
        dtype, size = self.dtypes["instruction"], int(self.inputs["instruction"][1])
        if task is None:
            raise InputError(f"the network takes an instruction: task=ids or task=vectors (batch, {size})")
        task = array(task, f"instructions are ({batch},) integer ids or ({batch}, {size}) floats", self._place)
        rows = (1,) if isinstance(self.inputs["instruction"][0], int) else (1, batch)
        if is_floating(task):
            if task.ndim != 2 or task.shape[1] != size or len(task) not in rows:
                raise InputError(f"an instruction vector has shape ({batch}, {size}), not {tuple(task.shape)}")
            return finite(cast(task, dtype), "the instruction")
        if not self.metadata["takes_ids"]:
            raise InputError(f"an instruction is a float vector ({batch}, {size}) here, not ids")
        task = array(task, "instruction ids")
        if not is_integer(task) or task.ndim > 1 or (task.ndim == 1 and len(task) != batch):
            raise InputError(
                f"instructions are ({batch},) integer ids or ({batch}, {size}) floats, "
                f"not {task.dtype} of shape {task.shape}"
            )
        if task.size and not 0 <= task.min() <= task.max() < size:
            raise InputError(f"instruction ids lie between 0 and {size - 1}; got {task.min()} to {task.max()}")
        return np.eye(size, dtype=dtype)[task.reshape(-1)]


def _shown(shape: Iterable[int | str], sizes: Mapping[str, int]) -> str:
    return ", ".join(str(sizes.get(size, size)) if isinstance(size, str) else str(size) for size in shape)
