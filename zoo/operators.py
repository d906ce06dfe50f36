"""Every differentiable operator of PyTorch's own tests: do its updates equal autograd's gradients? A row for each.

    python zoo/operators.py [NAME ...]        # a name may end in *

The entries are those of `torch.testing._internal.common_methods_invocations.op_db` that are differentiable in float64,
with samples of their own test inputs, evenly chosen. Each sample is a model in up to two roles:

- parameters: all float64 tensors of the call are parameters, where torch allows it, and others are buffers; the output
  is multiplied by a number of each sample, so that there is a batch;
- input: the first float64 tensor is the model's input. An op is tried batch first if that is its meaning: called on a
  batch, each row of its outputs is what it computes of this row alone. The batch is the tensor with a new leading
  dimension, times a factor per sample; where the op is not defined so, such tensors one after the other along the first
  dimension. An op that is per sample in neither way (a sum over everything, say) is tried on the tensor times the
  batch's mean square.

From the same random state outputs and updates must be those of the plain call, to 1e-9 of the largest gradient. Of an
entry that is exact, the first sample's learner (with the op's forward and its error pass) is exported, and ONNX Runtime
must take the step that torch takes.

Verdicts: exact: all samples in both roles. partly: some exact, others refused. refused: none exact. raw: an error that
is not one of fxfeedback's. WRONG: other numbers than torch's. not tried: torch has no gradient of any sample.
"""

import copy
import functools
import importlib
import inspect
import random
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import onnxruntime
import torch
from models import Problem
from table import Table, command, in_words
from torch import nn
from torch.utils._pytree import tree_flatten
from tqdm import tqdm
from workers import in_workers

import fxfeedback

TOLERANCE = 1e-9
NOISE = 1e-12
"""An update that is off by less than this is rounding: the samples' values are of size 1 to 10."""
BATCH = 3
SAMPLES = 6
ENOUGH = 45.0
"""Seconds after which no further sample of an entry is tried."""
LIMIT = 240.0
"""Seconds after which an entry is given up."""
JOBS = 2

TABLE = Table("", {"verdict": 10, "tried": 8, "exact": 6, "exported": 9}, "reason", first=("operator",))
VERDICTS = ("exact", "partly", "refused", "raw", "WRONG", "not tried")


class Row(NamedTuple):
    """What the table says of an entry: of how many calls so many were exact; whether the first is an ONNX file."""

    verdict: str
    tried: int = 0
    exact: int = 0
    exported: str = "-"
    reason: str = ""


class NoGradient(Exception):
    """Torch itself does not run or does not differentiate the call."""


UNSAFE = (torch._segment_reduce,)
"""Functions that read past the end of tensors whose sizes do not fit: they are not asked whether they take a batch."""


@functools.cache
def entries() -> dict[str, Any]:
    """Name -> the entry, sorted by name: those that torch differentiates in float64."""
    profile = hypothesis.settings.get_current_profile_name()
    tested = importlib.import_module("torch.testing._internal.common_methods_invocations")
    hypothesis.settings.load_profile(profile)  # the import sets one of its own, with fewer examples
    tested.wrapper_set_seed = lambda function, *args, **kwargs: function(*args, **kwargs)  # the seed is set outside
    found = {}
    for op in tested.op_db:
        if torch.double in op.dtypes and op.supports_autograd:
            found[f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name] = op
    return dict(sorted(found.items()))


def samples_of(op: Any, number: int) -> list[Any]:
    """Evenly chosen ones of the entry's samples, always the same."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    every = list(op.sample_inputs("cpu", torch.double, requires_grad=True))
    return [every[i * len(every) // number] for i in range(number)] if len(every) > number else every


# -- a call as a model -------------------------------------------------------------------------------------------------


class Case(nn.Module):
    """A sample's call as a model of one input x (batch, ...) that returns (batch, numbers)."""

    def __init__(self, op: Any, sample: Any, every: bool) -> None:
        """`every`: not only those are parameters that PyTorch's test differentiates, but all float64 tensors."""
        super().__init__()
        self.function, self.process = as_called(op.op), sample.output_process_fn_grad
        self.values, self.structure = tree_flatten((sample.input, sample.args, sample.kwargs))
        self.role, self.several = "parameters", False
        self.wanted: dict[int, torch.dtype] = {}
        self.names: dict[int, str] = {}
        for i, value in enumerate(self.values):
            if isinstance(value, torch.Tensor):
                self.names[i] = f"tensor{i}"
                if value.dtype == torch.double and (every or value.requires_grad):
                    self.register_parameter(self.names[i], nn.Parameter(value.detach().clone()))
                else:
                    self.register_buffer(self.names[i], value.detach().clone())
        self.first = next((i for i, name in self.names.items() if name in self._parameters), None)
        self.eval()

    def outputs(self, first: Any = None) -> Any:
        """What the call returns, with another first tensor."""
        values = list(self.values)
        for i, name in self.names.items():
            values[i] = first if first is not None and i == self.first else getattr(self, name)
        given, args, kwargs = self.structure.unflatten(values)
        return self.process(self.function(given, *args, **kwargs))

    def numbers(self, first: Any = None) -> list[Any]:
        """Its outputs that have a gradient, as real numbers."""
        made = self.outputs(first)
        chosen = made if self.several else [made]
        return [real(chosen[i], dtype) for i, dtype in self.wanted.items()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.role == "batch":
            rows = [y.unsqueeze(-1).flatten(1) for y in self.numbers(x)]
        else:
            first = None if self.role == "parameters" else getattr(self, self.names[self.first]) * x.square().mean()
            rows = [y.flatten()[None] * x.sum(1, keepdim=True) for y in self.numbers(first)]
        return torch.cat(rows, 1) if len(rows) > 1 else rows[0]


def as_called(function: Any) -> Any:
    """A method of tensors in C, which takes nothing but tensors, called as users call it: x.double()."""
    if not inspect.ismethoddescriptor(function):
        return function
    return lambda x, *args, **kwargs: getattr(x, function.__name__)(*args, **kwargs)


def real(y: Any, dtype: torch.dtype) -> Any:
    """In float64, a complex tensor as real and imaginary parts."""
    if dtype.is_complex:
        return torch.view_as_real(torch.resolve_conj(y if dtype == torch.cdouble else y.to(torch.cdouble)))
    return y if dtype == torch.double else y.to(torch.double)


def cases(op: Any, sample: Any) -> Iterator[tuple[Case, torch.Tensor]]:
    """The sample in its roles, with inputs.

    Raises:
        NoGradient: torch does not run or does not differentiate the call.
    """
    try:
        case = Case(op, sample, every := True)
        outputs = case.outputs()
    except Exception:
        try:
            case = Case(op, sample, every := False)
            outputs = case.outputs()
        except Exception as error:
            raise NoGradient(in_words(error)) from error
    if case.first is None:
        raise NoGradient("no float64 tensor has a gradient")
    case.several = isinstance(outputs, (tuple, list))
    every_output = outputs if case.several else [outputs]
    case.wanted = {i: y.dtype for i, y in enumerate(every_output) if has_gradient(y)}
    if not case.wanted:
        raise NoGradient("no output has a gradient")
    factors = torch.tensor([[0.5, 1.5], [1.25, -0.5], [-1.0, 0.25]], dtype=torch.double)
    yield case, factors
    if case.get_parameter(case.names[case.first]).layout != torch.strided:
        return
    other, first = Case(op, sample, every), case.get_parameter(case.names[case.first]).detach()
    other.several, other.wanted = case.several, case.wanted
    scales = torch.tensor([1.0, 0.75, 1.125], dtype=torch.double)
    scaled = [first * scale for scale in scales]
    for x in [torch.stack(scaled), *([torch.cat(scaled)] if first.ndim else [])]:
        if is_per_sample(other, x):
            other.role = "batch"
            yield other, x.clone()
            return
    other.role = "whole"
    yield other, factors


def has_gradient(y: Any) -> bool:
    """Whether an output is a tensor of numbers that torch differentiates."""
    return isinstance(y, torch.Tensor) and y.layout == torch.strided and y.requires_grad


@torch.no_grad()
def is_per_sample(case: Case, x: torch.Tensor) -> bool:
    """Whether the first dimension is a batch: each row of the outputs is what the op computes of this row alone."""
    if x.numel() == 0 or case.function in UNSAFE:
        return False
    try:
        whole, rows = case.numbers(x), [case.numbers(x[i : i + 1]) for i in range(len(x))]
    except Exception:
        return False
    return all(
        y.ndim > 0
        and len(y) == len(x)
        and all(row[k].shape == y[:1].shape for row in rows)
        and torch.allclose(y, torch.cat([row[k] for row in rows]), rtol=1e-9, atol=1e-12, equal_nan=True)
        for k, y in enumerate(whole)
    )


# -- the checks --------------------------------------------------------------------------------------------------------


def learned(model: nn.Module, x: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of a loss that weighs every number of it differently; nothing is zeros."""
    torch.manual_seed(0)
    output = model(x)
    loss = (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)).sum()
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [output, *(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, tensors, strict=True))]


def compare(case: Case, x: torch.Tensor) -> None:
    """One case's output and updates against the plain call's.

    Raises:
        NoGradient: torch itself has none.
        Problem: they differ.
        fxfeedback.Error: it is refused.
    """
    if case.role != "parameters":
        x = x.requires_grad_()
    start = {name: buffer.clone() for name, buffer in case.named_buffers()}
    tensors = [*case.parameters(), *([x] if x.requires_grad else [])]
    try:
        expected = learned(case, x, tensors)
    except Exception as error:
        raise NoGradient(in_words(error)) from error
    case.load_state_dict(start, strict=False)
    found = learned(fxfeedback.to_butd(case, example_inputs=(x.detach()[:1],)), x, tensors)
    largest = max((size_of(t) for t in expected[1:]), default=0.0)
    for what, a, b in zip(("output", *len(tensors) * ("update",)), found, expected, strict=True):
        allowed = TOLERANCE * (size_of(b) if what == "output" else largest) + NOISE
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=allowed, equal_nan=True):
            raise Problem(f"an {what} is off by {(a - b).abs().max():.1e} of {largest:.1e}")


def size_of(tensor: torch.Tensor) -> float:
    """The largest of its finite numbers."""
    return float(tensor[tensor.isfinite()].abs().max()) if tensor.isfinite().any() else 0.0


def exports(case: Case, x: torch.Tensor) -> str:
    """Write the learner of a case in float32, and compare its step with torch's; returns what is wrong."""
    onnxruntime.set_default_logger_severity(4)
    try:
        butd = fxfeedback.to_butd(copy.deepcopy(case).float(), example_inputs=(x.detach()[:1].float(),))
        with tempfile.TemporaryDirectory() as folder:
            fxfeedback.export_learner(butd, Path(folder, "learner.onnx"), loss="mse", instructed=False)
    except Exception as error:
        return essence(error)
    return ""


def check(name: str, number: int = SAMPLES, export: bool = True) -> Row:
    """One entry's row; does not raise."""
    warnings.filterwarnings("ignore")
    op, start = entries()[name], time.monotonic()
    try:
        samples = samples_of(op, number)
    except Exception as error:
        return Row("not tried", reason=essence(error))
    verdicts: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    whole: list[tuple[Case, torch.Tensor]] = []
    for sample in samples:
        if time.monotonic() - start > ENOUGH:
            break
        for verdict, reason, case, x in tried(op, sample):
            verdicts[verdict] += 1
            reasons.setdefault(verdict, reason)
            if verdict == "exact":
                whole.append((case, x))
    return row_of(verdicts, reasons, exports(*whole[0]) if export and whole else None)


def tried(op: Any, sample: Any) -> Iterator[tuple[str, str, Case | None, torch.Tensor | None]]:
    """(verdict, reason, case, its input) of each role of a sample."""
    case, x = None, None
    try:
        for case, x in cases(op, sample):
            verdict, reason = "exact", ""
            try:
                compare(case, x)
            except NoGradient as error:
                verdict, reason = "not tried", essence(error)
            except fxfeedback.Error as error:
                verdict, reason = "refused", f"{case.role}: {essence(error)}"
            except Problem as error:
                verdict, reason = "WRONG", f"{case.role}: {error}"
            except Exception as error:
                verdict, reason = "raw", f"{case.role}: {essence(error)}"
            yield verdict, reason, case, x
    except NoGradient as error:
        yield "not tried", essence(error), case, x


def row_of(verdicts: Counter[str], reasons: dict[str, str], exported: str | None) -> Row:
    """What its cases come to: the worst of them."""
    exact, refused, tried = verdicts["exact"], verdicts["refused"], verdicts.total() - verdicts["not tried"]
    verdict = next((bad for bad in ("WRONG", "raw") if verdicts[bad]), "")
    verdict = verdict or ("not tried" if not tried else "exact" if not refused else "partly" if exact else "refused")
    reason = reasons.get("refused" if verdict == "partly" else verdict, "")
    if exported:
        reason = "; ".join(filter(None, [reason, f"export: {exported}"]))
    return Row(verdict, tried, exact, "-" if exported is None else "no" if exported else "yes", reason)


def essence(error: BaseException) -> str:
    """The essential words of an error, on one line."""
    text = " ".join(str(error).split()).removeprefix("torch.fx cannot trace Case: ") or type(error).__name__
    text = re.sub(r"0x[0-9a-f]+|/\S*/", "", text.split(" (at ")[0])
    origin = "" if isinstance(error, (fxfeedback.Error, NoGradient)) else f"{type(error).__name__}: "
    return f"{origin}{text}"[:160]


# -- the table ---------------------------------------------------------------------------------------------------------


def chosen(names: Sequence[str]) -> list[str]:
    """The entries of these names, a name being whole or ending in *; all where there is none.

    Raises:
        SystemExit: there is no such entry.
    """
    known, found = list(entries()), set()
    for name in names or ["*"]:
        fitting = {one for one in known if one == name or (name.endswith("*") and one.startswith(name[:-1]))}
        if not fitting:
            raise SystemExit(f"PyTorch's tests have no differentiable operator {name}")
        found |= fitting
    return sorted(found)


def main(names: Sequence[str], file: Path | None = None) -> int:
    """Fill the table, and print what is not exact and the counts; returns how many entries are raw or wrong."""
    torch.set_num_threads(1)
    every, names, found = list(entries()), chosen(names), {}
    with tqdm(total=len(names), unit="operator") as progress:
        for name, row, failure in in_workers(check, names, JOBS, LIMIT):
            found[name] = row = row or Row("raw", reason=failure)
            progress.update()
            if row.verdict != "exact":
                progress.write(f"{name:<44}{row.verdict:<10}{row.exact}/{row.tried}  {row.reason}")
            if file is not None:
                TABLE.keep(file, every, [name, *map(str, row), torch.__version__])
    print(summary(found))
    return sum(row.verdict in ("raw", "WRONG") for row in found.values())


def summary(rows: dict[str, Row]) -> str:
    """How many entries have which verdict, and how many are exported."""
    counts = Counter(row.verdict for row in rows.values())
    exported = Counter(row.exported for row in rows.values())
    words = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    return f"{len(rows)} operators: {words}; {exported['yes']} exported, {exported['no']} not"


if __name__ == "__main__":
    command(main, "operators.csv")
