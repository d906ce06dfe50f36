"""The linear layers and convolutions of a BU graph, and what TD has beside the weight of each."""

import functools
import math
from collections.abc import Callable, Sequence

from torch import fx

from fxfeedback.errors import InputError, OptionError
from fxfeedback.feedback_weights import Direct, Signed, Twins, bound, broadcasting, scale
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.nodes import find_node, name_of, spec_of, user_line
from fxfeedback.graph.operands import weight_of
from fxfeedback.graph.specs import Spec
from fxfeedback.instructed import td_state
from fxfeedback.instructed.options import Options
from fxfeedback.instructed.owner import Owner
from fxfeedback.instructed.rows_of_samples import check_rows
from fxfeedback.instructed.td_state import ByName

OF_WEIGHTS = ("td_weights", "td_magnitudes")
"""State of TD that is under the names of weights; the rest is under those of their modules."""

AS_WEIGHT = ('weights="separate"', 'weights="sign"')
"""Options whose state has the shape of the weight, whatever its layer's input is."""


def _by_units(site: fx.Node, outputs: int) -> Spec:
    """What a random weight is like that brings an error over `outputs` logits to every unit of a site."""
    spec = spec_of(site)
    if spec.per_sample[:1] != (1,) or any(spec.per_sample[1:]):
        raise OptionError(f'direct="unit": the first dimension of the site {name_of(site)!r} is not the batch alone')
    return Spec((outputs, math.prod(spec.shape[1:])), (0, 0), spec.dtype)


def _require_batch(node: fx.Node, spec: Spec) -> None:
    """A layer's samples lie along one dimension, so that each can get its own error."""
    if len([slope for slope in spec.per_sample if slope]) != 1:
        raise OptionError(
            f'weights="direct": the batch of {name_of(node)!r}{user_line(node)} does not lie along one dimension, so '
            "that its samples have no errors of their own: use another kind of weights"
        )


class Weighted:
    """What `Graphs` knows of weights."""

    bu: fx.GraphModule
    bottom_up: BottomUp
    require_sites: Callable[[str], list[fx.Node]]
    owner: Owner
    options: Options

    @functools.cached_property
    def weights(self) -> dict[str, fx.Node]:
        """Weight name -> the linear layer or convolution that it belongs to."""
        return {str(weight_of(node).target): node for node in self._weighted if weight_of(node).op == "get_attr"}

    @functools.cached_property
    def _weighted(self) -> list[fx.Node]:
        return [node for node in self.bottom_up.nodes if self.bottom_up.is_weighted(node)]

    def layers(self) -> list[tuple[str, fx.Node]]:
        """(weight name, linear layer or convolution), for every use of a weight."""
        return [(str(weight_of(node).target), node) for node in self._weighted if weight_of(node).op == "get_attr"]

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
        if self.options.weights == "direct":
            return {}
        if self.options.weights != "sign":
            return self.twins
        if self.options.td_magnitude == "fixed":
            buffers = self.td_names("td_magnitudes", list(self.weights))
            return {name: Signed(buffers[name]) for name in self.weights}
        return {name: Signed(None if drawn else self.magnitude(name)) for name in self.weights}

    @functools.cached_property
    def direct(self) -> Direct | None:
        """How the error is broadcast, with weights="direct"."""
        if self.options.weights != "direct":
            return None
        _ = self.logits
        owned = self.owner.td_part("td_weights")
        assert owned is not None  # made before any learner
        if self.options.direct == "unit":
            self._check_units(owned)
        return Direct({name: f"td_weights.{name}" for name in owned}, self.options.direct == "unit")

    @property
    def logits(self) -> Spec:
        """What is known of the logits, (B, K), whose error is broadcast.

        Raises:
            OptionError: the model returns something else.
        """
        leaves = self.bottom_up.output_leaves()
        specs = [spec_of(leaf) for leaf in leaves]
        if len(specs) != 1 or specs[0].per_sample != (1, 0):
            found = ", ".join(str(spec.sizes).replace("None", "batch") for spec in specs)
            raise OptionError(
                f'weights="direct" broadcasts the error at logits (batch, classes); the model returns {found}: use '
                "another kind of weights, or a model with one output"
            )
        return specs[0]

    def random_weights(self) -> dict[str, Spec]:
        """Name -> what the fixed random weights are like that broadcast the error at the logits.

        Raises:
            OptionError: the error has no place there.
        """
        outputs = self.logits.shape[-1]
        if self.options.direct == "unit":
            return {name_of(site): _by_units(site, outputs) for site in self.require_sites('direct="unit"')}
        for node in self._weighted:
            _require_batch(node, spec_of(node))
        folded = [node for node in self._weighted if max(spec_of(node).per_sample) > 1]
        check_rows(self.bu, folded, self.owner.fetch(next(iter(self.weights))).device)
        return {name: broadcasting(node, outputs) for name, node in self.weights.items()}

    def _check_units(self, owned: ByName) -> None:
        """At other input sizes sites have other units."""
        for name, b in owned.items():
            units, needed = b.shape[1], _by_units(find_node(self.bottom_up.graph, name), 1).shape[1]
            if units != needed:
                raise InputError(
                    f'direct="unit": the site {name!r} has {needed} units at this input size, and {units} at that of '
                    "the example, for which its random weights are: give inputs of the example's size"
                )

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
