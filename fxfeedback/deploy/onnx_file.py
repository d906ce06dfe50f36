"""Turn a torch.fx graph into an ONNX file: torch's exporter, then names, optional inputs and metadata.

`write` is the whole of it; export.py and deploy/learner.py make the programs. The file is written whole or not at all.
"""

import contextlib
import functools
import glob
import json
import os
import re
import secrets
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfeedback.deploy.free_sizes import FREE_SIZES
from fxfeedback.errors import ExportError, OptionError
from fxfeedback.files import LARGEST, as_path, beside, sync
from fxfeedback.graph.shapes import plain
from fxfeedback.version import __version__

FOLDED = 64
"""What is computed from a larger tensor is left to ONNX Runtime: folded here, a weight would be stored twice."""


@dataclass
class Input:
    """An input of the file.

    example: tensor without data, batch first (or without a batch: batch=None).
    batch: name of its batch dimension. default: its value when it is left out, with batch 1.
    any_size: whether the dimensions behind the channels are free.
    """

    name: str
    example: torch.Tensor
    batch: str | None = "batch"
    default: torch.Tensor | None = None
    any_size: bool = False


@dataclass
class Program:
    """A graph to export.

    graph: in call_function, call_module and get_attr nodes; it is interpreted, so targets may be any callables.
    labels: what its nodes are called in the file.
    fetch: qualified name -> parameter or buffer; root: has them, and the modules that are called.
    constants: further tensors that get_attr nodes may name.
    output: what the output is called; nothing, where it is a dict and its keys name its parts.
    """

    graph: fx.Graph
    labels: dict[fx.Node, str]
    inputs: list[Input]
    root: nn.Module
    fetch: Callable[[str], torch.Tensor]
    metadata: dict[str, Any]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    output: str = "output"


def check_target(path: str | os.PathLike[str]) -> None:
    """Find out early whether a file can be written.

    Raises:
        OptionError: no directory for the file.
        ImportError: the packages onnx and onnxscript are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: to export, pip install 'fxfeedback[onnx]'") from error
    path = as_path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise OptionError(f"path={str(path)!r}: give the name of a file in a directory that exists")


def write(
    program: Program,
    path: str | os.PathLike[str],
    dynamic_batch: bool,
    check: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write the program as an ONNX file.

    check: looks at the file before it takes its place, and raises if something is wrong with it.

    Raises:
        ExportError: an op has no ONNX form; the message names its node.
    """
    exported, labels, outputs = _to_onnx(program, dynamic_batch)
    _finish(exported, program, labels, outputs)
    _write(exported, Path(path), check)


# -- torch's exporter -------------------------------------------------------------------------------------------------

STEPS = "fxfeedback_steps"


class _Step(nn.Module):
    """One node as a module of its own: its place among the modules is what the exporter hands on of its name."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "function", function)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)  # type: ignore[operator]


@dataclass
class _Record:
    """What a run of the program leaves behind; torch.export puts attributes of a module back.

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
        self.fxfeedback_constants = nn.Module()
        for name, tensor in program.constants.items():
            self.fxfeedback_constants.register_buffer(name, tensor)
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
                name = str(node.target)
                constant = name in program.constants
                values[node] = getattr(self.fxfeedback_constants, name) if constant else program.fetch(name)
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
    """torch.native_dropout in training mode, as random numbers: ONNX Runtime leaves out a Dropout that is on."""
    kept = torch.rand_like(input) >= p
    return input * kept * (1 / (1 - p) if p < 1 else 0.0), kept


WITH_A_FORM = {F.scaled_dot_product_attention: _attention, torch.native_dropout: _dropout}
"""Function -> the same in ops that torch's exporter can take."""


def _call_method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)


def leaves(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model's output, with names: `output`, `output_1`, `output.key`."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, item in enumerate(value, 1):
            yield from leaves(f"{name}_{number}", item)


def _to_onnx(program: Program, dynamic_batch: bool) -> tuple[Any, list[str], list[str]]:
    """The program as torch's exporter makes it, an `onnx_ir.Model`; labels of its steps; names of its outputs."""
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
            raise ExportError(f"torch.export cannot take the model{where}: {_first_line(error)}{hint}") from error
        names = [i.name for i in program.inputs]
        try:
            if any(i.any_size for i in program.inputs):
                exported = exported.run_decompositions(FREE_SIZES)
            made = torch.onnx.export(
                exported,
                (),
                input_names=names,
                output_names=runner.fxfeedback_record.outputs,
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


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


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
                step = re.search(rf"{STEPS}\.(\d+)", str(node.meta.get("nn_module_stack", "")))
                where = f" at node {labels[int(step[1])]!r}" if step else where
    return f"torch.onnx cannot convert the model{where}: {_first_line(chain[-1])}"


# -- what torch's exporter leaves to do -------------------------------------------------------------------------------


def _finish(model: Any, program: Program, labels: Sequence[str], outputs: Sequence[str]) -> None:
    """Fold shape arithmetic, name dimensions and nodes, make inputs optional, drop what tells of this machine."""
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript import optimizer

    ir.passes.Sequential(common.InlinePass(), common.RemoveUnusedNodesPass())(model)
    optimizer.fold_constants(model, input_size_limit=FOLDED)
    _drop_wrong_biases(model.graph)
    _resize_by_products(model.graph)
    # No fusions: they would store a weight once per use, and ONNX Runtime makes them when it loads the file.
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
    _name_dimensions(model.graph, program.inputs)
    _name_nodes(model.graph, labels)
    _set_defaults(model.graph, program)
    _forget(model)
    model.producer_name, model.producer_version, model.graph.name = "fxfeedback", __version__, "fxfeedback"
    model.metadata_props.update({key: _text(value) for key, value in program.metadata.items()})


def _drop_wrong_biases(graph: Any) -> None:
    """A 3-d convolution without a bias gets one of zeros that has two dimensions (onnxscript's issue 2931)."""
    for node in graph.all_nodes():
        if node.op_type == "Conv" and len(node.inputs) == 3 and node.inputs[2] is not None:
            shape = node.inputs[2].shape
            if shape is not None and len(shape) == 2:
                node.replace_input_with(2, None)


def _resize_by_products(graph: Any) -> None:
    """A map of a known size is resized by two products of matrices: half of the time that Resize takes on a CPU."""
    import onnx_ir as ir

    for node in list(graph.all_nodes()):
        if node.op_type != "Resize":
            continue
        x, y = node.inputs[0], node.outputs[0]
        sizes = [*x.shape[2:], *y.shape[2:]]
        modes = [node.attributes.get_string(name) for name in ("mode", "coordinate_transformation_mode")]
        known = len(sizes) == 4 and all(isinstance(n, int) for n in sizes) and x.dtype == ir.DataType.FLOAT
        if modes != ["linear", "align_corners"] or not known:
            continue
        rows = _constant(graph, f"resize_rows_{sizes[0]}_to_{sizes[2]}", _resizing(sizes[0], sizes[2]).T)
        columns = _constant(graph, f"resize_columns_{sizes[1]}_to_{sizes[3]}", _resizing(sizes[1], sizes[3]))
        tall = ir.node("MatMul", [rows, x], metadata_props=node.metadata_props)
        wide = ir.node("MatMul", [tall.outputs[0], columns], metadata_props=node.metadata_props)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [tall, wide], [y], [wide.outputs[0]])


def _resizing(old: int, new: int) -> torch.Tensor:
    """The matrix (old, new) that resizes a row; as resizing is linear, it is what the unit rows become."""
    return F.interpolate(torch.eye(old)[None, None], (old, new), mode="bilinear", align_corners=True)[0, 0]


def _constant(graph: Any, name: str, tensor: torch.Tensor) -> Any:
    """The initializer of this name."""
    import onnx_ir as ir

    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(tensor.contiguous(), name=name)))
    return graph.initializers[name]


SPATIAL = {3: ["length"], 4: ["height", "width"], 5: ["depth", "height", "width"]}


def _name_dimensions(graph: Any, inputs: Sequence[Input]) -> None:
    """The exporter's symbols for free sizes, as in s77 and 64*s77, become `batch`, `height` and `width`."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value, given in zip(graph.inputs, inputs, strict=True):
        for i, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim):
                name = SPATIAL[len(value.shape)][i - 2] if i and given.any_size else "batch"
                names.setdefault(str(dim.value), name)
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape(
                re.sub(r"\w+", lambda found: names.get(found[0], found[0]), str(d.value))
                if isinstance(d, ir.SymbolicDim)
                else d
                for d in value.shape
            )


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _name_nodes(graph: Any, labels: Sequence[str]) -> None:
    """A node is called as its step; where a step takes several, the last is, and the others `<step>/<op>`."""
    by_label: dict[str, list[Any]] = {}
    for node in graph.all_nodes():
        step = re.search(rf"{STEPS}\.(\d+)", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        by_label.setdefault(labels[int(step[1])] if step else "shapes", []).append(node)
    for label, nodes in by_label.items():
        seen: dict[str, int] = {}
        for node in nodes[:-1]:
            seen[node.op_type] = seen.get(node.op_type, 0) + 1
            count = seen[node.op_type]
            node.name = f"{label}/{node.op_type}" + (f"_{count}" if count > 1 else "")
        nodes[-1].name = label


def _set_defaults(graph: Any, program: Program) -> None:
    """Inputs with a batch of their own are broadcast to the batch; those with a default need not be given."""
    import onnx_ir as ir

    image = graph.inputs[0]
    for number, given in enumerate(program.inputs):
        value = graph.inputs[number]
        if given.batch not in (None, "batch") and isinstance(value.shape[0], ir.SymbolicDim):
            free = ir.Value(name=given.name, type=value.type, shape=ir.Shape([given.batch, *value.shape[1:]]))
            graph.inputs[number] = free
            ones = ir.Value(
                name=f"{given.name}.ones",
                const_value=ir.tensor([1] * (len(value.shape) - 1), ir.DataType.INT64, f"{given.name}.ones"),
            )
            graph.register_initializer(ones)
            size = ir.node("Shape", [image], {"start": 0, "end": 1}, name=f"{given.name}/Shape")
            whole = ir.node("Concat", [size.outputs[0], ones], {"axis": 0}, name=f"{given.name}/Concat")
            expanded = ir.node("Expand", [free, whole.outputs[0]], name=f"{given.name}/Expand")
            for node, suffix in ((size, "size"), (whole, "sizes"), (expanded, "expanded")):
                node.outputs[0].name = f"{given.name}.{suffix}"
            expanded.outputs[0].type, expanded.outputs[0].shape = value.type, value.shape
            ir.convenience.replace_all_uses_with(value, expanded.outputs[0])
            first = next(iter(graph), None)
            new = [size, whole, expanded]
            if first is None:
                graph.extend(new)
            else:
                graph.insert_before(first, new)
            value = free
        if given.default is not None:
            value.const_value = ir.tensor(given.default, name=given.name)
            graph.initializers[given.name] = value


def _forget(model: Any) -> None:
    """Drop stack traces and what else the exporter noted: they hold paths of the machine that exported."""
    model.doc_string = None
    for thing in (model, model.graph, *model.graph.all_nodes(), *_values(model.graph)):
        thing.metadata_props.clear()
        thing.doc_string = None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# -- the file ---------------------------------------------------------------------------------------------------------


def _require_valid(model: Any, **options: Any) -> None:
    import onnx

    try:
        onnx.checker.check_model(model, **options)
    except Exception as error:  # of two classes of onnx's own; for a dtype that an op does not take, say
        raise ExportError(f"onnx's checker refuses the file: {_first_line(error)}") from error


def _write(model: Any, path: Path, check: Callable[[Path], None]) -> None:
    """The file, and with more weights than it can hold a second one beside it; in place in one step."""
    import onnx_ir as ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    with beside(path) as new:
        if weights > LARGEST:
            # Under a name of its own: the old file keeps the old weights until the new one has taken its place.
            data = f"{path.name}.{model.metadata_props['weights_sha256'][:8]}-{secrets.token_hex(4)}.data"
            ir.save(model, new, external_data=data)
            _require_valid(str(new))
            check(new)
            sync(new.with_name(data)).replace(path.parent / data)
        else:
            data = ""
            proto = ir.to_proto(model)
            _require_valid(proto, full_check=True)
            new.write_bytes(proto.SerializeToString())
            check(new)
        try:
            sync(new).replace(path)
        except BaseException:
            if data:
                (path.parent / data).unlink()
            raise
    for old in path.parent.glob(f"{glob.escape(path.name)}.*.data"):
        if old.name != data and re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{8}", old.name[len(path.name) + 1 : -len(".data")]):
            old.unlink()
