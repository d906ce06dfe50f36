"""All graphs of a BU-TD network for one input size and mode; each is built when it is first used."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxfeedback import td_state
from fxfeedback.autograd_bridge import Halves, cut, lift
from fxfeedback.bottom_up import BottomUp, channels_of, weight_of
from fxfeedback.counter_hebb_pass import Learning, key_of, learner
from fxfeedback.errors import Error, NodeNameError, OptionError
from fxfeedback.gates import channel_mean, gate_sites
from fxfeedback.open_modules import open_modules
from fxfeedback.rules.gating import gate
from fxfeedback.shaped import trace_for
from fxfeedback.task_heads import TaskHeads, put_task_heads
from fxfeedback.td_graph import Instructing, instruct
from fxfeedback.trace import annotate_shapes, building, find_node, settled

if TYPE_CHECKING:
    from fxfeedback.butd import BUTD


class Graphs:
    """All graphs of a BU-TD network for one input size and mode; each is built when it is first used."""

    def __init__(self, butd: "BUTD", examples: Sequence[torch.Tensor]) -> None:
        self.butd, self.options = butd, butd.options
        traced, _ = trace_for(butd._net, examples)
        self.bu = open_modules(traced, example_inputs=examples, owner=butd._net)
        task_heads = butd._modules.get("task_heads")
        if isinstance(task_heads, TaskHeads):
            annotate_shapes(self.bu, examples)
            put_task_heads(self.bu, task_heads, self.options.head)
            examples = [*examples, examples[0].new_empty(1, task_heads.n_tasks)]
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
        self._candidates = [] if self.no_head else self.bottom_up.sites(self.head, self.options.sites)

    @functools.cached_property
    def sites(self) -> list[fx.Node]:
        """The gating sites: a rule may bring no instruction to an operand, as attention's to its queries."""
        if not self._candidates:
            return []
        reached = self.td.graph.output_node().args[0]
        missed = [
            name for name in self.options.sites or () if find_node(self.bu.graph, name).meta["name"] not in reached
        ]
        if missed:
            raise NodeNameError(f"sites: no instruction reaches {missed[0]!r} from {self.head.meta['name']!r}")
        return [site for site in self._candidates if site.meta["name"] in reached]

    @functools.cached_property
    def sites_are_batch_first(self) -> bool:
        """Whether a sample's gates can be picked by their first dimension."""
        return all(site.meta["spec"].per_sample[:1] == (1,) for site in self.sites)

    @property
    def can_instruct(self) -> bool:
        return self.no_head is None and bool(self.sites)

    def require_head(self) -> None:
        if self.no_head:
            raise self.no_head
        if not self._candidates:
            raise OptionError(
                f"no gating site lies below the prediction head {self.head.meta['name']!r}, so an instruction reaches "
                "none: pass another head= or sites="
            )

    @property
    def instruction_size(self) -> int:
        """Length of an instruction vector."""
        own_outputs = self.head.meta["spec"].shape[channels_of(self.head)]
        return self.options.instruction_size or self.options.n_tasks or own_outputs

    @functools.cached_property
    def weights(self) -> dict[str, fx.Node]:
        """Weight name -> the linear layer or convolution that it belongs to."""
        return {str(weight_of(node).target): node for node in self.bottom_up.nodes if self.bottom_up.is_weighted(node)}

    def _td_names(self, kind: str, names: Sequence[str]) -> dict[str, str]:
        """Weight name -> qualified name of its TD twin, bias or norm, where there is one."""
        owned = self.butd._modules.get(kind)
        if not isinstance(owned, td_state.ByName):
            return {}
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

    def learning_parameters(self) -> frozenset[str]:
        """The names of those that ask for an update."""
        with settled(self.butd._net), torch.enable_grad():  # of a parametrized one, as its own parameters do
            return frozenset(name for name in self.attributes if self.butd._fetch(name).requires_grad)

    def input_names(self, instructed: bool) -> list[str]:
        return [key_of(node) for node in self.predicting(instructed).graph.nodes if node.op == "placeholder"]

    # -- the graphs ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def td(self) -> fx.GraphModule:
        self.require_head()
        how = Instructing(
            sites=self._candidates,
            head=self.head,
            through_head=self.options.n_tasks is None,
            twins=self.twins,
            td_biases=self.td_biases,
            td_norms=self._td_names("td_norms", list(self.weights)),
            by_channel=self.options.gating == "channel",
        )
        return instruct(self.bu, self.butd._root, how)

    def predicting(self, instructed: bool) -> fx.GraphModule:
        """The BU graph, gated at the sites where it is instructed."""
        if not instructed:
            return self.bu
        lateral = gate if self.options.exact else self.options.lateral_function
        return self._keep("predicting", lambda: gate_sites(self.bu, self.sites, lateral))

    def learner(self, instructed: bool, wanted: frozenset[str], autocast: bool = False, **how: Any) -> fx.GraphModule:
        learning = Learning(
            wanted=wanted,
            twins=self.twins,
            td_biases=self.td_biases,
            noise=self.options.update_noise,
            lateral=None if self.options.exact else self.options.lateral_function,
            sites=frozenset(site.meta["name"] for site in self.sites),
            autocast=autocast,
            **how,
        )
        return self._keep(
            ("learner", instructed, wanted, autocast, *how.items()),
            lambda: learner(self.predicting(instructed), self.butd._root, learning),
        )

    def halves(self, instructed: bool, wanted: frozenset[str], autocast: bool) -> Halves:
        return self._keep(
            ("halves", instructed, wanted, autocast), lambda: cut(self.learner(instructed, wanted, autocast))
        )

    def predict(self, instructed: bool) -> tuple[fx.GraphModule, list[str]]:
        return self._keep(("predict", instructed), lambda: lift(self.predicting(instructed)))

    def check(self) -> None:
        """Build what every use needs, so that errors come early."""
        self.learner(self.can_instruct, self.learning_parameters())
        if self.can_instruct:
            _ = self.td

    def _keep(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            with building(self.butd._net):
                if key not in self._kept:
                    self._kept[key] = make()
        return self._kept[key]

    # -- the instruction pass at run time -----------------------------------------------------------------------------

    def instruct(self, instruction: torch.Tensor) -> dict[str, torch.Tensor]:
        run, names = self._keep("instruct", lambda: lift(self.td))
        return run(instruction, *(self.butd._fetch(name) for name in names))

    def gates(self, counters: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """What the lateral connections take: counter neurons, of each unit or channel; GaLU needs only their sign."""
        by_channel = self.options.gating == "channel"
        values = [
            channel_mean(t, site) if by_channel else t for t, site in zip(counters.values(), self.sites, strict=True)
        ]
        return [(value > 0).to(value.dtype) for value in values] if self.options.exact else values

    def gates_of_all_tasks(self, like: torch.Tensor) -> list[torch.Tensor]:
        """The gates of every task, (n_tasks, ...); computed anew only when a weight has changed."""
        _, names = self._keep("instruct", lambda: lift(self.td))
        tensors = [*(self.butd._fetch(name) for name in names), *self.butd.parameters()]
        version = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if self._gates_of_all is None or self._gates_of_all[0] != version:
            instructions = torch.eye(self.instruction_size, dtype=like.dtype, device=like.device)
            self._gates_of_all = version, self.gates(self.instruct(instructions))
        return self._gates_of_all[1]
