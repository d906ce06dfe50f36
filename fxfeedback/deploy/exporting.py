"""A program through torch's exporter, which hands on where each ONNX node comes from."""

import contextlib
import functools
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfeedback.deploy.free_sizes import FREE_SIZES
from fxfeedback.deploy.program import Program, leaves
from fxfeedback.errors import ExportError, first_line
from fxfeedback.graph.structures import plain
from fxfeedback.rules.draws import DROPOUTS

STEPS = "fxfeedback_steps"
"""Where the steps lie among the modules of what is exported; the exporter hands on `fxfeedback_steps.NUMBER`."""


def label_of(said: str, labels: Sequence[str]) -> str:
    """The label of the step that torch's exporter names in a node's metadata, or nothing where it names none."""
    step = re.search(rf"{STEPS}\.(\d+)", said)
    return labels[int(step[1])] if step else ""


class _Step(nn.Module):
    """One node as a module of its own: its place among the modules is what the exporter hands on of its name."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "function", function)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)  # type: ignore[operator]


@dataclass
class _Record:
    """What a run of the program leaves; torch.export puts attributes of a module back.

    at: label of the node that runs; outputs: names of what was returned.
    """

    at: str = ""
    outputs: list[str] = field(default_factory=list)


class _Runner(nn.Module):
    """Runs a program node by node. Its names leave the model's own, which it takes over, free."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        root = program.root
        self._parameters, self._buffers, self._modules = (
            dict(root._parameters),
            dict(root._buffers),
            dict(root._modules),
        )
        self.fxfeedback_program, self.fxfeedback_record = program, _Record()
        steps: dict[fx.Node, _Step] = {}
        for node in program.graph.nodes:
            if node.op in ("call_function", "call_module", "call_method"):
                steps[node] = _Step(self._function(node))
        self.fxfeedback_step_of = steps
        self._modules[STEPS] = nn.ModuleList(steps.values())
        self.fxfeedback_labels = [program.labels.get(node, node.name) for node in steps]

    def _function(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_module":
            return self.fxfeedback_program.root.get_submodule(str(node.target))
        if node.op == "call_method":
            return functools.partial(_call_method, str(node.target))
        return WITH_A_FORM.get(node.target, node.target)  # type: ignore[arg-type, return-value]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        program, record = self.fxfeedback_program, self.fxfeedback_record
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = program.fetch(str(node.target))
            elif node.op == "output":
                named = list(leaves(program.output, fx.map_arg(node.args[0], values.__getitem__)))
            else:
                record.at = program.labels.get(node, node.name)
                args, kwargs = plain(fx.map_arg((node.args, node.kwargs), values.__getitem__))
                values[node] = self.fxfeedback_step_of[node](*args, **kwargs)
        record.at = ""
        record.outputs = [name for name, _ in named]
        return tuple(value.clone() for _, value in named)  # passes may share a value, and a file's outputs are distinct


def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *options: Any, **named: Any) -> Any:
    """F.scaled_dot_product_attention of any number of dimensions: torch's exporter takes four."""
    if query.ndim == 4:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *options, **named)
    rows = query.shape[:-2]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*rows, *attn_mask.shape[-2:]).reshape(-1, 1, *attn_mask.shape[-2:])
    query, key, value = (each.reshape(-1, 1, *each.shape[-2:]) for each in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask, *options, **named).reshape(
        *rows, *query.shape[-2:-1], -1
    )


def _dropout(input: torch.Tensor, p: float, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Dropout in training mode, as random numbers: ONNX Runtime leaves out a Dropout that is on."""
    kept = torch.rand_like(input) >= p
    return input * kept * (1 / (1 - p) if p < 1 else 0.0), kept


WITH_A_FORM: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys(DROPOUTS, _dropout),
}
"""Function -> the same in ops that torch's exporter can take."""


def _call_method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)


def to_onnx(program: Program, dynamic_batch: bool, opset: int | None) -> tuple[Any, list[str], list[str]]:
    """The program as torch's exporter makes it, an `onnx_ir.Model`; labels of its steps; names of its outputs.

    opset: of the standard ONNX domain; None: the exporter's own.
    """
    runner = _Runner(program).eval()
    batch = 2 if dynamic_batch else 1  # what is exported with 1 is special to 1
    device = next((t.device for t in program.root.parameters()), torch.device("cpu"))
    examples = tuple(
        torch.zeros((batch, *i.example.shape[1:]) if i.batch else i.example.shape, dtype=i.example.dtype, device=device)
        for i in program.inputs
    )
    free, any_size = torch.export.Dim("batch"), torch.export.Dim.DYNAMIC
    shapes = tuple(
        ({0: free} if i.batch and dynamic_batch else {})
        | {dim: any_size for dim in range(2, i.example.ndim) if i.any_size}
        for i in program.inputs
    )
    with _quiet():
        try:
            exported = torch.export.export(runner, examples, dynamic_shapes=(shapes,), strict=False)
        except Exception as error:
            where = f" at {runner.fxfeedback_record.at!r}" if runner.fxfeedback_record.at else ""
            options = {"dynamic_batch": dynamic_batch, "dynamic_size": any(i.any_size for i in program.inputs)}
            hint = "".join(f"; {option}=False fixes it" for option, on in options.items() if on)
            raise ExportError(f"torch.export cannot take the model{where}: {first_line(error)}{hint}") from error
        names = [i.name for i in program.inputs]
        try:
            if any(i.any_size for i in program.inputs):
                exported = exported.run_decompositions(FREE_SIZES)
            made = torch.onnx.export(
                exported,
                (),
                input_names=names,
                output_names=runner.fxfeedback_record.outputs,
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(_no_onnx_form(error, runner.fxfeedback_labels)) from error
    return made.model, runner.fxfeedback_labels, runner.fxfeedback_record.outputs  # type: ignore[union-attr]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _no_onnx_form(error: BaseException, labels: Sequence[str]) -> str:
    """What torch's exporter could not convert, and at which node; it says so deep in its chain of exceptions."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    where = ""
    for one in chain:
        for frame, _ in traceback.walk_tb(one.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, fx.Node):
                label = label_of(str(node.meta.get("nn_module_stack", "")), labels)
                where = f" at node {label!r}" if label else where
    return f"torch.onnx cannot convert the model{where}: {first_line(chain[-1])}"
