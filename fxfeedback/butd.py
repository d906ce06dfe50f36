"""`to_butd`: an instructed BU-TD network around any traceable model."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import fx, nn

from fxfeedback.errors import InputError
from fxfeedback.graph.nodes import name_of
from fxfeedback.graph.specs import sizes_of
from fxfeedback.instructed.autograd_bridge import learned, refuse_transforms
from fxfeedback.instructed.feedback_methods import FeedbackMethods
from fxfeedback.instructed.graphs import Graphs
from fxfeedback.instructed.instruction import read_instruction
from fxfeedback.instructed.kept_graphs import graphs_of
from fxfeedback.instructed.magnitudes import Drawn
from fxfeedback.instructed.options import Lateral, Options
from fxfeedback.instructed.parts import make_instruction_head, make_task_heads, make_td_parts
from fxfeedback.one_task.select_task import select_task
from fxfeedback.tracing.arguments import example_form
from fxfeedback.tracing.autocast import is_autocast
from fxfeedback.tracing.examples import examples_of
from fxfeedback.tracing.modes import eval_mode
from fxfeedback.tracing.verify import verify_graph
from fxfeedback.tracing.while_tracing import building


def to_butd(
    model: nn.Module,
    n_tasks: int | None = None,
    *,
    embedding: int | Sequence[int] | nn.Module | None = None,
    head: str | None = None,
    sites: Sequence[str] | None = None,
    input_size: Sequence[int] | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    instruction_size: int | None = None,
    weights: str = "shared",
    td_learning: str | None = None,
    td_init: str | None = None,
    td_noise: float = 0.0,
    td_magnitude: str | None = None,
    td_scale: str | float | None = None,
    direct: str | None = None,
    td_decay: float = 0.0,
    td_clip: float | None = None,
    instruction_learning: str = "fixed",
    update_noise: float = 0.0,
    td_bias: bool = False,
    norm: str = "shared",
    lateral: str | Lateral = "galu",
    counter_scale: str | None = None,
    gating: str = "unit",
    heads: str | Sequence[int] = "shared",
    learning: str = "counter_hebb",
    door: str | None = None,
    verify: bool = True,
) -> "BUTD":
    """Derive an instructed bottom-up/top-down network from a plain model.

    The result is called like the model, with an instruction after the inputs: `butd(x, task)`. An instruction pass
    down the transposed network opens the gates of a sub-network, on which the input is then processed; with shared
    weights and GaLU gates `loss.backward()` gives exactly backpropagation's gradients, by Counter-Hebb learning
    ("Biologically Inspired Learning Model for Instructed Vision", NeurIPS 2024, arXiv:2306.02415).

    Args:
        model: any module. It is not changed. The result shares its parameters, and copies its attributes and modes.
        n_tasks: how many tasks there are; None: an instruction is a vector over the model's own outputs.
        embedding: the instruction head's hidden sizes (None, one, several), or a module: instruction -> features.
        head: name of the prediction head's node; None finds the last linear layer or convolution that every path to the
            output crosses. Of several outputs, "out" or "logits" is taken; where there is neither, name the head.
        sites: names of the gating sites; None: every rectifying activation that the instruction reaches.
        input_size: size of one input without its batch; default 224 by 224 with the first convolution's channels.
        example_inputs: instead of input_size: a tuple of tensors with a batch dimension, or a dict of them by name.
        instruction_size: length of the instruction vector, if it is not one-hot over tasks.
        weights: what TD reads: "shared", the BU weights; "separate": its own weight for each, in `td_weights`; "sign":
            the BU weights' signs, times a magnitude; "direct": no weight at all, fixed random ones in `td_weights`
            broadcast the error at the logits to every layer.
        td_learning: of separate weights. "mirror", the default, gives them the BU weights' updates, "fixed" none
            (feedback alignment); "weight_mirror": they learn in `mirror_step`.
        td_init: "kaiming", the default, or "symmetric": a copy of the BU weights times 1 + td_noise * randn.
        td_magnitude: of signs. "uniform", the default: one number for all; "batch": drawn in every call in training
            mode, in evaluation mode their mean; "fixed": drawn once. They are in `magnitudes`.
        td_scale: of magnitudes, their root mean square: "xavier", the default, √(2 / (fan in + fan out)), "kaiming",
            1 / √(3 fan in), or a number.
        td_decay: with td_learning="mirror", adds this times themselves to the updates of both weights: under SGD their
            difference shrinks whatever the data (Kolen and Pollack).
        direct: of direct feedback. "op", the default: each linear layer or convolution hands its input the error,
            broadcast as by its own transpose; "unit": each site has a dense random weight to all of its units.
        instruction_learning: "straight-through": the instruction head learns, through the gates ([-1 <= t <= 1] stands
            for their derivative) and up the instruction pass; "fixed": as published, no gradient reaches it.
        td_clip: clamps what a linear layer or convolution hands to input, weight and bias to [-td_clip, td_clip].
        update_noise: each weight's update is multiplied by one draw of 1 + update_noise * randn.
        td_bias: biases in the instruction pass, after every transposed linear op and in the instruction head.
        norm: "separate" gives TD batch norms of its own in the instruction pass, after each transposed convolution.
        lateral: "galu" v [c > 0], "multiply" v c, "add" v + c, or a function of (value, counter value).
        counter_scale: "unit": the lateral takes c over its root mean square at the site; else c is too small to learn.
        gating: "unit", or "channel": a channel is on when its counter neurons' mean over positions is positive.
        heads: "shared"; or "per_task": one prediction head per task, each starting as the model's own; or a list, one
            per task with so many outputs: the call's outputs are then as many as the largest head's, and those that
            the sample's task does not have are -inf, which is as nothing to a softmax or cross-entropy.
        learning: "counter_hebb", or "backprop": autograd differentiates the gated network.
        door: "fx": trace the model by torch.fx; "export": by torch.export; None: by that where torch.fx cannot.
        verify: compare the graph with the model once, by a forward pass of each on one random sample.

    Raises:
        TraceError: the model cannot be traced, does not run at this size, or its graph computes something else.
        RuleError: an op has no rule.
        NodeNameError: a name that no node has, or no prediction head although instructions need one.
        OptionError: options that do not exist or cannot be combined.
    """
    options = {name: value for name, value in locals().items() if name in Options.__dataclass_fields__}
    return BUTD(model, Options(**options), examples_of(model, input_size, example_inputs), verify, door=door)


class BUTD(FeedbackMethods):
    """An instructed BU-TD network, made by `to_butd`.

    Parameters and buffers of the user's model are attributes under their own names. Further state, if
    options ask for it, is under `instruction_head`, `td_weights`, `td_magnitudes`, `td_biases`, `td_norms` and
    `task_heads`.
    """

    OPTIONS = ("task",)
    OWN = ("instruction_head", "td_weights", "td_magnitudes", "td_biases", "td_norms", "task_heads")
    untraceable = "is a BU-TD network already: connections come first, and to_butd takes the whole model at once"

    def __init__(
        self, model: nn.Module, options: Options, example_inputs: Any, verify: bool = False, **kw: Any
    ) -> None:
        super().__init__(model, example_inputs, **kw)
        vars(self).update(options=options, _drawn=Drawn())  # past nn.Module, and not the model's
        if verify:
            with eval_mode(self):
                bu = self._bottom_up(sizes_of(self._stand_ins()))
                verify_graph(bu, self._net, *example_form(self._net, example_inputs))
        self._add_td_state()
        graphs_of(self).check()

    def _add_td_state(self) -> None:
        """Make the parameters and modules that the options ask for."""
        if self.options.n_tasks is not None:
            self.instruction_head = self._own("instruction_head", make_instruction_head(graphs_of(self), self._like()))
        if self.options.heads != "shared":
            self.task_heads = make_task_heads(graphs_of(self))
        for name, part in make_td_parts(graphs_of(self), self._like()).items():
            setattr(self, name, self._own(name, part) if name == "td_norms" else part)

    def _own(self, name: str, module: nn.Module) -> nn.Module:
        """`module` in our dtype, on our device, in our mode; no gradient flows in the instruction pass, but for a head
        that learns."""
        learns = name == "instruction_head" and self.options.instruction_learning != "fixed"
        return module.to(self._like()).requires_grad_(learns).train(self.training)

    def forward(self, *inputs: Any, task: Any = None, **named: Any) -> Any:
        """What the model returns, from the sub-network that the instruction selects.

        Args:
            inputs: the model's own, batch first. After as many as the example had, `task` may follow.
            task: (B,) integer ids or one integer; or (B, instruction size) floats; None: no instruction, no gates.
            named: the model's own, by name. Tensors are inputs; every other value has graphs of its own.

        Raises:
            InputError: arguments that the model does not take, an instruction of the wrong shape, an id out of range.
            TraceError: the model does not run on inputs of this size.
        """
        inputs, task = self._without_task(inputs, task)
        form, tensors = self._called(inputs, named)
        per_task = self.options.heads != "shared"
        if task is None and per_task:
            raise InputError("there is one prediction head per task: give the call a task")
        graphs = self._graphs(tensors, form)
        self._check_autocast(tensors, form)
        drawn = self._drawn_magnitudes(graphs)
        if task is None:
            return self._run(graphs, False, False, tensors, drawn)
        batch = next(x.shape[0] for x in tensors if x.ndim)
        instruction, ids = self._instruction(task, graphs, batch)
        learning = self._learning_gates(graphs, instruction, batch)
        rows, gates = ([], learning) if learning else self._gates(graphs, instruction, ids, batch, drawn)
        values = [*tensors, *([instruction] if per_task else []), *rows, *gates]
        return self._run(graphs, True, len(rows) > 0, values, drawn)

    def counter_neurons(self, task: Any) -> dict[str, torch.Tensor]:
        """Site name -> counter neurons of the instruction pass, (B, ...) like the site's value; B is 1 for one id."""
        graphs = graphs_of(self)
        with torch.no_grad():
            drawn = self._drawn_magnitudes(graphs)
            return graphs.instruct(self._instruction(task, graphs, None)[0], drawn)

    def select(self, task: Any, input_size: Sequence[int] | None = None) -> fx.GraphModule:
        """One task's network: the model's inputs in, what `self(*inputs, task)` returns in evaluation mode out.

        The instruction pass is done now, so that the gates are constants; channels that are off, and those that are
        unused, are removed from the weights. Above all with gating="channel" the network is smaller. What is removed
        counts as zero: where the whole network multiplies an infinite value by a closed gate, it gives NaN and this
        one does not.

        Args:
            task: an id, or an instruction vector (1, instruction size).
            input_size: size of one input without its batch, for which the gates are made; default: the example's.

        Returns:
            A module with tensors of its own, under the model's names. Later changes of this network do not affect it.

        Raises:
            InputError: an id out of range, a vector of the wrong shape, or several inputs and an input_size.
            NodeNameError, OptionError: the network takes no instruction.
        """
        with eval_mode(self), building(self._net), torch.no_grad():
            examples = self._stand_ins()
            if input_size is not None:
                if len(examples) > 1:
                    raise InputError("input_size= is for models with one input: call to_butd with other example_inputs")
                examples = [examples[0].new_empty(1, *input_size)]
            graphs = self._graphs(examples)
            return select_task(graphs, self._instruction(task, graphs, 1)[0], examples)

    @property
    def head(self) -> str | None:
        """The name of the prediction head's node; None where there is none, and so no instruction.

        A part of the model's that is called so is `get_submodule("head")`.
        """
        graphs = graphs_of(self)
        return None if graphs.no_head else name_of(graphs.head)

    @property
    def bu(self) -> fx.GraphModule:
        """The BU graph in functional ops, in the present mode, at the example's size."""
        return graphs_of(self).bu

    @property
    def td(self) -> fx.GraphModule:
        """The instruction pass: instruction -> counter neurons at every site."""
        return graphs_of(self).td

    @property
    def learner(self) -> fx.GraphModule:
        """BU pass (gated, if there are sites), error pass and one update node per learning parameter, in one graph."""
        graphs = graphs_of(self)
        return graphs.learner(graphs.can_instruct, graphs.learning_parameters())

    # -- inside -------------------------------------------------------------------------------------------------------

    def _run(
        self, graphs: Graphs, instructed: bool, by_row: bool, values: list[torch.Tensor], drawn: list[torch.Tensor]
    ) -> Any:
        call = graphs.call(instructed, by_row)
        tensors = dict(zip(call.inputs, values, strict=True)) | {n: self._fetch(n) for n in call.all_attributes}
        wanted = frozenset([name for name, tensor in tensors.items() if tensor.requires_grad])
        learns = self.options.learning == "counter_hebb" and 0 not in values[0].shape  # kernels refuse an empty batch
        if wanted and torch.is_grad_enabled() and learns:
            refuse_transforms()
            halves = graphs.halves(instructed, by_row, wanted, is_autocast(values[0]))
            values += [*drawn, *(tensors[name] for name in halves.attributes)]
            names = (*call.inputs, *graphs.magnitudes(), *halves.attributes)
            return halves.structure(None, *learned(halves, names, values))
        return call.run(None, *values, *[tensors[name] for name in call.attributes])

    def _switch_own(self, mode: bool) -> Self:
        self._cache.gates = None
        return super()._switch_own(mode)

    def _instruction(self, task: Any, graphs: Graphs, batch: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return read_instruction(task, graphs.gating().size, batch, self._like(), self.options.instruction_size is None)


# -- what the rest of the package asks of a BU-TD network ------------------------------------------------------------


def instruction_of(butd: BUTD, task: Any) -> torch.Tensor:
    """The instruction vector (1, size) of one task: an id, or a vector.

    Raises:
        InputError: an id out of range, a vector of the wrong shape.
    """
    return butd._instruction(task, graphs_of(butd), 1)[0]
