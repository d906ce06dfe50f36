"""`to_butd`: an instructed BU-TD network around any traceable model."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfeedback import td_state
from fxfeedback.counter_hebb_pass import CounterHebb, Halves, Learning, cut, key_of, learner, lift
from fxfeedback.errors import Error, InputError, OptionError
from fxfeedback.open_modules import open_modules
from fxfeedback.rules import RULES
from fxfeedback.rules.gating import gate
from fxfeedback.td_graph import BottomUp, Instructing, batch_norm_of, channel_mean, gate_sites, instruct, weight_of
from fxfeedback.trace import annotate_shapes, example_for, share, trace

Lateral = Callable[[Any, Any], Any]

LATERALS: dict[str, Lateral] = {
    "galu": lambda value, counter: value * (counter > 0),
    "multiply": lambda value, counter: value * counter,
    "add": lambda value, counter: value + counter,
}
CHOICES = {
    "weights": ("shared", "separate"),
    "td_learning": ("mirror", "fixed"),
    "td_init": ("kaiming", "symmetric"),
    "norm": ("shared", "separate"),
    "gating": ("unit", "channel"),
    "heads": ("shared", "per_task"),
    "learning": ("counter_hebb", "backprop"),
}


def to_butd(
    model: nn.Module,
    n_tasks: int | None = None,
    *,
    embedding: int | Sequence[int] | nn.Module | None = None,
    head: str | None = None,
    sites: Sequence[str] | None = None,
    input_size: Sequence[int] | None = None,
    example_inputs: Sequence[torch.Tensor] | None = None,
    instruction_size: int | None = None,
    weights: str = "shared",
    td_learning: str = "mirror",
    td_init: str = "kaiming",
    td_noise: float = 0.0,
    update_noise: float = 0.0,
    td_bias: bool = False,
    norm: str = "shared",
    lateral: str | Lateral = "galu",
    gating: str = "unit",
    heads: str = "shared",
    learning: str = "counter_hebb",
) -> "BUTD":
    """Derive an instructed bottom-up/top-down network from a plain model.

    The result is called like the model, with an instruction behind the inputs: `butd(x, task)`. An instruction pass
    down the transposed network opens the gates of a sub-network, on which the input is then processed; with shared
    weights and GaLU gates `loss.backward()` gives exactly backpropagation's gradients, by Counter-Hebb learning
    ("Biologically Inspired Learning Model for Instructed Vision", NeurIPS 2024, arXiv:2306.02415).

    Args:
        model: any module that torch.fx can trace. It stays as it is; its parameters are shared, not copied.
        n_tasks: how many tasks there are; None: an instruction is a vector over the model's own outputs.
        embedding: the hidden sizes of the instruction head (None, one or several), or a module that takes the
            instruction (B, n_tasks) to the features of the prediction head.
        head: name of the prediction head's node; None finds the last linear layer or convolution that every path to the
            output crosses.
        sites: names of the gating sites; None: every rectifying activation that the instruction reaches.
        input_size: size of one input without its batch; default 224 by 224 with the first convolution's channels.
        example_inputs: instead of input_size, for several inputs: tensors with a batch dimension.
        instruction_size: length of the instruction vector where it is not one-hot over tasks.
        weights: "shared", or "separate": TD has its own weight per BU weight, in `td_weights`.
        td_learning: "mirror" gives TD weights the BU weights' updates, "fixed" none (feedback alignment).
        td_init: "kaiming", or "symmetric": a copy of the BU weights times 1 + td_noise * randn.
        update_noise: each weight's update is multiplied by one draw of 1 + update_noise * randn.
        td_bias: biases in the instruction pass, after every transposed linear op and in the instruction head.
        norm: "separate" gives TD batch norms of its own in the instruction pass, behind each transposed convolution.
        lateral: "galu" v [c > 0], "multiply" v c, "add" v + c, or a function of (value, counter value).
        gating: "unit", or "channel": a channel is on when its counter neurons' mean over positions is positive.
        heads: "shared", or "per_task": one prediction head per task, each starting as the model's own.
        learning: "counter_hebb", or "backprop": autograd differentiates the gated network.

    Raises:
        TraceError: torch.fx cannot trace the model, or it does not run at this size.
        RuleError: an op has no rule.
        NodeNameError: a name that no node has, or no prediction head where instructions need one.
        OptionError: options that do not exist or do not go together.
    """
    options = {name: value for name, value in locals().items() if name in Options.__dataclass_fields__}
    return BUTD(model, Options(**options), example_inputs or example_for(model, input_size))


@dataclass(frozen=True)
class Options:
    """The arguments of `to_butd`, checked."""

    n_tasks: int | None
    embedding: int | Sequence[int] | nn.Module | None
    head: str | None
    sites: Sequence[str] | None
    instruction_size: int | None
    weights: str
    td_learning: str
    td_init: str
    td_noise: float
    update_noise: float
    td_bias: bool
    norm: str
    lateral: str | Lateral
    gating: str
    heads: str
    learning: str

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, choices))}")
        if isinstance(self.lateral, str) and self.lateral not in LATERALS:
            raise OptionError(
                f"lateral={self.lateral!r}: choose one of {', '.join(map(repr, LATERALS))}, or pass a function"
            )
        if self.n_tasks is not None and (not isinstance(self.n_tasks, int) or self.n_tasks < 1):
            raise OptionError(f"n_tasks={self.n_tasks!r}: give the number of tasks, or None for class instructions")
        if self.n_tasks is None and (self.embedding is not None or self.instruction_size is not None):
            raise OptionError("embedding= and instruction_size= belong to an instruction head: pass n_tasks=, too")
        if self.n_tasks is None and self.heads == "per_task":
            raise OptionError('heads="per_task" needs n_tasks=')
        if self.instruction_size is not None and self.heads == "per_task":
            raise OptionError(
                'heads="per_task" needs instructions that are one-hot over tasks: leave out instruction_size='
            )

    @property
    def exact(self) -> bool:
        """Whether the lateral is GaLU, for which updates equal gradients."""
        return self.lateral == "galu"

    @property
    def lateral_function(self) -> Lateral:
        return LATERALS[self.lateral] if isinstance(self.lateral, str) else self.lateral


class BUTD(nn.Module):
    """An instructed BU-TD network, made by `to_butd`.

    Parameters and buffers of the user's model are attributes under their own names. Further state lies, where options
    ask for it, under `instruction_head`, `td_weights`, `td_biases`, `td_norms` and `task_heads`.
    """

    OWN = ("instruction_head", "td_weights", "td_biases", "td_norms", "task_heads")

    def __init__(self, model: nn.Module, options: Options, example_inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._adopt(share(model))
        self.options = options
        self._examples = [torch.empty(1, *x.shape[1:], dtype=x.dtype, device="meta") for x in example_inputs]
        self._cache: dict[Any, Graphs] = {}
        self._add_td_state()
        self._graphs(self._examples).check()

    def _adopt(self, net: nn.Module) -> None:
        """Hold the tensors and submodules of `net` as our own."""
        taken = [name for name in self.OWN if hasattr(net, name)]
        if taken:
            raise OptionError(f"the model's attribute {taken[0]!r} has a name that fxfeedback needs: rename it")
        self.training = net.training
        self._parameters, self._buffers, self._modules = net._parameters, net._buffers, dict(net._modules)
        self._non_persistent_buffers_set = net._non_persistent_buffers_set
        object.__setattr__(self, "_net", net)

    def _add_td_state(self) -> None:
        options, graphs = self.options, self._graphs(self._examples)
        like = next(self.parameters(), torch.empty(0))
        learns = options.learning == "counter_hebb"
        if options.n_tasks is not None:
            features = td_state.in_channels(graphs.head)
            self.instruction_head = (
                self._make_instruction_head(features).to(like).requires_grad_(False).train(self.training)
            )
        if options.heads == "per_task":
            operands = RULES[graphs.head.target].operands(graphs.head.args, graphs.head.kwargs)
            bias = operands.get("bias")
            tensors = [
                self._fetch(str(node.target)) if node is not None else None for node in (operands["weight"], bias)
            ]
            self.task_heads = td_state.TaskHeads(tensors[0], tensors[1], options.n_tasks)
            self._cache.clear()
            graphs = self._graphs(self._examples)
        weights = graphs.weights
        if options.weights == "separate":
            mirrored = learns and options.td_learning == "mirror"
            twins = {name: td_state.twin(self._fetch(name), options.td_init, options.td_noise) for name in weights}
            self.td_weights = td_state.ByName({name: nn.Parameter(t, mirrored) for name, t in twins.items()})
        if options.td_bias:
            biases = {name: td_state.td_bias(self._fetch(name), node) for name, node in weights.items()}
            self.td_biases = td_state.ByName(
                {td_state.module_of(name): nn.Parameter(b, learns) for name, b in biases.items()}
            )
        if options.norm == "separate":
            normed = dict.fromkeys(filter(None, map(batch_norm_of, graphs.bottom_up.nodes)))
            norms = {
                td_state.module_of(name): td_state.td_norm(weights[name]).to(like).requires_grad_(False)
                for name in normed
            }
            self.td_norms = td_state.ByName(norms).train(self.training)

    def _make_instruction_head(self, features: int) -> nn.Module:
        options = self.options
        size = options.instruction_size or options.n_tasks
        if not isinstance(options.embedding, nn.Module):
            return td_state.instruction_head(size, options.embedding, features, options.td_bias)
        parameter = next(options.embedding.parameters(), torch.empty(0))
        made = options.embedding(parameter.new_zeros(2, size))
        if made.shape != (2, features):
            raise OptionError(
                f"embedding=: the module makes {tuple(made.shape[1:])} of an instruction; the head takes ({features},)"
            )
        return options.embedding

    # -- calls --------------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, task: Any = None) -> Any:
        """What the model returns, from the sub-network that the instruction selects.

        Args:
            inputs: the model's own inputs, batch first; behind them `task` may follow.
            task: (B,) integer ids or one integer; or (B, instruction size) floats; None: no instruction, no gates.

        Raises:
            InputError: an instruction of the wrong shape, or an id out of range.
            TraceError: the model does not run on inputs of this size.
        """
        if len(inputs) == len(self._examples) + 1 and task is None:
            *inputs, task = inputs  # type: ignore[assignment]
        if len(inputs) != len(self._examples):
            raise InputError(
                f"the model takes {len(self._examples)} inputs and an instruction, not {len(inputs)} inputs"
            )
        graphs = self._graphs(inputs)
        if task is None and self.options.heads == "per_task":
            raise InputError("there is one prediction head per task: give the call a task")
        if task is None:
            return self._run(graphs, False, list(inputs))
        instruction, ids = self._instruction(task, graphs, inputs[0].shape[0])
        more = [instruction] if self.options.heads == "per_task" else []
        return self._run(graphs, True, [*inputs, *more, *self._gates(graphs, instruction, ids)])

    def counter_neurons(self, task: Any) -> dict[str, torch.Tensor]:
        """Site name -> counter neurons of the instruction pass, (B, ...) like the site's value, 1 sample for one id."""
        graphs = self._graphs(self._examples)
        with torch.no_grad():
            return graphs.instruct(self._instruction(task, graphs, None)[0])

    @property
    def bu(self) -> fx.GraphModule:
        """The BU graph in functional ops, in the present mode, at the example's size."""
        return self._graphs(self._examples).bu

    @property
    def td(self) -> fx.GraphModule:
        """The instruction pass: instruction -> counter neurons at every site."""
        return self._graphs(self._examples).td

    @property
    def learner(self) -> fx.GraphModule:
        """BU pass (gated, if there are sites), error pass and one update node per parameter that learns, in one graph."""
        graphs = self._graphs(self._examples)
        wanted = frozenset(name for name in graphs.attributes if self._fetch(name).requires_grad)
        return graphs.learner(graphs.can_instruct, wanted)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _run(self, graphs: "Graphs", instructed: bool, values: list[torch.Tensor]) -> Any:
        attributes = {name: self._fetch(name) for name in graphs.attributes}
        names = graphs.input_names(instructed)
        wanted = [
            name for name, value in [*zip(names, values, strict=True), *attributes.items()] if value.requires_grad
        ]
        if wanted and torch.is_grad_enabled() and self.options.learning == "counter_hebb":
            halves = graphs.halves(instructed, frozenset(wanted))
            values += [attributes[name] for name in halves.attributes]
            return halves.structure(*CounterHebb.apply(halves, (*names, *halves.attributes), *values))
        predict, needed = graphs.predict(instructed)
        return predict(*values, *(attributes[name] for name in needed))

    def _gates(self, graphs: "Graphs", instruction: torch.Tensor, ids: torch.Tensor | None) -> list[torch.Tensor]:
        """The sites' gates, from one instruction pass; where ids are given, over the tasks instead of over the batch."""
        with torch.no_grad():
            count = self._instruction_size(graphs)
            if ids is None or count > len(ids) or self._instructions_mix():
                return graphs.gates(graphs.instruct(instruction))
            return [gates.index_select(0, ids) for gates in graphs.gates_of_all_tasks(count, like=instruction)]

    def _instructions_mix(self) -> bool:
        """Whether the samples of a batch see each other in the instruction pass, as in a batch norm's statistics."""
        return self.training and (self.options.norm == "separate" or isinstance(self.options.embedding, nn.Module))

    def _instruction_size(self, graphs: "Graphs") -> int:
        options = self.options
        return (
            options.instruction_size
            or options.n_tasks
            or graphs.head.meta["spec"].shape[RULES[graphs.head.target].channels]
        )

    def _instruction(self, task: Any, graphs: "Graphs", batch: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The instruction vectors (B, size) and, where the user gave ids, those (B,); B is 1 for one id for all."""
        graphs.require_head()
        size = self._instruction_size(graphs)
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        task = torch.as_tensor(task, device=like.device)
        if task.is_floating_point():
            if task.ndim != 2 or task.shape[1] != size or (batch is not None and len(task) not in (1, batch)):
                raise InputError(
                    f"an instruction vector has shape ({batch or 'batch'}, {size}), not {tuple(task.shape)}"
                )
            return task.to(like.dtype), None
        if self.options.instruction_size is not None:
            raise InputError(
                f"with instruction_size={size} an instruction is a float vector ({batch or 'batch'}, {size}), not ids"
            )
        if task.dtype == torch.bool or task.ndim > 1 or (task.ndim == 1 and batch is not None and len(task) != batch):
            raise InputError(
                f"instructions are ({batch or 'batch'},) integer ids or ({batch or 'batch'}, {size}) floats, "
                f"not {task.dtype} of shape {tuple(task.shape)}"
            )
        if task.device.type == "cpu" and task.numel() and not 0 <= int(task.min()) <= int(task.max()) < size:
            raise InputError(
                f"instruction ids lie between 0 and {size - 1}; got {int(task.min())} to {int(task.max())}"
            )
        ids = task.reshape(-1).long()
        return F.one_hot(ids, size).to(like.dtype), ids

    def _fetch(self, name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(path), leaf)

    def _graphs(self, inputs: Sequence[torch.Tensor]) -> "Graphs":
        """The graphs for inputs of this size in the present mode of every module; built once."""
        children = (child for name, child in self.named_children() if name not in self.OWN)
        modes = (self.training, *(module.training for child in children for module in child.modules()))
        key = (modes, tuple(x.shape[1:] for x in inputs))
        if key not in self._cache:
            self._cache[key] = Graphs(self, [x[:1].to("meta") for x in inputs])
        return self._cache[key]

    def train(self, mode: bool = True) -> "BUTD":
        """As nn.Module.train."""
        self._net.training = mode
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "BUTD":
        """As nn.Module._apply; buffers keep their identity as parameters do, so that the user's model follows."""
        owners = [
            (module._buffers, name, b)
            for module in self.modules()
            for name, b in module._buffers.items()
            if b is not None
        ]
        super()._apply(fn, recurse)
        for buffers, name, before in owners:
            if torch._has_compatible_shallow_copy_type(before, buffers[name]):
                before.data = buffers[name]
                buffers[name] = before
        self._cache.clear()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}


class Graphs:
    """All graphs of a BU-TD network for one input size and mode; each is built when it is first used."""

    def __init__(self, butd: BUTD, examples: Sequence[torch.Tensor]) -> None:
        self.butd, self.options = butd, butd.options
        self.bu = open_modules(trace(butd._net, len(examples)))
        if "task_heads" in butd._modules:
            self._put_task_heads(examples)
            examples = [*examples, examples[0].new_empty(1, self.options.n_tasks)]
        annotate_shapes(self.bu, examples)
        self.bottom_up = BottomUp(self.bu.graph)
        self._kept: dict[Any, Any] = {}
        self._gates_of_all: tuple[Any, list[torch.Tensor]] | None = None
        try:
            self.head, self.no_head = self.bottom_up.find_head(self.options.head), None
        except Error as error:
            if self.options.n_tasks is not None or self.options.head is not None:
                raise
            self.no_head = error  # a network without a head learns all the same; it only takes no instructions
        self.sites = [] if self.no_head else self.bottom_up.sites(self.head, self.options.sites)

    @property
    def can_instruct(self) -> bool:
        return self.no_head is None and bool(self.sites)

    def require_head(self) -> None:
        if self.no_head:
            raise self.no_head
        if not self.sites:
            raise OptionError("this network has no gating site that an instruction could reach: pass sites=")

    @functools.cached_property
    def weights(self) -> dict[str, fx.Node]:
        """Weight name -> the linear layer or convolution that it belongs to."""
        return {str(weight_of(node).target): node for node in self.bottom_up.nodes if self.bottom_up.is_weighted(node)}

    def _td_names(self, kind: str, names: Sequence[str]) -> dict[str, str]:
        """Weight name -> qualified name of its TD twin, bias or norm, where there is one."""
        if kind not in self.butd._modules:
            return {}
        owned = self.butd._modules[kind]
        keys = {name: name if kind == "td_weights" else td_state.module_of(name) for name in names}
        return {name: f"{kind}.{key}" for name, key in keys.items() if key in owned}

    @functools.cached_property
    def twins(self) -> dict[str, str]:
        return self._td_names("td_weights", list(self.weights))

    @functools.cached_property
    def td_biases(self) -> dict[str, str]:
        return self._td_names("td_biases", list(self.weights))

    @functools.cached_property
    def attributes(self) -> list[str]:
        """The names of all parameters and buffers that BU and TD use."""
        return [
            *dict.fromkeys(str(node.target) for node in self.bottom_up.parameters),
            *self.twins.values(),
            *self.td_biases.values(),
        ]

    def input_names(self, instructed: bool) -> list[str]:
        return [key_of(node) for node in self.predicting(instructed).graph.nodes if node.op == "placeholder"]

    # -- the graphs ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def td(self) -> fx.GraphModule:
        self.require_head()
        how = Instructing(
            sites=self.sites,
            head=self.head,
            through_head=self.options.n_tasks is None,
            twins=self.twins,
            td_biases=self.td_biases,
            td_norms=self._td_names("td_norms", list(self.weights)),
            by_channel=self.options.gating == "channel",
        )
        return instruct(self.bu, self.butd, how)

    def predicting(self, instructed: bool) -> fx.GraphModule:
        """The BU graph, gated at the sites where it is instructed."""
        if not instructed:
            return self.bu
        lateral = gate if self.options.exact else self.options.lateral_function
        return self._keep("predicting", lambda: gate_sites(self.bu, self.sites, lateral))

    def learner(self, instructed: bool, wanted: frozenset[str]) -> fx.GraphModule:
        learning = Learning(
            wanted=wanted,
            twins=self.twins,
            td_biases=self.td_biases,
            noise=self.options.update_noise,
            lateral=None if self.options.exact else self.options.lateral_function,
            sites=frozenset(site.meta["name"] for site in self.sites),
        )
        return self._keep(
            ("learner", instructed, wanted), lambda: learner(self.predicting(instructed), self.butd, learning)
        )

    def halves(self, instructed: bool, wanted: frozenset[str]) -> Halves:
        return self._keep(("halves", instructed, wanted), lambda: cut(self.learner(instructed, wanted)))

    def predict(self, instructed: bool) -> tuple[fx.GraphModule, list[str]]:
        return self._keep(("predict", instructed), lambda: lift(self.predicting(instructed)))

    def check(self) -> None:
        """Build what every use needs, so that errors come early."""
        wanted = frozenset(name for name in self.attributes if self.butd._fetch(name).requires_grad)
        self.learner(self.can_instruct, wanted)
        if self.can_instruct:
            _ = self.td

    def _keep(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    # -- the instruction pass at run time -------------------------------------------------------------------------------

    def instruct(self, instruction: torch.Tensor) -> dict[str, torch.Tensor]:
        run, names = self._keep("instruct", lambda: lift(self.td))
        return run(instruction, *(self.butd._fetch(name) for name in names))

    def gates(self, counters: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """What the lateral connections take: the counter neurons, of each unit or channel; GaLU needs only their sign."""
        by_channel = self.options.gating == "channel"
        values = [
            channel_mean(t, site) if by_channel else t for t, site in zip(counters.values(), self.sites, strict=True)
        ]
        return [(value > 0).to(value.dtype) for value in values] if self.options.exact else values

    def gates_of_all_tasks(self, count: int, like: torch.Tensor) -> list[torch.Tensor]:
        """The gates of every task, (count, ...); computed anew only when a weight has changed."""
        _, names = self._keep("instruct", lambda: lift(self.td))
        tensors = [*(self.butd._fetch(name) for name in names), *self.butd.parameters()]
        version = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if self._gates_of_all is None or self._gates_of_all[0] != version:
            instructions = torch.eye(count, dtype=like.dtype, device=like.device)
            self._gates_of_all = version, self.gates(self.instruct(instructions))
        return self._gates_of_all[1]

    def _put_task_heads(self, examples: Sequence[torch.Tensor]) -> None:
        """Replace the prediction head by one per task: all heads at once, then the sum weighted by the instruction."""
        annotate_shapes(self.bu, examples)
        graph, count = self.bu.graph, self.options.n_tasks
        head = BottomUp(graph).find_head(self.options.head)
        operands = RULES[head.target].operands(head.args, head.kwargs)
        channels, ndim = RULES[head.target].channels, len(head.meta["spec"].shape)
        tasks = ndim - 1 if channels == -1 else 1  # where the tasks lie once the channels are (tasks, outputs)
        self.bu.task_heads = self.butd.task_heads
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            instruction = graph.placeholder("instruction")
            instruction.meta["instruction"] = True
            stacked = {
                operands[name]: graph.get_attr(f"task_heads.{name}")
                for name in ("weight", "bias")
                if operands.get(name)
            }
        with graph.inserting_before(head):
            args, kwargs = fx.map_arg((head.args, head.kwargs), lambda node: stacked.get(node, node))
            all_heads = graph.call_function(head.target, args, kwargs)
            by_task = graph.call_function(torch.unflatten, (all_heads, channels, (count, -1)))
            weights = graph.call_function(
                torch.reshape, (instruction, [count if d == tasks else -1 if d == 0 else 1 for d in range(ndim + 1)])
            )
            chosen = graph.call_function(torch.sum, (graph.call_function(torch.mul, (by_task, weights)), tasks))
        for node in (*stacked.values(), instruction, all_heads, by_task, weights, *chosen.all_input_nodes, chosen):
            node.meta.setdefault("name", f"{head.meta['name']}.{node.name}")
        all_heads.meta["name"] = head.meta["name"]
        head.replace_all_uses_with(chosen)
        graph.eliminate_dead_code()
        self.bu.recompile()
