"""A network as an SVG, and the SVG as a PNG."""

import itertools
from collections.abc import Iterable
from xml.etree import ElementTree as ET

import resvg_py

from fxfeedback.drawing import marks
from fxfeedback.drawing.boxes import Box
from fxfeedback.drawing.effects import SIDE, Map
from fxfeedback.drawing.lengths import LANE, MARGIN
from fxfeedback.drawing.marks import FAINT, INK, NAME, SMALL
from fxfeedback.drawing.parts import count
from fxfeedback.drawing.places import Places, Rect, place
from fxfeedback.drawing.read import Drawing
from fxfeedback.drawing.svg import NAMESPACE, add, canvas, write
from fxfeedback.drawing.text import font_file, short_number, width_of, wrapped

ZOOM = 2  # pixels of a PNG per pixel of the SVG
AROUND = 20  # the margin of each part of a picture
LEAST_WIDTH = 380
TITLE, TEXT, HEADING = 18, 11.5, 13  # sizes of text
MARK = 24  # from the start of a mark to the start of its meaning
GAP = 14  # between maps

ABOUT_MAPS = (
    "Activations: the root mean square over channels, dark to bright. Modulation: the mean over channels, blue where "
    "it dampens, orange where it strengthens. Vectors: unit by unit, row after row."
)
"""The caption of the maps of effects."""


def picture(drawing: Drawing, opened: set[Box]) -> ET.Element:
    """The picture with these boxes open."""
    places = place(drawing.plan, opened)
    whole = extent(drawing, places)
    panel, panel_width, panel_height = effects(drawing)
    width = max(whole.width + (AROUND + panel_width if panel_width else 0), LEAST_WIDTH)
    head, head_height = heading(drawing, width)
    top = AROUND + head_height
    root = canvas(width + 2 * AROUND, top + max(whole.height, panel_height) + AROUND, marks.ARROWS)
    root.set("xmlns", NAMESPACE)
    add(root, "title").text = f"{drawing.network.title}, drawn by fxfeedback"
    add(root, "rect", width="100%", height="100%", fill=marks.PAPER)
    put(root, head, AROUND, AROUND)
    put(root, graph(drawing, places), AROUND - whole.left, top - whole.top)
    put(root, panel, 2 * AROUND + whole.width, top)
    return root


def png(root: ET.Element) -> bytes:
    """The picture in pixels."""
    text, fonts = ET.tostring(root, encoding="unicode"), [str(font_file(bold)) for bold in (False, True)]
    return bytes(resvg_py.svg_to_bytes(svg_string=text, font_files=fonts, skip_system_fonts=True, zoom=ZOOM))


def put(group: ET.Element, part: ET.Element, x: float, y: float) -> None:
    """`part` in `group`, with its (0, 0) at (x, y)."""
    part.set("transform", f"translate({x:.1f},{y:.1f})")
    group.append(part)


# -- the graph --------------------------------------------------------------------------------------------------------


def extent(drawing: Drawing, places: Places) -> Rect:
    """The area of the graph with its arcs, TD, and the boxes of instruction and error."""
    root = places.rect(drawing.plan.root)
    left = -LANE * (1 + max(drawing.plan.lanes, default=-1)) - MARGIN
    top = min([root.top, *(box.top for box, _ in places.inlets.values())])
    right = root.right
    if drawing.network.has_td:
        right = root.mirrored(places.axis).right + (2 * LANE if "instruction" in places.inlets else 0)
    return Rect(left, top, right - left, root.bottom - top)


def graph(drawing: Drawing, places: Places) -> ET.Element:
    """BU, TD and the connections, from the background to the foreground."""
    group, plan, axis = ET.Element("g"), drawing.plan, places.axis
    for box, rect in places.open.items():
        if box is not plan.root:
            look = box, plan.rows[box].thinned, rect.width, rect.height
            put(group, marks.frame(*look), rect.left, rect.top)
            if box.roles:
                put(group, marks.frame(*look, td=True), rect.mirrored(axis).left, rect.top)
    for box, ways in places.wires.items():
        for wire, way in zip(plan.rows[box].wires, ways, strict=True):
            group.append(marks.wire(way.points, way.ends_at_box))
            if wire.td:
                points = [(2 * axis - x, y) for x, y in reversed(way.points)]
                group.append(marks.wire(points, way.starts_at_box, td=True))
    group.extend(marks.lateral(way.points, way.ends_at_box) for way in places.laterals.values())
    group.extend(marks.inlet_way(way.points) for _, way in places.inlets.values())
    arcs = list(zip(places.arcs, drawing.network.arcs, strict=True))
    group.extend(marks.arc(way.points, connection) for way, connection in arcs)
    group.extend(marks.badge(connection, *way.number_at) for way, connection in arcs)
    for box, rect in places.closed.items():
        put(group, marks.closed_box(drawing, box), rect.left, rect.top)
        if box.roles:
            put(group, marks.closed_td_box(drawing, box), rect.mirrored(axis).left, rect.top)
    for kind, (rect, _) in places.inlets.items():
        put(group, marks.inlet(drawing.network, kind), rect.left, rect.top)
    return group


# -- what stands above and beside it ----------------------------------------------------------------------------------


def heading(drawing: Drawing, width: float) -> tuple[ET.Element, float]:
    """Title, summary and legend, and how high they are."""
    group, y = ET.Element("g"), 14.0
    write(group, drawing.network.title, 0, y, TITLE, INK, bold=True)
    for text in wrapped(summary(drawing), width, TEXT):
        y += 17
        write(group, text, 0, y, TEXT, INK)
    tasks = [
        (marks.patch(colour, colour), f"open for {task}")
        for task, colour in zip(drawing.tasks[:2], marks.task_colours(drawing), strict=True)
    ]
    x, y = 0.0, y + 22
    for mark, meaning in marks.legend(drawing) + tasks:
        taken = MARK + width_of(meaning, SMALL)
        if x and x + taken > width:
            x, y = 0.0, y + 18
        put(group, mark, x, y - 4)
        write(group, meaning, x + MARK, y, SMALL, FAINT)
        x += taken + 18
    return group, y + 16


def summary(drawing: Drawing) -> list[str]:
    """What the network is, in sentences."""
    network, nodes = drawing.network, drawing.network.nodes.values()
    sentences = [f"{short_number(count(node.parameters for node in nodes))} parameters in {len(nodes)} nodes."]
    if network.arcs:
        blocks = short_number(sum(connection.parameters for connection in network.arcs))
        predict = network.arcs[0].predicts
        arcs = _counted(len(network.arcs), "prediction" if predict else "connection")
        runs = _counted(network.steps, "step") if predict else _counted(network.passes, "pass", "passes")
        sentences.append(f"{arcs} with {blocks} parameters; {runs}.")
    later = range(2, network.passes + 1)
    for anew, group in itertools.groupby(later, lambda number: sum(number in node.computed for node in nodes)):
        first, *more = group
        who = f"Passes {first} to {more[-1]} each compute" if more else f"Pass {first} computes"
        sentences.append(f"{who} {anew} nodes; the others are shared with an earlier pass.")
    if network.has_td:
        sentences.append(f"TD, beside BU, runs the other way on {network.feedback[1]}.")
    if drawing.active:
        units = sum(active.units for active in drawing.active.values())
        sentences.append(f"Instructions gate {units:,} units at {_counted(len(drawing.active), 'site')}.")
        shown = drawing.tasks[:2]
        if len(shown) < drawing.n_tasks:
            sentences.append(f"{len(shown)} of {_counted(drawing.n_tasks, 'task')} shown.")
        if len(shown) > 1:
            sentences.append("Overlap: the cosine between the units that the two open, 1 where they are the same.")
    if network.heads:
        each = ", ".join(map(str, network.heads))
        sentences.append(f"{len(network.heads)} prediction heads, one per task, with {each} outputs.")
    return sentences


def _counted(n: int, one: str, several: str = "") -> str:
    return f"{n} {one if n == 1 else several or one + 's'}"


def effects(drawing: Drawing) -> tuple[ET.Element, float, float]:
    """What each connection does to the image, and how wide and high that is; 0 without an image."""
    group, y, width = ET.Element("g"), 12.0, 4 * SIDE + 3 * GAP
    if not drawing.effects:
        return group, 0, 0
    write(group, "What each connection does to this image", 0, y, HEADING, INK, bold=True)
    if drawing.image:
        y = _maps(group, [drawing.image], y + 14)
    for effect in drawing.effects:
        group.append(marks.badge(effect.arc, 9, y + 16))
        write(group, effect.arc.arrow, MARK, y + 20, NAME, INK, bold=True)
        y = _maps(group, effect.maps, y + 32)
    for text in wrapped([ABOUT_MAPS], width, SMALL):
        y += 15
        write(group, text, 0, y, SMALL, FAINT)
    return group, width, y + 8


def _maps(group: ET.Element, maps: Iterable[Map], y: float) -> float:
    """Maps in a row, with their words below; returns where they end."""
    bottom = y
    for i, one in enumerate(maps):
        x, below = i * (SIDE + GAP), y + one.height
        add(group, "image", x=x, y=y, width=one.width, height=one.height, href=one.uri)
        add(group, "rect", x=x, y=y, width=one.width, height=one.height, fill="none", stroke=marks.EDGE)
        write(group, one.caption, x, below + 14, SMALL, INK)
        write(group, one.scale, x, below + 27, SMALL, FAINT)
        bottom = max(bottom, below + (32 if one.scale else 20))
    return bottom
