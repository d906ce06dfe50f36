"""Let nodes of a model predict what lies below them, and say what comes of it: what each step computes, and its cost.

The steps share what lies below the first prediction. The last step predicts nothing; a step that follows
it has it predict. Operations are those of one image, a multiplication and an addition counted as two.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from fxfeedback.commands.given import add_model, positive, read_model
from fxfeedback.commands.text import Count, Percent, operations, sizes, table
from fxfeedback.errors import OptionError

EXAMPLES = [
    "fxfeedback predict vgg16 --at features.3 features.8 features.15",
    "fxfeedback predict resnet18 --at relu layer1 layer2 --scaling window --steps 4",
    "fxfeedback predict vgg11 --at features.1 features.4 --save predicting",
]
KEYS = {
    "model": "MODEL, as given",
    "inputs": "the shape of each input; in shapes null stands for the batch",
    "parameters": "of the model",
    "parameters_added": "of the predictors",
    "predictions[].node": "what predicts",
    "predictions[].target": "what it predicts",
    "predictions[].shape": "of the node's value",
    "predictions[].target_shape": "of the prediction",
    "predictions[].scaling": "of the error's gradient",
    "predictions[].parameters": "of its predictor",
    "steps[].computed": "how many of the unrolled graph's nodes this step computes",
    "steps[].operations": "floating-point operations that a call takes more by this step, of one image",
    "code": "with --code: the unrolled graph as Python code; else null",
    "saved": "with --save: the directory; else null",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, its predictions, what else to do."""
    add_model(parser)
    parser.add_argument(
        "--at", metavar="NODE", nargs="+", help="what predicts; `fxfeedback nodes MODEL` lists the names"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="how many steps (default 5)")
    parser.add_argument(
        "--scaling", choices=["mean", "sample", "window"], help="of the error's gradient (default mean)"
    )
    parser.add_argument("--code", action="store_true", help="also print the unrolled graph's code")
    parser.add_argument("--save", metavar="DIR", help="save the model for fxfeedback.load")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Add the predictions, and look at the unrolled graph."""
    import fxfeedback
    from fxfeedback.commands.networks import input_shapes, parameters
    from fxfeedback.graph.nodes import pass_of
    from fxfeedback.lrm.choosing import operations_of_runs

    model = _read(arguments)
    if arguments.save:
        fxfeedback.save(model, arguments.save)
    added = parameters(model.predictors)
    unrolled = model.unrolled()
    calls = [pass_of(node) or 0 for node in unrolled.graph.nodes if node.op.startswith("call")]
    counts = operations_of_runs(model, "steps", model.steps)
    return {
        "model": arguments.model,
        "inputs": input_shapes(model),
        "parameters": parameters(model) - added,
        "parameters_added": added,
        "predictions": _predictions(model),
        "steps": [{"computed": calls.count(t), "operations": count} for t, count in enumerate(counts)],
        "code": unrolled.code if arguments.code else None,
        "saved": arguments.save,
    }


def _read(arguments: argparse.Namespace) -> Any:
    """The model with its predictions, in evaluation mode."""
    import fxfeedback

    model: Any = read_model(arguments.model, arguments.weights)
    if arguments.at:
        predictions = [fxfeedback.Prediction(node, scaling=arguments.scaling or "mean") for node in arguments.at]
        made = fxfeedback.add_prediction(model, predictions, arguments.steps or 5, input_size=arguments.input_size)
        return made.eval()
    if not isinstance(model, fxfeedback.PredictiveModel):
        raise OptionError(f"{arguments.model} has no predictions: give --at NODE ...")
    if arguments.scaling:
        raise OptionError("--scaling belongs to --at")
    if arguments.steps:
        vars(model)["steps"] = arguments.steps
    return model.eval()


def _predictions(model: Any) -> list[dict[str, Any]]:
    from fxfeedback.commands.networks import parameters
    from fxfeedback.graph.nodes import name_of, spec_of
    from fxfeedback.predictive.predictive_model import parts_of

    return [
        {
            "node": part.name,
            "target": name_of(part.place.target),
            "shape": spec_of(part.place.node).sizes,
            "target_shape": spec_of(part.place.target).sizes,
            "scaling": part.place.prediction.scaling,
            "parameters": parameters(model.predictor(part.name)),
        }
        for part in parts_of(model)
    ]


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Two tables, and the code."""
    yield f"{result['model']}: input {', '.join(map(sizes, result['inputs']))}"
    share = Percent(result["parameters_added"] / max(result["parameters"], 1))
    yield f"{Count(result['parameters'])} parameters, {Count(result['parameters_added'])} added ({share})"
    yield ""
    rows = [
        (
            f"{one['node']} predicts {one['target']}",
            f"{sizes(one['shape'])} -> {sizes(one['target_shape'])}",
            one["scaling"],
            Count(one["parameters"]),
        )
        for one in result["predictions"]
    ]
    yield from table(("prediction", "shapes", "scaling", "parameters"), rows)
    yield ""
    steps = [(t, one["computed"], operations(one["operations"])) for t, one in enumerate(result["steps"])]
    yield from table(("step", "nodes computed", "operations"), steps)
    if result["code"]:
        yield ""
        yield from result["code"].strip().splitlines()
    if result["saved"]:
        yield ""
        yield f"saved: fxfeedback.load({result['saved']!r})"
