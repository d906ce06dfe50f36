"""Where boxes, wires and arcs lie, for a given set of open boxes.

Lengths are pixels, y points down, and (0, 0) is the upper left corner of the BU graph.

places.js computes the same in the page, where the reader opens and closes boxes; a test holds the two equal. Pictures
do not run the JavaScript: mini-racer, in which the tests run it, takes 80 MB and, where the address space is limited
(`ulimit -v`, common on clusters), aborts the whole Python process instead of raising an exception.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from fxfeedback.drawing import lengths as L
from fxfeedback.drawing.boxes import Box
from fxfeedback.drawing.plan import Plan
from fxfeedback.drawing.rows import Item, Rows

Point = tuple[float, float]


@dataclass(frozen=True)
class Rect:
    """Where something lies."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Its right edge."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.top + self.height

    @property
    def middle(self) -> Point:
        """Its centre."""
        return self.left + self.width / 2, self.top + self.height / 2

    def mirrored(self, axis: float) -> "Rect":
        """Where it lies in the mirror at x = axis."""
        return Rect(2 * axis - self.right, self.top, self.width, self.height)


@dataclass
class Way:
    """A wire, an arc or a lateral connection.

    points: from its start to its end. starts_at_box, ends_at_box: whether nothing lies between these and a visible
    box; only there are arrowheads. number_at: where an arc's number stands.
    """

    points: list[Point]
    starts_at_box: bool = True
    ends_at_box: bool = True
    number_at: Point = (0, 0)


@dataclass
class Places:
    """Where everything lies.

    closed, open: the boxes. wires: of an open box, as in its rows. arcs: as in the network. laterals: box of a site ->
    from it to its TD counterpart. inlets: "error", "instruction" -> the box above TD, and the way from it to where that
    TD pass starts. axis: TD is BU in the mirror at x = axis.
    """

    closed: dict[Box, Rect] = field(default_factory=dict)
    open: dict[Box, Rect] = field(default_factory=dict)
    wires: dict[Box, list[Way]] = field(default_factory=dict)
    arcs: list[Way] = field(default_factory=list)
    laterals: dict[Box, Way] = field(default_factory=dict)
    inlets: dict[str, tuple[Rect, Way]] = field(default_factory=dict)
    axis: float = 0.0

    def rect(self, box: Box) -> Rect:
        """The place of a visible box, open or closed."""
        return self.closed.get(box) or self.open[box]


def place(plan: Plan, opened: set[Box]) -> Places:
    """Where everything lies if these boxes are open."""
    return _Placing(plan, opened).run()


class _Placing:
    """One run of `place`.

    sizes: width and height of each visible box. columns, heights: of an open box, the x of its columns from its left
    edge, and the heights of its rows, the lowest first.
    """

    def __init__(self, plan: Plan, opened: set[Box]) -> None:
        self.plan, self.opened, self.places = plan, opened, Places()
        self.sizes: dict[Box, Point] = {}
        self.columns: dict[Box, list[float]] = {}
        self.heights: dict[Box, list[float]] = {}

    def run(self) -> Places:
        """Sizes from the inside out, places from the outside in, and then the lines between them."""
        width, _ = self.measure(self.plan.root)
        self.places.axis = width + L.LATERAL / 2 - L.MARGIN
        self.put(self.plan.root, 0, 0)
        self.places.wires = {box: self.wires(box) for box in self.places.open}
        self.places.arcs = self.arcs()
        self.places.laterals = self.laterals()
        self.places.inlets = self.inlets()
        return self.places

    # -- sizes, from the inside out

    def measure(self, box: Box) -> Point:
        """Width and height."""
        if box in self.opened:
            self.sizes[box] = self.measure_open(box)
        else:
            self.sizes[box] = L.WIDTH, L.SITE_HEIGHT if box.is_site else L.HEIGHT
        return self.sizes[box]

    def measure_open(self, box: Box) -> Point:
        """Width and height of an open box, and of its columns and rows."""
        rows = self.plan.rows[box]
        sizes = [self.measure_item(rows, i) for i in range(len(rows.items))]
        self.columns[box] = columns = spread(rows, [width for width, _ in sizes])
        self.heights[box] = heights = [0.0] * (1 + max(item.row for item in rows.items))
        for item, (_, height) in zip(rows.items, sizes, strict=True):
            heights[item.row] = max(heights[item.row], height)
        right = max(columns[item.column] + width / 2 for item, (width, _) in zip(rows.items, sizes, strict=True))
        above, below = self.margins(box)
        return right + L.MARGIN, above + sum(heights) + L.GAP_Y * (len(heights) - 1) + below

    def measure_item(self, rows: Rows, i: int) -> Point:
        """Width and height of what lies in a row."""
        box = rows.items[i].box
        if box is not None:
            return self.measure(box)
        return L.PORT if i in (rows.enter, rows.leave) else L.PASSAGE, 0

    def margins(self, box: Box) -> Point:
        """Of an open box, above and below its rows."""
        rows = self.plan.rows[box]
        if box is self.plan.root:
            return 0, 0
        return L.TITLE + (L.GAP_Y if rows.leave is None else 0), L.GAP_Y if rows.enter is None else 0

    # -- places, from the outside in

    def put(self, box: Box, left: float, top: float) -> None:
        """Place a box and what is inside."""
        rect = Rect(left, top, *self.sizes[box])
        if box not in self.opened:
            self.places.closed[box] = rect
            return
        self.places.open[box] = rect
        edges = self.row_edges(box)
        for item in self.plan.rows[box].items:
            if item.box is not None:
                width, height = self.sizes[item.box]
                above, below = edges[item.row]
                self.put(item.box, self.x_of(box, item) - width / 2, (above + below) / 2 - height / 2)

    def row_edges(self, box: Box) -> list[Point]:
        """Upper and lower edge of each row of an open box, the lowest row first."""
        edges = []
        y = self.places.open[box].bottom - self.margins(box)[1]
        for height in self.heights[box]:
            edges.append((y - height, y))
            y -= height + L.GAP_Y
        return edges

    def x_of(self, box: Box, item: Item) -> float:
        """The middle of an item's column in an open box."""
        return self.places.open[box].left + self.columns[box][item.column]

    # -- wires

    def wires(self, box: Box) -> list[Way]:
        """Between the items of an open box: upright through rows, and bending only between these."""
        rows, edges = self.plan.rows[box], self.row_edges(box)
        ways = []
        for wire in rows.wires:
            first, *passed, last = (rows.items[index] for index in wire.along)
            following = passed[0] if passed else last
            points = [*self.leaving(box, first, following, edges)]
            for item in passed:
                above, below = edges[item.row]
                points += [(self.x_of(box, item), below), (self.x_of(box, item), above)]
            points += self.arriving(box, last, points[-1][0], edges)
            ways.append(Way(points, first.box in self.places.closed, last.box in self.places.closed))
        return ways

    def leaving(self, box: Box, first: Item, following: Item, edges: Sequence[Point]) -> list[Point]:
        """A wire's first points: out of a box, or in over the lower edge of the box around."""
        above, below = edges[first.row]
        if first.box is None:
            x = self.x_of(box, first)
            return [(x, below), (x, above)]
        towards = self.x_of(box, following)
        if following.box in self.opened:
            towards = self.attach(following.box, towards, leave=False)
        x = self.attach(first.box, towards, leave=True)
        return [(x, self.places.rect(first.box).top), (x, above)]

    def arriving(self, box: Box, last: Item, x: float, edges: Sequence[Point]) -> list[Point]:
        """A wire's last points: into a box, or out over the upper edge of the box around."""
        above, below = edges[last.row]
        if last.box is None:
            x = self.x_of(box, last)
            return [(x, below), (x, above), (x, self.places.open[box].top)]
        x = self.attach(last.box, x, leave=False)
        return [(x, below), (x, self.places.rect(last.box).bottom)]

    def attach(self, box: Box, x: float, leave: bool) -> float:
        """Where a wire meets a box: at its port if it is open, else as near to x as the box reaches."""
        rect = self.places.rect(box)
        if box not in self.opened:
            return min(max(x, rect.left + L.INSET), rect.right - L.INSET)
        rows = self.plan.rows[box]
        port = rows.leave if leave else rows.enter
        assert port is not None, "a wire ends at a box that takes or gives nothing"
        return self.x_of(box, rows.items[port])

    # -- other ways

    def arcs(self) -> list[Way]:
        """The connections, in lanes to the left of all boxes."""
        pairs = [
            [self.plan.shown(name, self.opened) for name in (arc.source, arc.destination)]
            for arc in self.plan.network.arcs
        ]
        ends: dict[Box, list[tuple[int, int]]] = {}
        for i, pair in enumerate(pairs):
            for side, box in enumerate(pair):
                ends.setdefault(box, []).append((i, side))

        def end(i: int, side: int) -> Point:
            rect, own = self.places.rect(pairs[i][side]), ends[pairs[i][side]]
            return rect.left, rect.middle[1] + L.SPREAD * (own.index((i, side)) - (len(own) - 1) / 2)

        ways = []
        for i, lane in enumerate(self.plan.lanes):
            x, start, stop = -L.LANE * (lane + 1), end(i, 0), end(i, 1)
            ways.append(Way([start, (x, start[1]), (x, stop[1]), stop]))
        crossings = [y for way in ways for y in (way.points[0][1], way.points[-1][1])]
        for way in ways:
            (x, y1), (_, y2) = way.points[1:3]
            candidates = [y1 + (y2 - y1) * part for part in L.NUMBER_AT]
            free = [y for y in candidates if all(abs(y - other) > L.DISC for other in crossings)]
            way.number_at = x, [*free, candidates[0]][0]
        return ways

    def laterals(self) -> dict[Box, Way]:
        """From each site to the right, to TD: all the way if no other box is in it."""
        closed, ways = self.places.closed, {}
        for box, rect in closed.items():
            if box.is_site and box.roles:
                y = rect.middle[1]
                free = not any(other.left >= rect.right and other.top <= y <= other.bottom for other in closed.values())
                ways[box] = Way([(rect.right, y), (2 * self.places.axis - rect.right, y)], free, free)
        return ways

    def inlets(self) -> dict[str, tuple[Rect, Way]]:
        """Error and instruction, one above the other over TD; the instruction goes down to the right of TD."""
        axis, inlets = self.places.axis, {}
        for level, (kind, node) in enumerate(self.plan.inlets.items(), 1):
            target = self.places.rect(self.plan.shown(node, self.opened)).mirrored(axis)
            box = Rect(target.left, -level * (L.HEIGHT + L.GAP_Y), L.WIDTH, L.HEIGHT)
            points = [(box.middle[0], box.bottom), (target.middle[0], target.top)]
            if kind == "instruction":
                (_, y1), (_, y2), x = box.middle, target.middle, 2 * axis + L.LANE
                points = [(box.right, y1), (x, y1), (x, y2), (target.right, y2)]
            inlets[kind] = box, Way(points)
        return inlets


def spread(rows: Rows, widths: Sequence[float]) -> list[float]:
    """The x of each column, such that items of these widths lie side by side in every row."""
    columns = [0.0] * (1 + max(item.column for item in rows.items))
    by_column = sorted(range(len(widths)), key=lambda i: rows.items[i].column)
    for column, group in itertools.groupby(by_column, lambda i: rows.items[i].column):
        least = [columns[column - 1] if column else 0.0]
        for i in group:
            left = rows.items[i].left
            edge = L.MARGIN if left is None else columns[rows.items[left].column] + widths[left] / 2 + L.GAP_X
            least.append(edge + widths[i] / 2)
        columns[column] = max(least)
    return columns
