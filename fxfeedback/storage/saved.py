"""The fields of a file that `save` wrote, checked: the file may be damaged, or come from anybody."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import nn

from fxfeedback.errors import CheckpointError, OptionError
from fxfeedback.feedback import Connection
from fxfeedback.instructed.options import Options
from fxfeedback.predictive.predictions import Prediction
from fxfeedback.storage.building import SIZE, decode
from fxfeedback.tracing.doors import DOORS

MOST_PASSES = 256
"""Of a file, all wrappers' together: every pass is part of a flat graph, so that a number can ask for any memory."""
MOST_VALUES = 2**28
"""Of an example input: a graph is made for its size, and the masks and resizing matrices of that size with it."""
KINDS = ("FeedbackModel", "PredictiveModel", "BUTD")


@dataclass(frozen=True)
class Saved:
    """What a file says of its model.

    wrappers: path, kind and description, outermost first. net: the plain model, or None, and the reason.
    names: of the model's tensors -> of the file's. frozen: parameters without updates. training: modules in that mode.
    """

    wrappers: list[tuple[str, str, Any]]
    net: dict[str, Any] | None
    reason: str
    names: dict[str, str]
    frozen: frozenset[str]
    training: frozenset[str]


def read_saved(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: Any) -> Saved:
    """The fields, each of its type.

    Raises:
        CheckpointError: one is missing or of another type; the message says which.
    """

    def field(name: str, kinds: type | tuple[type, ...], is_right: Callable[[Any], bool] = lambda value: True) -> Any:
        if name not in about:
            raise CheckpointError(f"{where} is damaged: the field {name!r} is missing")
        if not isinstance(about[name], kinds) or not is_right(about[name]):
            raise CheckpointError(f"{where} is damaged: the field {name!r} is not what save writes there")
        return about[name]

    wrappers = field("wrappers", list, lambda value: bool(value) and all(map(_is_wrapper, value)))
    names = field("names", dict, lambda value: all(isinstance(kept, str) for kept in value.values()))
    unknown = next((name for name, kept in names.items() if kept not in tensors), None)
    if unknown is not None:
        raise CheckpointError(f"{where} is damaged: it has no tensor for {unknown!r} of the field 'names'")
    empty = next((name for name, t in tensors.items() if t.numel() == 0 and max(t.shape) > SIZE), None)
    if empty is not None:
        raise CheckpointError(f"{where} is damaged: the tensor {empty!r} has a size and no values")
    frozen, training = (frozenset(field(name, list, _are_strings)) for name in ("frozen", "training"))
    return Saved(
        [tuple(wrapper) for wrapper in wrappers],
        field("net", (dict, type(None))),
        field("reason", str),
        names,
        frozen,
        training,
    )


def read_wrapper(kind: str, described: Any, tensors: Mapping[str, torch.Tensor], where: Any, at: str) -> dict[str, Any]:
    """What a wrapper of this kind takes besides the model.

    Raises:
        CheckpointError: a field that is missing, unknown or of another type; the message says which.
    """
    how = decode(described, tensors, where, at)
    if not isinstance(how, dict):
        raise CheckpointError(f"{where}: {at} is not what save writes there")
    for name in FIELDS[kind]:
        if name not in how and name not in LATER:
            raise CheckpointError(f"{where} is damaged: {at} has no {name!r}")
    for name, value in how.items():
        if name not in FIELDS[kind]:
            raise CheckpointError(f"{where}: {at} has a field {name!r}, which this version does not know")
        if name in CHECKS and not CHECKS[name](value):
            raise CheckpointError(f"{where}: {at} has a {name!r} that save does not write: {_short(value)}")
    examples: Any = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in how.pop("examples")]
    by_name = how.pop("names", ())
    if len(by_name) not in (0, len(examples)):
        raise CheckpointError(f"{where}: {at} has {len(examples)} 'examples' and {len(by_name)} 'names'")
    examples = dict(zip(by_name, examples, strict=True)) if by_name else examples
    if kind == "BUTD":
        door = how.pop("door", None)
        try:
            return {"options": Options(**how), "example_inputs": examples, "door": door}
        except OptionError as error:
            raise CheckpointError(f"{where}: {at}: {error}") from error
    if kind == "PredictiveModel":
        return {**how, "predictions": [Prediction(**one) for one in how["predictions"]], "examples": examples}
    return {**how, "connections": [Connection(**one) for one in how["connections"]], "examples": examples}


def check_passes(wrappers: Sequence[Mapping[str, Any]], where: Any) -> None:
    """Refuse more passes than a graph can hold; one inside the other they multiply."""
    passes = math.prod(how.get("passes", 1) * how.get("steps", 1) for how in wrappers)
    if passes > MOST_PASSES:
        raise CheckpointError(f"{where} has {passes} passes, more than the {MOST_PASSES} that a file may ask for")


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 80 else f"{text[:80]}..."


# -- what is right ----------------------------------------------------------------------------------------------------


def _is_wrapper(value: Any) -> bool:
    is_triple = isinstance(value, list) and len(value) == 3
    return is_triple and isinstance(value[0], str) and value[1] in KINDS and isinstance(value[2], dict)


def _are_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_VALUES


def _is_count(value: Any) -> bool:
    return value is None or (_is_size(value) and value <= SIZE)


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _are_examples(value: Any) -> bool:
    pairs = isinstance(value, (list, tuple)) and all(isinstance(x, (list, tuple)) and len(x) == 2 for x in value)
    return (
        pairs
        and any(shape for shape, _ in value)  # one has a batch
        and all(
            isinstance(shape, tuple)
            and len(shape) <= 8  # none: a tensor of one number
            and all(map(_is_size, shape))
            and math.prod(shape) <= MOST_VALUES
            and isinstance(dtype, torch.dtype)
            for shape, dtype in value
        )
    )


def _are_connections(value: Any) -> bool:
    own = {field.name: field for field in fields(Connection)}
    needed = {name for name, field in own.items() if field.default is MISSING}
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and needed <= set(one) <= set(own)
        and all(type(one[name]) is (str if name in needed else type(own[name].default)) for name in one)
        for one in value
    )


def _are_predictions(value: Any) -> bool:
    kinds: dict[str, tuple[type, ...]] = {
        "node": (str,),
        "predictor": (nn.Module, type(None)),
        **dict.fromkeys(("feedforward", "feedback", "error"), (int, float)),
        "scaling": (str, int, float),
        "target": (str, type(None)),
    }
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(one, dict)
            and set(one) == set(kinds)
            and all(isinstance(one[name], kinds[name]) and not isinstance(one[name], bool) for name in kinds)
            for one in value
        )
    )


def _is_lateral(value: Any) -> bool:
    return isinstance(value, str) or (callable(value) and not isinstance(value, (type, nn.Module)))


FIELDS = {
    "FeedbackModel": ("examples", "names", "door", "connections", "passes", "return_all", "checkpoint"),
    "PredictiveModel": ("examples", "names", "door", "predictions", "steps", "learn_multipliers", "detach_error"),
    "BUTD": ("examples", "names", "door", *(field.name for field in fields(Options))),
}
"""Kind of wrapper -> what the file says of it."""
LATER = ("checkpoint", "names", "door", *(field.name for field in fields(Options) if field.default is not MISSING))
"""Fields that older files, or files of networks made without them, do not have."""
CHECKS: dict[str, Callable[[Any], bool]] = {
    "examples": _are_examples,
    "names": _are_strings,
    "door": lambda value: value in DOORS,
    "connections": _are_connections,
    "passes": lambda value: _is_size(value) and value <= MOST_PASSES,
    **dict.fromkeys(
        ("return_all", "checkpoint", "learn_multipliers", "detach_error"), lambda value: type(value) is bool
    ),
    "predictions": _are_predictions,
    "steps": lambda value: _is_size(value) and value <= MOST_PASSES,
    "n_tasks": _is_count,
    "instruction_size": _is_count,
    "lateral": _is_lateral,
}
"""Whether a field may have a value; `Options` itself says what else an option may be."""
