"""What a drawing needs to know of a network to place its boxes, whichever of them are open."""

from dataclasses import dataclass

from fxfeedback.drawing.boxes import Box
from fxfeedback.drawing.parts import Network
from fxfeedback.drawing.rows import Rows, in_rows


@dataclass
class Plan:
    """A network in boxes and rows.

    boxes: all, outer before inner. rows: of those with others inside. around: the box that one lies in. at: the box of
    a node. lanes: of the arcs. inlets: "error", "instruction" -> the node at which that TD pass starts.
    """

    network: Network
    root: Box
    boxes: list[Box]
    rows: dict[Box, Rows]
    around: dict[Box, Box]
    at: dict[str, Box]
    lanes: list[int]
    inlets: dict[str, str]

    def shown(self, node: str, opened: set[Box]) -> Box:
        """The box in which a node is seen: its own, or the outermost closed one around it."""
        box = found = self.at[node]
        while box in self.around:
            box = self.around[box]
            if box not in opened:
                found = box
        return found


def make_plan(network: Network, root: Box) -> Plan:
    """Rows and columns of all boxes, and a lane for each arc."""
    readers, inlets = network.readers(), _inlets(network)
    ends = {name for arc in network.arcs for name in (arc.source, arc.destination)} | set(inlets.values())
    boxes = list(root.walk())
    return Plan(
        network,
        root,
        boxes,
        rows={box: in_rows(box, network, readers, ends) for box in boxes if box.inside},
        around={inner: box for box in boxes for inner in box.inside},
        at={box.name: box for box in boxes if not box.inside},
        lanes=_lanes(network),
        inlets=inlets,
    )


def _lanes(network: Network) -> list[int]:
    """A lane for each arc: the shortest lies next to the boxes, and none meets another in its lane."""
    order = {name: i for i, name in enumerate(network.nodes)}
    spans = [sorted((order[arc.source], order[arc.destination])) for arc in network.arcs]
    lanes: dict[int, int] = {}
    for i in sorted(range(len(spans)), key=lambda i: spans[i][1] - spans[i][0]):
        taken = {lanes[j] for j in lanes if spans[j][0] <= spans[i][1] and spans[i][0] <= spans[j][1]}
        lanes[i] = next(lane for lane in range(len(spans)) if lane not in taken)
    return [lanes[i] for i in range(len(spans))]


def _inlets(network: Network) -> dict[str, str]:
    crossed = [name for name, node in network.nodes.items() if "error" in node.roles]
    inlets = {"error": crossed[-1]} if crossed else {}
    return inlets | ({"instruction": network.instruction[1]} if network.instruction else {})
