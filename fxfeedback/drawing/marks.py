"""What boxes, wires and arcs look like.

The colours are Okabe and Ito's, which colour-blind readers tell apart, as they are or as tints and shades of them; and
no two things differ in colour alone.
"""

from collections.abc import Sequence
from xml.etree import ElementTree as ET

from fxfeedback.drawing.boxes import Box
from fxfeedback.drawing.lengths import BAR, HEIGHT, INSET, MARGIN, PAD, PORT, SITE_HEIGHT, WIDTH
from fxfeedback.drawing.parts import Arc, Network
from fxfeedback.drawing.places import Point
from fxfeedback.drawing.read import Drawing
from fxfeedback.drawing.svg import across, add, bent, curve, line, write
from fxfeedback.drawing.text import fitted, fitted_name, short_number, sizes, width_of

INK, FAINT, LINE, EDGE, PAPER, INSIDE = "#1a1a1a", "#555555", "#777777", "#b5b5b5", "#ffffff", "#fafafa"
ANEW, ANEW_EDGE = "#dcf0fb", "#0072B2"  # computed again in a later pass
TD, TD_EDGE = "#f7e8f0", "#a8447c"
FEEDBACK, SKIP, PREDICTION = "#D55E00", "#009E73", "#56B4E9"
TASKS = ("#E69F00", "#0072B2")  # of the two tasks that are shown at a time
ARROWS = (LINE, TD_EDGE, FEEDBACK, SKIP, PREDICTION)
DASHED, DOTTED = "6 4", "2 3"  # skip connections; lateral connections

NAME, SMALL, TINY = 12, 10.5, 10  # sizes of text
FIRST, SECOND = 15, 29  # the lines of text in a box
SQUARE, PITCH, SQUARES = 7, 9, 54  # a pass's mark; from one to the next; room for all
BEHIND = 3  # how far the content of a closed module shows behind it


# -- boxes ------------------------------------------------------------------------------------------------------------


def closed_box(drawing: Drawing, box: Box) -> ET.Element:
    """A node or a closed module, at (0, 0)."""
    passes = drawing.network.passes
    anew = any(number > 1 for node in box.nodes for number in node.computed)
    group = _box(box, description(drawing, box), *((ANEW, ANEW_EDGE) if anew else (PAPER, LINE)))
    pitch = min(PITCH, SQUARES / passes)
    taken = pitch * passes + 4 if passes > 1 else 0
    _first_line(group, box.name, short_number(box.parameters) if box.parameters else "", taken)
    shape = fitted(sizes(box.nodes[-1].shape), 0.6 * WIDTH, SMALL)
    write(group, fitted(box.op, WIDTH - 3 * PAD - width_of(shape, SMALL), SMALL), PAD, SECOND, SMALL, FAINT)
    write(group, shape, WIDTH - PAD, SECOND, SMALL, INK, anchor="end")
    for number in range(1, passes + 1) if passes > 1 else ():
        part = sum(number in node.computed for node in box.nodes) / len(box.nodes)
        square(group, WIDTH - PAD - pitch * (passes - number + 1) + 2, FIRST - 8, part, pitch - 2)
    if box.is_site and drawing.tasks:
        _shares(group, drawing, box)
    return group


def closed_td_box(drawing: Drawing, box: Box) -> ET.Element:
    """Its TD counterpart."""
    roles = box.roles
    group = _box(
        box, f"{box.name}ᵀ, the TD counterpart of {box.name}", TD if "instruction" in roles else PAPER, TD_EDGE
    )
    weights = [shape for node in box.nodes for shape in node.parameters.values() if len(shape) > 1]
    _first_line(group, f"{box.name}ᵀ", drawing.network.feedback[0] if weights else "")
    write(group, roles_in_words(roles), PAD, SECOND, SMALL, FAINT)
    return group


def _box(box: Box, title: str, fill: str, edge: str) -> ET.Element:
    group = ET.Element("g", {"class": "box"})
    add(group, "title").text = title
    look = {"width": WIDTH, "height": SITE_HEIGHT if box.is_site else HEIGHT, "rx": 5, "fill": fill, "stroke": edge}
    if box.inside:  # its content shows behind it
        add(group, "rect", x=BEHIND, y=-BEHIND, **look)
    add(group, "rect", class_="body", **look)
    return group


def _first_line(group: ET.Element, name: str, right: str, taken: float = 0) -> None:
    """A name on the left, and `right` on the right, where `taken` pixels at the edge are in use."""
    room = WIDTH - 2 * PAD - taken - (width_of(right, SMALL) + PAD if right else 0)
    write(group, fitted_name(name, room, NAME), PAD, FIRST, NAME, INK, bold=True)
    write(group, right, WIDTH - PAD - taken, FIRST, SMALL, FAINT, anchor="end")


def square(group: ET.Element, x: float, y: float, part: float, width: float = SQUARE) -> None:
    """A pass's mark, filled in proportion to the nodes that the pass computes anew."""
    add(group, "rect", x=x, y=y, width=width, height=SQUARE, fill=PAPER, stroke=ANEW_EDGE)
    if part:
        add(group, "rect", x=x, y=y, width=width * part, height=SQUARE, fill=ANEW_EDGE)


def _shares(group: ET.Element, drawing: Drawing, box: Box) -> None:
    """The active shares of the first two tasks, and their overlap; the page replaces them where others are chosen."""
    active = drawing.active_in(box)
    assert active is not None, "a gating site has counts"
    for i, colour in enumerate(task_colours(drawing)):
        y, share = 37.5 + 12 * i, active.share(i)
        add(group, "rect", x=PAD, y=y, width=BAR, height=7, fill=PAPER, stroke=LINE, stroke_width=0.5)
        add(group, "rect", x=PAD, y=y, width=BAR * share, height=7, fill=colour, data_share=i)
        write(group, f"{100 * share:.0f} %", PAD + BAR + 6, y + 7, TINY, INK, data_percent=i)
    if len(drawing.tasks) > 1:
        overlap = f"overlap {active.overlap(0, 1):.2f}"
        write(group, overlap, WIDTH - PAD, 50.5, TINY, INK, anchor="end", data_overlap="")


def task_colours(drawing: Drawing) -> tuple[str, ...]:
    """The colours of the tasks that are shown at a time: of two, or of the only one."""
    return TASKS[: len(drawing.tasks)]


def description(drawing: Drawing, box: Box) -> str:
    """A box in words, for its tooltip and for screen readers."""
    last = box.nodes[-1]
    parts = [box.name, box.op if box.inside else last.call]
    parts += [f"output {sizes(last.shape)}"] if last.shape else []
    parts += [f"{short_number(box.parameters)} parameters"] if box.parameters else []
    if drawing.network.passes > 1:
        anew = sorted(set[int]().union(*(node.computed for node in box.nodes)))
        parts.append("computed in pass " + ", ".join(map(str, anew)))
    return "; ".join(parts)


def roles_in_words(roles: frozenset[str]) -> str:
    """The TD passes in words: instruction and error"""
    return " and ".join(sorted(roles, reverse=True))


def frame(box: Box, thinned: bool, width: float = 0, height: float = 0, td: bool = False) -> ET.Element:
    """An open module, at (0, 0); its name stands to the left of where wires leave, its parameters to the right.

    thinned: whether some of its wires are not drawn.
    """
    group = ET.Element("g", {"class": "frame"})
    add(group, "rect", class_="around", width=width, height=height, rx=6, fill=INSIDE, stroke=TD_EDGE if td else EDGE)
    room = MARGIN + PORT / 2 - PAD - INSET
    write(group, fitted_name(f"{box.name}ᵀ" if td else box.name, room, NAME), PAD, FIRST, NAME, INK, bold=True)
    words = ["not all wires"] if thinned else []
    words += [short_number(box.parameters)] if box.parameters and not td else []
    write(group, ", ".join(words), width - PAD, FIRST, SMALL, FAINT, anchor="end")
    return group


def inlet(network: Network, kind: str) -> ET.Element:
    """Where "instruction" or "error" comes from, at (0, 0)."""
    about = "loss gradient at the output"
    if kind == "instruction" and network.instruction:
        head, _ = network.instruction
        about = " → ".join(map(str, head)) if len(head) > 1 else f"a weight for each of {head[0]} outputs"
    group = ET.Element("g", {"class": "inlet"})
    add(group, "rect", class_="body", width=WIDTH, height=HEIGHT, rx=HEIGHT / 2, fill=TD, stroke=TD_EDGE)
    write(group, kind, WIDTH / 2, FIRST, NAME, INK, bold=True, anchor="middle")
    write(group, fitted(about, WIDTH - 2 * INSET, SMALL), WIDTH / 2, SECOND, SMALL, FAINT, anchor="middle")
    return group


# -- lines ------------------------------------------------------------------------------------------------------------


def wire(points: Sequence[Point], arrow: bool, td: bool = False) -> ET.Element:
    """A wire: a box hands a value to another."""
    return line(curve(points), TD_EDGE if td else LINE, arrow)


def arc(points: Sequence[Point], connection: Arc) -> ET.Element:
    """A connection."""
    drawn = line(bent(points), colour_of(connection), True, 2, "none" if connection.feedback else DASHED)
    drawn.set("class", "arc")
    add(drawn, "title").text = f"{connection.number}: {connection.kind} {connection.arrow}; {connection.size}"
    return drawn


def badge(connection: Arc, x: float = 0, y: float = 0) -> ET.Element:
    """A connection's number."""
    group = ET.Element("g", {"transform": f"translate({x:.1f},{y:.1f})"})
    add(group, "circle", r=8.5, fill=PAPER, stroke=colour_of(connection), stroke_width=1.5)
    number = f"{'+' * connection.added}{connection.number}"
    write(group, number, 0, 3.8, SMALL, INK, bold=True, anchor="middle")
    return group


def colour_of(connection: Arc) -> str:
    """The colour of a feedback or skip connection or a prediction."""
    return PREDICTION if connection.predicts else FEEDBACK if connection.feedback else SKIP


def lateral(points: Sequence[Point], free: bool) -> ET.Element:
    """From a site to its counterpart and back."""
    return line(across(points, free), TD_EDGE, dashes=DOTTED)


def inlet_way(points: Sequence[Point]) -> ET.Element:
    """From an inlet to where its TD pass starts: straight down, or in a lane."""
    return line(bent(points) if len(points) == 4 else curve(points), TD_EDGE, True)


# -- what they mean ---------------------------------------------------------------------------------------------------


def legend(drawing: Drawing) -> list[tuple[ET.Element, str]]:
    """Marks with their middle at (10, 0), and what they mean."""
    network = drawing.network
    found: list[tuple[ET.Element, str]] = []
    if network.passes > 1:
        found.append((_square(1), "computed in this pass"))
        found.append((_square(0), "shared with an earlier one"))
        found.append((patch(ANEW, ANEW_EDGE), "computed again"))
    kinds = {connection.kind for connection in network.arcs}
    if "feedback" in kinds:
        found.append((line("M1,0H19", FEEDBACK, width=2), "feedback"))
    if "skip" in kinds:
        found.append((line("M1,0H19", SKIP, width=2, dashes=DASHED), "skip connection"))
    if "prediction" in kinds:
        found.append((line("M1,0H19", PREDICTION, width=2), "prediction of what lies below"))
    added = next((connection for connection in network.arcs if connection.added), None)
    if added:
        found.append((badge(added, 10), "added, and not multiplied"))
    for roles in sorted({node.roles for node in network.nodes.values()} - {frozenset()}, key=len, reverse=True):
        found.append((patch(TD if "instruction" in roles else PAPER, TD_EDGE), f"TD of {roles_in_words(roles)}"))
    if network.instruction:
        found.append((line("M1,0H19", TD_EDGE, width=2, dashes=DOTTED), "lateral: BU and TD gate each other"))
    return found


def _square(part: float) -> ET.Element:
    group = ET.Element("g")
    square(group, 10 - SQUARE / 2, -SQUARE / 2, part)
    return group


def patch(fill: str, edge: str) -> ET.Element:
    """A colour."""
    look = {"x": "3", "y": "-5", "width": "14", "height": "10", "rx": "2"}
    return ET.Element("rect", {**look, "fill": fill, "stroke": edge})
