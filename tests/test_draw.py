"""Pictures: nothing overlaps in them, they are whole files of their kind, and what cannot be drawn is said."""

import bisect
import functools
import html
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
import torchvision
from PIL import Image
from py_mini_racer import MiniRacer
from torch import nn

import fxfeedback
import train_multi_mnist
from fxfeedback.drawing.boxes import Box
from fxfeedback.drawing.marks import Drawing
from fxfeedback.drawing.page import plan_of
from fxfeedback.drawing.picture import picture
from fxfeedback.drawing.places import Rect, Way, place
from fxfeedback.drawing.read import read_drawing
from fxfeedback.errors import InputError, NodeNameError, OptionError, TraceError
from marks import long_but, one_in
from networks import convnet, residual

SVG = "{http://www.w3.org/2000/svg}"
IMAGE = torch.linspace(0, 1, 3 * 224 * 224).reshape(3, 224, 224)


def lrm(model: nn.Module, *connections: tuple[str, str], **options: object) -> nn.Module:
    return fxfeedback.add_feedback(model, connections, **options)


MODELS = {
    "AlexNet lrm3": lambda: read_drawing(fxfeedback.models.alexnet_lrm3(), x=IMAGE),
    "ResNet-50": lambda: read_drawing(lrm(torchvision.models.resnet50(), ("layer4", "layer3.0.conv1"))),
    "ResNet-152": lambda: read_drawing(
        lrm(torchvision.models.resnet152(), ("layer4", "layer3.0.downsample.0"), ("fc", "conv1"))
    ),
    "ViT-B/16": lambda: read_drawing(
        lrm(
            torchvision.models.vit_b_16(),
            ("encoder.layers.encoder_layer_11", "encoder.layers.encoder_layer_5"),
            ("encoder.layers.encoder_layer_2.mlp.0", "encoder.layers.encoder_layer_8.mlp"),
        )
    ),
    "Multi-MNIST": lambda: read_drawing(
        fxfeedback.to_butd(train_multi_mnist.convnet(), n_tasks=2, embedding=50, input_size=(1, 28, 28)),
        tasks={"read the left digit": 0, "read the right digit": 1},
    ),
    "ResNet-18, instructed": lambda: read_drawing(
        fxfeedback.to_butd(torchvision.models.resnet18(), n_tasks=3, weights="separate")
    ),
    "passes that learn": lambda: read_drawing(
        fxfeedback.to_butd(lrm(convnet(), ("8", "4"), ("1", "5"), passes=3, input_size=(2, 6, 6)), input_size=(2, 6, 6))
    ),
    "residual": lambda: read_drawing(
        lrm(residual(), ("head", "conv"), ("relu", "up"), ("squeeze.3", "depthwise"), input_size=(2, 6, 6))
    ),
    "GoogLeNet": lambda: read_drawing(
        lrm(torchvision.models.googlenet(init_weights=False), ("inception5b", "inception4c.branch3.0.conv"))
    ),
    "DenseNet-121": lambda: read_drawing(torchvision.models.densenet121()),
    "LR-ASPP": lambda: read_drawing(torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None)),
}


@functools.cache
def drawing(name: str) -> tuple[Drawing, set[Box]]:
    return MODELS[name]()


def states(name: str) -> Iterator[set[Box]]:
    """Which boxes are open: as at first, all, none, and two at random."""
    made, opened = drawing(name)
    modules = [box for box in made.plan.boxes if box.inside]
    yield from (opened, set(modules), {made.plan.root})
    chance = random.Random(0)
    for _ in range(2):
        yield {made.plan.root, *chance.sample(modules, len(modules) // 2)}


# -- what lies where in an SVG ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Area:
    what: str
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Area", by: float = 0.5) -> bool:
        across = min(self.right, other.right) - max(self.left, other.left)
        return across > by and min(self.bottom, other.bottom) - max(self.top, other.top) > by

    def holds(self, other: "Area") -> bool:
        sides = (other.left - self.left, other.top - self.top, self.right - other.right, self.bottom - other.bottom)
        return min(sides) > -0.5


def elements(root: ET.Element, x: float = 0, y: float = 0) -> Iterator[tuple[ET.Element, float, float]]:
    """Every element that is drawn, and where its own (0, 0) lies."""
    moved = re.fullmatch(r"translate\(([-\d.]+),([-\d.]+)\)", root.get("transform", ""))
    x, y = (x + float(moved[1]), y + float(moved[2])) if moved else (x, y)
    yield root, x, y
    for child in root:
        if child.tag not in (f"{SVG}defs", f"{SVG}title", "defs", "title"):
            yield from elements(child, x, y)


def number(element: ET.Element, name: str) -> float:
    return float(element.get(name, 0))


def area(element: ET.Element, x: float, y: float) -> Area:
    """Of a rectangle, an image, a disc or a text."""
    left, top = x + number(element, "x"), y + number(element, "y")
    if element.tag.endswith("text"):
        width, size = number(element, "textLength"), number(element, "font-size")
        left -= {"start": 0, "middle": width / 2, "end": width}[element.get("text-anchor", "start")]
        return Area(element.text or "", left, top - 0.76 * size, left + width, top + 0.2 * size)
    if element.tag.endswith("circle"):
        r = number(element, "r")
        return Area("disc", x - r, y - r, x + r, y + r)
    return Area(element.tag, left, top, left + number(element, "width"), top + number(element, "height"))


def points_of(path: str) -> list[tuple[float, float]]:
    """Points along a path of M, H, V, C, Q, h."""
    points: list[tuple[float, float]] = []
    for letter, given in re.findall(r"([MHVCQh])([-\d., ]*)", path):
        numbers = [float(value) for value in re.findall(r"-?[\d.]+", given)]
        x, y = points[-1] if points else (0, 0)
        if letter in "CQ":
            corners = [(x, y), *zip(numbers[::2], numbers[1::2], strict=True)]
            points += [_bezier(corners, step / 12) for step in range(1, 13)]
        else:
            end = {"M": numbers, "H": [*numbers, y], "V": [x, *numbers], "h": [x + sum(numbers), y]}[letter]
            steps = 1 if letter == "M" else 60
            points += [(x + (end[0] - x) * i / steps, y + (end[1] - y) * i / steps) for i in range(1, steps + 1)]
    return points


def _bezier(corners: list[tuple[float, float]], t: float) -> tuple[float, float]:
    while len(corners) > 1:
        corners = [(a + (c - a) * t, b + (d - b) * t) for (a, b), (c, d) in itertools.pairwise(corners)]
    return corners[0]


def meeting(areas: list[Area]) -> Iterator[tuple[Area, Area]]:
    """All pairs that meet."""
    above: list[Area] = []
    for one in sorted(areas, key=lambda one: one.top):
        above = [other for other in above if other.bottom > one.top]
        yield from ((one, other) for other in above if one.meets(other))
        above.append(one)


@pytest.mark.parametrize("name", long_but(["AlexNet lrm3", "Multi-MNIST", "residual"], MODELS))
def test_nothing_overlaps(name: str) -> None:
    made, _ = drawing(name)
    for opened in states(name):
        nothing_overlaps(made, opened)


def nothing_overlaps(made: Drawing, opened: set[Box]) -> None:
    """What lies on something else lies inside of it, and no line runs across boxes or labels.

    Only boxes, open modules and the discs of numbers have something inside.
    """
    root = ET.fromstring(ET.tostring(picture(made, opened)))
    found = list(elements(root))
    areas = {kind: [area(*one) for one in found if drawn_as(one[0]) == kind] for kind in KINDS}
    assert areas["box"] and areas["text"] and all(text.right > text.left for text in areas["text"])
    paper = Area("paper", 0, 0, number(root, "width"), number(root, "height"))
    everything = list(itertools.chain(*areas.values()))
    assert [one for one in everything if not paper.holds(one)] == []
    around = {*areas["box"], *areas["frame"], *areas["disc"]}
    for pair in meeting(everything):
        assert any(one in around and one.holds(other) for one, other in (pair, pair[::-1])), pair
    lines = [(x + dx, y + dy) for path, x, y in found for dx, dy in points_of(path.get("d", ""))]
    labels = [text for text in areas["text"] if not any(disc.holds(text) for disc in areas["disc"])]
    assert crossed(lines, [*areas["box"], *areas["image"], *labels]) == set()


KINDS = ("text", "image", "disc", "box", "frame")


def drawn_as(element: ET.Element) -> str | None:
    classes = {"body": "box", "around": "frame"}
    tags = {f"{SVG}text": "text", f"{SVG}image": "image", f"{SVG}circle": "disc"}
    return tags.get(element.tag) or classes.get(element.get("class", ""))


def crossed(points: list[tuple[float, float]], areas: list[Area]) -> set[str]:
    """What has a point inside."""
    points = sorted(points, key=lambda point: point[1])
    heights = [y for _, y in points]
    found = set()
    for one in areas:
        inside = points[bisect.bisect(heights, one.top + 1.5) : bisect.bisect(heights, one.bottom - 1.5)]
        if any(one.left + 1.5 < x < one.right - 1.5 for x, _ in inside):
            found.add(one.what)
    return found


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", long_but(["AlexNet lrm3", "Multi-MNIST", "passes that learn", "residual"], MODELS))
def test_the_page_puts_everything_where_the_picture_has_it(name: str) -> None:
    made, _ = drawing(name)
    with MiniRacer() as engine:  # left open, it may keep the process from ending
        engine.eval((files("fxfeedback.drawing") / "places.js").read_text())
        for opened in states(name):
            plan = plan_of(made, opened)
            call = f"JSON.stringify(place({json.dumps(plan)}, new Set({plan['open']})))"
            assert json.loads(engine.eval(call)) == as_in_the_page(made, opened)


def as_in_the_page(made: Drawing, opened: set[Box]) -> dict[str, object]:
    """What places.py finds, in the form of places.js."""
    number, spots = {box: i for i, box in enumerate(made.plan.boxes)}, place(made.plan, opened)

    def rect(one: Rect) -> dict[str, float]:
        return {"left": one.left, "top": one.top, "right": one.right, "bottom": one.bottom}

    def points(drawn: Way) -> list[list[float]]:
        return [list(point) for point in drawn.points]

    wires: dict[str, list[object]] = {str(number[box]): [] for box in spots.open}
    for box, ways in spots.wires.items():
        for way in ways:
            ends = {"startsAtBox": way.starts_at_box, "endsAtBox": way.ends_at_box}
            wires[str(number[box])].append({"points": points(way), **ends})
    return {
        "closed": {str(number[box]): rect(one) for box, one in spots.closed.items()},
        "open": {str(number[box]): rect(one) for box, one in spots.open.items()},
        "wires": wires,
        "arcs": [{"points": points(drawn), "numberAt": list(drawn.number_at)} for drawn in spots.arcs],
        "laterals": {
            str(number[box]): {"points": points(drawn), "free": drawn.ends_at_box}
            for box, drawn in spots.laterals.items()
        },
        "inlets": {kind: {"rect": rect(one), "points": points(drawn)} for kind, (one, drawn) in spots.inlets.items()},
        "axis": spots.axis,
    }


# -- files ------------------------------------------------------------------------------------------------------------


def instructed() -> nn.Module:
    return fxfeedback.to_butd(train_multi_mnist.convnet(), n_tasks=3, embedding=50, input_size=(1, 28, 28))


def steered() -> nn.Module:
    return lrm(convnet(), ("8", "4"), ("5", "1"), ("10", "9"), input_size=(2, 6, 6))


DRAWN = {
    "plain": lambda path: fxfeedback.draw(residual(), path, input_size=(2, 6, 6)),
    "connections": lambda path: fxfeedback.draw(steered(), path, x=torch.randn(2, 6, 6)),
    "tasks": lambda path: fxfeedback.draw(instructed(), path, tasks={"</script><b>": 2, '"one" & other': 0}),
    "no instructions": lambda path: fxfeedback.draw(no_head(), path),
    "class instructions": lambda path: fxfeedback.draw(
        fxfeedback.to_butd(train_multi_mnist.convnet(), input_size=(1, 28, 28)), path, tasks=[7, 3]
    ),
    "part": lambda path: fxfeedback.draw(nn.Sequential(nn.Identity(), steered()), path, depth=0),
}


@one_in(2)
@pytest.mark.parametrize("case", DRAWN)
def test_svg_and_png_are_whole(case: str, tmp_path: Path) -> None:
    for suffix in ("svg", "png"):
        DRAWN[case](tmp_path / f"it.{suffix}")
    root = ET.parse(tmp_path / "it.svg").getroot()
    with Image.open(tmp_path / "it.png") as image:
        assert image.size == (2 * number(root, "width"), 2 * number(root, "height"))
        assert len(image.convert("RGB").getcolors(10**6) or []) > 20
    assert sorted(file.name for file in tmp_path.iterdir()) == ["it.png", "it.svg"]


class Page(HTMLParser):
    """The tags of a page with their attributes, and its scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.code: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.code.append(data)


@pytest.mark.parametrize("case", DRAWN)
def test_a_page_asks_for_nothing(case: str, tmp_path: Path) -> None:
    """One file, with what it needs inside: no address but of its own parts and data, and a policy that says so."""
    DRAWN[case](tmp_path / "it.html")
    page = Page(tmp_path / "it.html")
    names = {tag for tag, _ in page.tags}
    assert {"svg", "button", "script"} <= names and not names & {"link", "iframe", "object", "embed", "base", "b"}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("src", "href", "action", "srcset") or (value or "").startswith("data:")
            assert not name.startswith("on")
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none';")
    plain = re.sub(r"data:image/png;base64,[\w+/=]+", "", page.text)
    assert not re.search(r"https?:|//\w|url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(|WebSocket", plain)
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_page_folds_opens_and_compares_tasks(tmp_path: Path) -> None:
    """In a real browser: what a click, a key and the task selectors change."""
    model = nn.Sequential(OrderedDict(first=train_multi_mnist.convnet()[:7], then=train_multi_mnist.convnet()[7:]))
    butd = fxfeedback.to_butd(model, n_tasks=3, input_size=(1, 28, 28))
    page = tmp_path / "it.html"
    fxfeedback.draw(butd, page)
    script = """
      const seen = [], look = (id) => seen.push(!byId(id).hasAttribute("display"));
      window.onerror = (message) => seen.push(message);
      const [module] = modules.slice(1), [inside] = boxes[module].inside;
      look(`frame-${module}`);
      look(`box-${inside}`);
      byId(`frame-${module}`).dispatchEvent(new MouseEvent("click"));
      look(`box-${module}`);
      look(`box-${inside}`);
      byId(`box-${module}`).dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
      look(`frame-${module}`);
      byId("fold-all").click();
      look(`td-box-${module}`);
      byId("open-all").click();
      look(`td-wire-${module}-0`);
      const [one, other] = document.querySelectorAll("#tasks select");
      other.value = "2";
      other.dispatchEvent(new Event("change"));
      seen.push([...document.querySelectorAll("#shares tr")].map((row) => [...row.cells].map((c) => c.textContent)));
      byId(`box-${inside}`).focus();
      seen.push(byId("about").textContent);
      document.title = JSON.stringify(seen);
    """
    page.write_text(page.read_text(encoding="utf-8") + f"<script>{script}</script>", encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    run = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60)
    title = re.search(r"<title>(\[.*?)</title>", run.stdout)
    assert title, run.stderr
    *shown, shares, about = json.loads(html.unescape(title[1]))
    assert shown == [True, True, True, False, True, True, True]
    gates = [{name: value > 0 for name, value in butd.eval().counter_neurons(task).items()} for task in (0, 2)]
    for site, *given in shares:
        one, other = (gate[site].flatten().double() for gate in gates)
        overlap = torch.nn.functional.cosine_similarity(one, other, dim=0)
        assert given == [f"{100 * one.mean():.0f} %", f"{100 * other.mean():.0f} %", f"{overlap:.2f}"]
    assert len(shares) == len(gates[0]) == 2
    assert "conv1.weight: 32 × 1 × 5 × 5" in about


# -- what is drawn is so ----------------------------------------------------------------------------------------------


def test_a_node_is_drawn_as_computed_in_the_passes_that_compute_it() -> None:
    model = lrm(convnet(), ("8", "4"), ("5", "1"), passes=3, input_size=(2, 6, 6)).eval()
    network = read_drawing(model)[0].network
    calls = [
        (node.meta["name"], node.meta.get("pass", 1)) for node in model.unrolled().graph.nodes if "name" in node.meta
    ]
    for name, node in network.nodes.items():
        in_graph = {number for found, number in calls if found == name}
        assert node.computed == in_graph, name
    assert network.nodes["0"].computed == {1} and network.nodes["10"].computed == {1, 2, 3}


def test_shares_and_overlaps_are_those_of_the_counter_neurons() -> None:
    """Of a module as of its sites together; with channel gates a channel is one unit."""
    for gating in ("unit", "channel"):
        butd = fxfeedback.to_butd(train_multi_mnist.convnet(), n_tasks=2, input_size=(1, 28, 28), gating=gating).eval()
        made, _ = read_drawing(butd)
        neurons = [butd.counter_neurons(task) for task in (0, 1)]
        parts = [[value > 0 for value in found.values()] for found in neurons]
        if gating == "channel":
            parts = [[part.flatten(2).any(2) if part.ndim > 2 else part for part in found] for found in parts]
        one, other = (torch.cat([part.flatten() for part in found]).double() for found in parts)
        active = made.active_in(made.plan.root)
        assert active and active.units == len(one)
        assert active.share(1) == pytest.approx(other.mean().item())
        expected = torch.nn.functional.cosine_similarity(one, other, dim=0).item()
        assert active.overlap(0, 1) == pytest.approx(expected)


def test_an_effect_is_what_the_readout_reads() -> None:
    """The scales below the maps: of each connection its own modulation, of its ends what the passes hand on."""
    model, x = steered().eval(), torch.randn(1, 2, 6, 6)
    effects = read_drawing(model, x=x)[0].effects
    first, second = model.readout(x, ["8", "4", "5", "1", "10", "9"])

    def strongest(value: torch.Tensor) -> str:
        return f"0 to {value.square().mean(1).sqrt().max():.3g}" if value.ndim > 2 else f"0 to {value.abs().max():.3g}"

    for effect, (source, destination) in zip(effects, [("8", "4"), ("5", "1"), ("10", "9")], strict=True):
        at = second[destination]
        m = at.modulation.mean(1) if at.modulation.ndim > 2 else at.modulation
        both = max(at.before, at.after, key=lambda value: float(strongest(value).split()[-1]))
        scales = [strongest(first[source].value), strongest(both), f"±{m.abs().max():.3g}", strongest(both)]
        assert [one.scale for one in effect.maps] == scales
        assert [one.caption for one in effect.maps] == [
            "source, pass 1",
            "before, pass 2",
            "modulation",
            "after, pass 2",
        ]


class Scaled(nn.Module):
    """Takes its inputs by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.then = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, *, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.then(self.first(x).relu() * scale).relu()


def test_an_effect_on_inputs_that_are_taken_by_keyword_only() -> None:
    example = {"x": torch.zeros(1, 2, 6, 6), "scale": torch.ones(1, 3, 1, 1)}
    model = fxfeedback.add_feedback(Scaled(), [("relu_1", "relu")], example_inputs=example)
    x, scale = torch.randn(2, 6, 6), torch.rand(3, 1, 1)
    (effect,) = read_drawing(model, x=(x, scale))[0].effects
    first, _ = model.eval().readout("relu_1", x=x[None], scale=scale[None])
    strongest = first["relu_1"].value.square().mean(1).sqrt().max()
    assert effect.maps[0].scale == f"0 to {strongest:.3g}"


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_drawing_leaves_the_model_as_it_was(suffix: str, tmp_path: Path) -> None:
    model = instructed().train()
    model.get_submodule("norm2").eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fxfeedback.draw(model, tmp_path / f"it.{suffix}")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# -- mistakes ---------------------------------------------------------------------------------------------------------


class Untraceable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def no_head() -> nn.Module:
    return fxfeedback.to_butd(nn.Sequential(nn.ReLU(), nn.Tanh()), input_size=(4,))


MISTAKES = {
    "suffix": (convnet, "it.jpg", {}, OptionError, r"ends in one of \.svg, \.png, \.html"),
    "no suffix": (convnet, "it", {}, OptionError, "ends in one of"),
    "no folder": (convnet, "nowhere/it.svg", {}, OptionError, "in a directory that exists"),
    "no model": (dict, "it.svg", {}, OptionError, "a dict is not a model"),
    "untraceable": (Untraceable, "it.svg", {"input_size": (3,)}, TraceError, "cannot trace Untraceable"),
    "wrong size": (convnet, "it.svg", {"input_size": (3, 6, 6)}, TraceError, "does not run on an input"),
    "size of its own": (steered, "it.svg", {"input_size": (2, 6, 6)}, OptionError, "for a plain model"),
    "depth": (convnet, "it.svg", {"depth": -1}, OptionError, "number of levels"),
    "x of a plain model": (convnet, "it.svg", {"x": IMAGE, "input_size": (2, 6, 6)}, OptionError, "add_feedback"),
    "x of another size": (steered, "it.svg", {"x": torch.zeros(6)}, InputError, r"has shape \(6,\)"),
    "x of other channels": (steered, "it.svg", {"x": torch.zeros(3, 6, 6)}, InputError, "does not run"),
    "x a file": (steered, "it.svg", {"x": "cat.jpg"}, InputError, "not a str"),
    "x without feedback": (
        lambda: lrm(convnet(), ("8", "4"), passes=1, input_size=(2, 6, 6)),
        "it.svg",
        {"x": torch.zeros(2, 6, 6)},
        OptionError,
        "passes=2",
    ),
    "tasks of a plain model": (convnet, "it.svg", {"tasks": [0]}, OptionError, "to_butd"),
    "tasks without a head": (no_head, "it.svg", {"tasks": [0]}, NodeNameError, "no prediction head"),
    "no task": (instructed, "it.svg", {"tasks": []}, OptionError, "tasks= is empty"),
    "an unknown task": (instructed, "it.svg", {"tasks": [3]}, InputError, "between 0 and 2"),
    "a wrong instruction": (instructed, "it.svg", {"tasks": {"a": torch.zeros(1, 2)}}, InputError, r"\(1, 3\)"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_has_one_clear_error_and_writes_nothing(case: str, tmp_path: Path) -> None:
    make, name, options, error, message = MISTAKES[case]
    with pytest.raises(error, match=message):
        fxfeedback.draw(make(), tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "igraph", None)
    with pytest.raises(ImportError, match=r"pip install 'fxfeedback\[draw\]'"):
        fxfeedback.draw(convnet(), tmp_path / "it.svg")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "separate", "td_learning": "fixed"}, ("fixed weights", "weights of its own")),
        ({"weights": "sign", "td_magnitude": "batch"}, ("signs, batch", "the signs of the same weights")),
        ({"weights": "direct"}, ("direct error", "the error at the logits, broadcast")),
    ],
    ids=str,
)
def test_a_picture_says_what_td_reads(options, said, tmp_path):
    fxfeedback.draw(fxfeedback.to_butd(convnet(), 2, input_size=(2, 6, 6), **options), tmp_path / "picture.svg")
    assert all(words in (tmp_path / "picture.svg").read_text() for words in said)
