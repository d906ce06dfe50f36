"""Predictions: how a user gives them, at which nodes they may be, and which value each predicts."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

from torch import fx, nn

from fxfeedback.errors import NodeNameError, OptionError
from fxfeedback.graph.bottom_up import reaching_output
from fxfeedback.graph.layout import is_vector_or_map
from fxfeedback.graph.nodes import find_node, is_own_input, name_of, spec_of
from fxfeedback.graph.operands import is_floating
from fxfeedback.graph.specs import Spec

SCALINGS = ("mean", "sample", "window")
FORM = "the name of a node, a dict or a Prediction"


@dataclass(frozen=True)
class Prediction:
    """One prediction: from what `node` represents, of what lies below it.

    predictor: a module from the node's value to the target's shape; None: the default one (see `add_prediction`).
    feedforward, feedback, error: the multipliers β, λ, α. scaling: of the error's gradient, "mean" (over the batch and
    the elements), "sample" (over the elements), "window" (by how many cells depend on one) or a number C, 2 / √C.
    target: the node that is predicted; None: the next lower prediction's, or for the lowest the model's input.
    """

    node: str
    predictor: nn.Module | None = None
    feedforward: float = 0.3
    feedback: float = 0.3
    error: float = 0.01
    scaling: str | float = "mean"
    target: str | None = None


def block_name(prediction: Prediction) -> str:
    """What a prediction's parts are called among a model's `predictors` and `multipliers`."""
    return prediction.node.replace(".", "_")


# -- as the user gives them -------------------------------------------------------------------------------------------


def read_predictions(given: Any) -> list[Prediction]:
    """Predictions given as names, dicts or `Prediction`s.

    Raises:
        OptionError: they are something else, there are none, or one has a value that it cannot have.
    """
    if isinstance(given, (str, Mapping, Prediction)) or not isinstance(given, Iterable):
        raise OptionError(f"predictions={given!r}: give a list, of each prediction {FORM}")
    made = [_read(one) for one in given]
    if not made:
        raise OptionError("predictions= is empty: name at least one node that predicts")
    for prediction in made:
        _check(prediction)
    return made


def _read(given: Any) -> Prediction:
    try:
        made = Prediction(**given) if isinstance(given, Mapping) else given
    except TypeError as error:
        raise OptionError(f"{given!r} is not a prediction ({error}): give {FORM}") from None
    made = Prediction(made) if isinstance(made, str) else made
    if not isinstance(made, Prediction) or not isinstance(made.node, str):
        raise OptionError(f"{given!r} is not a prediction: give {FORM}")
    return made


def _check(prediction: Prediction) -> None:
    at = f"the prediction at {prediction.node!r}:"
    for name in ("feedforward", "feedback", "error"):
        value = getattr(prediction, name)
        if not is_number(value):
            raise OptionError(f"{at} {name}={value!r}: give a finite number")
    scaling = prediction.scaling
    if scaling not in SCALINGS if isinstance(scaling, str) else not is_number(scaling) or scaling <= 0:
        raise OptionError(f"{at} scaling={scaling!r}: choose {', '.join(map(repr, SCALINGS))} or a positive number")
    if not isinstance(prediction.predictor, (nn.Module, type(None))):
        raise OptionError(f"{at} predictor={prediction.predictor!r}: give a torch.nn.Module, or None for the default")
    if not isinstance(prediction.target, (str, type(None))):
        raise OptionError(f"{at} target={prediction.target!r}: give the name of a node, or None for what lies below")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


# -- in a graph -------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a prediction is in a graph: at `node`, of `target`. fed_back: whether the next one's prediction comes to
    it."""

    prediction: Prediction
    node: fx.Node
    target: fx.Node
    fed_back: bool


def places_in(graph: fx.Graph, predictions: Sequence[Prediction]) -> list[Place]:
    """Where the predictions are in a graph with shapes, in execution order.

    Raises:
        NodeNameError: a name that no node has, or of a node that cannot predict or be predicted.
        OptionError: two predictions at one node, a target that does not run before, several inputs to choose from.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    reaching = reaching_output(graph)
    found: dict[fx.Node, Prediction] = {}
    for prediction in predictions:
        node = find_node(graph, prediction.node)
        if node in found:
            raise OptionError(f"{found[node].node!r} and {prediction.node!r} are one node: give it one prediction")
        _refuse_other_values(prediction, node)
        if node not in reaching:
            raise NodeNameError(f"the model's output does not depend on {prediction.node!r}, so nothing reads it")
        found[node] = prediction
    _refuse_one_name(predictions)
    nodes = sorted(found, key=order.__getitem__)
    places = []
    for number, node in enumerate(nodes):
        below = nodes[number - 1] if number else None
        target = _target(graph, found[node], below)
        if order[target] >= order[node]:
            raise OptionError(f"{found[node].node!r} cannot predict {name_of(target)!r}, which does not run before it")
        fed_back = node is not nodes[-1] and found[node].feedback != 0
        places.append(Place(found[node], node, target, fed_back))
    for place, above in itertools.pairwise(places):
        if place.fed_back and spec_of(above.target) != spec_of(place.node):
            own = place.prediction.node
            raise OptionError(
                f"the prediction at {above.prediction.node!r} is fed back to {own!r}, which has shape "
                f"{shown(spec_of(place.node))}, and it predicts {name_of(above.target)!r}, which has "
                f"{shown(spec_of(above.target))}: give {own!r} feedback=0"
            )
    return places


def shown(spec: Spec) -> str:
    """(batch, 3, 224, 224)"""
    return f"({', '.join('batch' if n is None else str(n) for n in spec.sizes)})"


def _target(graph: fx.Graph, prediction: Prediction, below: fx.Node | None) -> fx.Node:
    if prediction.target is not None:
        target = find_node(graph, prediction.target)
    elif below is not None:
        target = below
    else:
        inputs = [node for node in graph.nodes if is_own_input(node) and is_floating(node)]
        if len(inputs) != 1:
            names = ", ".join(repr(name_of(node)) for node in inputs) or "none with floating-point numbers"
            raise OptionError(
                f"{prediction.node!r} predicts the model's input, which has several ({names}): give target="
            )
        target = inputs[0]
    if not is_vector_or_map(target):
        raise NodeNameError(f"{prediction.node!r} cannot predict {name_of(target)!r}, which is not a vector or a map")
    return target


def _refuse_other_values(prediction: Prediction, node: fx.Node) -> None:
    if not is_vector_or_map(node):
        raise NodeNameError(f"{prediction.node!r} is not a vector or a map: nothing can be predicted from it")
    per_sample = spec_of(node).per_sample
    if not per_sample[0] or any(per_sample[1:]):
        raise NodeNameError(f"{prediction.node!r} is not one value per sample: nothing can be predicted from it")


def _refuse_one_name(predictions: Sequence[Prediction]) -> None:
    named: dict[str, Prediction] = {}
    for prediction in predictions:
        other = named.setdefault(block_name(prediction), prediction)
        if other is not prediction:
            raise OptionError(
                f"{other.node!r} and {prediction.node!r} would both have the predictor {block_name(prediction)!r}: "
                "rename a module of the model"
            )
