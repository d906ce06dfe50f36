"""Whether the rows of a value that folds several of each sample into its batch dimension lie sample by sample."""

from collections.abc import Iterable

import torch
from torch import fx

from fxfeedback.errors import OptionError
from fxfeedback.graph.effects import counts_batches, has_effect
from fxfeedback.graph.nodes import name_of, spec_of, user_line
from fxfeedback.graph.specs import EXAMPLE_BATCH


@torch.no_grad()
def check_rows(module: fx.GraphModule, folded: Iterable[fx.Node], device: torch.device) -> None:
    """Refuse rows of different samples that take turns: no error could be told which sample a row belongs to.

    One forward pass on two samples, the second of them NaN, shows whose rows are whose; without data, or where samples
    see each other, nothing can be seen.

    Args:
        module: a BU graph, of which `folded` are nodes.
        folded: have several rows for each sample in their batch dimension.
        device: of the module's tensors.

    Raises:
        OptionError: rows take turns.
    """
    folded, nodes = list(folded), module.graph.nodes
    specs = [spec_of(node) for node in nodes if node.op == "placeholder"]
    calls = [node for node in nodes if node.op == "call_function"]
    mixes = any(counts_batches(node) or has_effect(node) for node in calls)
    if not folded or mixes or device.type == "meta" or not all(spec.dtype.is_floating_point for spec in specs):
        return
    seen: dict[fx.Node, torch.Tensor] = {}

    class Looks(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            value = super().run_node(node)
            if node in folded:
                assert isinstance(value, torch.Tensor)
                seen[node] = value.flatten(1).isnan().any(1)
            return value

    inputs = [torch.randn(spec.shape, dtype=spec.dtype, device=device) for spec in specs]
    for x in inputs:
        x[EXAMPLE_BATCH - 1 :] = torch.nan
    Looks(module).run(*inputs)
    for node, rows in seen.items():
        first = rows[: len(rows) // EXAMPLE_BATCH]
        if first.any() and not rows.all():
            raise OptionError(
                f'weights="direct": the rows of {name_of(node)!r}{user_line(node)} are of different samples in turn, '
                "so that none has an error of its own: fold the batch as the first of the dimensions"
            )
