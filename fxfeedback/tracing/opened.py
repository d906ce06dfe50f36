"""A model's graph in functional ops with shapes, for whoever unrolls it, and by what such a graph is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx, nn

from fxfeedback.graph.nodes import writes_into_arguments
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.specs import Sizes, of_size
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.tracing.arguments import Form
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.open_operators import open_operators
from fxfeedback.tracing.trace_at_size import trace_for


class GraphKey(NamedTuple):
    """By what a bottom-up graph is kept.

    modes: a number for the modes and attributes of the modules that it depends on. sizes: of the inputs; None: it
    serves all. form: of the call; None: the example's.
    """

    modes: int
    sizes: Sizes | None
    form: Form | None


def opened(
    net: nn.Module, stand_ins: Sequence[torch.Tensor], sizes: Sizes | None, form: Form, door: str | None = None
) -> tuple[fx.GraphModule, bool]:
    """A model's graph in functional ops with shapes, and whether it serves inputs of these sizes only.

    It does where the model's code branches on sizes, and where its functions write into their arguments: these must be
    opened, and look at sizes.

    Args:
        net: the model.
        stand_ins: tensors without data like the example inputs.
        sizes: of the inputs; None: the example's.
        form: of the call.
        door: by which the model is traced.
    """
    examples = stand_ins if sizes is None else [of_size(size, dtype) for size, dtype in sizes]
    traced, by_size = trace_for(net, examples, form, door)
    module = open_modules(traced, strict=False, owner=net)
    annotate_shapes(module, examples)
    unpack_tuples(module)
    writes = any(writes_into_arguments(node) for node in module.graph.nodes)
    if writes:
        module = open_modules(traced, strict=False, example_inputs=examples, owner=net)
        annotate_shapes(module, examples)
        unpack_tuples(module)
    return module, by_size or writes


@dataclass(eq=False)
class Traced:
    """A model's graph as it was traced, and whether it serves inputs of one size only."""

    module: fx.GraphModule
    by_size: bool


def opened_to_operators(traced: fx.GraphModule, examples: Sequence[torch.Tensor], net: nn.Module) -> fx.GraphModule:
    """A model's graph for the examples' sizes in ops with rules, as far as PyTorch takes them apart, with shapes.

    Args:
        traced: its graph as it was traced, which stays as it is.
        examples: tensors without data, batch first.
        net: the model.
    """
    module = open_modules(traced, example_inputs=examples, owner=net)
    annotate_shapes(module, examples)
    unpack_tuples(module)
    open_operators(module, examples, net)
    return module
