"""Run what `fxfeedback.export` wrote, in ONNX Runtime and without torch.

session = fxfeedback.runtime.Session("model.onnx")
outputs = session(images, steering={"source": "classifier.6", "activation": prototype, "strength": 3.0})
logits = session(images, task=[0, 1, 1])
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from fxfeedback.errors import CheckpointError, InputError, NodeNameError
from fxfeedback.file_facts import existing
from fxfeedback.files import as_path
from fxfeedback.runtime.arrays import array, cast, finite, is_floating
from fxfeedback.runtime.devices import Kind, Running
from fxfeedback.runtime.providers import open_session
from fxfeedback.runtime.reopen import Opened
from fxfeedback.runtime.signature import GIVEN, Signature, gate_in, gate_out

KEPT = 256
"""Of how many ids the gates are kept."""


class Session(Signature):
    """A file that `fxfeedback.export` wrote, ready to run.

    It keeps nothing between calls but the gates of ids, where the file takes some (`export(keep_gates=True)`): they are
    computed once, and a batch of one task then costs what the plain network does and the gating. Several threads may
    call it at once. Its pickle and its copies name the file, which they open again: see `__reduce__`.

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
        read = self.metadata.get("readout") or []
        self._read = {name: [each for each in self.outputs if _is_of(each, name)] for name in read}
        others = {one for each in self._read.values() for one in each}
        others |= {gate_out(site) for site in self.kept_sites()}
        self._own = [name for name in self.outputs if name not in others and not name.endswith(".next_state")]
        self._gates: dict[int, dict[str, Any]] = {}  # of each id that was met, the last used last
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
        return self._one_or_list(self._called(inputs, task, steering, None, self._own))

    def values(self, *inputs: Any, task: Any = None, steering: Any = (), state: Any = None) -> dict[str, Any]:
        """Every output of the file by its name; the arguments are those of the call and of `unroll`."""
        return self._called(inputs, task, steering, state, self.outputs)

    def unroll(self, *inputs: Any, state: Any = None, steering: Any = ()) -> tuple[Any, dict[str, Any]]:
        """As the call, going on from the state of an earlier call; returns (outputs, state).

        Args:
            inputs, steering: as in the call.
            state: source -> its signal, as an earlier call returned them; None: start without.

        Raises:
            InputError: the file was not exported with stateful=True; signals of other sources, batches or shapes.
        """
        states = self._states()
        made = self._called(inputs, None, steering, state, [*self._own, *states])
        return self._one_or_list({name: made[name] for name in self._own}), {
            states[name]: made[name] for name in states
        }

    def readout(self, *inputs: Any, steering: Any = ()) -> list[dict[str, Any]]:
        """Node -> value, for every pass, of the nodes that the file was exported with as outputs=.

        Raises:
            InputError: it was exported without.
        """
        if not self._read:
            raise InputError("this file hands out no nodes: export it with outputs=[names]")
        made = self._called(inputs, None, steering, None, [one for each in self._read.values() for one in each])
        passes = zip(*([made[one] for one in each] for each in self._read.values()), strict=True)
        return [dict(zip(self._read, values, strict=True)) for values in passes]

    def stream(self) -> "Stream":
        """For a sequence, such as a video: each call goes on from the signals of the one before.

        Raises:
            InputError: the file was not exported with stateful=True.
        """
        return Stream(self)

    def _one_or_list(self, made: Mapping[str, Any]) -> Any:
        return list(made.values()) if len(made) > 1 or list(made) != ["output"] else made["output"]

    def _states(self) -> dict[str, str]:
        """Output -> source whose signal it is."""
        if not self.metadata.get("state"):
            raise InputError("this file keeps no state: export it with stateful=True")
        return {f"{name}.next_state": name for name in self.metadata["state"]}

    def _called(
        self, inputs: Sequence[Any], task: Any, steering: Any, state: Any, names: Iterable[str]
    ) -> dict[str, Any]:
        """The outputs of these names, as what the inputs are."""
        kind = Kind.of(inputs)
        made = self._made(inputs, task, steering, state, dict.fromkeys(names, kind.where(self._run.device)), kind)
        return {name: kind.back(value) for name, value in made.items()}

    def _made(
        self, inputs: Sequence[Any], task: Any, steering: Any, state: Any, wanted: Mapping[str, Any], kind: Kind
    ) -> dict[str, Any]:
        """The outputs in `wanted`, each on its device, as values of ONNX Runtime's."""
        feeds, batch = self.feeds(inputs, task, {})
        feeds |= self._steering(steering, batch)
        feeds |= self._kept_gates(task, feeds) if self.kept_sites() else {}
        feeds |= {} if state is None else self._state(state, batch)
        return dict(zip(wanted, self._run(feeds, wanted, kind=kind), strict=True))

    def _kept_gates(self, task: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """The gates of a batch's only task, where it is an id: they do not depend on the images."""
        task = array(task, "instruction ids", self._place)
        ids = set() if is_floating(task) else set(np.asarray(array(task, "instruction ids")).reshape(-1).tolist())
        if len(ids) != 1:
            return {}
        (one,) = ids
        gates = self._gates.pop(one, None)
        if gates is None:
            own = [name for name in self.inputs if name not in self.NOT_OWN]
            sizes = {name: (1, *feeds[name].shape[1:]) if feeds[name].ndim else () for name in own}
            nothing = {name: np.zeros(size, self.dtypes[name]) for name, size in sizes.items()}
            instruction = np.eye(int(self.inputs["instruction"][1]), dtype=self.dtypes["instruction"])[[one]]
            wanted = {gate_out(site): self._run.device for site in self.kept_sites()}
            made = self._run(nothing | {"instruction": instruction}, wanted)
            gates = {gate_in(site): value for site, value in zip(self.kept_sites(), made, strict=True)}
        self._gates[one] = gates
        for old in list(self._gates)[:-KEPT]:
            self._gates.pop(old, None)
        return gates | {GIVEN: np.array(True)}

    def _state(self, state: Any, batch: int) -> dict[str, Any]:
        names = list(self._states().values())
        if not isinstance(state, Mapping) or set(state) != set(names):
            raise InputError(f"state= has a signal of each source ({', '.join(names)}): give what unroll returned")
        feeds: dict[str, Any] = {"state.given": np.array(True)}
        for name in names:
            value, what = state[name], f"{name}.state"
            if not isinstance(value, ort.OrtValue):
                value = finite(cast(array(value, repr(what), self._place), self.dtypes[what]), repr(what))
                self.checked(what, value, {})
            rows = (value.shape() if isinstance(value, ort.OrtValue) else value.shape)[0]
            if rows not in (1, batch):
                raise InputError(f"the state is of batch {rows}, and the call of batch {batch}: start anew")
            feeds[what] = value
        return feeds

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


class Stream:
    """Calls of a file with state, one after the other; between them the signals stay where the session runs.

    outputs = stream(frame). As `unroll(frame, state=...)` with the state of the call before.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._states = session, session._states()
        self._state: dict[str, Any] | None = None

    def __call__(self, *inputs: Any, steering: Any = ()) -> Any:
        """The outputs for the next inputs, as `Session.__call__` returns them.

        Raises:
            InputError: inputs that the file does not take, or of another batch than before: `reset()` starts anew.
        """
        session, kind = self._session, Kind.of(inputs)
        wanted = dict.fromkeys(session._own, kind.where(session._run.device))
        wanted |= dict.fromkeys(self._states, session._run.device)
        made = session._made(inputs, None, steering, self._state, wanted, kind)
        self._state = {source: made[name] for name, source in self._states.items()}
        return session._one_or_list({name: kind.back(made[name]) for name in session._own})

    def reset(self) -> None:
        """Start anew, without signals."""
        self._state = None


def _is_of(output: str, node: str) -> bool:
    """Whether an output is a node's value in one of the passes."""
    return output == node or (output.startswith(f"{node}_") and output[len(node) + 1 :].isdigit())
