"""Weight mirrors: what noise at a layer's input and the layer's answer say of its weight."""

import math
from typing import Any

import torch
from torch import fx

from fxfeedback.checks import is_count
from fxfeedback.errors import OptionError
from fxfeedback.graph.nodes import name_of, spec_of
from fxfeedback.graph.operands import operand
from fxfeedback.graph.specs import EXAMPLE_BATCH
from fxfeedback.instructed.graphs import Graphs
from fxfeedback.rules import RULES


@torch.no_grad()
def mirrored(graphs: Graphs, sigma: float, batch: int) -> dict[str, torch.Tensor]:
    """Weight name -> Σ y xᵀ / (sigma² n) for noise x and y = W x; NaN where n is 0, as a tap never lies in the map.

    n counts the terms of each weight: samples, times the positions at which its tap lies inside of the map.

    Raises:
        OptionError: an argument of the wrong kind, or a layer whose sizes forward computes.
    """
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0 < sigma < math.inf:
        raise OptionError(f"sigma={sigma!r}: give a standard deviation, a number above 0")
    if not is_count(batch):
        raise OptionError(f"batch={batch!r}: give a whole number from 1 on")
    sums: dict[str, Any] = dict.fromkeys(graphs.weights, 0)
    counts: dict[str, Any] = dict.fromkeys(graphs.weights, 0)
    for name, node in graphs.layers():
        weight = graphs.owner.fetch(name)
        x = sigma * torch.randn(_sizes(node, batch), dtype=weight.dtype, device=weight.device)
        sums[name] = sums[name] + _product(node, _answer(node, x, weight), x, weight)
        one = torch.ones(_sizes(node, 1), dtype=weight.dtype, device=weight.device)
        counts[name] = counts[name] + batch * _product(node, torch.ones_like(_answer(node, one, weight)), one, weight)
    return {name: sums[name] / (sigma**2 * counts[name]) for name in sums}


def _sizes(node: fx.Node, batch: int) -> list[int]:
    """Of the layer's input."""
    spec = spec_of(operand(node, "input"))
    return [size + slope * (batch - EXAMPLE_BATCH) for size, slope in zip(spec.shape, spec.per_sample, strict=True)]


def _operands(node: fx.Node, x: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    """Of the layer's call, without its bias."""
    rule = RULES[node.target]
    operands = rule.operands(node.args, node.kwargs) | {"input": x, str(rule.weight): weight, "bias": None}
    computed = next((key for key, value in operands.items() if isinstance(value, fx.Node)), None)
    if computed is not None:
        raise OptionError(f"mirror_step: {computed} of {name_of(node)!r} is computed by the model's forward")
    return operands


def _answer(node: fx.Node, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The layer's output, without its bias."""
    call: Any = node.target
    return call(**_operands(node, x, weight))


def _product(node: fx.Node, e: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Σ e xᵀ, the Counter-Hebb rule of the layer's weight."""
    rule = RULES[node.target]
    return rule.table(e, **_operands(node, x, weight))[str(rule.weight)].error(e)
