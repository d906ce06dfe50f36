"""What each connection does to an image: its source, and its destination before and after the modulation."""

import base64
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.colors import Colormap, LinearSegmentedColormap
from PIL import Image
from torch import fx

from fxfeedback.drawing.parts import Arc, Network
from fxfeedback.errors import InputError, OptionError
from fxfeedback.graph.layout import layout_of
from fxfeedback.graph.nodes import find_node
from fxfeedback.lrm.feedback_model import FeedbackModel, bottom_up_of
from fxfeedback.tracing.wrapper import example_of, like_of, stand_ins_of

SIDE = 112
"""Pixels of a map's longer side, as it is drawn."""

DAMPENED, STRENGTHENED = "#0072B2", "#D55E00"
"""The colours of negative and positive modulation."""


@dataclass(frozen=True)
class Map:
    """A value as an image: `uri` has its pixels, `width` and `height` their number; `caption` and `scale` are words."""

    caption: str
    scale: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Effect:
    """What one connection does in the last pass, as maps."""

    arc: Arc
    maps: list[Map]


@torch.no_grad()
def read_effects(model: FeedbackModel, network: Network, x: Any) -> tuple[Map | None, list[Effect]]:
    """The image, if it is one, and the effects of all connections on it, in the model's last pass.

    Maps show the root mean square over channels of activations, and the mean over channels of modulations; vectors are
    shown unit by unit, row after row.

    Args:
        model: in evaluation mode.
        network: what is drawn of it.
        x: its input, or a tuple of its inputs in the order of its example's; the first image of a batch is taken.

    Raises:
        InputError: `x` is not an input of this model.
        OptionError: the model makes one pass, in which no feedback acts.
    """
    feedback = any(arc.feedback for arc in network.arcs)
    if model.passes < 2 and feedback:
        raise OptionError("x=: the model makes one pass, and feedback acts from the second on: make it with passes=2")
    inputs = _inputs(model, x)
    graph = bottom_up_of(model).graph
    names = list(dict.fromkeys(name for arc in network.arcs for name in arc.given))
    try:
        args, named = example_of(model).form.fill(inputs)
        passes = model.readout(*args, names, **named)
    except RuntimeError as error:
        shapes = " and ".join(str(tuple(one.shape)) for one in inputs)
        raise InputError(f"x=: the model does not run on an input of size {shapes}: {error}") from error
    return _picture(inputs[0]), [Effect(arc, _maps(model, graph, arc, passes)) for arc in network.arcs]


def _inputs(model: FeedbackModel, x: Any) -> list[torch.Tensor]:
    """One sample of each input, where the model is."""
    given = [x] if isinstance(x, torch.Tensor) else x
    if not isinstance(given, (list, tuple)) or not all(isinstance(one, torch.Tensor) for one in given):
        raise InputError(f"x= is a tensor, or a tuple of the model's inputs, not a {type(x).__name__}")
    like, examples, inputs = like_of(model), stand_ins_of(model), []
    for one, example in itertools.zip_longest(given, examples):
        if one is None or example is None or one.ndim not in (example.ndim, example.ndim - 1):
            sizes = " and ".join(str(tuple(example.shape)) for example in examples)
            shapes = " and ".join(str(tuple(one.shape)) for one in given)
            raise InputError(f"x= has shape {shapes}, and the model takes {sizes}")
        first = one[:1] if one.ndim == example.ndim else one[None]
        inputs.append(first.to(like) if first.is_floating_point() else first.to(like.device))
    return inputs


def _maps(model: FeedbackModel, graph: fx.Graph, arc: Arc, passes: Sequence[dict[str, Any]]) -> list[Map]:
    number, (source_name, destination_name) = len(passes), arc.given
    at_source, at = passes[-2 if arc.feedback else -1][source_name], passes[-1][destination_name]
    m = model.modulation(*arc.given)(at_source.value, at.before).expand_as(at.before)
    source, destination = (find_node(graph, name) for name in arc.given)
    signal, before, after = (
        _rows(node, value.square()).sqrt()
        for node, value in ((source, at_source.value), (destination, at.before), (destination, at.after))
    )
    return [
        _activation(f"source, pass {number - arc.feedback}", signal, _top(signal)),
        _activation(f"before, pass {number}", before, max(_top(before), _top(after))),
        _modulation(_rows(destination, m)),
        _activation(f"after, pass {number}", after, max(_top(before), _top(after))),
    ]


def _rows(node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """The mean over channels, and frames, of a node's value: (rows, columns); a vector's units, padded with NaN."""
    found, _ = layout_of(node).to_map(value.float().cpu())
    if found.ndim > 2:
        flat = found[0].mean(0)
        return flat.reshape(-1, *flat.shape[-2:]).mean(0) if flat.ndim > 1 else flat[None]
    columns = math.ceil(math.sqrt(found.shape[1]))
    padding = found.new_full((-found.shape[1] % columns,), math.nan)
    return torch.cat([found[0], padding]).reshape(-1, columns)


def _top(values: torch.Tensor) -> float:
    return values.nan_to_num().abs().max().item()


# -- pixels -----------------------------------------------------------------------------------------------------------


def _activation(caption: str, values: torch.Tensor, top: float) -> Map:
    return _image(caption, f"0 to {top:.3g}", _pixels(values / (top or 1), "cividis"))


def _modulation(values: torch.Tensor) -> Map:
    top = _top(values)
    colours = LinearSegmentedColormap.from_list("modulation", [DAMPENED, "#ffffff", STRENGTHENED])
    return _image("modulation", f"±{top:.3g}", _pixels(0.5 + values / (2 * top or 1), colours))


def _pixels(values: torch.Tensor, colours: str | Colormap) -> Image.Image:
    """Values 0 to 1 in colours; NaN is transparent."""
    colormap = colormaps[colours] if isinstance(colours, str) else colours
    return Image.fromarray(colormap(values.numpy(), bytes=True), "RGBA")


def _picture(x: torch.Tensor) -> Map | None:
    """The input as a picture, its values stretched to 0 to 255; None if it does not have the shape of an image."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        return None
    values = x[0].float().cpu()
    values = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-12)
    pixels = values.expand(3, -1, -1).permute(1, 2, 0).mul(255).round().byte().numpy()
    return _image("input", "", Image.fromarray(pixels))


def _image(caption: str, scale: str, image: Image.Image) -> Map:
    """The image as a PNG, scaled so that its longer side has `SIDE` pixels."""
    factor = SIDE / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    resized = image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX)
    file = io.BytesIO()
    resized.save(file, "PNG", optimize=True)
    return Map(caption, scale, "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), *size)
