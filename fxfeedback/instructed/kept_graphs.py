"""The graphs that a BU-TD network keeps, and of what they are made."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxfeedback.graph.specs import Sizes, of_size, sizes_of
from fxfeedback.instructed.graphs import Graphs
from fxfeedback.instructed.magnitudes import Drawn
from fxfeedback.instructed.options import Options
from fxfeedback.instructed.owner import Owner
from fxfeedback.tracing.arguments import Form
from fxfeedback.tracing.opened import GraphKey, Traced, opened_to_operators
from fxfeedback.tracing.trace_at_size import trace_for
from fxfeedback.tracing.wrapper import Wrapper


class KeepsItsGraphs(Wrapper):
    """The part of `BUTD` that makes graphs, each once: traced for all sizes, opened for one, and all that a call needs.

    The first two are of the model alone, and stay when the network adds state of its own.
    """

    options: Options
    _drawn: Drawn

    def _graphs(self, inputs: Sequence[torch.Tensor], form: Form | None = None) -> Graphs:
        """The graphs for inputs of this size and dtype and this form of call (None: the example's), built once."""
        return self._kept(("graphs", GraphKey(self._fingerprint(), sizes_of(inputs), form)))

    def _bottom_up(self, sizes: Sizes | None, form: Form | None = None) -> fx.GraphModule:
        """The opened graph of the model alone, which is the same whatever is added to it."""
        return self._kept(("bottom up", GraphKey(self._fingerprint_of_model(), sizes, form)))

    def _present(self) -> Graphs:
        """Our graphs in the present mode, at the example's size."""
        return self._graphs(self._stand_ins())

    def _graph(self, sizes: Any, form: Form | None) -> fx.Graph:
        return self._bottom_up(sizes, form).graph

    def _build(self, key: tuple[str, Any]) -> Any:
        kind, how = key
        if kind == "traced":
            examples = self._stand_ins() if how.sizes is None else [of_size(*each) for each in how.sizes]
            return Traced(*trace_for(self._net, examples, how.form or self._form, self._door))
        examples = [of_size(*each) for each in how.sizes]
        if kind == "bottom up":
            traced = self._kept(("traced", how._replace(sizes=None) if how.form is None else how))
            if traced.by_size and how.sizes != sizes_of(self._stand_ins()):
                traced = self._kept(("traced", how))
            return opened_to_operators(traced.module, examples, self._net)
        owner = Owner(self._net, self._root, self._fetch, self.options, self._drawn.always)
        return Graphs(owner, self._bottom_up(how.sizes, how.form), examples)


def graphs_of(butd: KeepsItsGraphs) -> Graphs:
    """The graphs of a BU-TD network in the present mode, at the example's size."""
    return butd._present()
