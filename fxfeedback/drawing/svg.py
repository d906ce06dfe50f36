"""SVG elements, and lines through points as SVG paths."""

import itertools
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from fxfeedback.drawing.lengths import BEND, STUB
from fxfeedback.drawing.places import Point
from fxfeedback.drawing.text import FAMILY, width_of

NAMESPACE = "http://www.w3.org/2000/svg"


def canvas(width: float, height: float, arrows: Sequence[str]) -> ET.Element:
    """An empty picture with arrowheads of these colours."""
    root = ET.Element("svg", {"font-family": FAMILY, "viewBox": f"0 0 {width:.0f} {height:.0f}"})
    root.attrib |= {"width": f"{width:.0f}", "height": f"{height:.0f}"}
    definitions = add(root, "defs")
    for colour in arrows:
        size = {"viewBox": "0 0 8 8", "markerWidth": 8, "markerHeight": 8, "markerUnits": "userSpaceOnUse"}
        marker = add(definitions, "marker", id=_marker(colour), refX=7, refY=4, orient="auto", **size)
        add(marker, "path", d="M0,0 L8,4 L0,8 Z", fill=colour)
    return root


def _marker(colour: str) -> str:
    return f"arrow-{colour[1:]}"


def add(parent: ET.Element, tag: str, **attributes: object) -> ET.Element:
    """A new element in `parent`; stroke_width stands for stroke-width, class_ for class."""
    spelled = {name.rstrip("_").replace("_", "-"): _spelled(value) for name, value in attributes.items()}
    return ET.SubElement(parent, tag, spelled)


def _spelled(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def write(
    parent: ET.Element,
    text: str,
    x: float,
    y: float,
    size: float,
    fill: str,
    bold: bool = False,
    anchor: str = "start",
    **attributes: object,
) -> None:
    """A text that is as wide as it was measured, whatever font the reader has."""
    if text:
        style = {"font_size": size, "font_weight": "bold" if bold else "normal", "fill": fill, "text_anchor": anchor}
        length = {"textLength": width_of(text, size, bold), "lengthAdjust": "spacingAndGlyphs"}
        add(parent, "text", x=float(x), y=float(y), **style, **length, **attributes).text = text


def line(path: str, colour: str, arrow: bool = False, width: float = 1.3, dashes: str = "none") -> ET.Element:
    """A line; data-arrow has its arrowhead, for the page."""
    style = {"fill": "none", "stroke": colour, "stroke-width": _spelled(width), "stroke-dasharray": dashes}
    head = {"marker-end": f"url(#{_marker(colour)})"} if arrow else {}
    return ET.Element("path", {"d": path, **style, **head, "data-arrow": _marker(colour)})


def curve(points: Sequence[Point]) -> str:
    """A wire: upright through rows, bending between them."""
    path = f"M{points[0][0]:.1f},{points[0][1]:.1f}" if points else ""
    for (x, y), (x2, y2) in itertools.pairwise(points):
        half = (y + y2) / 2
        if abs(x - x2) > 0.1:
            path += f"C{x:.1f},{half:.1f} {x2:.1f},{half:.1f} {x2:.1f},{y2:.1f}"
        elif abs(y - y2) > 0.1:  # an arrowhead on a line without length would have no direction
            path += f"V{y2:.1f}"
    return path


def bent(points: Sequence[Point]) -> str:
    """An arc: from a box to a lane, along it, and to another box, with round corners."""
    if not points:
        return ""
    (x1, y1), (lane, _), _, (x2, y2) = points
    bend = min(BEND, abs(y2 - y1) / 2)
    out, up = (-bend if lane < x1 else bend), (-bend if y2 < y1 else bend)
    return (
        f"M{x1:.1f},{y1:.1f}H{lane - out:.1f}Q{lane:.1f},{y1:.1f} {lane:.1f},{y1 + up:.1f}"
        f"V{y2 - up:.1f}Q{lane:.1f},{y2:.1f} {lane - out:.1f},{y2:.1f}H{x2:.1f}"
    )


def across(points: Sequence[Point], free: bool) -> str:
    """A lateral connection, or its two ends where boxes lie in between."""
    if not points:
        return ""
    (x1, y), (x2, _) = points
    return f"M{x1:.1f},{y:.1f}H{x2:.1f}" if free else f"M{x1:.1f},{y:.1f}h{STUB:.1f}M{x2:.1f},{y:.1f}h{-STUB:.1f}"
