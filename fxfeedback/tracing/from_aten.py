"""An exported program's graph of aten ops as a graph of torch functions, with the model's tensors by their own names.

What is computed from constants alone is computed now. Ops in place become ops out of place, but for those on buffers.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.export.graph_signature import InputKind

from fxfeedback.errors import TraceError
from fxfeedback.graph.nodes import built_in, user_line
from fxfeedback.rules.ops import ADVANCES, put_at, same, without_gradient
from fxfeedback.tracing.aten_calls import NOTHING, Call, Operator, base_name, may_share, torch_call, writes
from fxfeedback.tracing.attributes import CONSTANT
from fxfeedback.tracing.flat_graph import flattened


class FromAten:
    """The translation of one program.

    graph: the new one, without names; `origin` has the exported node that each of its calls was made for.
    constants: name -> value of the constants that the graph reads and the model does not have.
    """

    def __init__(self, program: Any, prefix: str, inputs: Sequence[str], own: Mapping[str, torch.Tensor]) -> None:
        self.own = own
        flat = flattened(program.graph_module, program.graph)
        self.graph = fx.Graph()
        self.origin: dict[fx.Node, fx.Node] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.nodes = list(flat.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.last_use = {s: self.order[n] for n in self.nodes for s in n.all_input_nodes}
        self.values: dict[fx.Node, Any] = {}  # of each exported node that is no other's value: the new node
        self.known: dict[fx.Node, Any] = {}  # what is computed already
        self.kept: dict[fx.Node, fx.Node] = {}  # constants that the graph reads
        self.same_as: dict[fx.Node, fx.Node] = {}  # a node whose value is another's, as of an op in place
        self.part_of: dict[fx.Node, tuple[fx.Node, Any]] = {}  # x[index] -> x, index
        self.memory: dict[fx.Node, fx.Node] = {}  # whose memory a value lies in
        self.buffers: set[fx.Node] = set()
        self.first_input: fx.Node | None = None
        self._read_inputs(program, prefix, inputs)
        self.constant = self._constant_nodes()

    def _read_inputs(self, program: Any, prefix: str, inputs: Sequence[str]) -> None:
        places = [node for node in self.nodes if node.op == "placeholder"]
        names = iter(inputs)
        for node, spec in zip(places, program.graph_signature.input_specs, strict=True):
            name = str(spec.target).removeprefix(prefix)
            self.memory[node] = node
            if spec.kind is InputKind.USER_INPUT:
                self.values[node] = self.graph.placeholder(next(names))
                self.first_input = self.first_input or self.values[node]
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.values[node] = self.graph.get_attr(name)
                self.buffers.add(node)
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                self.known[node] = self.own.get(name, program.constants[spec.target])
                if name in self.own:
                    self.values[node] = self.graph.get_attr(name)
                    self.buffers.add(node)
            else:
                raise TraceError(f"its graph has {spec.arg.name!r}, a {spec.kind.name}, which is not a tensor")

    # -- what is constant -------------------------------------------------------------------------------------------

    def _constant_nodes(self) -> set[fx.Node]:
        """The nodes that depend on constants alone, and whose memory nothing else writes into."""
        for node in self.nodes:
            first = node.args[0] if node.args else None
            shares = isinstance(first, fx.Node) and may_share(node)
            self.memory.setdefault(node, self.memory[first] if shares else node)  # type: ignore[index]
        written: set[fx.Node] = set()
        while True:
            constant = set(self.known)
            more = set()
            for node in self.nodes:
                if node.op != "call_function":
                    continue
                if constant.issuperset(node.all_input_nodes) and self.memory[node] not in written and _is_pure(node):
                    constant.add(node)
                elif writes(node):
                    more.add(self.memory[node])
            if more <= written:
                return constant
            written |= more

    def _compute(self, node: fx.Node) -> None:
        """The value of a constant node."""
        if writes(node):
            if self.memory[node] in self.buffers:
                raise TraceError(
                    f"its forward writes into a tensor that is a plain attribute of a module{user_line(node)}: make it "
                    "a buffer, by register_buffer"
                )
            self.kept.clear()
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.known.__getitem__)
        with torch.no_grad():
            self.known[node] = node.target(*args, **kwargs)  # type: ignore[operator]

    def _read_constant(self, node: fx.Node) -> Any:
        value = self.known[node]
        if not isinstance(value, torch.Tensor):
            return value
        if node not in self.kept:
            name = f"{CONSTANT}{len(self.constants)}"
            self.constants[name] = value.detach().clone()
            self.kept[node] = self.graph.get_attr(name)
        return self.kept[node]

    # -- the walk -----------------------------------------------------------------------------------------------------

    def run(self) -> list[Any]:
        """Make the graph, but for its output; what is returned, in order."""
        for node in self.nodes:
            if node.op == "output":
                return fx.map_arg(list(node.args[0]), self.value)  # type: ignore[arg-type]
            if node.op == "call_function":
                if node in self.constant:
                    self._compute(node)
                else:
                    self._call(node)
        raise AssertionError("a graph has an output")

    def root(self, node: fx.Node) -> fx.Node:
        """The first node that has the same value, whatever is written into it."""
        while node in self.same_as:
            node = self.same_as[node]
        return node

    def value(self, node: fx.Node) -> Any:
        """The new node of an exported one, as it is by now."""
        node = self.root(node)
        return self.values[node] if node in self.values else self._read_constant(node)

    def _call(self, node: fx.Node) -> None:
        if not isinstance(node.target, Operator):
            args, kwargs = self._arguments(node)
            self.values[node] = self._emit(node, Call(node.target, args, kwargs))
            return
        if base_name(node.target) in NOTHING:
            return
        if writes(node):
            self._write(node)
            return
        call = torch_call(node, *self._arguments(node))
        if call.target is same:
            self.same_as[node] = self.root(node.args[0])  # type: ignore[arg-type]
            return
        index = call.args[1] if call.target is operator.getitem else None
        if base_name(node.target) == "select" and isinstance(node.args[1], int) and isinstance(node.args[2], int):
            index = (slice(None),) * node.args[1] + (node.args[2],) if node.args[1] >= 0 else None
        if index is not None and may_share(node):
            self.part_of[node] = self.root(node.args[0]), index  # type: ignore[arg-type]
        like = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor)]
        if "device" in node.kwargs and not like:
            device = self._emit(node, Call(getattr, (self.first_input, "device")))
            call = call._replace(kwargs={**call.kwargs, "device": device})
        if call.target is F.batch_norm and call.args[5] and not node.users and call.args[1] is not None:
            call = Call(ADVANCES[F.batch_norm], (*call.args[:3], call.args[6]))  # nothing reads it, but they advance
        self.values[node] = self._emit(node, call)

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return fx.map_arg((node.args, node.kwargs), self.value)  # type: ignore[return-value]

    def _emit(self, node: fx.Node, call: Call) -> fx.Node:
        kind = "call_method" if isinstance(call.target, str) else "call_function"
        made = self.graph.create_node(kind, call.target, *_plain(call.args, call.kwargs))
        made.stack_trace = node.stack_trace
        self.origin[made] = node
        return made

    # -- ops in place -------------------------------------------------------------------------------------------------

    def _write(self, node: fx.Node) -> None:
        """An op in place: its first argument has a new value from then on, and so has what that is a part of."""
        source: fx.Node = self.root(node.args[0])  # type: ignore[arg-type]
        args, kwargs = self._arguments(node)
        name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
        self.same_as[node] = source
        if source in self.buffers:
            self._emit(node, Call(name, args, kwargs))
            return
        if name == "detach_":
            self.values[source] = self._emit(node, Call(torch.detach, args))
            return
        call = torch_call(node, args, kwargs)
        new = self._emit(node, call)
        changed = {source}
        self.values[source] = new
        while source in self.part_of:
            source, index = self.part_of[source]
            source = self.root(source)
            changed.add(source)
            new = self._emit(node, Call(put_at, (self.value(source), index, new)))
            if source in self.buffers:
                self._emit(node, Call("copy_", (self.values[source], new)))
                break
            self.values[source] = new
        self._check_overwriting(node, changed)

    def _check_overwriting(self, node: fx.Node, changed: set[fx.Node]) -> None:
        """Refuse to go on where memory that was written into is read under another name."""
        now = self.order[node]
        for other, memory in self.memory.items():
            late = self.last_use.get(other, -1) > now and self.order.get(other, -1) < now
            if late and memory is self.memory[node] and self.root(other) not in changed:
                raise TraceError(
                    f"the op in place {node.target}{user_line(node)} overwrites memory that is read again as "
                    f"{other.name!r}, a view: write it out of place (x = x + y, not x.add_(y))"
                )


def _plain(*values: Any) -> Any:
    """torch.fx's lists as Python's own, numbers as themselves."""

    def convert(value: Any) -> Any:
        if isinstance(value, slice):
            return slice(*map(convert, (value.start, value.stop, value.step)))
        if isinstance(value, tuple):
            return tuple(map(convert, value))
        if isinstance(value, list):
            return [convert(part) for part in value]
        return {key: convert(part) for key, part in value.items()} if isinstance(value, dict) else built_in(value)

    return convert(values)


def _is_pure(node: fx.Node) -> bool:
    """Whether the op draws no numbers, and its sizes are numbers."""
    op = node.target
    if isinstance(op, Operator):
        return torch.Tag.nondeterministic_seeded not in op.tags and base_name(op) not in NOTHING
    return op in (operator.getitem, without_gradient)
