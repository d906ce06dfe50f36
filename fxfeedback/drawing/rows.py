"""How the content of a box lies in rows and columns.

This does not depend on which boxes inside are open. igraph's Sugiyama layout orders the items of each row and aligns
them in columns, as if they had no size; places.py then gives every column the width that it needs.
"""

import itertools
from dataclasses import dataclass, field

import igraph
import networkx as nx

from fxfeedback.drawing.boxes import Box
from fxfeedback.drawing.parts import Network

DENSE = 3
"""With more wires per item than this, those are left out that a path through other items replaces."""

APART = 0.001
"""The least distance of two columns, in the units of igraph, which puts neighbouring boxes 1 apart."""

IN, OUT = "in", "out"


@dataclass
class Item:
    """Something in a row: a box, or a place that a wire passes (box None).

    left: the index of the item beside it in its row, or None.
    """

    box: Box | None
    row: int
    column: int = 0
    left: int | None = None


@dataclass
class Wire:
    """What one item hands to another. along: the indices of the items from the bottom up. td: TD goes back along it."""

    along: list[int]
    td: bool


@dataclass
class Rows:
    """The content of a box, bottom to top. enter, leave: the items at its lower and upper edge, if wires cross them."""

    items: list[Item]
    wires: list[Wire] = field(default_factory=list)
    enter: int | None = None
    leave: int | None = None
    thinned: bool = False


def in_rows(box: Box, network: Network, readers: dict[str, list[str]], ends: set[str]) -> Rows:
    """The rows and columns of an open box.

    Args:
        box: with others inside.
        network: of which it is a part.
        readers: node name -> names of the nodes that read it.
        ends: names of nodes at which connections begin or end: their boxes come first in their rows, so that no box
            is between them and the arcs on the left.
    """
    graph = _graph(box, network, readers)
    thinned = graph.number_of_edges() > DENSE * len(graph)
    if thinned:
        reduced = nx.transitive_reduction(graph)
        reduced.add_edges_from((a, b, graph.edges[a, b]) for a, b in reduced.edges)
        graph = reduced
    levels = _levels(box, graph)
    items = {key: Item(key if isinstance(key, Box) else None, level) for key, level in levels.items()}
    index = {key: i for i, key in enumerate(items)}
    rows = Rows(list(items.values()), thinned=thinned)
    for source, target, td in graph.edges(data="td"):
        passed = range(levels[source] + 1, levels[target])
        between = range(len(rows.items), len(rows.items) + len(passed))
        rows.items += [Item(None, level) for level in passed]
        rows.wires.append(Wire([index[source], *between, index[target]], td))
    rows.enter, rows.leave = index.get(IN), index.get(OUT)
    _set_columns(rows, ends)
    return rows


def _graph(box: Box, network: Network, readers: dict[str, list[str]]) -> "nx.DiGraph":
    """Which box inside hands something to which, and whether TD goes back; IN and OUT stand for what lies outside."""
    where: dict[str, Box] = {node.name: inner for inner in box.inside for node in inner.nodes}
    graph = nx.DiGraph()
    graph.add_nodes_from(box.inside)
    for node in box.nodes:
        pairs = [(source, node.name) for source in node.reads]
        pairs += [(node.name, reader) for reader in readers[node.name] if reader not in where]
        for source, target in pairs:
            ends = where.get(source, IN), where.get(target, OUT)
            td = bool(network.nodes[source].roles and network.nodes[target].roles)
            if ends[0] is not ends[1]:
                graph.add_edge(*ends, td=td or (graph.has_edge(*ends) and graph.edges[ends]["td"]))
    return graph


def _levels(box: Box, graph: "nx.DiGraph") -> dict[object, int]:
    """The row of each box, and of IN and OUT below and above all: as low as its sources allow.

    What depends on no input, such as a parameter, is directly below its reader.
    """
    inner = graph.subgraph(box.inside)
    levels: dict[object, int] = {}
    for level, generation in enumerate(nx.topological_generations(inner)):
        levels.update(dict.fromkeys(generation, level))
    inputs = [b for b in box.inside if any(node.op == "input" for node in b.nodes) or graph.has_edge(IN, b)]
    anchored = set(inputs).union(*(nx.descendants(inner, b) for b in inputs))
    for b in reversed(list(nx.topological_sort(inner))):
        above = [levels[reader] for reader in inner.successors(b)]
        if b not in anchored and above:
            levels[b] = min(above) - 1
    if IN in graph:
        levels[IN] = -1
    lowest = min(levels.values())
    levels = {b: level - lowest for b, level in levels.items()}
    if OUT in graph:
        levels[OUT] = max(levels.values()) + 1
    return levels


def _set_columns(rows: Rows, ends: set[str]) -> None:
    """Order the rows and line up the columns."""
    edges = [pair for wire in rows.wires for pair in itertools.pairwise(wire.along)]
    graph = igraph.Graph(len(rows.items), edges, directed=True)
    layout = graph.layout_sugiyama(layers=[item.row for item in rows.items])
    x = [round(point[0], 3) for point in layout.coords[: len(rows.items)]]
    by_row: dict[int, list[int]] = {}
    for i in sorted(range(len(x)), key=x.__getitem__):
        by_row.setdefault(rows.items[i].row, []).append(i)
    for row in by_row.values():
        places = [x[i] for i in row]
        row.sort(key=lambda i: not _has_end(rows.items[i], ends))
        for i, place in zip(row, places, strict=True):
            x[i] = place
        for left, i in itertools.pairwise(row):
            rows.items[i].left = left
            x[i] = max(x[i], x[left] + APART)  # igraph may put two items at one place
    columns = {place: column for column, place in enumerate(sorted(set(x)))}
    for item, place in zip(rows.items, x, strict=True):
        item.column = columns[place]


def _has_end(item: Item, ends: set[str]) -> bool:
    return item.box is not None and any(node.name in ends for node in item.box.nodes)
