"""Every model of torchvision, and some of timm, in ONNX Runtime: three files each, and a table, one row per model.

    python zoo/export.py [NAME ...]

- passes: the connection of zoo/feedback.py, two passes;
- instructed: the BU-TD network of ten tasks, image and instruction in; where the model has a prediction head;
- learner: a step of SGD in evaluation mode with the loss "mse", of that network, or of the plain one without a head.

Each file is checked by onnx's own checker when it is written. Then ONNX Runtime's CPU provider runs it with one sample
and with three, from the same file, and must compute in float32 what torch computes in float64, relative to the largest
output. The learner's step must be torch's, too, for every parameter relative to the length of its own step, or to a
hundredth of the longest where it is shorter than that. A file is about as large as the weights.

In float32 a unit that sits at zero can fall on either side of its gate, which changes all that is behind it a little.
So a sample whose numbers differ is drawn again: what is wrong stays wrong.

torch.fx cannot trace the detection and optical flow models whole: of them, the part that computes their features. Two
models are tried with fewer blocks, which the row says: whole, they would take more memory than most machines have.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from feedback import connection_in
from learning import HEADS
from models import (
    PARTS,
    SHORTENED,
    Problem,
    build,
    input_of,
    leaves,
    models,
    more_models,
    shorten,
    warm_up,
)
from table import Line, Table, command, in_words
from torch import nn

import fxfeedback
from fxfeedback.errors import NodeNameError, OptionError
from fxfeedback.runtime import Learner, Session

TASKS = 10
SAMPLES = 3
WARM_UP = 32
"""Samples behind a batch norm's statistics: those of two or three make a deep network magnify rounding beyond use."""
TRIES = 6
TOLERANCE = 1e-4
STEP_TOLERANCE = 1e-3
ROUNDING = 3
"""How many times as far from float64 as torch's float32 a number may be: some networks magnify rounding."""
SHORT = 1e-2
"""A parameter's step that is shorter than this part of the longest is judged by that part: the exact step of a bias
before a norm is nothing, and what is left of it is the rounding of terms that are as large as other gradients' are."""

LARGEST = (1.1, 2e6)
"""A file: so many times the weights, and so many bytes for the graph."""


TABLE = Table(
    "for each product: the file's size over the weights', and the largest difference from torch in float64;\n"
    "behind the verdict torch's own difference in float32, where a network magnifies rounding",
    {"passes": 14, "instructed": 14, "learner": 14},
    "what is wrong",
)


class File(NamedTuple):
    """size: bytes over those of the weights; difference: from torch in float64.

    own: how far torch in float32 is from that, where the difference is more than float32 should need.
    """

    size: float
    difference: float
    own: float | None = None

    def __str__(self) -> str:
        return f"{self.size:.2f} {self.difference:7.1e}"


class Row(NamedTuple):
    """What the table says of a model: for every product its file, None where there is no such thing, or the error.

    tried: what was tried of a model that is too large.
    uninstructed: the learner without instructions, where with them even torch's own float32 is far from exact.
    """

    passes: File | str
    instructed: File | str | None
    learner: File | str
    tried: str = ""
    uninstructed: File | str | None = None


Differences = tuple[float, float | None]
"""The last two entries of a `File`."""


# -- the checks --------------------------------------------------------------------------------------------------------


def check(name: str, kind: str) -> Row:
    """Export the products of one model, and compare them with torch."""
    torch.manual_seed(0)
    part, x = build(name, kind).get_submodule(PARTS.get(kind, "")).eval(), input_of(name, kind)
    tried = shorten(part, *SHORTENED[name]) if name in SHORTENED else ""
    size = tuple(x.shape[1:])
    warm_up(part, torch.randn(WARM_UP, *size))
    torch.manual_seed(1)
    butd, instructs = butd_of(part, HEADS.get(name), size)
    row = Row(
        attempt(lambda: passes(part, x)),
        attempt(lambda: instructed(butd, size)) if instructs else None,
        attempt(lambda: learner(butd, size, instructs)),
        tried,
    )
    if instructs and isinstance(row.learner, File) and row.learner.own is not None:
        row = row._replace(uninstructed=attempt(lambda: learner(butd, size, False)))
    return row


def attempt(product: Callable[[], File]) -> File | str:
    """The file, or what is wrong with it."""
    try:
        return product()
    except Exception as error:
        return in_words(error)


def butd_of(part: nn.Module, head: str | None, size: tuple[int, ...]) -> tuple[fxfeedback.BUTD, bool]:
    """The BU-TD network, and whether it takes an instruction."""
    try:
        butd = fxfeedback.to_butd(part, n_tasks=TASKS, head=head, input_size=size).eval()
        butd.counter_neurons(0)
        return butd, True
    except (NodeNameError, OptionError):
        return fxfeedback.to_butd(part, input_size=size).eval(), False


def fed_back(part: nn.Module, x: torch.Tensor) -> fxfeedback.FeedbackModel:
    """The network of two passes with one connection."""
    for ends in ((1 / 4, 0), (0, 0), (1 / 4, 1 / 4), (0, 1 / 2)):
        try:
            return fxfeedback.add_feedback(part, [connection_in(part, x, *ends)], input_size=tuple(x.shape[1:])).eval()
        except NodeNameError as error:  # there a model may have windows or patches in its batch, or one query
            unfit = error
    raise unfit


def passes(part: nn.Module, x: torch.Tensor) -> File:
    """Two passes with one connection."""
    model, size = fed_back(part, x), tuple(x.shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        fxfeedback.export(model, path := Path(folder, "passes.onnx"), check=False)
        session = Session(path, "cpu")
        return File(size_over_weights(path, model), *outputs_differ(model, session, size))


def instructed(butd: fxfeedback.BUTD, size: tuple[int, ...]) -> File:
    """Every sample with an instruction of its own."""
    with tempfile.TemporaryDirectory() as folder:
        fxfeedback.export(butd, path := Path(folder, "instructed.onnx"), check=False)
        session = Session(path, "cpu")
        return File(size_over_weights(path, butd), *outputs_differ(butd, session, size, instructs=True))


def learner(butd: fxfeedback.BUTD, size: tuple[int, ...], instructs: bool) -> File:
    """One step of SGD, of a length that float32 keeps: that of the weights."""
    with tempfile.TemporaryDirectory() as folder:
        fxfeedback.export_learner(
            butd, path := Path(folder, "learner.onnx"), loss="mse", instructed=instructs, check=False
        )
        over, there = size_over_weights(path, butd), Learner(path, "cpu")
    start, exact = there.state_dict(), copy.deepcopy(butd).double()

    def difference(x: torch.Tensor, task: torch.Tensor | None) -> tuple[float, float]:
        target = torch.randn(len(x), *map(int, there.outputs["logits"][1:]))
        updates = updates_of(exact, x.double(), target.double(), task, there.metadata["learns"])
        lr = length(start[name] for name in updates) / length(updates.values())
        there.load_state_dict(start)
        there.step(x, target, task=task, lr=lr)
        new = there.state_dict()
        single = updates_of(butd, x, target, task, there.metadata["learns"])
        steps = {name: np.linalg.norm(update) for name, update in updates.items()}

        def off(found: Mapping[str, np.ndarray]) -> float:
            errors = {name: np.linalg.norm(found[name] - updates[name]) for name in updates}
            return max(float(errors[name] / max(steps[name], SHORT * max(steps.values()))) for name in updates)

        return off({name: (start[name] - new[name]) / lr for name in updates}), off(single)

    return File(over, *least_difference(difference, size, instructs, STEP_TOLERANCE))


def updates_of(
    butd: fxfeedback.BUTD, x: torch.Tensor, target: torch.Tensor, task: torch.Tensor | None, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Parameter name -> its update; the loss is taken at the main output.

    Of every sample twice, which changes no mean: for a single one, torch's backward of batch norm (2.15, on the CPU) is
    wrong where the error, as a transposed sequence of tokens, lies in memory position by position.
    """
    x, target = torch.cat([x, x]), torch.cat([target, target])
    task = task if task is None else torch.cat([task, task])
    butd.zero_grad()
    output = butd(x) if task is None else butd(x, task)
    main = output["out"] if isinstance(output, dict) and "out" in output else leaves(output)[0]
    (main - target).square().mean().backward()
    parameters = dict(butd.named_parameters(remove_duplicate=False))
    missing = [name for name in names if parameters[name].grad is None]
    if missing:
        raise Problem(f"{missing[0]} learns in the file, but has no update in torch")
    return {name: parameters[name].grad.numpy() for name in names}  # type: ignore[union-attr]


def outputs_differ(model: nn.Module, session: Session, size: tuple[int, ...], instructs: bool = False) -> Differences:
    """The largest difference of any output, relative to the largest output."""

    exact = copy.deepcopy(model).double()

    @torch.no_grad()
    def difference(x: torch.Tensor, task: torch.Tensor | None) -> tuple[float, float]:
        wanted, single = (
            [y.numpy() for y in leaves(one(x) if task is None else one(x, task))]
            for one, x in ((exact, x.double()), (model, x))
        )
        found = session(x.numpy(), task=task)
        found = found if isinstance(found, list) else [found]
        if [y.shape for y in found] != [y.shape for y in wanted]:
            raise Problem(f"outputs of {[y.shape for y in found]}, in torch of {[y.shape for y in wanted]}")
        off = [
            max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ys, wanted, strict=True))
            for ys in (found, single)
        ]
        return off[0], off[1]

    return least_difference(difference, size, instructs, TOLERANCE)


Differ = Callable[[torch.Tensor, torch.Tensor | None], tuple[float, float]]
"""Inputs, tasks -> how far the file is from float64, and how far torch is in float32."""


def least_difference(difference: Differ, size: tuple[int, ...], instructs: bool, tolerance: float) -> Differences:
    """The largest of a few samples' differences from float64, one by one and as a batch; each is the best of its tries.

    Args:
        difference: see `Differ`.
        size: of a sample.
        instructs: whether each has a task.
        tolerance: how large a difference may be, or else `ROUNDING` times torch's own.

    Raises:
        Problem: it is too large at every try.
    """

    def is_well(off: float, own: float) -> bool:
        return off <= max(tolerance, ROUNDING * own)  # NaN is not

    samples, found = [], []
    for _ in range(SAMPLES):
        tries: list[tuple[float, float, torch.Tensor, torch.Tensor | None]] = []
        while len(tries) < TRIES and not (tries and tries[-1][0] <= tolerance):
            x, task = torch.randn(1, *size), torch.randint(TASKS, (1,)) if instructs else None
            tries.append((*difference(x, task), x, task))
        off, own, x, task = min(tries, key=lambda one: (not is_well(*one[:2]), np.nan_to_num(one[0], nan=np.inf)))
        samples.append((x, task))
        found.append((1, off, own))
    xs, tasks = zip(*samples, strict=True)
    found.append((SAMPLES, *difference(torch.cat(xs), torch.cat(tasks) if instructs else None)))
    for batch, off, own in found:
        if not is_well(off, own):
            raise Problem(f"numbers are off by {off:.1e} at batch {batch}, torch's by {own:.1e}")
    _, off, own = max(found, key=lambda one: one[1])
    return off, own if off > tolerance else None


def size_over_weights(path: Path, model: nn.Module) -> float:
    """The size of the file over that of the weights.

    Raises:
        Problem: it holds more than these and a graph.
    """
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    if size > LARGEST[0] * weights + LARGEST[1]:
        raise Problem(f"a file of {size / 1e6:.1f} MB for {weights / 1e6:.1f} MB of weights")
    return size / weights


def length(arrays: object) -> float:
    """Of all arrays as one vector."""
    return float(np.sqrt(sum(np.square(a, dtype=np.float64).sum() for a in arrays)))  # type: ignore[attr-defined]


# -- the table ---------------------------------------------------------------------------------------------------------


def main(names: Sequence[str], file: Path | None = None) -> int:
    """Print the table; returns how many models are not well."""

    def row(name: str, kind: str) -> Line:
        products = check(name, kind)
        cells = {product: getattr(products, product) for product in TABLE.columns}
        files = cells | {"learner without instructions": products.uninstructed}
        wrong = [f"{product}: {file}" for product, file in files.items() if isinstance(file, str)]
        magnified = [
            f"{product}: torch itself {file.own:.1e}"
            for product, file in files.items()
            if isinstance(file, File) and file.own is not None
        ]
        if isinstance(products.uninstructed, File):
            magnified.append(f"without instructions {products.uninstructed.difference:.1e}")
        shown = [str(cell) if isinstance(cell, File) else "-" for cell in cells.values()]
        return Line(shown, not wrong, "; ".join(filter(None, [products.tried.removesuffix(": "), *wrong, *magnified])))

    known = [*models(), *(one for one in more_models() if one[1] != "odd")]
    return TABLE.fill(dict(known), names, row, file)


if __name__ == "__main__":
    command(main, "export.csv")
