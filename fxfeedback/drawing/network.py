"""What is drawn: a model's nodes, its connections, and what passes and instructions do at each node."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fxfeedback.butd import BUTD, graphs_of
from fxfeedback.drawing.text import short_number
from fxfeedback.errors import OptionError
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.nodes import find_node, is_named, name_of, pass_of, specs_of
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.specs import Spec
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.instructed.graphs import Graphs
from fxfeedback.lrm.feedback_model import FeedbackModel, bottom_up_of
from fxfeedback.tracing.arguments import example_form
from fxfeedback.tracing.doors import door_of
from fxfeedback.tracing.examples import examples_of
from fxfeedback.tracing.names import op_name
from fxfeedback.tracing.share import share
from fxfeedback.tracing.trace_at_size import trace_for
from fxfeedback.tracing.wrapper import Wrapper, example_of, net_of, stand_ins_of, wanted_door_of


@dataclass
class Node:
    """One node of the BU graph that makes a tensor.

    name: as `node_names` gives it. module: the one whose code made it, of a parameter the first that reads it.
    op: what it is called; call: with its settings. shape: without the batch, None for another size that depends on it.
    parameters: name -> shape. reads: the nodes whose tensors it takes.
    computed: the passes that compute it; the others share an earlier pass's value.
    roles: "instruction", "error": the TD passes that cross it. site: whether it is a gating site.
    """

    name: str
    module: str
    op: str
    call: str
    shape: tuple[int | None, ...] | None
    parameters: dict[str, tuple[int, ...]]
    reads: tuple[str, ...]
    computed: frozenset[int] = frozenset({1})
    roles: frozenset[str] = frozenset()
    site: bool = False


@dataclass(frozen=True)
class Arc:
    """A connection between two nodes; `given` is how the user wrote it, `parameters` how many its block has; `added`:
    what it brings is added and not multiplied."""

    number: int
    source: str
    destination: str
    given: tuple[str, str]
    feedback: bool
    parameters: int
    added: bool = False

    @property
    def kind(self) -> str:
        """What is said of it: feedback or skip."""
        return "feedback" if self.feedback else "skip"

    @property
    def size(self) -> str:
        """1.2k parameters, added"""
        return f"{short_number(self.parameters)} parameters" + ", added" * self.added

    @property
    def arrow(self) -> str:
        """From where to where, as the user wrote it: fc → conv1"""
        return " → ".join(self.given)


@dataclass
class Network:
    """A model as it is drawn.

    nodes: by name, in execution order. classes: module path -> name of its class. passes: 1 without connections.
    instruction: sizes from the instruction to what it arrives at, and the node whose counter neurons it sets.
    feedback: what TD reads, in a word or two, and as the end of a sentence. heads: of one per task, how many outputs.
    """

    title: str
    nodes: dict[str, Node]
    classes: dict[str, str]
    arcs: list[Arc] = field(default_factory=list)
    passes: int = 1
    instruction: tuple[list[int], str] | None = None
    feedback: tuple[str, str] = ("", "")
    heads: tuple[int, ...] = ()

    @property
    def has_td(self) -> bool:
        """Whether there is a TD graph."""
        return any(node.roles for node in self.nodes.values())

    def readers(self) -> dict[str, list[str]]:
        """Node name -> the nodes that read it."""
        readers: dict[str, list[str]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for source in node.reads:
                readers[source].append(node.name)
        return readers


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
    plain = net_of(within) if isinstance(within, FeedbackModel) else within
    door = next((wanted_door_of(each) for each in (within, model) if isinstance(each, Wrapper)), None)
    traced, _ = trace_for(share(plain), examples, form, door)
    annotate_shapes(traced, examples)
    unpack_tuples(traced)
    classes = {path: type(module).__name__ for path, module in plain.named_modules()}
    by = " by torch.export" if door_of(traced) == "export" else ""
    network = Network(type(plain).__name__ + by, _nodes(traced), classes)
    if isinstance(within, FeedbackModel):
        _add_passes(network, within)
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


# -- passes -----------------------------------------------------------------------------------------------------------


def _add_passes(network: Network, model: FeedbackModel) -> None:
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


def drawn_as(network: Network, node: fx.Node) -> str:
    """The drawn node to which a node of an opened graph, in any of its passes, belongs.

    A node that a connection adds has a name that no drawn node has, and belongs to what the first of its inputs belongs
    to. '' if none of them belongs to a drawn node.
    """
    name = drawn_name(network, name_of(node) if is_named(node) else "")
    return name or next(filter(None, (drawn_as(network, source) for source in node.all_input_nodes)), "")


def drawn_name(network: Network, name: str) -> str:
    """The drawn node of this name, or the one whose name this name continues, as layer4.1.relu.pass2; '' if none."""
    while name and name not in network.nodes:
        name = name.rpartition(".")[0]
    return name


def count(parameters: Iterable[dict[str, tuple[int, ...]]]) -> int:
    """How many numbers the parameters have together; a parameter that several nodes share counts once."""
    shapes: dict[str, tuple[int, ...]] = {}
    for some in parameters:
        shapes |= some
    return sum(math.prod(shape) for shape in shapes.values())
