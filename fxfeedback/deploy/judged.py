"""The outputs that a learner's loss is taken at, and the target that belongs to them."""

from collections.abc import Callable

import torch
from torch import fx

from fxfeedback.errors import OptionError
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.nodes import find_node, name_of, spec_of


def judged_outputs(bu: BottomUp, head: fx.Node | None) -> list[int]:
    """The numbers of the outputs that the loss is taken at: all of a list, which are passes; else the main one.

    The main output is called "out" or "logits", is the only one, or is the only one that the prediction head leads to.

    Args:
        bu: the graph, gated or not.
        head: the prediction head, or None where there is none.

    Raises:
        OptionError: there is none, or several.
    """
    leaves, main = bu.output_leaves(), bu.main_output()
    if main is None:
        raise OptionError("the model returns no floating-point tensor that a loss could be taken of")
    if isinstance(bu.output, list):
        return [i for i, leaf in enumerate(leaves) if spec_of(leaf) == spec_of(main)]
    candidates = bu.main_leaves()
    if len(candidates) > 1 and head is not None:
        top = find_node(bu.graph, name_of(head))
        candidates = [leaf for leaf in candidates if top in bu.crossed_by_all_paths_to(leaf)]
    if len(candidates) != 1:
        names = ", ".join(repr(name_of(leaf)) for leaf in candidates or bu.main_leaves())
        raise OptionError(
            f'the model returns several outputs, {names}, and a loss is taken of one of them: call it "out" in a dict, '
            "return it alone, or make the network with head= the prediction head that leads to it alone"
        )
    return [leaves.index(candidates[0])]


def target_like(logits: fx.Node, loss: str | Callable[..., torch.Tensor]) -> torch.Tensor:
    """A target without data."""
    spec = spec_of(logits)
    if spec.per_sample[:1] != (1,):
        raise OptionError(f"the output {name_of(logits)!r} has no row for each sample: a loss cannot be taken of it")
    if loss == "cross_entropy":
        return torch.empty(1, *spec.shape[2:], dtype=torch.long, device="meta")
    return torch.empty(1, *spec.shape[1:], dtype=spec.dtype, device="meta")
