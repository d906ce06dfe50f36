"""The linear layers and convolutions of a BU graph, and what TD has beside the weight of each."""

import functools
from collections.abc import Sequence

from torch import fx

from fxfeedback.errors import OptionError
from fxfeedback.feedback_weights import Signed, Twins, bound, scale
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.nodes import name_of, spec_of, user_line
from fxfeedback.graph.operands import weight_of
from fxfeedback.instructed import td_state
from fxfeedback.instructed.options import Options
from fxfeedback.instructed.owner import Owner

OF_WEIGHTS = ("td_weights", "td_magnitudes")
"""State of TD that is under the names of weights; the rest is under those of their modules."""

AS_WEIGHT = ('weights="separate"', 'weights="sign"')
"""Options whose state has the shape of the weight, whatever its layer's input is."""


class Weighted:
    """What `Graphs` knows of weights."""

    bottom_up: BottomUp
    owner: Owner
    options: Options

    @functools.cached_property
    def weights(self) -> dict[str, fx.Node]:
        """Weight name -> the linear layer or convolution that it belongs to."""
        return {str(weight_of(node).target): node for node in self._weighted if weight_of(node).op == "get_attr"}

    @functools.cached_property
    def _weighted(self) -> list[fx.Node]:
        return [node for node in self.bottom_up.nodes if self.bottom_up.is_weighted(node)]

    def require_weights_of_layers(self, option: str) -> None:
        """TD state belongs to a layer's weight: refuse weights that forward computes, and layers that share one, but
        have other inputs.
        """
        for node in self._weighted:
            weight = weight_of(node)
            if weight.op != "get_attr":
                raise OptionError(
                    f"{option}: the weight of {name_of(node)!r}{user_line(node)} is computed by the model's "
                    "forward, and only a weight that is a parameter can have TD state: use the default"
                )
            other = self.weights[str(weight.target)]
            if option not in AS_WEIGHT and td_state.in_channels(node) != td_state.in_channels(other):
                raise OptionError(
                    f"{option}: {name_of(node)!r} and {name_of(other)!r} have one weight, and inputs with "
                    "different numbers of channels, which cannot share TD state: use the default"
                )

    def td_names(self, kind: str, names: Sequence[str]) -> dict[str, str]:
        """Weight name -> qualified name of its TD twin, magnitudes, bias or norm, where there is one."""
        owned = self.owner.td_part(kind)
        if owned is None:
            return {}
        keys = {name: name if kind in OF_WEIGHTS else td_state.module_of(name) for name in names}
        return {name: f"{kind}.{key}" for name, key in keys.items() if key in owned}

    @functools.cached_property
    def twins(self) -> dict[str, str]:
        return self.td_names("td_weights", list(self.weights))

    def feedback(self, drawn: bool) -> Twins:
        """What TD reads in place of the BU weights; `drawn`: with magnitudes as inputs, where they are drawn."""
        if self.options.weights != "sign":
            return self.twins
        if self.options.td_magnitude == "fixed":
            buffers = self.td_names("td_magnitudes", list(self.weights))
            return {name: Signed(buffers[name]) for name in self.weights}
        return {name: Signed(None if drawn else self.magnitude(name)) for name in self.weights}

    def magnitude(self, weight: str) -> float:
        """The magnitude of a weight's signs where all have one: of those that a training call draws, their mean."""
        shape, how = spec_of(weight_of(self.weights[weight])).shape, self.options.td_scale or "xavier"
        return bound(shape, how) / 2 if self.options.draws else scale(shape, how)

    @functools.cached_property
    def td_biases(self) -> dict[str, str]:
        return self.td_names("td_biases", list(self.weights))

    def bounds(self) -> dict[str, float]:
        """Weight name -> b of the magnitudes |U(-b, b)| that a call in training mode draws; empty: it draws none."""
        how = self.options.td_scale or "xavier"
        drawn = self.weights if self.options.draws else {}
        return {name: bound(spec_of(weight_of(node)).shape, how) for name, node in drawn.items()}
