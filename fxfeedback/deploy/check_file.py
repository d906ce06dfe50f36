"""Compare a file that was just written with torch, in ONNX Runtime, before it takes its place.

Float32 keeps 7 digits; kernels that sum in another order lose one or two, a deep network one more. A network may
magnify that, and a unit that sits at its gate may fall on either side of it. So what differs is looked at again: in
float64, where the file may be `ROUNDING` times as far off as torch itself in the file's dtype; and with numbers drawn
anew, as what is wrong stays wrong.
"""

import copy
import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxfeedback.deploy.half import HALVES
from fxfeedback.deploy.program import leaves
from fxfeedback.deploy.trials import Network, Sizes, Trial, other_sizes, runs, sizes_of, trials
from fxfeedback.errors import CheckpointError, ExportError, InputError, OptionError, first_line

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 0.2}
"""How far an output may be from torch's, relative to its largest value: some thousand roundings, 30 of a half."""
ROUNDING = 3
LOOSE = 0.1
"""A difference beyond which that comparison says little, and the user hears of it."""
DRAWS = 4


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
    session, example = open_file(file), sizes_of(network.inputs)
    first, second = (3, 1) if network.dynamic_batch else (1, 1)
    _compare(network, session, first, example)
    if not any(given.any_size for given in network.inputs):
        if second != first:
            _compare(network, session, second, example)
        return
    done = 0
    for sizes in other_sizes(network.inputs, example):
        if done < 2 and runs(network, sizes):
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


def _compare(network: Network, session: Any, batch: int, sizes: Sizes) -> None:
    """Every kind of call at this batch and these sizes; each is drawn anew as long as it differs."""
    for kind, _ in enumerate(trials(network, batch, sizes, 0)):
        wrong = ""
        for number in range(DRAWS):
            trial = next(itertools.islice(trials(network, batch, sizes, number), kind, None))
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
        wanted = dict(leaves(network.output, network.call(network.model, trial)))
    except Exception as error:  # whatever the user's model raises
        return f"torch cannot be asked, as the model does not take random numbers: {first_line(error)}"
    try:
        given = _cast(trial, HALVES[network.half.dtype]) if network.half and network.half.io else trial
        found = session.values(*given.inputs, **given.options)
    except (InputError, CheckpointError) as error:
        return str(error)
    found = {name: numpy_of(value) for name, value in found.items()}
    dtype = next((t.dtype for t in wanted.values() if t.is_floating_point()), torch.float32)
    theirs = {name: numpy_of(tensor) for name, tensor in wanted.items()}
    if not all(_is_finite(value) for value in theirs.values()):
        return "torch's own output is not finite, for any random numbers"
    computed = HALVES[network.half.dtype] if network.half else dtype
    tolerance = TOLERANCES.get(computed, 1e-4)
    off = {name: relative(found[name], theirs[name]) for name in theirs}
    far = [name for name in theirs if not off[name] <= tolerance]
    far = far and _without_chance(network, trial, theirs, far, tolerance)
    if not far:
        return ""
    name = far[0]
    if dtype != torch.float64 and np.isfinite(off[name]):
        exact = _in(torch.float64, network, trial)
        own = theirs if computed == dtype else _in(computed, network, trial)
        if (
            exact
            and own
            and all(relative(found[n], exact[n]) <= max(tolerance, ROUNDING * relative(own[n], exact[n])) for n in far)
        ):
            if off[name] > LOOSE:
                warnings.warn(
                    f"the check could not decide: the network magnifies rounding, so that torch in {computed} is "
                    f"itself far from float64, as the file is ({name!r} differs by {off[name]:.1e} of its largest)",
                    stacklevel=2,
                )
            return ""
    shapes = f"has the shape {found[name].shape}, in torch {theirs[name].shape}"
    return f"{name!r} " + (f"is off by {off[name]:.1e} of its largest value" if off[name] < np.inf else shapes)


def _is_finite(values: np.ndarray) -> bool:
    """Whether all are finite, but for some that are -inf: outputs that a task does not have."""
    there = ~np.isneginf(values)
    return bool(np.isfinite(values[there]).all() and (there.any() or not values.size))


def _without_chance(
    network: Network, trial: Trial, theirs: Mapping[str, np.ndarray], far: list[str], tolerance: float
) -> list[str]:
    """The outputs among `far` that are the same in every call of torch; the user hears of the others."""
    again = dict(leaves(network.output, network.call(network.model, trial)))
    drawn = [name for name in far if relative(numpy_of(again[name]), theirs[name]) > tolerance]
    if drawn:
        warnings.warn(f"the check leaves out {drawn[0]!r}, which depends on random numbers in eval mode", stacklevel=2)
    return [name for name in far if name not in drawn]


def _in(dtype: torch.dtype, network: Network, trial: Trial) -> dict[str, np.ndarray]:
    """What a copy of the model computes in this dtype; nothing, where it cannot."""
    try:
        made = network.call(copy.deepcopy(network.model).to(dtype), _cast(trial, dtype))
    except Exception:  # a model of the user's that has its dtype in its code
        return {}
    return {name: numpy_of(tensor) for name, tensor in leaves(network.output, made)}


def _cast(trial: Trial, dtype: torch.dtype) -> Trial:
    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(dtype)
        if isinstance(value, Mapping):
            return {name: cast(one) for name, one in value.items()}
        return [cast(one) for one in value] if isinstance(value, list) else value

    return Trial(cast(trial.inputs), cast(trial.options))


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """Its values as float64."""
    return tensor.detach().cpu().double().numpy()


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """How far an array is off, as a part of the largest value; infinitely, where it has another shape.

    Outputs that a task does not have are -inf in both.
    """
    if found.shape != wanted.shape:
        return np.inf
    there = ~(np.isneginf(found) & np.isneginf(wanted))
    found, wanted = found[there], wanted[there]
    if not wanted.size:
        return 0.0
    difference, largest = np.abs(found.astype(np.float64) - wanted).max(), np.abs(wanted).max()
    return float(difference / largest) if largest else float(difference)
