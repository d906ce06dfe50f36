"""What the exported products have in common: their own inputs, gates, names of TD nodes, what a file says of itself."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from fxfeedback.butd import BUTD
from fxfeedback.checksums import checksum
from fxfeedback.deploy.program import Input
from fxfeedback.errors import OptionError
from fxfeedback.graph.channels import channel_mean
from fxfeedback.graph.effects import has_effect
from fxfeedback.graph.nodes import counterpart_of, feedback_weight_of, name_of
from fxfeedback.instructed.graphs import Graphs
from fxfeedback.tracing.wrapper import Wrapper, stand_ins_of
from fxfeedback.version import __version__


def own_inputs(wrapper: Wrapper, graph: fx.Graph) -> list[Input]:
    """What the model's own inputs are in the file; they are the first placeholders of `graph`."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    examples = stand_ins_of(wrapper)
    return [
        Input(str(node.target), example, "batch" if example.ndim else None, own=True)
        for node, example in zip(nodes, examples, strict=False)
    ]


def td_name(node: fx.Node) -> str:
    """The name of the BU node that a node of the TD graph is the counterpart of; else its own."""
    weight = feedback_weight_of(node)
    if weight is not None:
        return f"td_weights/{weight}"
    return str(node.target) if node.op == "call_module" else counterpart_of(node) or node.name


def take_gate(graphs: Graphs, site: fx.Node, counter: torch.Tensor) -> torch.Tensor:
    """What the lateral connection takes, as `Graphs.gates` makes it."""
    value = channel_mean(counter, site) if graphs.options.gating == "channel" else counter
    return value > 0 if graphs.options.exact else value


def about(model: nn.Module, product: str) -> dict[str, Any]:
    """What every file says of itself."""
    return {"fxfeedback": __version__, "product": product, "weights_sha256": checksum(model.state_dict())}


def about_butd(butd: BUTD, graphs: Graphs, product: str) -> dict[str, Any]:
    """What the file of an instructed network says of itself."""
    return about(butd, product) | {
        "tasks": graphs.options.n_tasks,
        "instruction_size": graphs.instruction_size,
        "takes_ids": graphs.options.instruction_size is None,
        "gating": graphs.options.gating,
        "sites": [name_of(site) for site in graphs.sites],
    }


def return_only(graph: fx.Graph, value: Any) -> None:
    """Let a graph return `value`, and nothing be computed that it does not need."""
    graph.output_node().args = (value,)
    graph.eliminate_dead_code(is_impure_node=_is_kept)


def _is_kept(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or has_effect(node)


def state_of(butd: BUTD, learns: Iterable[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The entries of the state_dict by name, each tensor once; and for the other names of tied ones the first name."""
    first: dict[int, str] = {}
    state: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in butd.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        elif isinstance(tensor, torch.Tensor):
            first[id(tensor)], state[name] = name, tensor
    for name in learns:
        if name not in state:
            raise OptionError(
                f"{name!r} learns, but is not an entry of the state_dict: remove its parametrization "
                "(torch.nn.utils.parametrize.remove_parametrizations) or freeze it"
            )
    return state, tied
