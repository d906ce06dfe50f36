"""Files in half precision of torchvision's classifiers: how far they are from torch in float32, as a table.

    python zoo/half.py [NAME ...]

Two files each, as in zoo/export.py, with dtype="float16": passes, and the instructed network where there is one. Three
samples, each with a task of its own, are compared with torch in float32, relative to the largest output; and so is
torch itself in float16, as a network that was never trained magnifies rounding. Its statistics and heads are those of a
model that has seen data: otherwise its numbers may be smaller than any half.
"""

import copy
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
from fxfeedback.runtime import Session

OTHERS = ("detection", "segmentation", "optical_flow", "video")
WELL = 1e-2
ROUNDING = 2
"""How many times as far off as torch in float16 a file may be that is not well by itself."""
TABLE = Table(
    "for each product: the file's size over the float32 weights'; the largest difference from torch in float32,\n"
    "and that of torch in float16",
    {"passes": 22, "instructed": 22},
    "what is wrong",
)


class Difference(NamedTuple):
    """size: of the file over the weights. file, torch: how far they are from torch in float32."""

    size: float
    file: float
    torch: float

    def __str__(self) -> str:
        return f"{self.size:.2f} {self.file:7.1e} {self.torch:7.1e}"


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
    wanted = outputs(model, x, tasks)
    halves = outputs(copy.deepcopy(model).half(), x.half(), tasks)

    def off(ys: Sequence[np.ndarray]) -> float:
        return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ys, wanted, strict=True))

    return Difference(over, off(found if isinstance(found, list) else [found]), off(halves))


def outputs(model: nn.Module, x: torch.Tensor, tasks: torch.Tensor | None) -> list[np.ndarray]:
    """Of torch."""
    return [y.double().numpy() for y in leaves(model(x) if tasks is None else model(x, tasks))]


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
    far = [cell for cell in cells if isinstance(cell, Difference) and not cell.file <= max(WELL, ROUNDING * cell.torch)]
    shown = [str(cell) if isinstance(cell, Difference) else "-" for cell in (*cells, "-")][:2]
    return Line(shown, not wrong and not far, "; ".join(wrong))


def main(names: Sequence[str], file: Path | None = None) -> int:
    """Print the table; returns how many models are not well."""
    return TABLE.fill({name: kind for name, kind in models() if kind not in OTHERS}, names, row, file)


if __name__ == "__main__":
    command(main, "half.csv")
