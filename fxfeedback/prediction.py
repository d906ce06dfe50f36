"""`add_prediction`: predictive coding at named nodes of any traceable model."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fxfeedback.errors import TraceError
from fxfeedback.predictive.predicted import Predicted
from fxfeedback.predictive.predictions import Prediction, read_predictions
from fxfeedback.predictive.predictive_model import PredictiveModel
from fxfeedback.tracing.doors import both, is_final
from fxfeedback.tracing.examples import examples_of
from fxfeedback.tracing.wrapper import want_door

__all__ = ["Predicted", "Prediction", "PredictiveModel", "add_prediction"]


def add_prediction(
    model: nn.Module,
    predictions: Iterable[Any],
    steps: int = 5,
    *,
    learn_multipliers: bool = False,
    detach_error: bool = True,
    input_size: Sequence[int] | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    door: str | None = None,
    verify: bool = True,
) -> PredictiveModel:
    """Let nodes of a model predict what lies below them, and run it in several steps that correct the predictions.

    A node i that predicts has a representation r, which the network reads in its place; P is its predictor, p = P(r),
    and τ what it predicts: the representation below it, or the input. With f what the node computes from below:

        r_i(0) = f_i(0)
        r_i(t) = β f_i(t) + λ p_{i+1}(t-1) + (1 - β - λ) r_i(t-1) - α g_i(t-1)

    where g is the gradient of the mean of (p - τ)², or of another multiple of it. At the last, nothing is fed back
    (λ = 0). So one step is the model ("Predify: Augmenting deep neural networks with brain-inspired predictive coding
    dynamics", NeurIPS 2021). What lies below the first prediction is computed once.

    Args:
        model: any module that torch.fx can trace. It is not changed. Its parameters, and those of given predictors, are
            shared with the result; attributes and modes are copied.
        predictions: names of nodes, as `node_names` gives them, dicts, or `Prediction` objects, in any order. The
            default predictor of a map is an upsampling (bilinear, trilinear for video) where sizes differ and a
            transposed convolution of 3; between vectors it is a linear layer. Give others as predictor=.
        steps: how many steps a call makes by default, t = 0 .. steps - 1.
        learn_multipliers: whether β, λ, α are learned: β and λ through sigmoids, so that they and the memory
            1 - β - λ stay positive. Otherwise they are buffers.
        detach_error: whether g is a constant for every loss, as published, so that nothing learns through it.
        input_size: size of one input without its batch; default 224 by 224 with the first convolution's channels.
        example_inputs: instead of input_size, for several inputs: tensors with a batch dimension; a dict gives them by
            name.
        door: how the model becomes a graph: "fx", by torch.fx's symbolic tracing; "export", by torch.export; None: by
            torch.export where torch.fx cannot trace the model.
        verify: compare the graph with the model, and those of predictors with them, once, on one random sample.

    Raises:
        NodeNameError: a name that no node has, or one that cannot predict or be predicted.
        OptionError: options that do not exist or do not go together, a prediction of another shape than its target's.
        TraceError: the model or a predictor cannot be traced, does not run at this size, or its graph computes
            something else.
        RuleError: an op of a predictor has no rule.
    """
    made = read_predictions(predictions)
    examples = examples_of(model, input_size, example_inputs)
    how = (made, steps, examples, learn_multipliers, detach_error, verify)
    make = functools.partial(PredictiveModel, model, *how)
    try:
        rewritten = make(door or "fx")
    except TraceError as by_fx:
        if door is not None or is_final(by_fx):
            raise
        try:
            rewritten = make("export")
        except TraceError as by_export:
            raise both(by_fx, by_export) from by_fx
    want_door(rewritten, door)
    return rewritten
