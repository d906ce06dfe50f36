"""Write what `add_feedback` or `to_butd` returned as an ONNX file, for ONNX Runtime.

The passes are one flat graph in the standard ONNX domain, with every weight stored once. This module makes a `Program`:
a torch.fx graph with labels for its nodes and descriptions of its inputs. `deploy/` does the rest.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxfeedback.butd import BUTD, instruction_of
from fxfeedback.deploy.check_file import check_file, require_runtime
from fxfeedback.deploy.half import half_of, rounded
from fxfeedback.deploy.parts import about_butd, own_inputs, take_gate, td_name
from fxfeedback.deploy.passes import Asked, called_in_passes, unrolled_program
from fxfeedback.deploy.program import Input, Program
from fxfeedback.deploy.steps import stepped_program
from fxfeedback.deploy.trials import Network, Trial
from fxfeedback.deploy.writing import check_opset, check_target, write
from fxfeedback.errors import InputError, OptionError
from fxfeedback.graph.nodes import (
    gate_of,
    is_instruction,
    is_own_input,
    name_of,
)
from fxfeedback.instructed.graphs import Graphs
from fxfeedback.instructed.kept_graphs import graphs_of
from fxfeedback.lrm.feedback_model import FeedbackModel
from fxfeedback.predictive.predictive_model import PredictiveModel
from fxfeedback.tracing.modes import eval_mode
from fxfeedback.tracing.wrapper import Wrapper, call_as_example, fetch_of, like_of, root_of


def export(
    model: Any,
    path: str | os.PathLike[str],
    steerable: bool = False,
    task: Any = None,
    passes: int | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    check: bool = True,
    *,
    steps: int | None = None,
    stateful: bool = False,
    outputs: Sequence[str] = (),
    opset: int | None = None,
    dtype: str | None = None,
    io_dtype: str | None = None,
    keep_gates: bool = False,
) -> None:
    """Write a model with connections or predictions, or an instructed BU-TD network, as an ONNX file.

    The model is exported in its own eval mode and its dtype, at its example's size and called as the example calls it,
    with flags at their defaults. The file's inputs and outputs:

    - `add_feedback`: the model's own inputs in; `output_1`, `output_2`, ...: each pass's output. With steerable=True
      also for each source, named as in the connection, `<source>.activation` (B or 1, ...), `<source>.alpha` () and
      `<source>.strength` (2,), negative and positive. These may be left out; the source is then not steered.
      With stateful=True also the sources' signals: `<source>.state` (B or 1, ...) and `state.given` () in, which may be
      left out, and `<source>.next_state` out, for `runtime.Session.stream` and `unroll`. With outputs= also each named
      node's value in every pass, as it is read: `<node>_1`, `<node>_2`, ...
    - `add_prediction`: the model's own inputs in; `output_1`, `output_2`, ...: the output of step 0, of step 1, ...
    - `to_butd`: the model's own inputs and `instruction` (B or 1, instruction size), floats, in; `output` out.
      With keep_gates=True also, for each site, `<site>.given_gate` and `gates.given` () in, which may be left out, and
      `<site>.gate` out: `runtime.Session` then computes the gates of an id once.
    - `to_butd` with task=k: the model's own inputs in, `output` out: the network that `model.select(k)` returns.

    An output that is a dict or a tuple becomes several: `output.out`, `output_1`, ... Nodes are named after the pass
    and the model's node: `pass2/features.8`, `step2/features.4` (of t = 2), `bu/layer1.0.relu`, `td/layer1.0.conv1`.
    `metadata_props` has connections, passes, predictions, steps, tasks, the version and a checksum of the weights.
    Above 2 GB the weights are in a second file beside the first. ONNX Runtime's CPU provider has no float64
    convolutions: convert a float64 model with `.float()` first.

    Args:
        model: what `add_feedback`, `add_prediction` or `to_butd` returned; it is not changed.
        path: the file, replaced atomically.
        steerable: whether the sources of the connections can be steered, after every pass.
        task: an id, or an instruction vector (1, size), whose sub-network is exported.
        passes: how many passes; default: the model's own number.
        dynamic_batch: whether the batch size is free; otherwise it is 1.
        dynamic_size: whether height and width are also free, for a model with connections whose code allows it;
            otherwise they are the example's.
        steps: how many steps, of a model with predictions; default: the model's own number.
        stateful: whether a call can go on from an earlier one's signals, of a model with connections.
        outputs: names of nodes of a model with connections whose values are outputs as well.
        opset: of ONNX's standard operators, 18 or later; None: what torch's exporter takes, for which ONNX Runtime has
            the most kernels. From 22 on its CUDA has none for max pooling.
        dtype: "float16" or "bfloat16": the file's weights and values are halves, but for sums, norms and softmax, which
            are computed in float32. It has half the size. None: the model's own.
        io_dtype: of the file's inputs and outputs, with dtype=: "float32", or the same as dtype=.
        check: compare the file with torch, in ONNX Runtime, before it takes its place: for random inputs, at batch 3
            and 1 if the batch is free, at two sizes other than the example's if sizes are free, without and with
            steering, with ids and with vectors as instructions. Differences that float32's rounding explains are
            accepted; with dtype="float16" such of three percent of the largest value, from torch in float32 with the
            same rounded weights. The check takes as long as two to eight
            calls of batch 3 in both (ResNet-18 with two passes: 2 s of a CPU core, in addition to 5 s for the export),
            and needs another copy of the weights in memory.

    Raises:
        OptionError: options that do not apply to this model, or a task that does not exist.
        ExportError: an op has no ONNX form, and the message names its node; or the file does not compute what torch
            computes, or cannot be run here, and the message names the output, batch and size. No file is written.
        ImportError: the packages onnx and onnxscript are missing: pip install 'fxfeedback[onnx]'; or, with check=True,
            onnxruntime: pip install 'fxfeedback[runtime]'.
    """
    check_target(path)
    if check:
        require_runtime()
    check_opset(opset)
    half = half_of(dtype, io_dtype, like_of(model).dtype) if isinstance(model, Wrapper) else None
    asked = Asked(steerable, dynamic_size, stateful, _names(outputs))
    if keep_gates and (task is not None or not isinstance(model, BUTD)):
        raise OptionError("keep_gates= belongs to an instructed network that to_butd returned, without task=")
    with torch.no_grad(), eval_mode(model):
        program = _program(model, asked, task, passes, steps)
        call = _call(model, asked, task, passes, steps)
        like = model if half is None or not check else rounded(model, half)
        network = Network(like, call, program.inputs, _ids(program), dynamic_batch, program.output, half)
        program.metadata |= {} if half is None else {"dtype": half.dtype}
        if keep_gates:
            program.metadata["keeps_gates"] = True
        else:
            program.gates = {}
        look = functools.partial(_check, network) if check else lambda _: None
        write(program, path, dynamic_batch, look, opset, half)


def _names(outputs: Any) -> tuple[str, ...]:
    if isinstance(outputs, str) or not all(isinstance(name, str) and name != "output" for name in outputs):
        raise OptionError(f"outputs={outputs!r}: give a list of names of nodes, as node_names lists them")
    return tuple(outputs)


def _check(network: Network, file: Path) -> None:
    with eval_mode(network.model):  # again, as torch's exporter has switched off what the model's own eval keeps on
        check_file(network, file)


def _call(
    model: Any, asked: Asked, task: Any, passes: int | None, steps: int | None
) -> Callable[[Any, Trial], dict[str, Any] | Any]:
    """How the model is run for what the file's session is given: its outputs, as the file names them."""
    if isinstance(model, FeedbackModel):
        return lambda run, trial: called_in_passes(run, trial, asked, passes)
    if isinstance(model, PredictiveModel):
        return lambda run, trial: call_as_example(run, trial.inputs, steps=steps)
    return lambda run, trial: call_as_example(run, trial.inputs, task=trial.options.get("task", task))


def _ids(program: Program) -> int:
    """How many ids the file takes as instructions."""
    return program.metadata["instruction_size"] if program.metadata.get("takes_ids") else 0


# -- what is exported -------------------------------------------------------------------------------------------------


def _program(model: Any, asked: Asked, task: Any, passes: int | None, steps: int | None) -> Program:
    if (asked.stateful or asked.outputs) and not isinstance(model, FeedbackModel):
        raise OptionError("stateful= and outputs= belong to a model that add_feedback returned")
    if steps is not None and not isinstance(model, PredictiveModel):
        raise OptionError("steps= belongs to a model that add_prediction returned")
    if isinstance(model, PredictiveModel):
        given = {"steerable": asked.steerable, "task": task is not None, "passes": passes is not None}
        for name in (name for name, is_given in {**given, "dynamic_size": asked.any_size}.items() if is_given):
            raise OptionError(f"{name}= does not apply to a model with predictions: give steps=, or nothing")
        return stepped_program(model, model.steps if steps is None else steps)
    if isinstance(model, FeedbackModel):
        if task is not None:
            raise OptionError(
                "task= belongs to a network that to_butd returned; this one has connections, but no tasks"
            )
        return unrolled_program(model, model.passes if passes is None else passes, asked)
    if isinstance(model, BUTD):
        if asked.steerable or passes is not None:
            raise OptionError(
                "steerable= and passes= belong to a model that add_feedback returned, not to a BU-TD network"
            )
        if asked.any_size:
            raise OptionError("dynamic_size= belongs to a model that add_feedback returned: gates have a size")
        return _instructed(model) if task is None else _one_task(model, task)
    inside = [name for name, part in model.named_modules() if isinstance(part, Wrapper)] if _is_module(model) else []
    hint = f": export its part {inside[0]!r}" if inside else ": use torch.onnx.export"
    raise OptionError(f"a {type(model).__name__} was not made by add_feedback, add_prediction or to_butd{hint}")


def _is_module(model: Any) -> bool:
    return isinstance(model, nn.Module)


def _instructed(butd: BUTD) -> Program:
    """The instruction pass and, after it, the gated BU graph."""
    graphs, graph = _graphs(butd), fx.Graph()
    labels: dict[fx.Node, str] = {}
    predicting = graphs.predicting(True).graph
    own = {node: graph.node_copy(node) for node in predicting.nodes if is_own_input(node)}
    inputs = own_inputs(butd, graph)
    like = like_of(butd)
    one = torch.empty(1, graphs.instruction_size, dtype=like.dtype, device="meta")
    inputs.append(Input("instruction", one, "instructions"))

    down: dict[fx.Node, fx.Node] = {}
    for node in graphs.td.graph.nodes:
        if node.op != "output":
            down[node] = graph.node_copy(node, down.__getitem__)
            labels[down[node]] = f"td/{td_name(node)}"
    counters = graphs.td.graph.output_node().args[0]
    instruction = next(copy for node, copy in down.items() if node.op == "placeholder")

    gates: dict[str, fx.Node] = {}
    for site in graphs.sites:
        name = name_of(site)
        take = functools.partial(take_gate, graphs, site)
        gate = graph.create_node("call_function", take, (down[counters[name]],), name=f"gate_{site.name}")  # type: ignore
        labels[gate] = f"gate/{name}"
        gates[name] = gate
    _predict(predicting, graph, labels, own, instruction, gates)
    told = about_butd(butd, graphs, "instructed")
    made_by = {name: (labels[gate], labels[down[counters[name]]]) for name, gate in gates.items()}  # type: ignore
    return Program(graph, labels, inputs, root_of(butd), fetch_of(butd), told, gates=made_by)


def _one_task(butd: BUTD, task: Any) -> Program:
    """One task's network, as `butd.select` makes it."""
    graphs = _graphs(butd)
    try:
        selected = butd.select(task)
        instruction = instruction_of(butd, task)
    except InputError as error:
        raise OptionError(f"task={task!r}: {error}") from None
    labels = {node: f"bu/{name_of(node)}" for node in selected.graph.nodes}
    metadata = about_butd(butd, graphs, "task") | {"task": task if isinstance(task, int) else instruction[0].tolist()}
    inputs = own_inputs(butd, selected.graph)
    fetch = functools.partial(_attribute, selected)
    return Program(selected.graph, labels, inputs, selected, fetch, metadata)


def _attribute(module: nn.Module, name: str) -> torch.Tensor:
    """A tensor by its qualified name, as it is now: torch.export puts others in the place of parameters."""
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def _graphs(butd: BUTD) -> Graphs:
    graphs = graphs_of(butd)
    graphs.require_head()
    return graphs


def _predict(
    predicting: fx.Graph,
    graph: fx.Graph,
    labels: dict[fx.Node, str],
    copies: dict[fx.Node, fx.Node],
    instruction: fx.Node,
    gates: Mapping[str, fx.Node],
) -> None:
    """Copy the gated BU graph after the nodes that compute its gates."""
    copies = dict(copies)
    for node in predicting.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], copies.__getitem__))
        elif node.op == "placeholder" and node not in copies:
            copies[node] = instruction if is_instruction(node) else gates[str(gate_of(node))]
        elif node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            labels[copies[node]] = f"bu/{name_of(node)}"
