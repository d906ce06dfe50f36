"""A model with connections as a program: its passes, and what steers their sources."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxfeedback.checks import check_passes
from fxfeedback.deploy.parts import about, own_inputs, return_only
from fxfeedback.deploy.program import SPATIAL, Input, Program
from fxfeedback.deploy.trials import Trial
from fxfeedback.errors import OptionError
from fxfeedback.graph.nodes import find_node, name_of, pass_of, spec_of, tell
from fxfeedback.graph.specs import Spec
from fxfeedback.lrm.feedback_model import FeedbackModel, bottom_up_of, links_of, looks_at_sizes
from fxfeedback.rewrite import Link, Unroller, Unrolling
from fxfeedback.tracing.wrapper import call_as_example, fetch_of, like_of, root_of


@dataclass
class _Numbered(Unroller):
    """Says of every node of the flat graph in which pass it is computed.

    A file takes a state or none: an input `given` says which. Without one, the first pass is the plain model.

    held: the signals of the state; uncertain: the modulations by them alone.
    """

    given: fx.Node | None = None
    held: set[fx.Node] = field(default_factory=set)
    uncertain: set[fx.Node] = field(default_factory=set)

    def placeholder(self, kind: str, name: str) -> fx.Node:
        if kind != "state":
            return super().placeholder(kind, name)
        self.given = self.given or super().placeholder(kind, "given")
        self.held.add(state := super().placeholder(kind, name))
        return state

    def one_pass(self, number: int, inputs: dict[fx.Node, fx.Node]) -> tuple[Any, dict[str, Any]]:
        before = set(self.graph.nodes)
        result = super().one_pass(number, inputs)
        for node in self.graph.nodes:
            if node not in before:
                tell(node, **{"pass": number})
        return result

    def modulation(self, y: fx.Node, signals: Sequence[tuple[Link, fx.Node]]) -> fx.Node | None:
        held = super().modulation(y, [(link, signal) for link, signal in signals if signal in self.held])
        now = super().modulation(y, [(link, signal) for link, signal in signals if signal not in self.held])
        if held is None or now is None:
            self.uncertain.update(() if held is None else (held,))
            return held or now
        return self.once(operator.add, now, self.once(torch.where, self.given, held, 0))

    def modulated(self, y: fx.Node, modulation: fx.Node, link: Link) -> fx.Node:
        before = set(self.graph.nodes)
        value = super().modulated(y, modulation, link)
        if modulation in self.uncertain:
            value = self.once(torch.where, self.given, value, y)
        for node in self.graph.nodes:
            if node not in before:
                tell(node, name=f"{name_of(y)}.modulated")
        return value


@dataclass(frozen=True)
class Asked:
    """What a file of passes shall have beside inputs and outputs of the model.

    steerable: inputs that steer the sources; any_size: free height and width; stateful: the sources' signals, in and
    out; outputs: nodes, as the user names them, whose values in every pass are outputs as well.
    """

    steerable: bool = False
    any_size: bool = False
    stateful: bool = False
    outputs: tuple[str, ...] = ()


def unrolled_program(model: FeedbackModel, passes: int, asked: Asked) -> Program:
    """Its passes: the model's own inputs in, one output per pass out, and what is asked for."""
    check_passes(passes)
    bu = bottom_up_of(model)
    if asked.any_size and looks_at_sizes(model):
        raise OptionError("dynamic_size: the model's code looks at the size of its input, so its graph is for one size")
    sources = {c.source: find_node(bu.graph, c.source) for c in model.connections}
    called = {name_of(node): name for name, node in reversed(sources.items())}
    steered, state = (called if asked.steerable else {}), (called if asked.stateful else {})
    read = {name: name_of(find_node(bu.graph, name)) for name in asked.outputs}
    what = Unrolling(passes, model.return_all, tuple(state), tuple(steered), readout=tuple(read.values()))
    graph = _Numbered(bu.graph, links_of(model), what).run()
    outputs, signals, readouts = graph.output_node().args[0]  # type: ignore[misc]
    values: dict[str, Any] = {"output": outputs}
    values |= {name: [one[node][0] for one in readouts] for name, node in read.items()}
    values |= {f"{name}.next_state": signals[node] for node, name in state.items()}
    return_only(graph, values)
    inputs = own_inputs(model, graph)
    for given in inputs:
        given.any_size = asked.any_size and given.example.ndim in SPATIAL
    specs = {name: _spec_of_source(bu.graph, node, name, asked) for node, name in (steered | state).items()}
    dtype = like_of(model).dtype
    inputs += [_optional("state.given", (), torch.bool)] if state else []
    inputs += [_optional(f"{name}.state", specs[name].shape, dtype, f"{name}.state.batch") for name in state.values()]
    for name in steered.values():
        inputs += [
            _optional(f"{name}.activation", specs[name].shape, dtype, f"{name}.batch"),
            _optional(f"{name}.alpha", (), dtype),
            _optional(f"{name}.strength", (2,), dtype, default=1),
        ]
    labels = {}
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_module" else name_of(node)
        labels[node] = f"pass{pass_of(node)}/{name}" if pass_of(node) else f"steering/{name}"
    metadata = about(model, "lrm") | {
        "connections": [vars(connection) for connection in model.connections],
        "passes": passes,
        "steerable": {given: steered[name_of(node)] for given, node in sources.items()} | steered if steered else {},
    }
    metadata |= {"state": list(state.values())} if state else {}
    metadata |= {"readout": list(read)} if read else {}
    return Program(graph, labels, inputs, root_of(model), fetch_of(model), metadata, output="")


def _spec_of_source(graph: fx.Graph, node: str, name: str, asked: Asked) -> Spec:
    """Of a source that the file takes values for."""
    spec, why = spec_of(find_node(graph, node)), "steerable" if asked.steerable else "stateful"
    if spec.per_sample[0] != 1 or any(spec.per_sample[1:]):
        raise OptionError(f"{why}: the value of {name!r} is not one per sample of the batch: it cannot be an input")
    if asked.any_size and len(spec.shape) > 2:
        raise OptionError(f"dynamic_size: {name!r} would be given as a map of the example's size: export one of both")
    return spec


def _optional(
    name: str, shape: Sequence[int], dtype: torch.dtype, batch: str | None = None, default: float = 0
) -> Input:
    """An input that may be left out; of one with a batch, `shape` is an example's."""
    shape = (1, *shape[1:]) if batch else shape
    return Input(name, torch.empty(shape, dtype=dtype, device="meta"), batch, torch.full(shape, default, dtype=dtype))


def called_in_passes(model: FeedbackModel, trial: Trial, asked: Asked, passes: int | None) -> dict[str, Any]:
    """What the model returns for what the file is given, called as in the file."""
    options: dict[str, Any] = {"passes": passes, **trial.options}
    outputs, signals = call_as_example(model, trial.inputs, method="unroll", return_all=model.return_all, **options)
    values = {"output": outputs}
    if asked.stateful:
        values |= {f"{name}.next_state": value for name, value in signals.items()}
    if asked.outputs and "state" not in options:  # of which readout knows nothing
        read = call_as_example(model, trial.inputs, list(asked.outputs), method="readout", **options)
        values |= {name: [one[name].value for one in read] for name in asked.outputs}
    return values
