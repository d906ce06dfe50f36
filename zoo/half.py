"""Files in half precision of torchvision's classifiers: how far they are from torch in float32, as a table.

    python zoo/half.py [NAME ...]

Two files each, as in zoo/export.py, with dtype="float16": passes, and the instructed network where there is one. Three
samples are compared, each with a task of its own: with torch in float32, and with torch in float32 whose weights are
rounded as the file's are, as that may open and close other gates. Relative to the largest output; statistics and heads
are those of a model that has seen data, as numbers of a network that was never trained may be smaller than any half.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from export import SAMPLES, TASKS, WARM_UP, butd_of, fed_back, size_over_weights
from learning import HEADS
from models import build, input_of, leaves, models, warm_up
from table import Line, Table, command, in_words
from torch import nn

import fxfeedback
from fxfeedback.deploy.half import Half, rounded
from fxfeedback.runtime import Session

OTHERS = ("detection", "segmentation", "optical_flow", "video")
WELL = 1e-2
"""What is more than this behind rounded weights is not well."""
TABLE = Table(
    "for each product: the file's size over the float32 weights'; the largest difference from torch in float32,\n"
    "and from torch in float32 with the file's rounded weights",
    {"passes": 22, "instructed": 22},
    "what is wrong",
)


class Difference(NamedTuple):
    """size: of the file over the weights. own: from the model in float32. rounded: from that with rounded weights."""

    size: float
    own: float
    rounded: float

    def __str__(self) -> str:
        return f"{self.size:.2f} {self.own:7.1e} {self.rounded:7.1e}"


@torch.no_grad()
def difference(model: nn.Module, size: Sequence[int], tasks: torch.Tensor | None) -> Difference | str:
    """How far the file is from torch; or what is wrong."""
    x = torch.randn(SAMPLES, *size)
    try:
        with tempfile.TemporaryDirectory() as folder:
            fxfeedback.export(model, path := Path(folder, "half.onnx"), dtype="float16", check=False)
            over, found = size_over_weights(path, model), Session(path, "cpu")(x.numpy(), task=tasks)
    except Exception as error:
        return in_words(error)
    found = found if isinstance(found, list) else [found]

    def off(one: nn.Module) -> float:
        wanted = [y.numpy() for y in leaves(one(x) if tasks is None else one(x, tasks))]
        return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, wanted, strict=True))

    return Difference(over, off(model), off(rounded(model, Half("float16", False))))


def row(name: str, kind: str) -> Line:
    """Both products of one model."""
    torch.manual_seed(0)
    model, x = build(name, kind).eval(), input_of(name, kind)
    size = tuple(x.shape[1:])
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    warm_up(model, torch.randn(WARM_UP, *size))
    butd, instructs = butd_of(model, HEADS.get(name), size)
    cells = [difference(fed_back(model, x), size, None)]
    cells += [difference(butd, size, torch.arange(SAMPLES) % TASKS)] if instructs else []
    wrong = [f"{product}: {cell}" for product, cell in zip(TABLE.columns, cells, strict=False) if isinstance(cell, str)]
    far = [cell for cell in cells if isinstance(cell, Difference) and not cell.rounded <= WELL]
    shown = [str(cell) if isinstance(cell, Difference) else "-" for cell in (*cells, "-")][:2]
    return Line(shown, not wrong and not far, "; ".join(wrong))


def main(names: Sequence[str], file: Path | None = None) -> int:
    """Print the table; returns how many models are not well."""
    return TABLE.fill({name: kind for name, kind in models() if kind not in OTHERS}, names, row, file)


if __name__ == "__main__":
    command(main, "half.csv")
