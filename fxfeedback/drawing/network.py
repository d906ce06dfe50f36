"""What is drawn of a model: its nodes, its arcs, and what passes and instructions do at each node."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from fxfeedback.butd import BUTD
from fxfeedback.drawing.arcs import add_passes, add_predictions
from fxfeedback.drawing.parts import Network, Node, drawn_as
from fxfeedback.errors import OptionError
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.nodes import is_named, name_of, specs_of
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.specs import Spec
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.instructed.graphs import Graphs
from fxfeedback.instructed.kept_graphs import graphs_of
from fxfeedback.lrm.feedback_model import FeedbackModel
from fxfeedback.predictive.predictive_model import PredictiveModel
from fxfeedback.tracing.arguments import example_form
from fxfeedback.tracing.doors import door_of
from fxfeedback.tracing.examples import examples_of
from fxfeedback.tracing.names import op_name
from fxfeedback.tracing.share import share
from fxfeedback.tracing.trace_at_size import trace_for
from fxfeedback.tracing.wrapper import Wrapper, example_of, net_of, stand_ins_of, wanted_door_of


def converted(model: nn.Module) -> nn.Module:
    """The part of a model that fxfeedback returned, where it could rewrite only a part; else the model."""
    return next((part for part in model.modules() if isinstance(part, Wrapper)), model)


def read_network(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
) -> Network:
    """What is drawn of a model in evaluation mode; sizes are for a plain model, as the others have theirs.

    Raises:
        OptionError: a size for a model that has one.
        TraceError: torch.fx cannot trace the model, or it does not run at this size.
    """
    if isinstance(model, Wrapper):
        if input_size is not None or example_inputs is not None:
            raise OptionError("input_size= and example_inputs= are for a plain model: this one was made with its size")
        form, examples = example_of(model).form, stand_ins_of(model)
    else:
        form, examples = example_form(model, examples_of(model, input_size, example_inputs))
    within = net_of(model) if isinstance(model, BUTD) else model
    plain = net_of(within) if isinstance(within, (FeedbackModel, PredictiveModel)) else within
    door = next((wanted_door_of(each) for each in (within, model) if isinstance(each, Wrapper)), None)
    traced, _ = trace_for(share(plain), examples, form, door)
    annotate_shapes(traced, examples)
    unpack_tuples(traced)
    classes = {path: type(module).__name__ for path, module in plain.named_modules()}
    by = " by torch.export" if door_of(traced) == "export" else ""
    network = Network(type(plain).__name__ + by, _nodes(traced), classes)
    if isinstance(within, FeedbackModel):
        add_passes(network, within)
    if isinstance(within, PredictiveModel):
        add_predictions(network, within)
    if isinstance(model, BUTD):
        _add_top_down(network, model)
    return network


# -- the BU graph -----------------------------------------------------------------------------------------------------


def _nodes(traced: fx.GraphModule) -> dict[str, Node]:
    """The parameters, and the nodes that make tensors of them or of the inputs: no sizes, no tables that stay as is."""
    own = dict(traced.named_parameters())
    nodes: dict[str, Node] = {}
    unread: set[fx.Node] = set()  # parameters
    for node in traced.graph.nodes:
        name = name_of(node) if is_named(node) else ""
        if node.op == "get_attr" and str(node.target) in own:
            unread.add(node)
        elif _tensor(node) is not None:
            module = name.rpartition(".")[0]
            for parameter in [source for source in node.all_input_nodes if source in unread]:
                unread.remove(parameter)
                nodes[name_of(parameter)] = _parameter(parameter, module)
            sources = [name_of(source) for source in node.all_input_nodes if name_of(source) in nodes]
            if sources or node.op == "placeholder":
                nodes[name] = _node(node, name, module, traced, sources)
    return nodes


def _parameter(node: fx.Node, module: str) -> Node:
    spec = _tensor(node)
    assert spec is not None
    return Node(name_of(node), module, "parameter", "parameter", spec.shape, {str(node.target): spec.shape}, ())


def _node(node: fx.Node, name: str, module: str, traced: fx.GraphModule, reads: Iterable[str]) -> Node:
    op = call = "input" if node.op == "placeholder" else op_name(node, traced)
    parameters: dict[str, tuple[int, ...]] = {}
    if node.op == "call_module":
        called = traced.get_submodule(str(node.target))
        call = f"{op}({called.extra_repr()})"
        parameters = {f"{node.target}.{own}": tuple(p.shape) for own, p in called.named_parameters()}
    return Node(name, module, op, call, _shape(node), parameters, tuple(reads))


def _tensor(node: fx.Node) -> Spec | None:
    """The spec of the tensor that a node makes, or of the first of several."""
    spec = specs_of(node)
    specs = spec.values() if isinstance(spec, dict) else spec if isinstance(spec, tuple) else [spec]
    return next((one for one in specs if isinstance(one, Spec)), None)


def _shape(node: fx.Node) -> tuple[int | None, ...] | None:
    spec = _tensor(node)
    assert spec is not None
    return spec.sizes[1:] if spec.sizes[:1] == (None,) else spec.sizes


# -- the TD graph -----------------------------------------------------------------------------------------------------


def _add_top_down(network: Network, model: BUTD) -> None:
    """What the TD passes cross, and where the instruction comes in."""
    graphs = graphs_of(model)
    bu, options = graphs.bottom_up, graphs.options
    network.feedback = options.feedback
    if model.options.heads != "shared":
        _add_heads(network, model.get_submodule("task_heads"), network.nodes[drawn_as(network, graphs.head)])
    if graphs.can_instruct:
        instructed = bu.below(graphs.sites) & bu.above(graphs.head)
        _mark(network, instructed - (set() if options.n_tasks is None else {graphs.head}), "instruction")
        for site in graphs.sites:
            network.nodes[drawn_as(network, site)].site = True
        network.instruction = _instruction(network, model, graphs)
    if options.learning == "counter_hebb":
        learning = graphs.learning_parameters()
        starts = [node for node in bu.parameters if str(node.target) in learning]
        _mark(network, bu.below(starts) & _above_outputs(bu), "error")


def _add_heads(network: Network, heads: Any, head: Node) -> None:
    """In the place of the model's own head: those of all tasks."""
    network.heads = heads.sizes
    head.op = f"{head.op} × {len(heads.sizes)}"
    head.parameters = {f"task_heads.{name}": tuple(p.shape) for name, p in heads.named_parameters()}


def _above_outputs(bu: BottomUp) -> set[fx.Node]:
    return set[fx.Node]().union(*(bu.above(leaf) for leaf in bu.output_leaves()))


def _mark(network: Network, crossed: Iterable[fx.Node], role: str) -> None:
    for node in crossed:
        name = drawn_as(network, node) if node.op == "call_function" else ""
        if name:
            network.nodes[name].roles |= {role}


def _instruction(network: Network, model: BUTD, graphs: Graphs) -> tuple[list[int], str]:
    """The sizes of the instruction head, and the node at which TD starts."""
    sizes = [graphs.instruction_size]
    if model.options.n_tasks is None:
        return sizes, drawn_as(network, graphs.head)
    linear = [layer for layer in model.instruction_head.modules() if isinstance(layer, nn.Linear)]
    top = graphs.head.all_input_nodes[0]
    return sizes + [layer.out_features for layer in linear], drawn_as(network, top)
