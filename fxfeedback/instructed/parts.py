"""The parameters and modules that the options of a BU-TD network ask for, made for its graphs."""

import functools

import torch
from torch import nn

from fxfeedback.graph.operands import operand
from fxfeedback.instructed import td_state
from fxfeedback.instructed.graphs import Graphs
from fxfeedback.instructed.task_heads import TaskHeads
from fxfeedback.tracing.saved import check_saved, own_part


def make_instruction_head(graphs: Graphs, like: torch.Tensor) -> nn.Module:
    """The instruction head, where `like` is, or the user's module (see `td_state.instruction_head`)."""
    options, features = graphs.options, td_state.in_channels(graphs.head)
    size = options.instruction_size or options.n_tasks or 0
    make = functools.partial(td_state.instruction_head, size, options.embedding, features, options.td_bias)
    return make() if isinstance(options.embedding, nn.Module) else own_part("instruction_head", make, like)


def make_task_heads(graphs: Graphs) -> TaskHeads:
    """One prediction head per task.

    Raises:
        OptionError: the head's weights are also read elsewhere.
    """
    graphs.require_head_of_its_own()
    nodes = (operand(graphs.head, name) for name in ("weight", "bias"))
    weight, bias = (None if node is None else graphs.owner.fetch(str(node.target)) for node in nodes)
    assert isinstance(weight, torch.Tensor)  # a head has one
    outputs, *rest = weight.shape
    sizes = graphs.options.head_sizes(outputs)
    check_saved("task_heads.weight", (sum(sizes), *rest))
    return TaskHeads(weight, bias, sizes)


def make_td_parts(graphs: Graphs, like: torch.Tensor) -> dict[str, td_state.ByName]:
    """TD's own weights, magnitudes, biases and norms, as far as options ask for them, by their attributes' names.

    Norms have the dtype and the device of `like`; weights and biases are as the BU weights.

    Raises:
        OptionError: a layer that cannot have them.
    """
    options = graphs.options
    learns = options.learning == "counter_hebb"
    asked = {
        f'weights="{options.weights}"': options.weights != "shared" and options.direct != "unit",
        "td_bias=True": options.td_bias,
        'norm="separate"': options.norm == "separate",
    }
    random = graphs.random_weights() if options.weights == "direct" else {}
    for option in (option for option, given in asked.items() if given):
        graphs.require_weights_of_layers(option)
    weights, fetch = graphs.weights, graphs.owner.fetch
    parts: dict[str, td_state.ByName] = {}
    if options.weights == "separate":
        learning = (learns and options.mirrors) or options.td_learning == "weight_mirror"
        parts["td_weights"] = td_state.twins(weights, fetch, options.td_init, options.td_noise, learning)
    if options.weights == "direct":
        parts["td_weights"] = td_state.random_weights(random, like)
    if options.td_magnitude == "fixed":
        parts["td_magnitudes"] = td_state.magnitudes(weights, fetch, options.td_scale)
    if options.td_bias:
        parts["td_biases"] = td_state.td_biases(weights, fetch, learns)
    if options.norm == "separate":
        make = functools.partial(td_state.td_norms, graphs.bottom_up, weights)
        parts["td_norms"] = own_part("td_norms", make, like)
    return parts
