"""A network as a page: all boxes as SVG elements, and what the page's scripts need to know to place them."""

import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any
from xml.etree import ElementTree as ET

from fxfeedback.drawing import lengths, marks
from fxfeedback.drawing.boxes import Box
from fxfeedback.drawing.effects import Map
from fxfeedback.drawing.picture import ABOUT_MAPS, summary
from fxfeedback.drawing.read import Drawing
from fxfeedback.drawing.rows import Rows
from fxfeedback.drawing.svg import canvas
from fxfeedback.drawing.text import short_number, sizes


def page(drawing: Drawing, opened: set[Box]) -> str:
    """The page, with these boxes open at first."""
    own = files("fxfeedback.drawing")
    template = Template((own / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(drawing.network.title),
        style=(own / "page.css").read_text(encoding="utf-8"),
        script="".join((own / name).read_text(encoding="utf-8") for name in ("places.js", "page.js")),
        plan=json.dumps(plan_of(drawing, opened), separators=(",", ":")).replace("<", "\\u003c"),
        summary="\n".join(f"<p>{escape(sentence)}</p>" for sentence in summary(drawing)),
        legend="\n".join(f"<li>{_icon(mark)}{escape(meaning)}</li>" for mark, meaning in marks.legend(drawing)),
        picture=_markup(_parts(drawing)),
        tasks=_task_choice(drawing),
        shares=_share_table(drawing),
        effects=_effects(drawing),
    )


# -- what the scripts know --------------------------------------------------------------------------------------------


def plan_of(drawing: Drawing, opened: set[Box]) -> dict[str, Any]:
    """Boxes by their number, outer before inner, with their rows and what is said of them."""
    plan, network, readers = drawing.plan, drawing.network, drawing.network.readers()
    index = {box: i for i, box in enumerate(plan.boxes)}
    return {
        "lengths": lengths.ALL,
        "boxes": [
            {
                "name": box.name,
                "site": box.is_site,
                "td": bool(box.roles),
                "around": index[plan.around[box]] if box in plan.around else None,
                "inside": [index[inner] for inner in box.inside],
                "rows": _rows(plan.rows[box], index) if box.inside else None,
                "about": _about_module(drawing, box) if box.inside else _about_node(drawing, box, readers),
                "active": None if box.inside else _active(drawing, box),
            }
            for box in plan.boxes
        ],
        "open": sorted(index[box] for box in opened),
        "arcs": [
            {"source": index[plan.at[arc.source]], "destination": index[plan.at[arc.destination]], "lane": lane}
            for arc, lane in zip(network.arcs, plan.lanes, strict=True)
        ],
        "inlets": {kind: index[plan.at[node]] for kind, node in plan.inlets.items()},
        "tasks": drawing.tasks,
        "td": network.has_td,
    }


def _rows(rows: Rows, index: dict[Box, int]) -> dict[str, Any]:
    items = [
        {"box": index[item.box] if item.box else None, "row": item.row, "column": item.column, "left": item.left}
        for item in rows.items
    ]
    return {"items": items, "wires": [wire.along for wire in rows.wires], "enter": rows.enter, "leave": rows.leave}


def _active(drawing: Drawing, box: Box) -> dict[str, Any] | None:
    active = drawing.active_in(box)
    return {"units": active.units, "both": active.both.long().tolist()} if active else None


def _about_node(drawing: Drawing, box: Box, readers: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Terms, and under each what is said of a node."""
    (node,), network = box.nodes, drawing.network
    about = [("node", [node.name]), ("op", [node.call]), ("output, without the batch", [sizes(node.shape)])]
    about.append(("parameters", [f"{name}: {sizes(shape) or 1}" for name, shape in node.parameters.items()]))
    if network.passes > 1:
        words = {True: "computed", False: "shared with an earlier pass"}
        passes = range(1, network.passes + 1)
        about.append(("passes", [f"{number}: {words[number in node.computed]}" for number in passes]))
    for arc in network.arcs:
        if node.name in (arc.source, arc.destination):
            about.append((f"{arc.kind} {arc.number}", [arc.arrow, arc.size]))
    roles = [marks.roles_in_words(node.roles)] if node.roles else []
    about.append(("TD", [*roles, *(["a gating site"] if node.site else [])]))
    about += [("reads", list(node.reads)), ("is read by", readers[node.name])]
    return [(term, said) for term, said in about if any(said)]


def _about_module(drawing: Drawing, box: Box) -> list[tuple[str, list[str]]]:
    """Terms, and under each what is said of a module."""
    about = [("module", [box.name or "the model"]), ("class", [box.op])]
    about.append(("output, without the batch", [sizes(box.nodes[-1].shape)]))
    about.append(("parameters", [short_number(box.parameters)]))
    for number in range(1, drawing.network.passes + 1) if drawing.network.passes > 1 else ():
        anew = sum(number in node.computed for node in box.nodes)
        about.append((f"pass {number}", [f"{anew} of {len(box.nodes)} nodes computed"]))
    if drawing.plan.rows[box].thinned:
        about.append(("wires", ["only those that no way through other boxes replaces"]))
    return [(term, said) for term, said in about if any(said)]


# -- markup -----------------------------------------------------------------------------------------------------------


def _markup(element: ET.Element) -> str:
    return ET.tostring(element, encoding="unicode", short_empty_elements=False)


def _icon(mark: ET.Element, left: int = 0) -> str:
    icon = ET.Element("svg", {"width": "20", "height": "20", "viewBox": f"{left} -10 20 20", "aria-hidden": "true"})
    icon.append(mark)
    return _markup(icon)


def _parts(drawing: Drawing) -> ET.Element:
    """All boxes, wires and arcs, hidden and not yet placed, from the background to the foreground."""
    plan, network = drawing.plan, drawing.network
    svg = canvas(0, 0, marks.ARROWS)
    svg.attrib |= {"role": "group", "aria-label": f"The graph of {network.title}"}

    def put(name: str, part: ET.Element) -> ET.Element:
        part.attrib |= {"id": name, "data-part": "", "display": "none"}
        svg.append(part)
        return part

    def label(part: ET.Element, i: int, box: Box, expanded: str) -> None:
        part.attrib |= {"data-box": str(i), "tabindex": "0", "aria-label": marks.description(drawing, box)}
        part.attrib |= {"role": "button", "aria-expanded": expanded} if box.inside else {"role": "img"}

    inner = list(enumerate(plan.boxes))[1:]
    for i, box in inner:
        if box.inside:
            label(put(f"frame-{i}", marks.frame(box, plan.rows[box].thinned)), i, box, expanded="true")
            if box.roles:
                put(f"td-frame-{i}", marks.frame(box, plan.rows[box].thinned, td=True))
    for i, box in enumerate(plan.boxes):
        for j, wire in enumerate(plan.rows[box].wires if box.inside else ()):
            put(f"wire-{i}-{j}", marks.wire([], False))
            if wire.td:
                put(f"td-wire-{i}-{j}", marks.wire([], False, td=True))
    for i, box in inner:
        if box.is_site and box.roles:
            put(f"lateral-{i}", marks.lateral([], True))
    for kind in plan.inlets:
        put(f"way-{kind}", marks.inlet_way([]))
        put(f"inlet-{kind}", marks.inlet(network, kind))
    for i, arc in enumerate(network.arcs):
        put(f"arc-{i}", marks.arc([], arc))
    for i, arc in enumerate(network.arcs):
        put(f"number-{i}", marks.badge(arc))
    for i, box in inner:
        label(put(f"box-{i}", marks.closed_box(drawing, box)), i, box, expanded="false")
        if box.roles:
            put(f"td-box-{i}", marks.closed_td_box(drawing, box))
    return svg


def _task_choice(drawing: Drawing) -> str:
    """A choice of one task, or of two."""
    choices = []
    for i, (words, colour) in enumerate(zip(("open for", "and for"), marks.task_colours(drawing), strict=False)):
        options = "".join(
            f'<option value="{j}"{" selected" if i == j else ""}>{escape(task)}</option>'
            for j, task in enumerate(drawing.tasks)
        )
        swatch = f'<span class="swatch" style="background:{colour}"></span>'
        choices.append(f"<label>{swatch}{words} <select>{options}</select></label>")
    return f'<span id="tasks">{" ".join(choices)}</span>' if choices else ""


def _share_table(drawing: Drawing) -> str:
    """A table of shares and overlaps, which page.js fills."""
    if not drawing.active:
        return ""
    heads = [f'<th scope="col" data-task="{i}"></th>' for i in range(len(drawing.tasks[:2]))]
    heads += ['<th scope="col">overlap</th>'] if len(heads) > 1 else []
    return (
        "<h2>Active shares</h2>\n"
        f'<table><thead><tr><th scope="col">gating site</th>{"".join(heads)}</tr></thead>'
        '<tbody id="shares"></tbody></table>\n'
        '<p class="faint">Overlap: the cosine between the two tasks’ 0/1 vectors of active units.</p>'
    )


def _effects(drawing: Drawing) -> str:
    """What each connection does to the image."""
    if not drawing.effects:
        return ""
    parts = ["<h2>What each connection does to this image</h2>"]
    parts += [_figure(drawing.image, "")] if drawing.image else []
    for effect in drawing.effects:
        arrow = effect.arc.arrow
        parts.append(f"<h3>{_icon(marks.badge(effect.arc), -10)}{escape(arrow)}</h3>")
        parts.append(f'<div class="maps">{"".join(_figure(one, f"{arrow}: ") for one in effect.maps)}</div>')
    return "\n".join([*parts, f'<p class="faint">{escape(ABOUT_MAPS)}</p>'])


def _figure(one: Map, of: str) -> str:
    size = f'width="{one.width}" height="{one.height}"'
    image = f'<img src="{one.uri}" {size} alt="{escape(of + one.caption)}">'
    return f"<figure>{image}<figcaption>{escape(one.caption)}<span>{escape(one.scale)}</span></figcaption></figure>"
