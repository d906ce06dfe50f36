"""Compare a file that was just written with torch, in ONNX Runtime, before it takes its place.

Float32 keeps 7 digits; kernels that sum in another order lose one or two, a deep network one more. A network may
magnify that, and a unit that sits at its gate may fall on either side of it. So what differs is looked at again: in
float64, where the file may be `ROUNDING` times as far off as torch itself in the model's dtype; and with numbers drawn
anew, as what is wrong stays wrong.
"""

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fxfeedback.deploy.program import Input, leaves
from fxfeedback.errors import CheckpointError, ExportError, InputError, OptionError, first_line

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2}
"""How far an output may be from torch's, relative to its largest value: some thousand roundings, 30 of a half."""
ROUNDING = 3
LOOSE = 0.1
"""A difference beyond which that comparison says little, and the user hears of it."""
DRAWS = 4

Sizes = list[tuple[int, ...]]
"""Of each input of the model, without its batch."""


class Trial(NamedTuple):
    """What a file and torch are called with: the model's own inputs, and task= or steering=."""

    inputs: list[torch.Tensor]
    options: dict[str, Any]


class Network(NamedTuple):
    """What was exported.

    model: in eval mode. call: runs it, or a copy, for a trial. inputs: those of the file. task_ids: how many ids it
    takes, if any. dynamic_batch: whether the file's batch is free.
    """

    model: nn.Module
    call: Callable[[Any, Trial], Any]
    inputs: Sequence[Input]
    task_ids: int
    dynamic_batch: bool


def require_runtime() -> None:
    """Find out early whether files can be checked.

    Raises:
        ImportError: onnxruntime is missing.
    """
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{error}: a file is compared with torch before it is done, in ONNX Runtime: pip install "
            "'fxfeedback[runtime]', or export with check=False"
        ) from error


def check_file(network: Network, file: Path) -> None:
    """Compare the file's outputs with torch's.

    At batch 3 and 1 where the batch is free, and where sizes are, at two sizes other than the example's; without and
    with steering, with ids and with vectors as instructions.

    Raises:
        ExportError: they differ, or they cannot be compared; the message names the output, batch and size.
    """
    session, example = open_file(file), [tuple(given.example.shape[1:]) for given in _own(network.inputs)]
    first, second = (3, 1) if network.dynamic_batch else (1, 1)
    _compare(network, session, first, example)
    if not any(given.any_size for given in network.inputs):
        if second != first:
            _compare(network, session, second, example)
        return
    done = 0
    for sizes in _other_sizes(network.inputs, example):
        if done < 2 and _runs(network, sizes):
            _compare(network, session, first if done else second, sizes)
            done += 1
    if not done:
        raise ExportError(
            "dynamic_size: torch itself runs the model at the example's size only: export it with dynamic_size=False"
        )


def open_file(file: Path, kind: str = "Session") -> Any:
    """A `Session` or `Learner` of the file, on the CPU, or on CUDA where the CPU has no kernel.

    Raises:
        ExportError: neither can run it.
    """
    from fxfeedback import runtime

    opened = getattr(runtime, kind)
    try:
        made = opened(file, "cpu")
    except CheckpointError as error:
        try:
            made = opened(file, "cuda")
        except (CheckpointError, OptionError):
            raise _cannot_run(str(error)) from error
    strange = [name for name, dtype in made.dtypes.items() if dtype is None]
    if strange:
        raise _cannot_run(f"{strange[0]!r} has a dtype that numpy does not know")
    return made


def _cannot_run(reason: str) -> ExportError:
    return ExportError(
        f"the file cannot be checked, as ONNX Runtime cannot run it here: {reason} (its CPU has, for one, no "
        "convolution of float64 and nothing of bfloat16: convert the model with .float()). check=False writes it "
        "unchecked"
    )


# -- what is tried ----------------------------------------------------------------------------------------------------


def _own(inputs: Sequence[Input]) -> list[Input]:
    """The model's own inputs: the others are named, have a batch of their own or none, and mostly a default."""
    return [given for given in inputs if given.batch == "batch" and given.default is None]


def _other_sizes(inputs: Sequence[Input], example: Sizes) -> Iterator[Sizes]:
    """Sizes to try, smaller and larger, square ones last; some models take only multiples of 32 or such."""
    for change in (
        lambda n, k: max(n * (6 - k) // 8 - k, 1),
        lambda n, k: n * (5 + k) // 4 + 1,
        lambda n, k: max(n // 32 - 1 - k, 1) * 32,
        lambda n, k: (n // 32 + 1 + k) * 32,
        lambda n, _: max(n // 2, 1),
        lambda n, _: 2 * n,
    ):
        sizes = [
            (size[0], *(change(n, k) for k, n in enumerate(size[1:]))) if given.any_size else size
            for given, size in zip(_own(inputs), example, strict=True)
        ]
        if sizes != example:
            yield sizes


def _runs(network: Network, sizes: Sizes) -> bool:
    """Whether torch takes inputs of these sizes."""
    try:
        trial = next(_trials(network, 1, sizes, 0))
        leaves("", network.call(network.model, trial))
        return True
    except Exception:  # whatever the user's model raises
        return False


def _trials(network: Network, batch: int, sizes: Sizes, number: int) -> Iterator[Trial]:
    """The calls at this batch and these sizes, with numbers that depend on the draw's `number` only.

    Every second draw is positive, for models that take roots or logarithms.
    """
    generator = torch.Generator().manual_seed(number)
    device = next((t.device for t in network.model.parameters()), torch.device("cpu"))

    def draw(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if not dtype.is_floating_point:
            return torch.randint(2, shape, generator=generator).to(device, dtype)
        make = torch.rand if number % 2 else torch.randn
        return make(shape, generator=generator).to(device, dtype)

    own = _own(network.inputs)
    xs = [draw((batch, *size), given.example.dtype) for given, size in zip(own, sizes, strict=True)]
    vectors = next((given.example for given in network.inputs if given.name == "instruction"), None)
    if vectors is None:
        yield Trial(xs, {})
    else:
        yield Trial(xs, {"task": torch.randn(batch, vectors.shape[1], generator=generator).to(device, vectors.dtype)})
    if vectors is not None and network.task_ids:
        yield Trial(xs, {"task": torch.randint(network.task_ids, (batch,), generator=generator).to(device)})
    steering = [
        {
            "source": given.name.removesuffix(".activation"),
            "activation": draw((1 if i else batch, *given.example.shape[1:]), given.example.dtype),
            "strength": (0.5, 1.5),
            "alpha": 0.7,
        }
        for i, given in enumerate(one for one in network.inputs if one.name.endswith(".activation") and one.batch)
        if given.default is not None
    ]
    if steering:
        yield Trial(xs, {"steering": steering})


# -- the comparison ---------------------------------------------------------------------------------------------------


def _compare(network: Network, session: Any, batch: int, sizes: Sizes) -> None:
    """Every kind of call at this batch and these sizes; each is drawn anew as long as it differs."""
    for kind, _ in enumerate(_trials(network, batch, sizes, 0)):
        wrong = ""
        for number in range(DRAWS):
            trial = next(itertools.islice(_trials(network, batch, sizes, number), kind, None))
            wrong = _differs(network, session, trial)
            if not wrong:
                break
        else:
            what = "".join(f", with {name}=" for name in trial.options)
            raise ExportError(
                f"the file does not compute what torch does: at batch {batch}, inputs of "
                f"{' and '.join(map(str, sizes))}{what}: {wrong}. It was not written; "
                + ("dynamic_size=False may be right, and " if any(one.any_size for one in network.inputs) else "")
                + "check=False writes it unchecked"
            )


def _differs(network: Network, session: Any, trial: Trial) -> str:
    """Which output differs from torch's, and how far; or nothing."""
    try:
        wanted = dict(leaves("output", network.call(network.model, trial)))
    except Exception as error:  # whatever the user's model raises
        return f"torch cannot be asked, as the model does not take random numbers: {first_line(error)}"
    try:
        found = session(*trial.inputs, **trial.options)
    except InputError as error:
        return str(error)
    except Exception as error:  # of ONNX Runtime's dozen classes
        return f"ONNX Runtime cannot run it: {first_line(error)}"
    found = dict(zip(session.outputs, found if isinstance(found, list) else [found], strict=True))
    dtype = next((t.dtype for t in wanted.values() if t.is_floating_point()), torch.float32)
    theirs = {name: numpy_of(tensor) for name, tensor in wanted.items()}
    if not all(np.isfinite(value).all() for value in theirs.values()):
        return "torch's own output is not finite, for any random numbers"
    tolerance = TOLERANCES.get(dtype, 1e-4)
    off = {name: relative(found[name], theirs[name]) for name in theirs}
    far = [name for name in theirs if not off[name] <= tolerance]
    far = far and _without_chance(network, trial, theirs, far, tolerance)
    if not far:
        return ""
    name = far[0]
    if dtype != torch.float64 and np.isfinite(off[name]):
        exact = _in_float64(network, trial)
        if exact and all(
            relative(found[n], exact[n]) <= max(tolerance, ROUNDING * relative(theirs[n], exact[n])) for n in far
        ):
            if off[name] > LOOSE:
                warnings.warn(
                    f"the check could not decide: the network magnifies rounding, so that torch in {dtype} is itself "
                    f"far from float64, as the file is ({name!r} differs by {off[name]:.1e} of its largest value)",
                    stacklevel=2,
                )
            return ""
    shapes = f"has the shape {found[name].shape}, in torch {theirs[name].shape}"
    return f"{name!r} " + (f"is off by {off[name]:.1e} of its largest value" if off[name] < np.inf else shapes)


def _without_chance(
    network: Network, trial: Trial, theirs: Mapping[str, np.ndarray], far: list[str], tolerance: float
) -> list[str]:
    """The outputs among `far` that are the same in every call of torch; the user hears of the others."""
    again = dict(leaves("output", network.call(network.model, trial)))
    drawn = [name for name in far if relative(numpy_of(again[name]), theirs[name]) > tolerance]
    if drawn:
        warnings.warn(f"the check leaves out {drawn[0]!r}, which depends on random numbers in eval mode", stacklevel=2)
    return [name for name in far if name not in drawn]


def _in_float64(network: Network, trial: Trial) -> dict[str, np.ndarray]:
    """What a copy of the model computes in float64; nothing, where it cannot."""

    def wide(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.double()
        if isinstance(value, Mapping):
            return {name: wide(one) for name, one in value.items()}
        return [wide(one) for one in value] if isinstance(value, list) else value

    try:
        exact = network.call(copy.deepcopy(network.model).double(), Trial(wide(trial.inputs), wide(trial.options)))
    except Exception:  # a model of the user's that has its dtype in its code
        return {}
    return {name: numpy_of(tensor) for name, tensor in leaves("output", exact)}


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """Its values as float64."""
    return tensor.detach().cpu().double().numpy()


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """How far an array is off, as a part of the largest value; infinitely, where it has another shape."""
    if found.shape != wanted.shape:
        return np.inf
    if not wanted.size:
        return 0.0
    difference, largest = np.abs(found.astype(np.float64) - wanted).max(), np.abs(wanted).max()
    return float(difference / largest) if largest else float(difference)
