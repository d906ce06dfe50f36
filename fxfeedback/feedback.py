"""`add_feedback`: long-range modulatory connections between named nodes of any traceable model."""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxfeedback.checks import check_passes
from fxfeedback.errors import ActivationWarning, InputError, NodeNameError, OptionError, TraceError
from fxfeedback.graph.bottom_up import has_effect, never_negative
from fxfeedback.graph.channels import channel_dim
from fxfeedback.graph.layout import layout_of
from fxfeedback.graph.nodes import find_node, is_named, name_of, pass_of, spec_of, specs_of, tell, writes_into_arguments
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.specs import Spec, of_size, size_of
from fxfeedback.lrm.modulation import Modulation
from fxfeedback.lrm.recompute import brief, lean, segmented
from fxfeedback.rewrite import Link, Unrolling, unroll
from fxfeedback.rules import RULES
from fxfeedback.tracing.arguments import Form, example_form
from fxfeedback.tracing.examples import example_for, examples_of
from fxfeedback.tracing.modes import eval_mode
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.saved import own_part
from fxfeedback.tracing.share import put
from fxfeedback.tracing.stand_ins import Shaped
from fxfeedback.tracing.trace_at_size import trace_for
from fxfeedback.tracing.verify import verify_graph
from fxfeedback.tracing.wrapper import Wrapper, not_finite

State = dict[str, torch.Tensor]
Sizes = tuple[tuple[tuple[int, ...] | None, torch.dtype], ...]  # of each input, and its dtype


@dataclass(frozen=True)
class Connection:
    """One LRM connection, from the node `source` to the node `destination`.

    order: "norm-squash-resize", or "resize-norm-squash"; norm: "layer", or "channel"; resize: "bilinear", "bicubic" or
    "area" (see `Modulation`). activation: "relu" or "none" after the modulated destination; "auto": ReLU for vectors
    and channel-first maps, as published, none for tokens and channel-last maps. A pass without a signal has no such
    ReLU: choose a destination that is rectified anyway, the ReLU after a convolution rather than the convolution, or
    "none"; with "auto" `add_feedback` warns of others.
    """

    source: str
    destination: str
    order: str = "norm-squash-resize"
    norm: str = "layer"
    resize: str = "bilinear"
    activation: str = "auto"


@dataclass(frozen=True)
class Steering:
    """What a source hands on instead of its own activation: alpha * activation + (1 - alpha) * its signal.

    activation: shaped like the source's, or with batch 1. strength: factor on the connection's scales, one number or
    (negative, positive).
    """

    source: str
    activation: torch.Tensor
    strength: float | Sequence[float] | torch.Tensor = 1.0
    alpha: float | torch.Tensor = 1.0


class Readout(NamedTuple):
    """A node's value in one pass; at a destination also its value before and after the modulation, and Σ m between.

    modulation is None in a pass in which no connection has a signal.
    """

    value: torch.Tensor
    before: torch.Tensor | None = None
    modulation: torch.Tensor | None = None
    after: torch.Tensor | None = None


def add_feedback(
    model: nn.Module,
    connections: Iterable[Any],
    passes: int = 2,
    *,
    input_size: Sequence[int] | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    checkpoint: bool = False,
    verify: bool = True,
) -> Any:
    """Add long-range modulatory connections to a model and run it in several passes.

    In each pass a destination y becomes relu(y + y Σ m), where m comes from its sources' values: of the previous pass
    for a source that runs later (feedback), of the present pass for one that runs earlier (skip). A destination without
    a signal is left alone, so the first pass of a feedback-only model is the model ("Cognitive Steering in Deep Neural
    Networks via Long-Range Modulatory Feedback Connections", NeurIPS 2023).

    Args:
        model: any module that torch.fx can trace. It stays as it is; its parameters are shared, not copied,
            its attributes and modes are copied, not shared.
        connections: pairs (source, destination), dicts, or `Connection`s; names as `node_names` gives them.
        passes: how many passes a call makes unless it says otherwise.
        input_size: size of one input without its batch; default 224 by 224 with the first convolution's channels.
        example_inputs: instead of input_size, for several inputs: tensors with a batch dimension; a dict gives them by
            name.
        checkpoint: train in less memory and more time, as torch.utils.checkpoint does: the backward pass computes the
            activations again. Also an attribute of what is returned. torch.compile decides for itself what it keeps.
        verify: compare the graph with the model once, on one random sample in evaluation mode. It costs three forward
            passes of that sample.

    Returns:
        A `FeedbackModel`. Where torch.fx cannot trace the whole model, but a part that has all the connections: a copy
        of the model with its own call, in which that part is a `FeedbackModel` that returns its last pass.

    Raises:
        NodeNameError: a name that no node has, or one that cannot be source or destination.
        OptionError: options that do not exist or do not go together, a connection given twice.
        TraceError: torch.fx cannot trace the model, it does not run at this size, or its graph computes something else.

    Warns:
        ActivationWarning: a destination is rectified in the passes that have a signal, and in no others (see
            `Connection`).
    """
    made = _connections(connections)
    try:
        examples = examples_of(model, input_size, example_inputs)
        whole: nn.Module
        whole = rewritten = FeedbackModel(model, made, passes, examples, checkpoint=checkpoint, verify=verify)
    except TraceError as error:
        whole, rewritten = _add_feedback_inside(model, made, passes, input_size, checkpoint, verify, error)
    for message in _new_rectifications(rewritten):
        warnings.warn(message, ActivationWarning, stacklevel=2)
    return whole


def _add_feedback_inside(
    model: nn.Module,
    connections: Sequence[Connection],
    passes: int,
    input_size: Any,
    checkpoint: bool,
    verify: bool,
    whole: TraceError,
) -> tuple[nn.Module, "FeedbackModel"]:
    """A copy of a model that cannot be traced, with the largest traceable part that has all connections rewritten.

    And that part.
    """
    names = [name for c in connections for name in (c.source, c.destination)]
    steps = zip(*(name.split(".")[:-1] for name in names), strict=False)
    path = [step[0] for step in itertools.takewhile(lambda step: len(set(step)) == 1, steps)]
    for part in itertools.accumulate(path, "{}.{}".format):
        inside = len(part) + 1
        try:
            module = model.get_submodule(part)
            moved = [replace(c, source=c.source[inside:], destination=c.destination[inside:]) for c in connections]
            made = FeedbackModel(module, moved, passes, example_for(module, input_size), False, checkpoint, verify)
        except (AttributeError, TraceError):
            continue
        return put(model, part, made), made
    raise TraceError(
        f"{whole} Or let all connections lie inside one part of the model that can be traced, such as its backbone: "
        "that part is then rewritten alone."
    ) from whole


class FeedbackModel(Wrapper):
    """A model with LRM connections, made by `add_feedback`.

    Parameters and buffers of the user's model are attributes under their own names; the connections' blocks lie under
    `modulations`.
    """

    OWN = ("modulations",)
    OPTIONS = ("passes", "state", "steering", "steer_first_pass", "return_all", "keep_graph")
    connections: tuple[Connection, ...]
    passes: int
    return_all: bool
    checkpoint: bool
    _by_size = False  # whether a graph serves inputs of one size only

    def __init__(
        self,
        model: nn.Module,
        connections: Sequence[Connection],
        passes: int,
        examples: Sequence[Any] | Mapping[str, Any],
        return_all: bool = True,
        checkpoint: bool = False,
        verify: bool = False,
    ) -> None:
        super().__init__(model, examples)
        check_passes(passes)
        vars(self).update(  # past nn.Module, for which a child of the model may have such a name
            connections=tuple(connections), passes=passes, return_all=return_all, checkpoint=checkpoint
        )
        bu = self._bottom_up()
        _check_connections(bu, self.connections)
        if verify:
            with eval_mode(self):
                verify_graph(self._bottom_up(), self._net, *example_form(self._net, examples))
        names = [_block_name(c) for c in self.connections]
        for i, name in enumerate(names):
            if name in names[:i]:
                first, second = self.connections[names.index(name)], self.connections[i]
                raise OptionError(
                    f"{first} and {second} would both have the block {name!r}: rename a module of the model"
                )
        blocks = {
            name: own_part(f"modulations.{name}", functools.partial(_block, bu, c)).to(self._like())
            for name, c in zip(names, self.connections, strict=True)
        }
        self.modulations = nn.ModuleDict(blocks)

    def forward(
        self,
        *inputs: torch.Tensor,
        passes: int | None = None,
        steering: Any = (),
        steer_first_pass: bool = False,
        return_all: bool | None = None,
        **named: Any,
    ) -> Any:
        """The model's output of every pass, a list; with return_all=False that of the last pass.

        Args:
            inputs: the model's own.
            passes: how many; default as the model was made.
            steering: a `Steering` or a dict, or several; applied after every pass.
            steer_first_pass: apply it before the first pass, too.
            named: the model's own inputs by name, and its other arguments, of which each value has graphs of its own.

        Raises:
            InputError: arguments that the model does not take, a steering activation of the wrong shape.
            NodeNameError: a steered node that is no source.
        """
        return_all = self.return_all if return_all is None else return_all
        return self._run(inputs, named, passes, None, steering, steer_first_pass, return_all)[0]

    def unroll(
        self,
        *inputs: torch.Tensor,
        passes: int | None = None,
        state: State | None = None,
        steering: Any = (),
        steer_first_pass: bool = False,
        return_all: bool = True,
        keep_graph: bool = False,
        **named: Any,
    ) -> tuple[Any, State]:
        """As the call, from the state of an earlier call on; returns (outputs, state).

        Args:
            inputs, passes, steering, steer_first_pass, return_all, named: as in the call.
            state: what an earlier call returned; None: there is no signal yet.
            keep_graph: whether gradients flow through the returned state, for backpropagation through time: all values
                of this call then live as long as the state does, and those of the calls before it. By default the state
                has no history, so that a loop of any length needs the memory of one call.
        """
        outputs, state, _ = self._run(inputs, named, passes, state, steering, steer_first_pass, return_all)
        return outputs, state if keep_graph else {name: value.detach() for name, value in state.items()}

    def readout(self, *inputs: Any, passes: int | None = None, **named: Any) -> list[dict[str, Readout]]:
        """Node name -> `Readout`, for every pass.

        Args:
            inputs: the model's own, and after them the names of the nodes, one by one or in a list; a module's name
                stands for its last node.
            passes, named: as in the call.

        Raises:
            NodeNameError: no names, or one that no node has.
        """
        own, names = _without_names(inputs)
        graph = self._bottom_up().graph
        found = {name: name_of(find_node(graph, name)) for name in names}
        destinations = {name_of(find_node(graph, c.destination)) for c in self.connections}
        options = {name: named.pop(name) for name in ("steering", "steer_first_pass") if name in named}
        read = self._run(own, named, passes, readout=tuple(found.values()), **options)[2]

        def at(node: str, value: torch.Tensor, before: torch.Tensor, modulation: torch.Tensor | None) -> Readout:
            return Readout(value, before, modulation, value) if node in destinations else Readout(value)

        return [{name: at(node, *one_pass[node]) for name, node in found.items()} for one_pass in read]

    def unrolled(self, passes: int | None = None) -> fx.GraphModule:
        """The flat graph of this many passes: inputs -> (outputs, state, readouts)."""
        passes = self.passes if passes is None else passes
        check_passes(passes)
        return self._unrolled(Unrolling(passes))

    def modulation(self, source: str, destination: str) -> Modulation:
        """The block of one connection."""
        for connection in self.connections:
            if (connection.source, connection.destination) == (source, destination):
                return self.modulations[_block_name(connection)]  # type: ignore[return-value]
        known = ", ".join(f"{c.source} -> {c.destination}" for c in self.connections)
        raise NodeNameError(f"there is no connection {source} -> {destination}; there are: {known}")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set `checkpoint`, as timm's models do."""
        vars(self)["checkpoint"] = enable

    def as_graph(
        self, args: Sequence[Any], named: Mapping[str, Any], tensors: Any = torch.Tensor
    ) -> tuple[fx.GraphModule, list[Any]]:
        """A call as a graph with names, for whoever traces a model that has this one inside, and the graph's inputs.

        What a later pass n computes anew is called as in the first, with `.pass{n}` behind.

        Args:
            args, named: of the call; tensors without data, or proxies.
            tensors: their classes.
        """
        options = {name: named[name] for name in self.OPTIONS if name in named}
        for name in options.keys() - {"passes", "return_all"}:
            raise ValueError(f"a model with connections takes no {name}= inside another one")
        passes, return_all = (
            getattr(self, name) if options.get(name) is None else options[name] for name in ("passes", "return_all")
        )
        check_passes(passes)
        found, inputs = self._bind(args, {name: named[name] for name in named if name not in options}, tensors)
        form = None if found == self._form else found
        self._bottom_up()  # which says whether the model looks at sizes
        sizes = self._sizes([_known(x) for x in inputs], form) if self._by_size or form else None
        module = self._unrolled(Unrolling(passes, return_all), sizes, form)
        graph = module.graph
        for node in graph.nodes:
            name = str(node.target) if node.op == "call_module" and not is_named(node) else name_of(node)
            tell(node, name=f"{name}.pass{pass_of(node)}" if pass_of(node) else name)
        graph.output_node().args = (graph.output_node().args[0][0],)  # type: ignore[index]
        graph.eliminate_dead_code(is_impure_node=has_effect)
        module.recompile()
        return module, inputs

    # -- inside -------------------------------------------------------------------------------------------------------

    def _run(
        self,
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        passes: int | None,
        state: State | None = None,
        steering: Any = (),
        steer_first_pass: bool = False,
        return_all: bool = True,
        readout: tuple[str, ...] = (),
    ) -> tuple[Any, State, list[dict[str, Any]]]:
        passes = self.passes if passes is None else passes
        check_passes(passes)
        if taken := [name for name in self.OPTIONS if name in named]:
            raise InputError(f"{taken[0]}= is an option of unroll, and not of this call")
        form, inputs = self._called(inputs, named)
        if form is None:
            _check_inputs(inputs, self._examples)
        state, several = _state(state), _several(steering)
        steered = tuple([one.source for one in several])
        what = (form, passes, return_all, tuple(state), steered, steer_first_pass, readout)
        plan = self._plan(inputs, what)
        at_example_size = form is None and all(
            x.shape[1:] == y.shape[1:] for x, y in zip(inputs, self._examples, strict=True)
        )
        batch = next(len(x) for x in inputs if x.ndim)
        signals, like = list(state.values()), self._like()
        for name, source in zip(state, plan.state, strict=True):
            source.check_state(name, state[name], batch)
        for one, source in zip(several, plan.steered, strict=True):
            signals += _steering_tensors(one, source, batch, at_example_size, like)
        try:
            return plan.run(self._root, *inputs, *signals)
        except (RuntimeError, TypeError, ValueError) as error:
            expected, found = _shown(self._stand_ins()), _shown(inputs)
            if state:
                expected, found = f"{expected}, state in {like.dtype}", f"{found}, state in {signals[0].dtype}"
            if isinstance(error, torch.OutOfMemoryError) or found == expected:
                raise
            raise InputError(f"the model does not run on {found}, as it was made for {expected}: {error}") from error

    def _sizes(self, inputs: Sequence[torch.Tensor], form: Form | None) -> Sizes | None:
        """The sizes and dtypes for which a graph is made; None: a graph serves all."""
        if form is None and not self._by_size:
            return None
        return tuple([(size_of(x), x.dtype) for x in inputs])

    def _bottom_up(self, sizes: Sizes | None = None, form: Form | None = None) -> fx.GraphModule:
        """The opened graph in the present mode, with shapes; for inputs of these sizes where that makes a difference.

        It does where the model's code branches on sizes, and where its functions write into their arguments: these must
        be opened, and look at sizes. And where a call has not the form of the example.
        """
        return self._kept(("bottom up", self._fingerprint(), sizes, form))

    def _opened(self, sizes: Sizes | None, form: Form | None) -> fx.GraphModule:
        examples = self._stand_ins()
        if sizes is not None:
            examples = [of_size(size, dtype) for size, dtype in sizes]
        traced, by_size = trace_for(self._net, examples, form or self._form)
        module = open_modules(traced, strict=False, owner=self._net)
        annotate_shapes(module, examples)
        writes = any(writes_into_arguments(node) for node in module.graph.nodes)
        self._by_size |= by_size or writes
        if writes:
            module = open_modules(traced, strict=False, example_inputs=examples, owner=self._net)
            annotate_shapes(module, examples)
        return module

    def _unrolled(self, what: Unrolling, sizes: Sizes | None = None, form: Form | None = None) -> fx.GraphModule:
        bu = self._bottom_up(sizes, form)
        return unroll(bu, self._root, [_link(bu, connection) for connection in self.connections], what)

    def _steps(self) -> tuple[Callable[[fx.GraphModule], fx.GraphModule], ...]:
        """What else is done to the unrolled graph: that less is computed, and with gradients that less is kept.

        Not while someone else rewrites the graph or its gradients: torch.compile, a tracer, torch.func.
        """
        others = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
        if others:
            return ()
        if not torch.is_grad_enabled():
            return (brief,)
        return (lean, segmented) if self.checkpoint else (lean,)

    def _plan(self, inputs: Sequence[torch.Tensor], what: tuple[Any, ...]) -> "_Plan":
        """What a call of this form (first of `what`) runs; made once."""
        by_size, sizes = self._by_size, self._sizes(inputs, what[0])
        plan = self._kept(("plan", self._fingerprint(), self._steps(), sizes, what))
        return plan if by_size == self._by_size else self._plan(inputs, what)  # the first graph that looks at sizes

    def _build(self, key: tuple[Any, ...]) -> Any:
        return self._opened(*key[2:]) if key[0] == "bottom up" else self._planned(key)

    def _planned(self, key: tuple[Any, ...]) -> "_Plan":
        *_, steps, sizes, (form, passes, return_all, state, steered, steer_first, readout) = key
        graph = self._bottom_up(sizes, form).graph
        nodes = [find_node(graph, c.source) for c in self.connections]
        sources = {name_of(node): _Source(spec_of(node), channel_dim(node)) for node in nodes}
        names = {name: name_of(find_node(graph, name)) for name in steered}
        for name in [name for name in (*state, *names.values()) if name not in sources]:
            given = "the state" if name in state else "the steering"
            raise NodeNameError(f"{given} has {name!r}, which is no source; sources: {', '.join(sources)}")
        if len(set(names.values())) < len(steered):
            raise OptionError(f"a source is steered twice, in {', '.join(steered)}: give each one steering")
        what = Unrolling(passes, return_all, state, tuple(names.values()), steer_first, readout)
        module = self._unrolled(what, sizes, form)
        for step in steps:
            module = step(module)
        steered_sources = [sources[name] for name in names.values()]
        return _Plan(type(module).forward, [sources[name] for name in state], steered_sources)


# -- what the rest of the package asks of a model with connections ----------------------------------------------------


def bottom_up_of(model: FeedbackModel) -> fx.GraphModule:
    """Its opened graph for one pass in the present mode, with shapes, at the example's size."""
    return model._bottom_up()


def links_of(model: FeedbackModel) -> list[Link]:
    """Its connections, between nodes of `bottom_up_of(model)`."""
    bu = bottom_up_of(model)
    return [_link(bu, connection) for connection in model.connections]


def looks_at_sizes(model: FeedbackModel) -> bool:
    """Whether a graph of it serves inputs of one size only."""
    bottom_up_of(model)  # which finds out
    return model._by_size


class _Source(NamedTuple):
    """What is known of a source's value: its spec, and where its channels are."""

    spec: Spec
    channels: int

    def check_state(self, name: str, value: torch.Tensor, batch: int) -> None:
        """A signal has the source's dimensions, channels and batch; its map may have another size."""
        shape, sizes = tuple(value.shape), self.spec.sizes
        samples = (1, batch * self.spec.per_sample[0])
        if len(shape) != len(sizes) or shape[0] not in samples or shape[self.channels] != sizes[self.channels]:
            raise InputError(f"the state of {name!r} has shape ({self.shown()}), not {shape}; batch: {batch}")

    def check_activation(self, name: str, activation: torch.Tensor, batch: int, exact: bool) -> None:
        """A steering activation is shaped like its source; at another input size only its channels are known."""
        shape, sizes = tuple(activation.shape), self.spec.sizes
        fits = len(shape) == len(sizes) and shape[0] in (1, batch) and shape[self.channels] == sizes[self.channels]
        if fits and exact:
            fits = all(n is None or n == m for n, m in zip(sizes[1:], shape[1:], strict=True))
        if not fits:
            wanted = f"takes an activation of shape ({self.shown()})"
            raise InputError(f"steering {name!r} {wanted}, not {shape}; batch: 1 or {batch}")

    def shown(self) -> str:
        return ", ".join("batch" if n is None else str(n) for n in self.spec.sizes)


@dataclass(eq=False)
class _Plan:
    """What a call runs.

    run: the unrolled graph as a function of the module with the tensors and the blocks, of inputs, state and steering.
    state, steered: the sources that have a signal already, and those that are steered.
    """

    run: Callable[..., Any]
    state: list[_Source]
    steered: list[_Source]


FORM = "give (source, destination), a dict or a Connection, with names of nodes"


def _connections(given: Any) -> list[Connection]:
    if isinstance(given, (str, Mapping, Connection)) or not isinstance(given, Iterable):
        raise OptionError(f"connections={given!r}: give a list, of each connection {FORM.removeprefix('give ')}")
    return [_connection(one) for one in given]


def _connection(given: Any) -> Connection:
    if isinstance(given, Connection):
        return given
    try:
        made = Connection(**given) if isinstance(given, Mapping) else Connection(*given)
    except TypeError as error:
        raise OptionError(f"{given!r} is no connection ({error}): {FORM}") from None
    if not isinstance(made.source, str) or not isinstance(made.destination, str):
        raise OptionError(f"{given!r} is no connection: {FORM}")
    return made


def _check_connections(bu: fx.GraphModule, connections: Sequence[Connection]) -> None:
    graph = bu.graph
    seen: set[tuple[fx.Node, fx.Node]] = set()
    activations: dict[fx.Node, str] = {}
    reaching = _reaching_output(graph)
    for connection in connections:
        source, destination = find_node(graph, connection.source), find_node(graph, connection.destination)
        arrow = f"{connection.source} -> {connection.destination}"
        if (source, destination) in seen:
            raise OptionError(f"the connection {arrow} is given twice")
        seen.add((source, destination))
        for node, role in ((source, "source"), (destination, "destination")):
            if not _is_vector_or_map(node):
                raise NodeNameError(f"{arrow}: the {role} {name_of(node)!r} is no vector and no map")
        samples = [spec_of(node).per_sample[0] for node in (source, destination)]
        if 0 in samples or samples[0] != samples[1]:
            node = destination if samples[1] != 1 else source
            what = "is the same for all samples" if 0 in samples else "has several parts of an input in its batch"
            raise NodeNameError(f"{arrow}: {name_of(node)!r} {what}, and cannot be matched sample by sample")
        onto, positions = (len(layout_of(node).size) for node in (destination, source))
        if not _can_be_resized(source) or (onto and positions and onto != positions):
            raise NodeNameError(
                f"{arrow}: a source with {positions} dimensions of positions cannot be resized to a destination with "
                f"{onto}: both have the same number, at most three, or one of them is a vector"
            )
        if destination not in reaching:
            raise NodeNameError(f"{arrow}: the model's output does not depend on {connection.destination!r}")
        if connection.activation not in ("auto", "relu", "none"):
            raise OptionError(f"activation={connection.activation!r}: choose one of 'auto', 'relu', 'none'")
        activation = _activation(connection, destination)
        if activations.setdefault(destination, activation) != activation:
            raise OptionError(f"{arrow}: connections into one destination must agree on activation=")


def legal_ends(graph: fx.Graph) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes of a graph with shapes that may be sources, and those that may be destinations."""
    ends = {node for node in graph.nodes if _is_vector_or_map(node) and spec_of(node).per_sample[0]}
    return {node for node in ends if _can_be_resized(node)}, ends & _reaching_output(graph)


def _is_vector_or_map(node: fx.Node) -> bool:
    spec = specs_of(node)
    return isinstance(spec, Spec) and len(spec.shape) >= 2 and spec.dtype.is_floating_point


def _can_be_resized(node: fx.Node) -> bool:
    """Whether a vector or map has at most three dimensions of positions."""
    return len(spec_of(node).shape) <= 5


def _reaching_output(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the output depends on."""
    reaching = set(graph.output_node().all_input_nodes)
    for node in reversed(graph.nodes):
        if node in reaching:
            reaching.update(node.all_input_nodes)
    return reaching


def _block_name(connection: Connection) -> str:
    return f"{connection.source}_to_{connection.destination}".replace(".", "_")


def _block(bu: fx.GraphModule, connection: Connection) -> Modulation:
    source, destination = (layout_of(find_node(bu.graph, n)) for n in (connection.source, connection.destination))
    return Modulation(source, destination, connection.order, connection.norm, connection.resize)


def _link(bu: fx.GraphModule, connection: Connection) -> Link:
    source, destination = find_node(bu.graph, connection.source), find_node(bu.graph, connection.destination)
    return Link(source, destination, f"modulations.{_block_name(connection)}", _activation(connection, destination))


def _activation(connection: Connection, destination: fx.Node) -> str:
    """ "relu" or "none"; "auto" decides by the destination's layout."""
    if connection.activation != "auto":
        return connection.activation
    return "relu" if layout_of(destination).kind in ("vector", "map") else "none"


def _new_rectifications(model: FeedbackModel) -> list[str]:
    """A warning of each destination that only the default activation rectifies, and only where there is a signal."""
    graph = model._bottom_up().graph
    rectified, messages = never_negative(graph), {}
    for connection in model.connections:
        node = find_node(graph, connection.destination)
        if connection.activation == "auto" and _activation(connection, node) == "relu" and node not in rectified:
            after = _next_rectified(node, rectified)
            messages[node] = (
                f"the destination {connection.destination!r} is not rectified in the model, but is in every pass that "
                "has a signal, as published, so that such passes differ from the first by this ReLU, too. Say "
                'activation="none", or connect to '
                + (f"{name_of(after)!r}, which is rectified" if after else "a node after a ReLU")
                + '; activation="relu" keeps it, without this warning'
            )
    return list(messages.values())


def _next_rectified(node: fx.Node, rectified: set[fx.Node]) -> fx.Node | None:
    """The first rectified node that reads `node`, directly or through norms and the like that nothing else reads."""
    while len(node.users) == 1:
        (node,) = node.users
        if node in rectified:
            return node
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is None or rule.weight:
            return None
    return None


def _shown(inputs: Sequence[torch.Tensor]) -> str:
    """(batch, 3, 224, 224) in torch.float32, of each input"""
    return ", ".join(f"({', '.join(map(str, ('batch', *x.shape[1:])))}) in {x.dtype}" for x in inputs)


def _without_names(inputs: Sequence[Any]) -> tuple[Sequence[Any], list[str]]:
    """A model's inputs, and the names after them."""

    def is_names(given: Any) -> bool:
        is_list = isinstance(given, (list, tuple)) and all(isinstance(name, str) for name in given)
        return isinstance(given, str) or is_list

    number = sum(1 for _ in itertools.takewhile(is_names, reversed(inputs)))
    own, names = inputs[: len(inputs) - number], inputs[len(inputs) - number :]
    if not number:
        raise NodeNameError("no node is named: readout(x, 'layer3', 'layer4') reads two, after the model's inputs")
    return own, [name for given in names for name in ([given] if isinstance(given, str) else given)]


def _state(given: Any) -> State:
    """Name -> signal, as an earlier call returned it."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(value, torch.Tensor) for value in given.values()):
        raise InputError("state= maps names of sources to tensors: give what unroll returned")
    return dict(given)


def _several(steering: Any) -> list[Steering]:
    """One or several steerings, as objects or dicts."""
    several = [steering] if isinstance(steering, (Steering, Mapping, str)) else list(steering or ())
    return [one if isinstance(one, Steering) else _steering(one) for one in several]


def _steering(given: Any) -> Steering:
    try:
        return Steering(**given)
    except TypeError as error:
        raise OptionError(
            f"{given!r} is no steering ({error}): give a Steering, or a dict with its arguments"
        ) from None


def _steering_tensors(
    given: Steering, source: _Source, batch: int, exact: bool, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(activation, alpha, strength) as the graph takes them."""
    activation, strength, alpha = (_steering_tensor(given, what, like) for what in ("activation", "strength", "alpha"))
    source.check_activation(given.source, activation, batch, exact)
    if strength.numel() not in (1, 2) or alpha.numel() != 1:
        raise InputError(f"steering {given.source!r}: strength is one number or two (negative, positive), alpha is one")
    return activation, alpha.reshape(()), strength.reshape(-1).expand(2)


def _steering_tensor(given: Steering, what: str, like: torch.Tensor) -> torch.Tensor:
    """The activation, strength or alpha of a steering in our dtype, on our device."""
    value = getattr(given, what)
    try:
        tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, dtype=like.dtype)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"steering {given.source!r}: {what}={value!r} is not a number or a tensor") from None
    made = tensor.to(like.device, like.dtype)
    if not_finite(tensor) or not_finite(made):
        raise InputError(
            f"steering {given.source!r}: {what} has values that are not finite (NaN, or too large for {like.dtype})"
        )
    return made


def _known(x: Any) -> torch.Tensor:
    """A tensor with the size and the dtype of an input of a traced call."""
    if isinstance(x, fx.Proxy) and not isinstance(x, Shaped):
        raise ValueError("a model with connections inside another one looks at the size of its input")
    return x.small if isinstance(x, Shaped) else x


def _check_inputs(inputs: Sequence[torch.Tensor], examples: Sequence[torch.Tensor]) -> None:
    """Tensors with as many dimensions as their examples."""
    for x, example in zip(inputs, examples, strict=True):
        if x.ndim != example.ndim:
            wanted = ", ".join(["batch", *map(str, example.shape[1:])])
            raise InputError(f"an input of shape {tuple(x.shape)} has not the dimensions of ({wanted})")
