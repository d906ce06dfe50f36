"""Connections: how a user gives them, between which nodes they may run, and what each is in a graph."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxfeedback.errors import NodeNameError, OptionError
from fxfeedback.graph.bottom_up import reaching_output
from fxfeedback.graph.layout import is_vector_or_map, layout_of
from fxfeedback.graph.nodes import find_node, name_of, spec_of
from fxfeedback.graph.signs import never_negative
from fxfeedback.lrm.modulation import Modulation
from fxfeedback.rewrite import Link
from fxfeedback.rules import RULES

CHOICES = {
    "activation": ("auto", "relu", "none"),
    "mode": ("multiply", "add"),
    "init": ("random", "identity"),
}
FORM = "give (source, destination), a dict or a Connection, with names of nodes"


@dataclass(frozen=True)
class Connection:
    """One LRM connection, from the node `source` to the node `destination`.

    order: "norm-squash-resize", or "resize-norm-squash"; norm: "layer", or "channel"; resize: "bilinear", "bicubic" or
    "area" (see `Modulation`). activation: "relu" or "none" after the modulated destination; "auto": ReLU for vectors
    and channel-first maps, as published, none for tokens and channel-last maps. A pass without a signal has no such
    ReLU. Choose a destination that is rectified anyway (the ReLU after a convolution, not the convolution), or "none";
    with "auto", `add_feedback` warns of other destinations. mode: "multiply", act(y + y Σ m), as published; "add",
    act(y + Σ m), which also reaches units that are silent. In both the block's bias acts where the source is 0.
    init: "random", as published; "identity": the block's projection, weight and bias, starts at zero, so that every
    pass is the model, to the bit. The first gradient of the projection is not zero, and then of the rest is not. There
    "auto" is ReLU only where the destination is rectified anyway, as another ReLU would change the model.
    """

    source: str
    destination: str
    order: str = "norm-squash-resize"
    norm: str = "layer"
    resize: str = "bilinear"
    activation: str = "auto"
    mode: str = "multiply"
    init: str = "random"


def block_name(connection: Connection) -> str:
    """What a connection's block is called among a model's `modulations`."""
    return f"{connection.source}_to_{connection.destination}".replace(".", "_")


def arrow(connection: Connection) -> str:
    """A connection as messages say it."""
    return f"{connection.source} -> {connection.destination}"


# -- as the user gives them -------------------------------------------------------------------------------------------


def read_connections(given: Any) -> list[Connection]:
    """Connections given as pairs, dicts or `Connection`s.

    Raises:
        OptionError: they are something else.
    """
    if isinstance(given, (str, Mapping, Connection)) or not isinstance(given, Iterable):
        raise OptionError(f"connections={given!r}: give a list, of each connection {FORM.removeprefix('give ')}")
    return [_read(one) for one in given]


def _read(given: Any) -> Connection:
    if isinstance(given, Connection):
        return plainly(given)
    try:
        made = Connection(**given) if isinstance(given, Mapping) else Connection(*given)
    except TypeError as error:
        raise OptionError(f"{given!r} is not a connection ({error}): {FORM}") from None
    if not isinstance(made.source, str) or not isinstance(made.destination, str):
        raise OptionError(f"{given!r} is not a connection: {FORM}")
    return made


def plainly(connection: Connection) -> Connection:
    """A connection without what a subclass says of it."""
    return Connection(**{name: getattr(connection, name) for name in Connection.__dataclass_fields__})


# -- what is refused --------------------------------------------------------------------------------------------------


def check_connections(graph: fx.Graph, connections: Sequence[Connection]) -> None:
    """Refuse connections that a graph with shapes cannot have.

    Raises:
        NodeNameError: a name that no node has, or a node that cannot be source or destination.
        OptionError: an option that does not exist, or connections that do not go together.
    """
    reaching = reaching_output(graph)
    ends = [(find_node(graph, one.source), find_node(graph, one.destination)) for one in connections]
    _refuse_repeated(connections, ends)
    for connection, (source, destination) in zip(connections, ends, strict=True):
        _refuse_other_values(connection, source, destination)
        _refuse_other_batches(connection, source, destination)
        _refuse_other_dimensions(connection, source, destination)
        if destination not in reaching:
            raise NodeNameError(
                f"{arrow(connection)}: the model's output does not depend on {connection.destination!r}"
            )
        for name, choices in CHOICES.items():
            if getattr(connection, name) not in choices:
                raise OptionError(
                    f"{name}={getattr(connection, name)!r}: choose one of {', '.join(map(repr, choices))}"
                )
        _refuse_change(connection, destination)
    _refuse_disagreement(connections, [destination for _, destination in ends])
    _refuse_one_block(connections)


def _refuse_repeated(connections: Sequence[Connection], ends: Sequence[tuple[fx.Node, fx.Node]]) -> None:
    for i, connection in enumerate(connections):
        if ends[i] in ends[:i]:
            raise OptionError(f"the connection {arrow(connection)} is given twice")


def _refuse_other_values(connection: Connection, source: fx.Node, destination: fx.Node) -> None:
    for node, role in ((source, "source"), (destination, "destination")):
        if not is_vector_or_map(node):
            raise NodeNameError(f"{arrow(connection)}: the {role} {name_of(node)!r} is not a vector or a map")


def _refuse_other_batches(connection: Connection, source: fx.Node, destination: fx.Node) -> None:
    samples = [spec_of(node).per_sample[0] for node in (source, destination)]
    if 0 in samples or samples[0] != samples[1]:
        node = destination if samples[1] != 1 else source
        what = "is the same for all samples" if 0 in samples else "has several parts of an input in its batch"
        raise NodeNameError(f"{arrow(connection)}: {name_of(node)!r} {what}, and cannot be matched sample by sample")


def _refuse_other_dimensions(connection: Connection, source: fx.Node, destination: fx.Node) -> None:
    onto, positions = (len(layout_of(node).size) for node in (destination, source))
    if not _can_be_resized(source) or (onto and positions and onto != positions):
        raise NodeNameError(
            f"{arrow(connection)}: a source with {positions} dimensions of positions cannot be resized to a "
            f"destination with {onto}: both have the same number, at most three, or one of them is a vector"
        )


def _refuse_change(connection: Connection, destination: fx.Node) -> None:
    if (connection.init, connection.activation) == ("identity", "relu") and not _is_rectified(destination):
        raise OptionError(
            f'{arrow(connection)}: init="identity" is to change nothing, but {connection.destination!r} is not '
            'rectified in the model, and activation="relu" changes it: leave activation= out, or choose a node after a '
            "ReLU"
        )


def _refuse_disagreement(connections: Sequence[Connection], destinations: Sequence[fx.Node]) -> None:
    agreed: dict[tuple[fx.Node, str], str] = {}
    for connection, destination in zip(connections, destinations, strict=True):
        for option, value in (("activation", activation_of(connection, destination)), ("mode", connection.mode)):
            if agreed.setdefault((destination, option), value) != value:
                raise OptionError(f"{arrow(connection)}: connections into one destination must agree on {option}=")


def _refuse_one_block(connections: Sequence[Connection]) -> None:
    named: dict[str, Connection] = {}
    for connection in connections:
        other = named.setdefault(block_name(connection), connection)
        if other is not connection:
            raise OptionError(
                f"{other} and {connection} would both have the block {block_name(connection)!r}: rename a module of "
                "the model"
            )


# -- which nodes may be ends ------------------------------------------------------------------------------------------


def legal_ends(graph: fx.Graph) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes of a graph with shapes that may be sources, and those that may be destinations."""
    ends = {node for node in graph.nodes if is_vector_or_map(node) and spec_of(node).per_sample[0]}
    return {node for node in ends if _can_be_resized(node)}, ends & reaching_output(graph)


def _can_be_resized(node: fx.Node) -> bool:
    """Whether a vector or map has at most three dimensions of positions."""
    return len(spec_of(node).shape) <= 5


# -- in a graph -------------------------------------------------------------------------------------------------------


def make_block(graph: fx.Graph, connection: Connection) -> Modulation:
    """A connection's new block, for the layouts of its ends."""
    source, destination = (layout_of(find_node(graph, name)) for name in (connection.source, connection.destination))
    block = Modulation(source, destination, connection.order, connection.norm, connection.resize)
    if connection.init == "identity":
        for parameter in block.modulation.parameters():
            nn.init.zeros_(parameter)
    return block


def link(graph: fx.Graph, connection: Connection) -> Link:
    """A connection between nodes of a graph."""
    source, destination = find_node(graph, connection.source), find_node(graph, connection.destination)
    block = f"modulations.{block_name(connection)}"
    return Link(source, destination, block, activation_of(connection, destination), connection.mode)


def activation_of(connection: Connection, destination: fx.Node) -> str:
    """ "relu" or "none"; "auto" decides by the destination's layout, and where nothing is to change, by its sign."""
    if connection.activation != "auto":
        return connection.activation
    if connection.init == "identity" and not _is_rectified(destination):
        return "none"
    return "relu" if layout_of(destination).kind in ("vector", "map") else "none"


def _is_rectified(node: fx.Node) -> bool:
    return node in never_negative(node.graph)


# -- what is warned of ------------------------------------------------------------------------------------------------


def new_rectifications(graph: fx.Graph, connections: Iterable[Connection]) -> list[str]:
    """A warning of each destination that only the default activation rectifies, and only where there is a signal."""
    rectified, messages = never_negative(graph), {}
    for connection in connections:
        node = find_node(graph, connection.destination)
        if connection.activation == "auto" and activation_of(connection, node) == "relu" and node not in rectified:
            after = _next_rectified(node, rectified)
            messages[node] = (
                f"the destination {connection.destination!r} is not rectified in the model, but is in every pass that "
                "has a signal, as published, so that such passes also differ from the first by this ReLU. Say "
                'activation="none", or connect to '
                + (f"{name_of(after)!r}, which is rectified" if after else "a node after a ReLU")
                + '; activation="relu" keeps it, without this warning'
            )
    return list(messages.values())


def _next_rectified(node: fx.Node, rectified: set[fx.Node]) -> fx.Node | None:
    """The first rectified node that reads `node`, directly or through norms and the like that nothing else reads."""
    while len(node.users) == 1:
        (node,) = node.users
        if node in rectified:
            return node
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is None or rule.weight:
            return None
    return None
