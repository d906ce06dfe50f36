"""A model with predictions, which `add_prediction` makes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfeedback.checks import check_steps
from fxfeedback.errors import InputError, NodeNameError
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.nodes import find_node, name_of, spec_of
from fxfeedback.graph.specs import Sizes, Spec, size_of
from fxfeedback.predictive.multipliers import LearnedMultipliers, Multipliers
from fxfeedback.predictive.predicted import Predicted, State, predicted, tensors_of_state
from fxfeedback.predictive.predictions import Place, Prediction, block_name, places_in
from fxfeedback.predictive.predictors import default_predictor, factor_of, graph_of
from fxfeedback.predictive.steps import Held, Part, Stepping, Steps, step
from fxfeedback.rewrite import name_by_pass
from fxfeedback.tracing.arguments import Form, example_form
from fxfeedback.tracing.autocast import is_autocast
from fxfeedback.tracing.modes import eval_mode
from fxfeedback.tracing.names import without_names
from fxfeedback.tracing.opened import GraphKey, opened
from fxfeedback.tracing.running import bound_as_graph, check_inputs, run_graph
from fxfeedback.tracing.saved import own_part
from fxfeedback.tracing.share import share
from fxfeedback.tracing.verify import verify_graph
from fxfeedback.tracing.while_tracing import is_rewritten
from fxfeedback.tracing.wrapper import Wrapper


class PlanKey(NamedTuple):
    """By what a plan is kept: the bottom-up graph that is unrolled, and how."""

    graph: GraphKey
    what: Stepping


@dataclass(eq=False)
class Plan:
    """What a call runs: the unrolled graph as a function of the root, the inputs and the state; and the state's specs.

    state: of each prediction its representation's spec and its prediction's.
    """

    run: Callable[..., Any]
    state: dict[str, tuple[Spec, Spec]]


@dataclass(eq=False)
class Parts:
    """The predictions of one bottom-up graph."""

    bu: fx.GraphModule
    all: list[Part]


class PredictiveModel(Wrapper):
    """A model with predictions, made by `add_prediction`.

    Parameters and buffers of the user's model are attributes under their own names; what predicts is under
    `predictors`, and the numbers β, λ, α are under `multipliers`.
    """

    OWN = ("predictors", "multipliers")
    OPTIONS = ("steps", "state", "return_all", "keep_graph")
    predictions: tuple[Prediction, ...]
    steps: int
    learn_multipliers: bool
    detach_error: bool

    def __init__(
        self,
        model: nn.Module,
        predictions: Sequence[Prediction],
        steps: int,
        examples: Sequence[Any] | Mapping[str, Any],
        learn_multipliers: bool = False,
        detach_error: bool = True,
        verify: bool = False,
        door: str | None = None,
    ) -> None:
        super().__init__(model, examples, door)
        check_steps(steps)
        how = {"learn_multipliers": learn_multipliers, "detach_error": detach_error}
        vars(self).update(steps=steps, predictions=(), **how)  # past nn.Module, for which a child may have such a name
        bu = self._bottom_up()
        if verify:
            with eval_mode(self):
                verify_graph(self._bottom_up(), self._net, *example_form(self._net, examples))
        places = places_in(bu.graph, predictions)
        predictors, multipliers = {}, {}
        for place in places:
            block, given = block_name(place.prediction), place.prediction.predictor
            make = functools.partial(default_predictor, place) if given is None else functools.partial(share, given)
            predictors[block] = own_part(f"predictors.{block}", make, self._like())
            make = functools.partial(_multipliers, place, learn_multipliers)
            multipliers[block] = own_part(f"multipliers.{block}", make, self._like())
            if given is None:
                predictors[block].train(self._net.training)
            graph_of(predictors[block], place, "", verify)  # which refuses what does not fit
        self.predictors, self.multipliers = nn.ModuleDict(predictors), nn.ModuleDict(multipliers)
        vars(self).update(predictions=tuple(place.prediction for place in places))
        self._unrolled(Stepping(2))  # which refuses an op without a rule

    def forward(self, *inputs: torch.Tensor, steps: int | None = None, return_all: bool = True, **named: Any) -> Any:
        """The model's output of every step, a list; with return_all=False that of the last step.

        Args:
            inputs: the model's own.
            steps: how many; default: the model's own number.
            named: the model's own inputs by name, and its other arguments, of which each value has graphs of its own.

        Raises:
            InputError: arguments that the model does not take.
        """
        return self._run(inputs, named, Stepping(self._steps(steps), return_all))[0]

    def unroll(
        self,
        *inputs: torch.Tensor,
        steps: int | None = None,
        state: State | None = None,
        return_all: bool = True,
        keep_graph: bool = False,
        **named: Any,
    ) -> tuple[Any, State]:
        """As the call, continuing from the state of an earlier call with the same inputs; returns (outputs, state).

        Args:
            inputs, steps, return_all, named: as in the call.
            state: what an earlier call returned; None: start with step 0.
            keep_graph: whether gradients flow through the returned state. By default it has no history.

        Raises:
            InputError: a state that is not of this model, or of another batch or size.
        """
        what = Stepping(self._steps(steps), return_all, state is not None, keeps=True)
        outputs, held, _ = self._run(inputs, named, what, state)
        return outputs, {
            name: Held(*(value if keep_graph else value.detach() for value in values)) for name, values in held.items()
        }

    def readout(self, *inputs: Any, steps: int | None = None, **named: Any) -> list[dict[str, Predicted]]:
        """Node name -> `Predicted`, for every step.

        Args:
            inputs: the model's own, and then the names of nodes, each or in a list; a module's is its last node's.
            steps, named: as in the call.

        Raises:
            NodeNameError: no names, or one that no node has.
        """
        own, names = without_names(inputs)
        graph = self._bottom_up().graph
        predicting = {find_node(graph, one.node): one.node for one in self.predictions}
        found = {name: find_node(graph, name) for name in names}
        read_as = {name: predicting.get(node, name_of(node)) for name, node in found.items()}
        what = Stepping(self._steps(steps), readout=tuple(dict.fromkeys(read_as.values())))
        read = self._run(own, named, what)[2]
        return [{name: predicted(*one[key]) for name, key in read_as.items()} for one in read]

    def prediction_losses(self, *inputs: Any, **named: Any) -> dict[str, torch.Tensor]:
        """Node name -> the mean squared error of its prediction at step 0, with what is predicted as a constant.

        At step 0 no representation depends on a predictor, so that each learns from its own loss alone: minimise their
        sum over `model.predictors.parameters()`.
        """
        names = tuple(one.node for one in self.predictions)
        read = self._run(inputs, named, Stepping(1, readout=names))[2][0]
        return {name: F.mse_loss(p, target.detach()) for name, (_, p, target, _) in read.items()}

    def unrolled(self, steps: int | None = None) -> fx.GraphModule:
        """The flat graph of this many steps: inputs -> (outputs, state, readouts)."""
        return self._unrolled(Stepping(self._steps(steps)))

    def predictor(self, node: str) -> nn.Module:
        """What predicts at a node."""
        for prediction in self.predictions:
            if prediction.node == node:
                return self.predictors[block_name(prediction)]  # type: ignore[return-value]
        known = ", ".join(prediction.node for prediction in self.predictions)
        raise NodeNameError(f"there is no prediction at {node!r}; there are: {known}")

    def as_graph(
        self, args: Sequence[Any], named: Mapping[str, Any], tensors: Any = torch.Tensor
    ) -> tuple[fx.GraphModule, list[Any]]:
        """A call as a graph with names, for whoever traces a model that has this one inside, and the graph's inputs.

        What a later step t computes anew is called as in step 0, followed by `.step{t}`.

        Args:
            args, named: of the call; tensors without data, or proxies.
            tensors: their classes.
        """
        options, form, inputs, sizes = bound_as_graph(self, args, named, tensors, ("steps", "return_all"))
        what = Stepping(self._steps(options.get("steps")), options.get("return_all", True))
        module = self._unrolled(what, sizes, form)
        name_by_pass(module, Steps.WORD)
        return module, inputs

    # -- inside -------------------------------------------------------------------------------------------------------

    def _steps(self, steps: int | None) -> int:
        """How many steps a call makes."""
        steps = self.steps if steps is None else steps
        check_steps(steps)
        return steps

    def _run(
        self, inputs: Sequence[Any], named: Mapping[str, Any], what: Stepping, state: State | None = None
    ) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
        """(outputs, state, readouts) of a call; `what` says all of it but for the state."""
        if taken := [name for name in self.OPTIONS if name in named]:
            raise InputError(f"{taken[0]}= is an option of unroll, and not of this call")
        form, inputs = self._called(inputs, named)
        if form is None:
            check_inputs(inputs, self._examples)
        what = what._replace(fused=not (is_rewritten() or torch.jit.is_tracing() or is_autocast(inputs[0])))
        plan = self._kept(("plan", PlanKey(GraphKey(self._fingerprint(), self._sizes(inputs), form), what)))
        self._check_autocast(inputs, form)
        batch = next(x.shape[0] for x in inputs if x.ndim)
        held = [] if state is None else tensors_of_state(state, plan.state, batch)
        return run_graph(plan.run, self, inputs, held, held)

    def _sizes(self, inputs: Sequence[torch.Tensor]) -> Sizes:
        """The sizes for which a graph is made; floating-point inputs count in our own dtype, as under autocast."""
        like = self._like()
        return tuple([(size_of(x), like.dtype if x.is_floating_point() else x.dtype) for x in inputs])

    def _bottom_up(self, sizes: Sizes | None = None, form: Form | None = None) -> fx.GraphModule:
        """The opened graph in the present mode, with shapes; None: of the example's size, of its form."""
        sizes = sizes or self._sizes(self._stand_ins())
        return self._kept(("bottom up", GraphKey(self._fingerprint_of_model(), sizes, form)))

    def _parts(self, sizes: Sizes | None, form: Form | None) -> Parts:
        """The opened graph, and the predictions between its nodes."""
        return self._kept(("parts", GraphKey(self._fingerprint(), sizes or self._sizes(self._stand_ins()), form)))

    def _unrolled(self, what: Stepping, sizes: Sizes | None = None, form: Form | None = None) -> fx.GraphModule:
        parts = self._parts(sizes, form)
        return step(parts.bu, self._root, parts.all, what)

    def _graph(self, sizes: Any, form: Form | None) -> fx.Graph:
        return self._bottom_up(sizes, form).graph

    def _build(self, key: tuple[str, Any]) -> Any:
        kind, how = key
        if kind == "plan":
            parts = self._parts(how.graph.sizes, how.graph.form)
            run = type(self._unrolled(how.what, how.graph.sizes, how.graph.form)).forward
            specs = {part.name: (spec_of(part.place.node), spec_of(part.place.target)) for part in parts.all}
            return Plan(run, specs)
        if kind == "parts":
            bu = self._bottom_up(how.sizes, how.form)
            return Parts(bu, [self._part(place) for place in places_in(bu.graph, self.predictions)])
        return opened(self._net, self._stand_ins(), how.sizes, how.form or self._form, self._door)[0]

    def _part(self, place: Place) -> Part:
        block = block_name(place.prediction)
        predictor: Any = self.predictors[block]
        graph = BottomUp(graph_of(predictor, place, f"predictors.{block}").graph)
        by_batch = place.prediction.scaling == "mean"
        factor = factor_of(predictor, place)
        return Part(place, graph, factor, by_batch, self.learn_multipliers, self.detach_error)


def _multipliers(place: Place, learned: bool) -> nn.Module:
    return LearnedMultipliers(place.prediction, place.fed_back) if learned else Multipliers(place.prediction)


# -- what the rest of the package asks of a model with predictions ----------------------------------------------------


def bottom_up_of(model: PredictiveModel) -> fx.GraphModule:
    """Its opened graph for one step in the present mode, with shapes, at the example's size."""
    return model._bottom_up()


def parts_of(model: PredictiveModel) -> list[Part]:
    """Its predictions, between nodes of `bottom_up_of(model)`."""
    return model._parts(None, None).all


def given_predictions(model: PredictiveModel) -> list[Prediction]:
    """Its predictions, with the predictors that they were given as they are now."""
    return [
        one if one.predictor is None else replace(one, predictor=model.predictor(one.node)) for one in model.predictions
    ]
