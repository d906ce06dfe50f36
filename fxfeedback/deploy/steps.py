"""A model with predictions as a program: its steps."""

from fxfeedback.checks import check_steps
from fxfeedback.deploy.parts import about, own_inputs, return_only
from fxfeedback.deploy.program import Program
from fxfeedback.graph.nodes import name_of, pass_of
from fxfeedback.predictive.predictive_model import PredictiveModel, bottom_up_of, parts_of
from fxfeedback.predictive.steps import Stepping, Steps
from fxfeedback.tracing.wrapper import fetch_of, root_of


def stepped_program(model: PredictiveModel, steps: int) -> Program:
    """Its steps, t = 0 .. steps - 1: the model's own inputs in, one output per step out."""
    check_steps(steps)
    graph = Steps(bottom_up_of(model).graph, parts_of(model), Stepping(steps)).run()
    return_only(graph, graph.output_node().args[0][0])  # type: ignore[index]
    labels = {node: f"step{pass_of(node) or 0}/{name_of(node)}" for node in graph.nodes}
    predictions = [
        {name: value for name, value in vars(one).items() if name != "predictor"} for one in model.predictions
    ]
    metadata = about(model, "predictive") | {"predictions": predictions, "steps": steps}
    return Program(graph, labels, own_inputs(model, graph), root_of(model), fetch_of(model), metadata)
