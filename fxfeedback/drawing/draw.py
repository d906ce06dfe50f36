"""`draw`: a network as a picture, or as a page in which modules fold and open."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import torch
from torch import nn

from fxfeedback.errors import OptionError
from fxfeedback.files import as_path, replace_whole

SUFFIXES = (".svg", ".png", ".html")


def draw(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    x: torch.Tensor | Sequence[torch.Tensor] | None = None,
    tasks: Sequence[int] | Mapping[str, Any] | None = None,
    depth: int | None = None,
    input_size: Sequence[int] | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
) -> None:
    """Draw a network, in evaluation mode, as .svg, .png or .html, by the path's suffix.

    The BU graph runs from the bottom to the top: a box for each node, with its name, op, output shape and number of
    parameters, in boxes of the model's modules, of which a picture shows some closed. Of a model with connections the
    picture shows these as arcs, and of each node the passes that compute it; the others share an earlier one's value.
    Predictions are arrows down to what is predicted.
    Of a BU-TD network it shows the TD graph beside it, what the instruction and the error reach, and at each gating
    site which share of its units two tasks open, and their overlap: the cosine between the two tasks' 0/1 vectors of
    active units. In a page modules fold and open, and any two tasks can be chosen. A page is a single file that
    loads nothing else.

    Args:
        model: what `add_feedback`, `add_prediction` or `to_butd` returned, or a plain model. Of a model of which
            `add_feedback` could rewrite a part, that part is drawn.
        path: the file, which is replaced atomically.
        x: an input (1, C, H, W) or (C, H, W) of a model with connections, or its inputs: the picture then shows what
            each connection does to it in the last pass. Of a batch the first is taken.
        tasks: the tasks that are drawn, as ids or as a dict from names to ids or instruction vectors (1, size); a
            picture shows the first two. Default: the first ten.
        depth: how many levels of modules are open; default as many as stay readable. Those in which a connection begins
            or ends are open in any case.
        input_size: of a plain model, the size of one input without its batch; default 224 by 224 with the first
            convolution's channels.
        example_inputs: instead of input_size, for several inputs: tensors with a batch dimension; a dict gives them by
            name.

    Raises:
        OptionError: a suffix that is not one of these, a directory that does not exist, a model that is not a
            torch.nn.Module, or options that do not apply to it.
        TraceError: torch.fx cannot trace the model, or it does not run at this size.
        InputError: an `x` or a task that the model does not take.
        ImportError: the packages that draw are missing: pip install 'fxfeedback[draw]'.
    """
    path = as_path(path)
    _check_path(path)
    _check_packages()
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"a {type(model).__name__} is not a model: give what add_feedback, add_prediction or to_butd returned, or "
            "a module"
        )
    if depth is not None and (not isinstance(depth, int) or depth < 0):
        raise OptionError(f"depth={depth!r}: give the number of levels of modules that are open")
    from fxfeedback.drawing.page import page
    from fxfeedback.drawing.picture import picture, png
    from fxfeedback.drawing.read import read_drawing

    drawing, opened = read_drawing(model, x, tasks, depth, input_size, example_inputs)
    suffix = path.suffix.lower()
    if suffix == ".html":
        content = page(drawing, opened).encode()
    else:
        svg = picture(drawing, opened)
        content = ET.tostring(svg, encoding="utf-8", xml_declaration=True) if suffix == ".svg" else png(svg)
    _write(path, content)


def _write(path: Path, content: bytes) -> None:
    def write(new: str) -> None:
        Path(new).write_bytes(content)

    replace_whole(path, write)


def _check_path(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"path={str(path)!r}: the file's name ends in one of {', '.join(SUFFIXES)}")
    if path.is_dir() or not path.parent.is_dir():
        raise OptionError(f"path={str(path)!r}: give the name of a file in a directory that exists")


def _check_packages() -> None:
    try:
        import igraph  # noqa: F401
        import matplotlib  # noqa: F401
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: to draw, pip install 'fxfeedback[draw]'") from error
