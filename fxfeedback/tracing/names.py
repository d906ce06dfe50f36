"""What a model's nodes are called, for whoever connects, gates or reads them: `node_names`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from fxfeedback.errors import NodeNameError
from fxfeedback.graph.nodes import name_of, specs_of
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.specs import Spec
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.tracing.arguments import example_form
from fxfeedback.tracing.examples import examples_of
from fxfeedback.tracing.share import share
from fxfeedback.tracing.trace_at_size import trace_for


class NodeInfo(NamedTuple):
    """What a node computes: its op, and its output's shape with None for the batch (no shape: no tensor)."""

    op: str
    shape: tuple[int | None, ...] | None


def node_names(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
) -> dict[str, NodeInfo]:
    """The names of the model's nodes, as torchvision gives them, in execution order.

    Args:
        model: any module that torch.fx can trace; it stays as it is.
        input_size: size of one input without its batch; default 224 by 224 with the first convolution's channels.
        example_inputs: instead of input_size, for several inputs: tensors with a batch dimension; a dict gives them by
            name.

    Raises:
        TraceError: torch.fx cannot trace the model, or it does not run at this size.
    """
    form, examples = example_form(model, examples_of(model, input_size, example_inputs))
    module, _ = trace_for(share(model), examples, form)
    annotate_shapes(module, examples)
    unpack_tuples(module)
    names = {}
    for node in module.graph.nodes:
        if node.op != "output":
            spec = specs_of(node)
            names[name_of(node)] = NodeInfo(op_name(node, module), spec.sizes if isinstance(spec, Spec) else None)
    return names


def op_name(node: fx.Node, module: nn.Module) -> str:
    """The class of the module that a node calls, or the name of the function."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target)) if node.op.startswith("call") else node.op


def without_names(inputs: Sequence[Any]) -> tuple[Sequence[Any], list[str]]:
    """A model's inputs, and the names of nodes after them.

    Raises:
        NodeNameError: there are no names.
    """

    def is_names(given: Any) -> bool:
        is_list = isinstance(given, (list, tuple)) and all(isinstance(name, str) for name in given)
        return isinstance(given, str) or is_list

    number = sum(1 for _ in itertools.takewhile(is_names, reversed(inputs)))
    own, names = inputs[: len(inputs) - number], inputs[len(inputs) - number :]
    if not number:
        raise NodeNameError("no node is named: readout(x, 'layer3', 'layer4') reads two, after the model's inputs")
    return own, [name for given in names for name in ([given] if isinstance(given, str) else given)]
