"""All graphs of a BU-TD network for one input size and mode; each is built when it is first used."""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from fxfeedback.counter_hebb_pass import Learning, key_of, learner
from fxfeedback.errors import Error, NodeNameError, OptionError
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.channels import channels_of, positions_of
from fxfeedback.graph.copies import copied
from fxfeedback.graph.nodes import find_node, name_of, spec_of, user_line
from fxfeedback.graph.operands import operand
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.instructed.gates import gate_sites
from fxfeedback.instructed.halves import Halves, cut, lift
from fxfeedback.instructed.owner import Owner
from fxfeedback.instructed.runs import Call, Gating
from fxfeedback.instructed.task_heads import with_task_heads
from fxfeedback.instructed.weighted import Weighted
from fxfeedback.instruction_pass import Instructing, instruct
from fxfeedback.rules.gating import gate
from fxfeedback.tracing.by_id import Shelf, by_id, known_by_id
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.open_operators import open_operators
from fxfeedback.tracing.while_tracing import building, forget, settled

Method = TypeVar("Method", bound=Callable[..., Any])
MAKERS: dict[str, Callable[..., Any]] = {}
"""The methods of `Graphs` that are `kept`, by name."""


def kept(make: Method) -> Method:
    """A method of `Graphs` with positional arguments only, whose result is made once, under the tracers' lock.

    To torch.compile, which could not trace it, the making is a constant.
    """
    name = make.__name__
    MAKERS[name] = make

    @functools.wraps(make)
    def get(self: "Graphs", *how: Any) -> Any:
        return getattr(self.made, _made_once(id(self), name, how))

    return get  # type: ignore[return-value]


@torch.compiler.assume_constant_result
def _made_once(graphs: int, name: str, how: tuple[Any, ...]) -> str:
    return by_id(graphs).make_once(name, how)


class Graphs(Weighted):
    """All graphs of a BU-TD network for one input size and mode; each is built when it is first used."""

    def __init__(self, owner: Owner, bu: fx.GraphModule, examples: Sequence[torch.Tensor]) -> None:
        """`bu`: the model's opened graph with shapes, at the examples' sizes; it stays as it is."""
        known_by_id(self)
        self.owner, self.options = owner, owner.options
        self.bu = bu if owner.task_heads is None else with_task_heads(bu, owner.task_heads, self.options.head, examples)
        self.bottom_up = BottomUp(self.bu.graph)
        self.draws = self.options.draws and (owner.net.training or owner.always_draws)
        self.made = Shelf()
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
        missed = [name for name in self.options.sites or () if name_of(find_node(self.bu.graph, name)) not in reached]
        if missed:
            raise NodeNameError(f"sites: no instruction reaches {missed[0]!r} from {name_of(self.head)!r}")
        return [site for site in self._candidates if name_of(site) in reached]

    @property
    def can_instruct(self) -> bool:
        return self.no_head is None and bool(self.sites)

    def require_sites(self, option: str) -> list[fx.Node]:
        """The sites, for an option that needs some."""
        if not self.can_instruct:
            raise OptionError(f"{option}: there is no gating site: choose some by sites=") from self.no_head
        return self.sites

    def require_head(self) -> None:
        if self.no_head:
            raise self.no_head
        if not self._candidates:
            raise OptionError(
                f"no gating site lies below the prediction head {name_of(self.head)!r}, so an instruction reaches "
                "none: pass another head= or sites="
            )

    @property
    def instruction_size(self) -> int:
        """Length of an instruction vector."""
        own_outputs = spec_of(self.head).shape[channels_of(self.head)]
        return self.options.instruction_size or self.options.n_tasks or own_outputs

    def require_head_of_its_own(self) -> None:
        """One head per task replaces the head's weights: refuse where forward also reads them elsewhere."""
        for source in (operand(self.head, name) for name in ("weight", "bias")):
            others = [node for node in source.users if node is not self.head] if isinstance(source, fx.Node) else []
            if isinstance(source, fx.Node) and (others or source.op != "get_attr"):
                where = others[0] if others else source
                raise OptionError(
                    f"heads={self.options.heads!r}: the weights of the head {name_of(self.head)!r} are read or "
                    f"computed at {name_of(where)!r}{user_line(where)} as well, which would not follow the task: pass "
                    "another head="
                )

    @functools.cached_property
    def attributes(self) -> list[str]:
        """The names of all parameters and buffers that BU and TD use."""
        return [
            *dict.fromkeys(str(node.target) for node in self.bottom_up.parameters),
            *(f"td_weights.{name}" for name in self.owner.td_part("td_weights") or ()),
            *self.td_names("td_magnitudes", list(self.weights)).values(),
            *self.td_biases.values(),
        ]

    def learning_parameters(self) -> frozenset[str]:
        """The names of those that ask for an update."""
        with settled(self.owner.net), torch.enable_grad():  # of a parametrized one, as its own parameters do
            return self._by_errors(name for name in self.attributes if self.owner.fetch(name).requires_grad)

    def _by_errors(self, names: Iterable[str]) -> frozenset[str]:
        """Of what asks for an update, what gets one from an error: a weight mirror needs none."""
        mirrors = self.options.mirrors
        return frozenset(name for name in names if mirrors or not name.startswith("td_weights."))

    # -- the graphs ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def td(self) -> fx.GraphModule:
        return self.instructing(self.draws)

    def instructing(self, drawn: bool, rectified: bool = True) -> fx.GraphModule:
        """The instruction pass (see `instruct`); `drawn`: with the magnitudes of signs as inputs."""
        self.require_head()
        how = Instructing(
            sites=self._candidates,
            head=self.head,
            through_head=self.options.n_tasks is None,
            twins=self.feedback(drawn),
            td_biases=self.td_biases,
            td_norms=self.td_names("td_norms", list(self.weights)),
            by_channel=self.options.gating == "channel",
            rectified=rectified,
        )
        return instruct(self.bu, self.owner.root, how)

    def predicting(self, instructed: bool, by_row: bool = False) -> fx.GraphModule:
        """The BU graph, gated at the sites where it is instructed (see `gate_sites`)."""
        return self._predicting(instructed, by_row)

    @kept
    def _predicting(self, instructed: bool, by_row: bool) -> fx.GraphModule:
        if not instructed:
            return self.bu
        lateral = gate if self.options.exact else self.options.lateral_function
        return gate_sites(self.bu, self.sites, lateral, by_row, self.options.gating == "channel")

    def learner(self, instructed: bool, wanted: Iterable[str], **how: Any) -> fx.GraphModule:
        """BU pass, error pass and updates of `wanted` (see `counter_hebb_pass.learner`)."""
        return self._learner(instructed, False, frozenset(wanted), self.draws, tuple(how.items()))

    def drawn_learner(self, instructed: bool, wanted: Iterable[str], errors: tuple[int, ...]) -> fx.GraphModule:
        """A learner without fused kernels, for the errors of these outputs; magnitudes that calls draw are inputs."""
        how = (("fused", False), ("errors", errors))
        return self._learner(instructed, False, frozenset(wanted), self.options.draws, how)

    @kept
    def _learner(
        self, instructed: bool, by_row: bool, wanted: frozenset[str], drawn: bool, how: tuple[tuple[str, Any], ...]
    ) -> fx.GraphModule:
        learning = Learning(
            wanted=self._by_errors(wanted),
            twins=self.feedback(drawn),
            td_biases=self.td_biases,
            direct=self.direct,
            decay=self.options.td_decay,
            clip=self.options.td_clip,
            noise=self.options.update_noise,
            lateral=None if self.options.exact else self.options.lateral_function,
            sites=frozenset(name_of(site) for site in self.sites),
            **dict(how),
        )
        return learner(self._predicting(instructed, by_row), self.owner.root, learning)

    @kept
    def halves(self, instructed: bool, by_row: bool, wanted: frozenset[str], autocast: bool) -> Halves:
        """What a call with learning runs."""
        how = (("autocast", True),) if autocast else ()
        return cut(self._learner(instructed, by_row, wanted, self.draws, how), self.options.inexact)

    @kept
    def teaching(self, wanted: frozenset[str]) -> Halves:
        """The instruction pass with learning: to the sites' counter neurons before the TD ReLU, and from their errors
        up to what is `wanted` of the instruction head, by the transposes of its own ops.
        """
        down = self.instructing(False, rectified=False)
        like = next((self.owner.fetch(name) for name in wanted), torch.empty(0))
        example = [torch.empty(1, self.instruction_size, dtype=like.dtype, device="meta")]
        opened = open_modules(copied(down), example_inputs=example, owner=self.owner.net)
        annotate_shapes(opened, example)
        unpack_tuples(opened)
        open_operators(opened, example, self.owner.net)
        return cut(learner(opened, self.owner.root, Learning(wanted, {}, {})), self.options.inexact)

    @kept
    def call(self, instructed: bool, by_row: bool) -> Call:
        """What a call without learning runs."""
        module = self._predicting(instructed, by_row)
        names = [key_of(node) for node in module.graph.nodes if node.op == "placeholder"]
        lifted, attributes = lift(module)
        return Call(tuple(names), type(lifted).forward, attributes, self.attributes)

    def magnitudes(self) -> dict[str, float]:
        """Weight name -> the bound of the magnitudes that a call draws, in the order of the graphs' inputs."""
        return self._magnitudes() if self.draws else {}

    @kept
    def _magnitudes(self) -> dict[str, float]:
        return self.bounds()

    @kept
    def gating(self) -> Gating:
        """The instruction pass, as a call runs it."""
        lifted, attributes = lift(self.td)
        positions = [positions_of(site) if self.options.gating == "channel" else [] for site in self.sites]
        batch_first = all(spec_of(site).per_sample[:1] == (1,) for site in self.sites)
        return Gating(self.instruction_size, type(lifted).forward, attributes, positions, batch_first)

    def check(self) -> None:
        """Build what every use needs, so that errors come early."""
        by_row = self.can_instruct and self.options.n_tasks is not None  # as a call with ids, which may differ
        self._learner(self.can_instruct, by_row, self.learning_parameters(), self.draws, ())
        if self.can_instruct:
            _ = self.td

    def make_once(self, name: str, how: tuple[Any, ...]) -> str:
        """What the `kept` method of this name returns for these arguments: its name in `made`."""
        key = name, how
        found = self.made.find(key)
        if found is None:
            with building(self.owner.net) as sources:
                weakref.finalize(self, forget, sources)
                found = self.made.find(key) or self.made.put(key, MAKERS[name](self, *how))
        return found

    # -- the instruction pass at run time -----------------------------------------------------------------------------

    def instruct(self, instruction: torch.Tensor, drawn: Sequence[torch.Tensor] = ()) -> dict[str, torch.Tensor]:
        """Site name -> counter neurons; `drawn`: the magnitudes of this call, where it draws some."""
        gating = self.gating()
        attributes = [self.owner.fetch(name) for name in gating.attributes]
        return gating.run(self.owner.root, instruction, *drawn, *attributes)

    def gates(self, instruction: torch.Tensor, drawn: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """What the lateral connections take: counter neurons, of each unit or channel; GaLU needs only their sign."""
        counters = self.instruct(instruction, drawn).values()
        positions = self.gating().positions
        values = [t.mean(dims, keepdim=True) if dims else t for t, dims in zip(counters, positions, strict=True)]
        return [(value > 0).to(value.dtype) for value in values] if self.options.exact else values
