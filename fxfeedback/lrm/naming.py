"""What a model's nodes are called, for whoever connects, gates or reads them: `node_names`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from fxfeedback.graph.nodes import name_of, specs_of
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.specs import Spec
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.lrm.choosing import good_ends
from fxfeedback.lrm.connections import legal_ends
from fxfeedback.tracing.arguments import example_form
from fxfeedback.tracing.examples import examples_of
from fxfeedback.tracing.names import op_name
from fxfeedback.tracing.share import share
from fxfeedback.tracing.trace_at_size import trace_for


class _Node(NamedTuple):
    op: str
    shape: tuple[int | None, ...] | None


class NodeInfo(_Node):
    """What a node computes, a pair (op, shape); and what it is to a connection.

    op: its op. shape: its output's, with None for the batch (no shape: no tensor). source, destination: "good" where it
    is a good end of a connection (see `suggest_connections`), "legal" where it may be one, or else "".
    """

    source: str
    destination: str

    def __new__(
        cls, op: str, shape: tuple[int | None, ...] | None, source: str = "", destination: str = ""
    ) -> "NodeInfo":
        made = super().__new__(cls, op, shape)
        made.source, made.destination = source, destination
        return made


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
    net = share(model)
    module, _ = trace_for(net, examples, form)
    good = good_ends(module, examples, net)
    annotate_shapes(module, examples)
    unpack_tuples(module)
    legal = legal_ends(module.graph)
    names = {}
    for node in module.graph.nodes:
        if node.op != "output":
            spec, name = specs_of(node), name_of(node)
            ends = zip(good, legal, strict=True)
            marks = ["good" if name in best else "legal" if node in all_ends else "" for best, all_ends in ends]
            names[name] = NodeInfo(op_name(node, module), spec.sizes if isinstance(spec, Spec) else None, *marks)
    return names
