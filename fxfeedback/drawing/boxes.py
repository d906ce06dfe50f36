"""Nodes in the boxes of their modules, and which boxes are open."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from fxfeedback.drawing.parts import Network, Node, count

MOST_BOXES = 30
"""About how many boxes a picture, in which no reader can open more, shows at most."""

SHORTEST_RUN = 3
"""How many modules of one class must follow each other, at least, to get a box of their own."""

CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")
"""Classes whose modules have little in common, so that several in a row are not a run."""


@dataclass(eq=False)
class Box:
    """A node, or a module with all its nodes; also a run of equal modules, or one part of a module that
    execution leaves and enters again.

    name: qualified, '' for the model. op: a node's op, a module's class. nodes: in execution order. inside: the boxes
    in it, in execution order; none for a node.
    """

    name: str
    op: str
    nodes: list[Node]
    inside: "list[Box]" = field(default_factory=list)
    is_run: bool = False

    @property
    def parameters(self) -> int:
        """How many there are, each counted once."""
        return count(node.parameters for node in self.nodes)

    @property
    def is_site(self) -> bool:
        """Whether it has gating sites."""
        return any(node.site for node in self.nodes)

    @property
    def roles(self) -> frozenset[str]:
        """The TD passes that cross it."""
        return frozenset[str]().union(*(node.roles for node in self.nodes))

    def walk(self) -> "Iterator[Box]":
        """This box and all inside, outer before inner."""
        yield self
        for box in self.inside:
            yield from box.walk()


def in_boxes(network: Network) -> Box:
    """The box of the whole model.

    Nodes that run one after the other in a module lie in its box. A module with a single node has no box of its own,
    and the box of a module that holds only another module has the content of that one.
    """
    named = {name for arc in network.arcs for name in (arc.source, arc.destination)}
    nodes = list(network.nodes.values())
    return Box("", network.title, nodes, _inside(nodes, "", network, named))


def _inside(nodes: Sequence[Node], path: str, network: Network, named: set[str]) -> list[Box]:
    boxes = []
    for child, group in itertools.groupby(nodes, lambda node: _child(node.module, path)):
        own = list(group)
        if child is None or len(own) == 1:
            boxes += [Box(node.name, node.op, [node]) for node in own]
        else:
            inside = _inside(own, child, network, named)
            if len(inside) == 1:
                inside = inside[0].inside
            boxes.append(Box(child, network.classes.get(child, ""), own, inside))
    return _runs(boxes, named)


def _child(module: str, path: str) -> str | None:
    """The child of module `path` that `module` is or lies in; None if `module` is `path`."""
    prefix = f"{path}." if path else ""
    child = module.removeprefix(prefix).partition(".")[0]
    return None if module == path else prefix + child


def _runs(boxes: Sequence[Box], named: set[str]) -> list[Box]:
    """The same boxes, but modules of one class that follow each other are in one box if no connection ends in them."""
    runs: list[list[Box]] = []
    for box in boxes:
        if runs and _continues(box, runs[-1], named):
            runs[-1].append(box)
        else:
            runs.append([box])
    found = []
    for run in runs:
        if SHORTEST_RUN <= len(run) < len(boxes):
            nodes = [node for box in run for node in box.nodes]
            found.append(Box(_run_name(run), f"{len(run)} × {run[0].op}", nodes, run, is_run=True))
        else:
            found += run
    return found


def _continues(box: Box, run: Sequence[Box], named: set[str]) -> bool:
    """Whether a box continues a run: it is like the others and reads nothing but these."""
    within = {node.name for other in (*run, box) for node in other.nodes}
    alike = box.op == run[-1].op not in CONTAINERS and bool(box.inside and run[-1].inside)
    ends = any(node.name in named for other in (run[-1], box) for node in other.nodes)
    return alike and not ends and all(source in within for node in box.nodes for source in node.reads)


def _run_name(run: Sequence[Box]) -> str:
    """The name of a run, from its first module to its last: layer3.1 – 5"""
    first, last = run[0].name, run[-1].name
    pairs = enumerate(zip(first, last, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), len(first))
    return f"{first} – {last[len(last[:same].rstrip('0123456789')) :]}"


# -- open or not ------------------------------------------------------------------------------------------------------


def open_at_first(root: Box, network: Network, depth: int | None) -> set[Box]:
    """The boxes that are open at first.

    These are the boxes in which a connection begins or ends, except at their last node, which a closed box stands for,
    and all boxes down to `depth` levels of modules. None: as many levels as keep about `MOST_BOXES` boxes in sight.
    """
    ends = {name for arc in network.arcs for name in (arc.source, arc.destination)}
    needed = {root, *_around(root, lambda box: any(node.name in ends for node in box.nodes[:-1]))}
    if depth is not None:
        return needed | _levels(root, depth)
    for levels in itertools.count(1):
        more = needed | _levels(root, levels)
        if more == needed or len(visible(root, more)) > MOST_BOXES:
            return needed
        needed = more
    raise AssertionError


def _around(box: Box, wanted: Callable[[Box], bool]) -> set[Box]:
    """The box, and those inside for which, and for every box between, `wanted` is true."""
    return {box}.union(*(_around(inner, wanted) for inner in box.inside if inner.inside and wanted(inner)))


def _levels(box: Box, depth: int) -> set[Box]:
    """The boxes down to a depth; a run stays closed."""
    if depth == 0:
        return {box}
    return {box}.union(*(_levels(inner, depth - 1) for inner in box.inside if inner.inside and not inner.is_run))


def visible(root: Box, opened: set[Box]) -> list[Box]:
    """The boxes that are drawn closed, and the nodes in open ones."""
    if root not in opened:
        return [root]
    return [box for inner in root.inside for box in visible(inner, opened)]
