"""Every kind of feedback weights in the classifiers of torchvision: a table, a row per model.

    python zoo/feedback_weights.py [NAME ...]

In float64 and evaluation mode each kind builds and learns: every parameter that backpropagation teaches gets a finite
update. Signs are held against weights of TD's own that are set to them by hand. Dense direct feedback, which needs a
weight to every unit, is left to the tests.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models as zoo
import torch
from learning import TOLERANCE, in_double, unsettle
from models import PARTS, Problem, leaves
from table import Line, Table, command

import fxfeedback

KINDS: dict[str, dict[str, Any]] = {
    "sign": {"weights": "sign"},
    "decay": {"weights": "separate", "td_decay": 0.01},
    "mirror": {"weights": "separate", "td_learning": "weight_mirror"},
    "direct": {"weights": "direct"},
}
TABLE = Table(
    "sign: the largest difference to signs set by hand, relative to the update; the others: how many weights learn",
    {"sign": 10, "decay": 8, "mirror": 8, "direct": 8},
    "what is wrong",
)


def check(name: str, kind: str) -> list[str]:
    """The cells of one row.

    Raises:
        Problem: a parameter gets no update, one that is not finite, or signs differ from those set by hand.
    """
    torch.manual_seed(0)
    model, x = zoo.build(name, kind).double().eval(), zoo.input_of(name, kind)
    unsettle(model)
    taught = learned(fxfeedback.to_butd(model, input_size=x.shape[1:]), x)
    cells = []
    for what, options in KINDS.items():
        butd = fxfeedback.to_butd(model, input_size=x.shape[1:], verify=False, **options)
        found = learned(butd, x)
        for parameter, update in taught.items():
            if update.any() and not (parameter in found and found[parameter].isfinite().all()):
                raise Problem(f"{what}: {parameter} has no finite update")
        if what == "mirror":
            butd.mirror_step(batch=2)
            if not all(v.grad is not None and v.grad.isfinite().all() for v in butd.td_weights.values()):
                raise Problem("mirror: a weight of TD's own has no finite update")
        cells.append(f"{by_hand(butd, found, model, x):.1e}" if what == "sign" else f"{len(butd.td_weights)}")
    return cells


def learned(butd: fxfeedback.BUTD, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The updates of the model's parameters for one output."""
    butd.zero_grad()
    sum((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum() for y in leaves(butd(x))).backward()
    own = {name: p for name, p in butd.named_parameters() if not name.startswith("td_weights.")}
    return {name: p.grad.clone() for name, p in own.items() if p.grad is not None}


def by_hand(butd: fxfeedback.BUTD, found: dict[str, torch.Tensor], model: Any, x: torch.Tensor) -> float:
    """How far updates are from those with TD weights that are set to magnitudes times signs."""
    options = {"weights": "separate", "td_learning": "fixed"}
    other = fxfeedback.to_butd(model, input_size=x.shape[1:], verify=False, **options)
    with torch.no_grad():
        for name, v in other.td_weights.items():
            v.copy_(butd.magnitudes[name] * model.get_parameter(name).sign())
    expected = learned(other, x)
    largest = max(update.abs().max() for update in expected.values())
    error = max(((found[name] - update).abs().max() / largest).item() for name, update in expected.items())
    if not error <= TOLERANCE:
        raise Problem(f"signs are off by {error:.1e} from those set by hand")
    return error


def main(names: Sequence[str], file: Path | None = None) -> int:
    """Print the table; returns how many models are not well."""

    def row(name: str, kind: str) -> Line:
        with in_double():
            return Line(check(name, kind), True)

    return TABLE.fill({name: kind for name, kind in zoo.models() if kind not in PARTS}, names, row, file)


if __name__ == "__main__":
    command(main, "feedback_weights.csv")
