"""The arcs of a picture: connections and predictions, and which passes compute each node."""

from fxfeedback.drawing.parts import Arc, Network, drawn_name
from fxfeedback.graph.nodes import find_node, is_named, name_of, pass_of
from fxfeedback.lrm.feedback_model import FeedbackModel, bottom_up_of
from fxfeedback.predictive.predictive_model import PredictiveModel, parts_of
from fxfeedback.predictive.predictive_model import bottom_up_of as bottom_up_of_predictions


def add_passes(network: Network, model: FeedbackModel) -> None:
    """The connections, and which passes compute each node."""
    graph = bottom_up_of(model).graph
    network.passes = model.passes
    order = {name: i for i, name in enumerate(network.nodes)}
    for number, connection in enumerate(model.connections, 1):
        given = connection.source, connection.destination
        source, destination = (drawn_name(network, name_of(find_node(graph, name))) for name in given)
        block = model.modulation(*given)
        size = sum(p.numel() for p in block.parameters())
        feedback = order[source] >= order[destination]
        network.arcs.append(Arc(number, source, destination, given, feedback, size, connection.mode == "add"))
    passes: dict[str, set[int]] = {}
    for node in model.unrolled().graph.nodes:
        if node.op.startswith("call") and is_named(node):
            passes.setdefault(name_of(node), set()).add(pass_of(node) or 1)
    for name, node in network.nodes.items():
        # A node that evaluation mode leaves out, such as dropout, is computed in the passes that compute its inputs.
        inherited = frozenset({1}).union(*(network.nodes[source].computed for source in node.reads))
        node.computed = frozenset(passes[name]) if name in passes else inherited


def add_predictions(network: Network, model: PredictiveModel) -> None:
    """Arcs from what predicts down to what is predicted."""
    network.steps = model.steps
    inputs = [name for name, node in network.nodes.items() if node.op == "input"]  # as the outermost call names them
    own = bottom_up_of_predictions(model).graph.find_nodes(op="placeholder")
    named = dict(zip(own, inputs, strict=False))
    for number, part in enumerate(parts_of(model), 1):
        source, target = (
            named.get(node) or drawn_name(network, name_of(node)) for node in (part.place.node, part.place.target)
        )
        size = sum(p.numel() for p in model.predictor(part.name).parameters())
        network.arcs.append(Arc(number, source, target, (part.name, target), True, size, predicts=True))
