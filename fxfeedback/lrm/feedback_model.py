"""A model with LRM connections, which `add_feedback` makes."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxfeedback.checks import check_passes
from fxfeedback.errors import InputError, NodeNameError
from fxfeedback.graph.nodes import find_node, name_of
from fxfeedback.graph.specs import Sizes, sizes_of
from fxfeedback.lrm.connections import Connection, arrow, block_name, check_connections, link, make_block
from fxfeedback.lrm.modulation import Modulation
from fxfeedback.lrm.parts import TwoParts
from fxfeedback.lrm.plan import Plan, PlanKey, make_plan, steps
from fxfeedback.lrm.readout import Readout
from fxfeedback.lrm.steering import State, Steering, read_state, read_steering, steering_tensors
from fxfeedback.rewrite import Link, Unrolling, name_by_pass, unroll
from fxfeedback.tracing.arguments import Form, example_form
from fxfeedback.tracing.modes import eval_mode
from fxfeedback.tracing.names import without_names
from fxfeedback.tracing.opened import GraphKey, opened
from fxfeedback.tracing.running import bound_as_graph, check_inputs, run_graph
from fxfeedback.tracing.saved import own_part
from fxfeedback.tracing.verify import verify_graph


class FeedbackModel(TwoParts):
    """A model with LRM connections, made by `add_feedback`.

    Parameters and buffers of the user's model are attributes under their own names; the connections' blocks are under
    `modulations`.
    """

    OWN = ("modulations",)
    OPTIONS: tuple[str, ...] = ("passes", "state", "steering", "steer_first_pass", "return_all", "keep_graph")
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
        door: str | None = None,
    ) -> None:
        super().__init__(model, examples, door)
        check_passes(passes)
        vars(self).update(  # past nn.Module, for which a child of the model may have such a name
            connections=tuple(connections), passes=passes, return_all=return_all, checkpoint=checkpoint
        )
        bu = self._bottom_up().graph
        check_connections(bu, self.connections)
        if verify:
            with eval_mode(self):
                verify_graph(self._bottom_up(), self._net, *example_form(self._net, examples))
        makers = {block_name(one): functools.partial(make_block, bu, one) for one in self.connections}
        blocks = {name: own_part(f"modulations.{name}", make, self._like()) for name, make in makers.items()}
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
            passes: how many; default: the model's own number.
            steering: a `Steering` or a dict, or several; applied after every pass.
            steer_first_pass: apply it also before the first pass.
            named: the model's own inputs by name, and its other arguments, of which each value has graphs of its own.

        Raises:
            InputError: arguments that the model does not take, a steering activation of the wrong shape.
            NodeNameError: a steered node that is not a source.
        """
        return_all = self.return_all if return_all is None else return_all
        what = Unrolling(self._passes(passes), return_all, steer_first=steer_first_pass)
        return self._run(inputs, named, what, steering=steering)[0]

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
        """As the call, continuing from the state of an earlier call; returns (outputs, state).

        Args:
            inputs, passes, steering, steer_first_pass, return_all, named: as in the call.
            state: what an earlier call returned; None: start without a signal.
            keep_graph: whether gradients flow through the returned state, for backpropagation through time: all values
                of this call and earlier ones then live as long as the state. By default the state has no history.
        """
        what = Unrolling(self._passes(passes), return_all, steer_first=steer_first_pass)
        outputs, state, _ = self._run(inputs, named, what, state, steering)
        return outputs, state if keep_graph else {name: value.detach() for name, value in state.items()}

    def readout(self, *inputs: Any, passes: int | None = None, **named: Any) -> list[dict[str, Readout]]:
        """A list over passes, of each a dict from node name to `Readout`.

        Args:
            inputs: the model's own, and then the names of nodes, each or in a list; a module's is its last node's.
            passes, named: as in the call.

        Raises:
            NodeNameError: no names, or one that no node has.
        """
        own, names = without_names(inputs)
        graph = self._bottom_up().graph
        found = {name: name_of(find_node(graph, name)) for name in names}
        destinations = {name_of(find_node(graph, c.destination)) for c in self.connections}
        steering, steer_first = named.pop("steering", ()), named.pop("steer_first_pass", False)
        what = Unrolling(self._passes(passes), steer_first=steer_first, readout=tuple(found.values()))
        read = self._run(own, named, what, steering=steering)[2]

        def at(node: str, value: torch.Tensor, before: torch.Tensor, modulation: torch.Tensor | None) -> Readout:
            return Readout(value, before, modulation, value) if node in destinations else Readout(value)

        return [{name: at(node, *one_pass[node]) for name, node in found.items()} for one_pass in read]

    def unrolled(self, passes: int | None = None) -> fx.GraphModule:
        """The flat graph of this many passes: inputs -> (outputs, state, readouts)."""
        return self._unrolled(Unrolling(self._passes(passes)))

    def modulation(self, source: str, destination: str) -> Modulation:
        """The block of one connection."""
        for connection in self.connections:
            if (connection.source, connection.destination) == (source, destination):
                return self.modulations[block_name(connection)]  # type: ignore[return-value]
        known = ", ".join(map(arrow, self.connections))
        raise NodeNameError(f"there is no connection {source} -> {destination}; there are: {known}")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set `checkpoint`, as timm's models do."""
        vars(self)["checkpoint"] = enable

    def as_graph(
        self, args: Sequence[Any], named: Mapping[str, Any], tensors: Any = torch.Tensor
    ) -> tuple[fx.GraphModule, list[Any]]:
        """A call as a graph with names, for whoever traces a model that has this one inside, and the graph's inputs.

        What a later pass n computes anew is called as in the first, followed by `.pass{n}`.

        Args:
            args, named: of the call; tensors without data, or proxies.
            tensors: their classes.
        """
        options, form, inputs, found = bound_as_graph(self, args, named, tensors, ("passes", "return_all"))
        return_all = options.get("return_all")
        what = Unrolling(self._passes(options.get("passes")), self.return_all if return_all is None else return_all)
        sizes = found if looks_at_sizes(self) or form else None
        module = self._unrolled(what, sizes, form)
        name_by_pass(module)
        return module, inputs

    # -- inside -------------------------------------------------------------------------------------------------------

    def _passes(self, passes: int | None) -> int:
        """How many passes a call makes."""
        passes = self.passes if passes is None else passes
        check_passes(passes)
        return passes

    def _run(
        self,
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        what: Unrolling,
        state: State | None = None,
        steering: Any = (),
    ) -> tuple[Any, State, list[dict[str, Any]]]:
        """(outputs, state, readouts) of a call; `what` says all of it but for the state and the steering."""
        if taken := [name for name in self.OPTIONS if name in named]:
            raise InputError(f"{taken[0]}= is an option of unroll, and not of this call")
        form, inputs = self._called(inputs, named)
        if form is None:
            check_inputs(inputs, self._examples)
        state, several = read_state(state), read_steering(steering)
        steered = tuple([one.source for one in several])
        what = Unrolling(what.passes, what.all_outputs, tuple(state), steered, what.steer_first, what.readout)
        plan = self._plan(inputs, what, form)
        self._check_autocast(inputs, form)
        signals = self._signals(plan, inputs, state, several, form is None)
        return run_graph(plan.run, self, inputs, signals, signals[: len(state)])

    def _signals(
        self, plan: Plan, inputs: Sequence[torch.Tensor], state: State, several: Sequence[Steering], as_example: bool
    ) -> list[torch.Tensor]:
        """State and steering as the plan takes them."""
        exact = as_example and all(x.shape[1:] == y.shape[1:] for x, y in zip(inputs, self._examples, strict=True))
        batch, like = next(x.shape[0] for x in inputs if x.ndim), self._like()
        for value, source in zip(state.values(), plan.state, strict=True):
            source.check_state(value, batch)
        signals = list(state.values())
        for one, source in zip(several, plan.steered, strict=True):
            signals += steering_tensors(one, source, batch, exact, like)
        return signals

    def _sizes(self, inputs: Sequence[torch.Tensor], form: Form | None) -> Sizes | None:
        """The sizes and dtypes for which a graph is made; None: a graph serves all."""
        if form is None and not self._by_size:
            return None
        return sizes_of(inputs)

    def _bottom_up(self, sizes: Sizes | None = None, form: Form | None = None) -> fx.GraphModule:
        """The opened graph in the present mode, with shapes: for these sizes and this form; None: see `GraphKey`."""
        return self._kept(("bottom up", GraphKey(self._fingerprint_of_model(), sizes, form)))

    def _unrolled(self, what: Unrolling, sizes: Sizes | None = None, form: Form | None = None) -> fx.GraphModule:
        bu = self._bottom_up(sizes, form)
        return unroll(bu, self._root, [link(bu.graph, connection) for connection in self.connections], what)

    def _plan(self, inputs: Sequence[torch.Tensor], what: Unrolling, form: Form | None) -> Plan:
        """What a call of this form runs; made once."""
        by_size, sizes = self._by_size, self._sizes(inputs, form)
        plan = self._kept(("plan", PlanKey(GraphKey(self._fingerprint(), sizes, form), what, steps(self.checkpoint))))
        return plan if by_size == self._by_size else self._plan(inputs, what, form)  # the first that looks at sizes

    def _graph(self, sizes: Any, form: Form | None) -> fx.Graph:
        return self._bottom_up(None if form is None and not self._by_size else sizes, form).graph

    def _build(self, key: tuple[str, Any]) -> Any:
        kind, how = key
        if kind == "plan":
            return make_plan(self._bottom_up(how.graph.sizes, how.graph.form), self._root, self.connections, how)
        module, by_size = opened(self._net, self._stand_ins(), how.sizes, how.form or self._form, self._door)
        self._by_size |= by_size
        return module


# -- what the rest of the package asks of a model with connections ----------------------------------------------------


def bottom_up_of(model: FeedbackModel) -> fx.GraphModule:
    """Its opened graph for one pass in the present mode, with shapes, at the example's size."""
    return model._bottom_up()


def links_of(model: FeedbackModel) -> list[Link]:
    """Its connections, between nodes of `bottom_up_of(model)`."""
    return [link(bottom_up_of(model).graph, connection) for connection in model.connections]


def looks_at_sizes(model: FeedbackModel) -> bool:
    """Whether a graph of it serves inputs of one size only."""
    bottom_up_of(model)  # which finds out
    return model._by_size
