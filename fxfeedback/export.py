"""Write what `add_feedback` or `to_butd` returned as an ONNX file, for ONNX Runtime.

The passes lie in the file as one flat graph in the standard ONNX domain, with every weight stored once. The steps:
a `Program` (a torch.fx graph with labels for its nodes, and what its inputs are), torch's ONNX exporter, `_finish`
(names, optional inputs, metadata), and a file that is written whole or not at all.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import secrets
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxfeedback.bottom_up import has_effect
from fxfeedback.butd import BUTD
from fxfeedback.butd_graphs import Graphs
from fxfeedback.errors import ExportError, InputError, OptionError
from fxfeedback.feedback import FeedbackModel, _check_passes, _link
from fxfeedback.gates import channel_mean
from fxfeedback.instruction import read_instruction
from fxfeedback.rewrite import Unroller, Unrolling
from fxfeedback.trace import find_node
from fxfeedback.version import __version__
from fxfeedback.wrapper import Wrapper

LARGEST = 2**31 - 2**24
"""Bytes of weights beyond which they go into a file of their own: an ONNX file holds less than 2 GB."""

FOLDED = 64
"""What is computed from a larger tensor is left to ONNX Runtime: folded here, a weight would be stored twice."""


def export(
    model: Any,
    path: str | os.PathLike[str],
    steerable: bool = False,
    task: Any = None,
    passes: int | None = None,
    dynamic_batch: bool = True,
) -> None:
    """Write a model with connections, or an instructed BU-TD network, as an ONNX file.

    What is exported is the model in eval mode, in its dtype, at its example's size. The file's inputs and outputs:

    - `add_feedback`: the model's own inputs in; `output_1`, `output_2`, ...: each pass's output. With steerable=True
      also for each source, named as in the connection, `<source>.activation` (B or 1, ...), `<source>.alpha` () and
      `<source>.strength` (2,), negative and positive: these may be left out, and then do not steer.
    - `to_butd`: the model's own inputs and `instruction` (B or 1, instruction size), floats, in; `output` out.
    - `to_butd` with task=k: the model's own inputs in, `output` out; the gates are constants.

    An output that is a dict or a tuple becomes several: `output.out`, `output_1`, ... Nodes are named after the pass
    and the model's node: `pass2/features.8`, `bu/layer1.0.relu`, `td/layer1.0.conv1`. `metadata_props` has connections,
    passes, tasks, the version and a checksum of the weights. Above 2 GB the weights lie in a second file, beside the
    first. ONNX Runtime's CPU provider has no float64 convolutions: convert a float64 model with `.float()` first.

    Args:
        model: what `add_feedback` or `to_butd` returned; it stays as it is.
        path: the file, replaced whole or not at all.
        steerable: whether the sources of the connections can be steered, after every pass.
        task: an id, or an instruction vector (1, size), whose sub-network is exported.
        passes: how many passes; default as the model was made.
        dynamic_batch: whether the batch size is free; otherwise it is 1.

    Raises:
        OptionError: options that do not belong to this model, or a task that there is not.
        ExportError: an op has no ONNX form; the message names its node.
        ImportError: the packages onnx and onnxscript are missing: pip install 'fxfeedback[onnx]'.
    """
    _require_packages()
    _check_path(Path(path))
    with torch.no_grad(), _eval_mode(model):
        program = _program(model, steerable, task, passes)
        exported, labels, outputs = _to_onnx(program, dynamic_batch)
        _finish(exported, program, labels, outputs)
        _write(exported, Path(path))


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over a state_dict: names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        data = tensor.detach().cpu().contiguous()
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- what is exported -------------------------------------------------------------------------------------------------


@dataclass
class Input:
    """An input of the file.

    example: tensor without data, batch first (or without a batch: batch=None).
    batch: name of its batch dimension. default: its value when it is left out, with batch 1.
    """

    name: str
    example: torch.Tensor
    batch: str | None = "batch"
    default: torch.Tensor | None = None


@dataclass
class Program:
    """A graph to export.

    graph: in call_function, call_module and get_attr nodes; it is interpreted, so targets may be any callables.
    labels: what its nodes are called in the file.
    fetch: qualified name -> parameter or buffer; root: has them, and the modules that are called.
    constants: further tensors that get_attr nodes may name.
    """

    graph: fx.Graph
    labels: dict[fx.Node, str]
    inputs: list[Input]
    root: nn.Module
    fetch: Callable[[str], torch.Tensor]
    metadata: dict[str, Any]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)


def _program(model: Any, steerable: bool, task: Any, passes: int | None) -> Program:
    if isinstance(model, FeedbackModel):
        if task is not None:
            raise OptionError(
                "task= belongs to a network that to_butd returned; this one has connections, but no tasks"
            )
        return _unrolled(model, model.passes if passes is None else passes, steerable)
    if isinstance(model, BUTD):
        if steerable or passes is not None:
            raise OptionError(
                "steerable= and passes= belong to a model that add_feedback returned, not to a BU-TD network"
            )
        return _instructed(model) if task is None else _one_task(model, task)
    inside = [name for name, part in model.named_modules() if isinstance(part, Wrapper)] if _is_module(model) else []
    hint = f": export its part {inside[0]!r}" if inside else ": use torch.onnx.export"
    raise OptionError(f"a {type(model).__name__} is nothing that add_feedback or to_butd returned{hint}")


def _is_module(model: Any) -> bool:
    return isinstance(model, nn.Module)


class _Numbered(Unroller):
    """Says of every node of the flat graph in which pass it is computed."""

    def one_pass(self, number: int, inputs: dict[fx.Node, fx.Node]) -> tuple[Any, dict[str, Any]]:
        before = set(self.graph.nodes)
        result = super().one_pass(number, inputs)
        for node in self.graph.nodes:
            if node not in before:
                node.meta = {**node.meta, "pass": number}
        return result

    def modulated(self, y: fx.Node, modulation: fx.Node, activation: str) -> fx.Node:
        before = set(self.graph.nodes)
        value = super().modulated(y, modulation, activation)
        for node in self.graph.nodes:
            if node not in before:
                node.meta["name"] = f"{y.meta['name']}.modulated"
        return value


def _unrolled(model: FeedbackModel, passes: int, steerable: bool) -> Program:
    _check_passes(passes)
    bu = model._bottom_up()
    sources = {c.source: find_node(bu.graph, c.source) for c in model.connections}
    steered = {node.meta["name"]: name for name, node in reversed(sources.items())} if steerable else {}
    links = [_link(bu, connection) for connection in model.connections]
    graph = _Numbered(bu.graph, links, Unrolling(passes, model.return_all, steered=tuple(steered))).run()
    _return_only(graph, graph.output_node().args[0][0])  # type: ignore[index]
    inputs = _own_inputs(model, graph)
    like = model._like()
    for node_name, name in steered.items():
        spec = find_node(bu.graph, node_name).meta["spec"]
        if spec.per_sample[0] != 1 or any(spec.per_sample[1:]):
            raise OptionError(
                f"steerable: the value of {name!r} is not one per sample of the batch: it cannot be steered"
            )
        one = torch.empty(1, *spec.shape[1:], dtype=like.dtype, device="meta")
        inputs += [
            Input(f"{name}.activation", one, f"{name}.batch", torch.zeros(one.shape, dtype=one.dtype)),
            Input(
                f"{name}.alpha", torch.empty((), dtype=one.dtype, device="meta"), None, torch.zeros((), dtype=one.dtype)
            ),
            Input(
                f"{name}.strength", torch.empty(2, dtype=one.dtype, device="meta"), None, torch.ones(2, dtype=one.dtype)
            ),
        ]
    labels = {}
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_module" else node.meta.get("name", node.name)
        labels[node] = f"pass{node.meta['pass']}/{name}" if "pass" in node.meta else f"steering/{name}"
    metadata = _about(model, "lrm") | {
        "connections": [vars(connection) for connection in model.connections],
        "passes": passes,
        "steerable": {given: steered[node.meta["name"]] for given, node in sources.items()} | steered
        if steerable
        else {},
    }
    return Program(graph, labels, inputs, model._root, model._fetch, metadata)


def _instructed(butd: BUTD) -> Program:
    """The instruction pass and, behind it, the gated BU graph."""
    graphs, graph = _graphs(butd), fx.Graph()
    labels: dict[fx.Node, str] = {}
    predicting = graphs.predicting(True).graph
    own = {node: graph.node_copy(node) for node in predicting.nodes if _is_own_input(node)}
    inputs = _own_inputs(butd, graph)
    like = butd._like()
    one = torch.empty(1, graphs.instruction_size, dtype=like.dtype, device="meta")
    inputs.append(Input("instruction", one, "instructions"))

    down: dict[fx.Node, fx.Node] = {}
    bottom_up_names = {node.name: node.meta["name"] for node in graphs.bu.graph.nodes if "name" in node.meta}
    for node in graphs.td.graph.nodes:
        if node.op != "output":
            down[node] = graph.node_copy(node, down.__getitem__)
            labels[down[node]] = f"td/{_td_name(node, bottom_up_names)}"
    counters = graphs.td.graph.output_node().args[0]
    instruction = next(copy for node, copy in down.items() if node.op == "placeholder")

    gates: dict[str, fx.Node] = {}
    for site in graphs.sites:
        name = site.meta["name"]
        take = functools.partial(_gate, graphs, site)
        gate = graph.create_node("call_function", take, (down[counters[name]],), name=f"gate_{site.name}")  # type: ignore
        labels[gate] = f"gate/{name}"
        gates[f"gate_{site.name}"] = gate
    _predict(predicting, graph, labels, own, instruction, gates)
    return Program(graph, labels, inputs, butd._root, butd._fetch, _about_butd(butd, graphs, "instructed"))


def _one_task(butd: BUTD, task: Any) -> Program:
    """The gated BU graph, with one task's gates as constants."""
    graphs, graph = _graphs(butd), fx.Graph()
    labels: dict[fx.Node, str] = {}
    try:
        takes_ids = butd.options.instruction_size is None
        instruction, _ = read_instruction(task, graphs.instruction_size, 1, butd._like(), takes_ids)
    except InputError as error:
        raise OptionError(f"task={task!r}: {error}") from None
    predicting = graphs.predicting(True).graph
    own = {node: graph.node_copy(node) for node in predicting.nodes if _is_own_input(node)}
    constants = {"instruction": instruction}
    gates = {}
    for site, gate in zip(graphs.sites, graphs.gates(graphs.instruct(instruction)), strict=True):
        name = f"gate_{site.name}"
        constants[name] = gate.bool() if butd.options.exact else gate
        gates[name] = graph.get_attr(name)
    _predict(predicting, graph, labels, own, graph.get_attr("instruction"), gates)
    graph.eliminate_dead_code(is_impure_node=_is_kept)
    metadata = _about_butd(butd, graphs, "task") | {"task": task if isinstance(task, int) else instruction[0].tolist()}
    return Program(graph, labels, _own_inputs(butd, graph), butd._root, butd._fetch, metadata, constants)


def _graphs(butd: BUTD) -> Graphs:
    graphs = butd._graphs(butd._stand_ins())
    graphs.require_head()
    return graphs


def _gate(graphs: Graphs, site: fx.Node, counter: torch.Tensor) -> torch.Tensor:
    """What the lateral connection takes, as `Graphs.gates` makes it."""
    value = channel_mean(counter, site) if graphs.options.gating == "channel" else counter
    return value > 0 if graphs.options.exact else value


def _predict(
    predicting: fx.Graph,
    graph: fx.Graph,
    labels: dict[fx.Node, str],
    copies: dict[fx.Node, fx.Node],
    instruction: fx.Node,
    gates: Mapping[str, fx.Node],
) -> None:
    """Copy the gated BU graph behind what gives it its gates."""
    copies = dict(copies)
    for node in predicting.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], copies.__getitem__))
        elif node.op == "placeholder" and node not in copies:
            copies[node] = instruction if node.meta.get("instruction") else gates[str(node.target)]
        elif node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            labels[copies[node]] = f"bu/{node.meta.get('name', node.name)}"


def _is_own_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and not node.meta.get("instruction") and not str(node.target).startswith("gate_")


def _own_inputs(wrapper: Wrapper, graph: fx.Graph) -> list[Input]:
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    examples = wrapper._stand_ins()
    return [Input(str(node.target), example) for node, example in zip(nodes, examples, strict=False)]


def _td_name(node: fx.Node, names: Mapping[str, str]) -> str:
    """The name of the BU node that a node of the TD graph is the counterpart of; else its own."""
    if node.op == "call_module":
        return str(node.target)
    found = re.fullmatch(r"(.*)_td(_\d+)?", node.name)
    return names.get(found[1], node.name) if found else node.name


def _return_only(graph: fx.Graph, value: Any) -> None:
    graph.output_node().args = (value,)
    graph.eliminate_dead_code(is_impure_node=_is_kept)


def _is_kept(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or has_effect(node)


def _about(model: nn.Module, product: str) -> dict[str, Any]:
    return {"fxfeedback": __version__, "product": product, "weights_sha256": checksum(model.state_dict())}


def _about_butd(butd: BUTD, graphs: Graphs, product: str) -> dict[str, Any]:
    return _about(butd, product) | {
        "tasks": graphs.options.n_tasks,
        "instruction_size": graphs.instruction_size,
        "takes_ids": graphs.options.instruction_size is None,
        "gating": graphs.options.gating,
        "sites": [site.meta["name"] for site in graphs.sites],
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextlib.contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """All modules in eval mode, and afterwards each in its own again."""
    modules = list(model.modules()) if _is_module(model) else []
    modules += [module._net for module in modules if isinstance(module, Wrapper)]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


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
    """Runs a program node by node."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        root = program.root
        self._parameters, self._buffers, self._modules = (
            dict(root._parameters),
            dict(root._buffers),
            dict(root._modules),
        )
        self.constants = nn.Module()
        for name, tensor in program.constants.items():
            self.constants.register_buffer(name, tensor)
        self.program, self.record = program, _Record()
        self.steps: dict[fx.Node, _Step] = {}
        for node in program.graph.nodes:
            if node.op in ("call_function", "call_module", "call_method"):
                self.steps[node] = _Step(self._function(node))
        self._modules[STEPS] = nn.ModuleList(self.steps.values())
        self.labels = [program.labels.get(node, node.name) for node in self.steps]

    def _function(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_module":
            return self.program.root.get_submodule(str(node.target))
        if node.op == "call_method":
            return functools.partial(_call_method, str(node.target))
        return node.target  # type: ignore[return-value]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        constants = self.program.constants
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                name = str(node.target)
                values[node] = getattr(self.constants, name) if name in constants else self.program.fetch(name)
            elif node.op == "output":
                named = list(_leaves("output", fx.map_arg(node.args[0], values.__getitem__)))
            else:
                self.record.at = self.program.labels.get(node, node.name)
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = self.steps[node](*args, **kwargs)
        self.record.at = ""
        self.record.outputs = [name for name, _ in named]
        return tuple(value.clone() for _, value in named)  # passes may share a value, and a file's outputs are distinct


def _call_method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model's output, with names: `output`, `output_1`, `output.key`."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, item in enumerate(value, 1):
            yield from _leaves(f"{name}_{number}", item)


def _to_onnx(program: Program, dynamic_batch: bool) -> tuple[Any, list[str], list[str]]:
    """The program as torch's exporter makes it, an `onnx_ir.Model`; labels of its steps; names of its outputs."""
    runner = _Runner(program).eval()
    batch = 2 if dynamic_batch else 1  # what is exported with 1 is special to 1
    device = next((t.device for t in program.root.parameters()), torch.device("cpu"))
    examples = tuple(
        torch.zeros((batch, *i.example.shape[1:]) if i.batch else i.example.shape, dtype=i.example.dtype, device=device)
        for i in program.inputs
    )
    free = torch.export.Dim("batch")
    shapes = tuple([{0: free} if i.batch and dynamic_batch else None for i in program.inputs])
    with _quiet():
        try:
            exported = torch.export.export(runner, examples, dynamic_shapes=(shapes,), strict=False)
        except Exception as error:
            where = f" at {runner.record.at!r}" if runner.record.at else ""
            hint = "; with dynamic_batch=False the batch size is fixed" if dynamic_batch else ""
            raise ExportError(f"torch.export cannot take the model{where}: {_first_line(error)}{hint}") from error
        names = [i.name for i in program.inputs]
        try:
            made = torch.onnx.export(
                exported, (), input_names=names, output_names=runner.record.outputs, optimize=False, verbose=False
            )
        except Exception as error:
            raise ExportError(_no_onnx_form(error, runner.labels)) from error
    return made.model, runner.labels, runner.record.outputs  # type: ignore[union-attr]


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
    _name_batch(model.graph)
    _name_nodes(model.graph, labels)
    _set_defaults(model.graph, program)
    _forget(model)
    model.producer_name, model.producer_version, model.graph.name = "fxfeedback", __version__, "fxfeedback"
    model.metadata_props.update({key: _text(value) for key, value in program.metadata.items()})


def _name_batch(graph: Any) -> None:
    """The exporter's symbol for the batch size, as in s77 and 64*s77, becomes `batch`."""
    import onnx_ir as ir

    symbols = {str(d.value) for value in graph.inputs for d in value.shape if isinstance(d, ir.SymbolicDim)}
    for symbol in symbols:
        for value in _values(graph):
            if value.shape is not None:
                dims = [
                    re.sub(rf"\b{symbol}\b", "batch", str(d.value)) if isinstance(d, ir.SymbolicDim) else d
                    for d in value.shape
                ]
                value.shape = ir.Shape(dims)


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


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: to export, pip install 'fxfeedback[onnx]'") from error


# -- the file ---------------------------------------------------------------------------------------------------------


def _check_path(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise OptionError(f"path={str(path)!r}: give the name of a file in a directory that exists")


def _write(model: Any, path: Path) -> None:
    """The file, and with more weights than it can hold a second one beside it; in place in one step."""
    import onnx
    import onnx_ir as ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as beside:
        new = Path(beside, path.name)
        if weights > LARGEST:
            # Under a name of its own: the old file keeps the old weights until the new one has taken its place.
            data = f"{path.name}.{model.metadata_props['weights_sha256'][:8]}-{secrets.token_hex(4)}.data"
            ir.save(model, new, external_data=data)
            onnx.checker.check_model(str(new))
            _sync(Path(beside, data)).replace(path.parent / data)
        else:
            data = ""
            proto = ir.to_proto(model)
            onnx.checker.check_model(proto, full_check=True)
            new.write_bytes(proto.SerializeToString())
        try:
            _sync(new).replace(path)
        except BaseException:
            if data:
                (path.parent / data).unlink()
            raise
    for old in path.parent.glob(f"{glob.escape(path.name)}.*.data"):
        if old.name != data and re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{8}", old.name[len(path.name) + 1 : -len(".data")]):
            old.unlink()


def _sync(path: Path) -> Path:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path
