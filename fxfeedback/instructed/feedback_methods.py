"""What a BU-TD network says and does of its feedback weights, and how its calls come by instructions and gates."""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fxfeedback.counter_hebb_pass import INPUT
from fxfeedback.errors import InputError, OptionError
from fxfeedback.instructed.autograd_bridge import learned
from fxfeedback.instructed.gates import StraightThrough
from fxfeedback.instructed.graphs import Graphs
from fxfeedback.instructed.instruction import distinct
from fxfeedback.instructed.kept_graphs import KeepsItsGraphs
from fxfeedback.instructed.last_gates import last_gates
from fxfeedback.instructed.magnitudes import Magnitudes
from fxfeedback.instructed.weight_mirror import mirrored
from fxfeedback.tracing.arguments import describe
from fxfeedback.tracing.waiting import at_hand
from fxfeedback.tracing.while_tracing import is_rewritten


class Alignment(NamedTuple):
    """How what TD reads, V, lies to a BU weight W.

    angle: between them over all elements, in degrees; None for direct feedback. ratio: |V| / |W|.
    """

    angle: float | None
    ratio: float


class FeedbackMethods(KeepsItsGraphs):
    """The part of `BUTD` that is about V, what TD reads in place of BU weights."""

    @property
    def magnitudes(self) -> MutableMapping[str, torch.Tensor]:
        """Weight name -> the magnitudes that its signs are multiplied by in TD, with weights="sign".

        Of td_magnitude="fixed" they are kept, and may be set. Of "batch" they are those of the last call in training
        mode; what is set, one by one or all at once, is taken in all such calls until it is deleted. Their absolute
        values are taken.
        """
        return Magnitudes(self._present(), self._drawn)

    @magnitudes.setter
    def magnitudes(self, values: Mapping[str, torch.Tensor]) -> None:
        kept = self.magnitudes
        self._drawn.given.clear()
        kept.update(values)

    @torch.no_grad()
    def alignment(self) -> dict[str, Alignment]:
        """Weight name -> (angle, ratio) of what TD reads and the BU weight, as they are now.

        An angle of 0 degrees is backpropagation's. Magnitudes that calls draw are those of the last one. Random weights
        that broadcast the error have a ratio only, and with direct="unit" belong to no weight: there is nothing then.
        """
        graphs = self._present()
        found = {name: _alignment(v, self._fetch(name)) for name, v in self._feedback_weights(graphs).items()}
        direct = self.options.weights == "direct"
        return {name: one._replace(angle=None) if direct else one for name, one in found.items()}

    def mirror_step(self, sigma: float = 1.0, batch: int = 64) -> None:
        """Let TD's weights learn the BU weights from noise, without data or error (td_learning="weight_mirror").

        Each layer is given noise x = sigma * randn, and answers y = W x. Added to V's `.grad` is
        V - Σ y xᵀ / (sigma² n), with n terms for each weight, whose mean is V - W: an optimizer's step then brings V
        nearer to W ("Deep Learning without Weight Transport", NeurIPS 2019, arXiv:1904.05391).

        Args:
            sigma: standard deviation of the noise.
            batch: how many samples of noise there are.

        Raises:
            OptionError: the network has no weight mirror, or an argument is of the wrong kind.
        """
        if self.options.td_learning != "weight_mirror":
            raise OptionError('mirror_step: make the network with weights="separate", td_learning="weight_mirror"')
        for name, estimate in mirrored(self._present(), sigma, batch).items():
            v = self._fetch(f"td_weights.{name}")
            update = torch.where(estimate.isnan(), 0, v.detach() - estimate)  # some never meet an input
            v.grad = update if v.grad is None else v.grad + update

    def _feedback_weights(self, graphs: Graphs) -> dict[str, torch.Tensor]:
        """Weight name -> what TD reads in its place."""
        if self.options.weights == "sign":
            return {name: m * torch.sign(self._fetch(name)) for name, m in self.magnitudes.items()}
        if self.options.direct == "unit":
            return {}
        return {name: self._fetch(graphs.twins.get(name, name)) for name in graphs.weights}

    def _without_task(self, inputs: tuple[Any, ...], task: Any) -> tuple[tuple[Any, ...], Any]:
        """The model's own positional arguments, and the instruction, which may follow them."""
        own = self._form.n_positional
        if task is not None or len(inputs) <= own or all(isinstance(value, (bool, str)) for value in inputs[own:]):
            return inputs, task  # no bool or string is an instruction
        if len(inputs) > own + 1:
            raise InputError(
                f"the model takes {own} inputs and an instruction, not {len(inputs)} inputs: give what else it takes "
                f"by name; {describe(self._net)}"
            )
        return inputs[:-1], inputs[-1]

    def _learning_gates(self, graphs: Graphs, instruction: torch.Tensor, batch: int) -> list[torch.Tensor]:
        """The gates of every sample, through which the instruction head learns; none where it does not."""
        own = self._modules.get("instruction_head")
        wanted = [name for name, p in own.named_parameters(prefix="instruction_head") if p.requires_grad] if own else []
        fixed = self.options.instruction_learning == "fixed" or not torch.is_grad_enabled()
        if fixed or not wanted or 0 in instruction.shape:
            return []
        halves = graphs.teaching(frozenset(wanted))
        values = [instruction.expand(batch, -1), *(self._fetch(name) for name in halves.attributes)]
        counters = halves.structure(None, *learned(halves, (INPUT + "instruction", *halves.attributes), values))
        positions = graphs.gating().positions
        means = [
            t.mean(dims, keepdim=True) if dims else t for t, dims in zip(counters.values(), positions, strict=True)
        ]
        return [StraightThrough.apply(t) for t in means]

    @torch.no_grad()
    def _gates(
        self,
        graphs: Graphs,
        instruction: torch.Tensor,
        ids: torch.Tensor | None,
        batch: int,
        drawn: Sequence[torch.Tensor],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The gates of the distinct instructions; before them, if there are several, which one each sample has."""
        if self._instructions_mix() or not graphs.gating().batch_first:
            return [], graphs.gates(instruction, drawn)
        instructions, rows = distinct(instruction, ids, batch)
        which = [] if rows is None else [rows]
        if drawn or not (self._may_keep_gates() and at_hand(instructions)):  # whether they are the last's, values say
            return which, graphs.gates(instructions, drawn)
        weights = [*self.parameters(), *self.buffers(), *(self._fetch(name) for name in graphs.gating().attributes)]
        return which, last_gates(self._cache, graphs, instructions, weights)

    def _may_keep_gates(self) -> bool:
        """Not where the instruction pass may draw random numbers or count, nor while others rewrite the call."""
        own = [self._modules.get(name) for name in ("instruction_head", "td_norms")]
        training = self.training or any(module.training for owner in own if owner for module in owner.modules())
        return not (training or is_rewritten() or isinstance(self.options.embedding, nn.Module))

    def _instructions_mix(self) -> bool:
        """Whether the samples of a batch see each other in the instruction pass, as in a batch norm's statistics."""
        return self.training and (self.options.norm == "separate" or isinstance(self.options.embedding, nn.Module))

    def _drawn_magnitudes(self, graphs: Graphs) -> list[torch.Tensor]:
        """The magnitudes of a call, in the graphs' order; none where calls draw none."""
        return [self._drawn.draw(name, b, self._fetch(name)) for name, b in graphs.magnitudes().items()]


def _alignment(v: torch.Tensor, w: torch.Tensor) -> Alignment:
    v, w = v.double().flatten(), w.double().flatten()
    ratio = (v.norm() / w.norm()).item()
    cosine = (v @ w) / (v.norm() * w.norm()) if v.shape == w.shape else v.new_tensor(math.nan)
    return Alignment(torch.rad2deg(cosine.clamp(-1, 1).acos()).item(), ratio)
