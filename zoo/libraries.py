"""Models of other libraries, as they come: Hugging Face, kornia, segmentation_models_pytorch, open_clip, CORnets, timm.

    python zoo/libraries.py [NAME ...]

A row each: the door by which its graph was made; the updates of `fxfeedback.to_butd(model)` against autograd's
gradients in float64, in evaluation and in training mode, as in zoo/learning.py; and a file of two passes with one
connection in ONNX Runtime, as in zoo/export.py. Hugging Face's models are small configurations; nothing is downloaded.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from export import File, attempt, passes
from learning import compare, in_double, unsettle
from library_models import Model, every_model
from models import BATCH, warm_up, without_zeros
from table import Line, Table, command
from torch import nn

import fxfeedback

TABLE = Table(
    "door: what made the graph\n"
    "eval, train: the largest error of an update, relative to its gradient\n"
    "passes: the file's size over the weights', and the largest difference from torch in float64",
    {"door": 8, "eval": 10, "train": 10, "passes": 14},
    "what is wrong",
)


def law(model: Model) -> tuple[nn.Module, str, list[float]]:
    """The plain network, the door by which its graph is made, and the errors in evaluation and in training mode.

    Raises:
        Problem: an update is not the gradient.
    """
    torch.manual_seed(0)
    with in_double():
        plain = without_zeros(model.make()).double()
        plain.eval()  # of some libraries it returns nothing
        x, another = (torch.randn(BATCH, *model.size) for _ in range(2))
        with torch.no_grad():
            plain(x)  # some make tables at their first call
        plain.train()  # and forget what of it holds for one state of the weights
        plain.eval()
        part = fxfeedback.to_butd(copy.deepcopy(plain), example_inputs=(x,))
        unsettle(plain)
        warm_up(plain, another)
        part.load_state_dict(plain.state_dict())
        errors = []
        for mode in (False, True):
            plain.train(mode)
            part.train(mode)
            errors.append(compare(plain, part, x, lambda network: network(x)))
    return plain, part.door, errors


def file_of(plain: nn.Module, model: Model) -> File | str:
    """Two passes of the plain network in ONNX Runtime, or what is wrong."""
    plain.float()
    plain.eval()
    return attempt(lambda: passes(plain, torch.randn(BATCH, *model.size)))


def main(names: Sequence[str], file: Path | None = None) -> int:
    """Print the table; returns how many models are not well."""
    models = dict(every_model())

    def row(name: str, kind: str) -> Line:
        plain, door, errors = law(models[name])
        product = file_of(plain, models[name])
        wrong = product if isinstance(product, str) else ""
        shown = [door, *(f"{error:.1e}" for error in errors), "-" if wrong else str(product)]
        return Line(shown, not wrong, wrong)

    return TABLE.fill(dict.fromkeys(models, ""), names, row, file)


if __name__ == "__main__":
    command(main, "libraries.csv")
