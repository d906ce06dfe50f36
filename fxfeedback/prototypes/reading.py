"""Read nodes of any model: of a network with connections after its last pass, of an instructed one uninstructed."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxfeedback.butd import BUTD
from fxfeedback.errors import InputError, NodeNameError, OptionError
from fxfeedback.feedback import FeedbackModel
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.nodes import name_of
from fxfeedback.lrm.feedback_model import bottom_up_of
from fxfeedback.prototypes.moments import Label
from fxfeedback.tracing.examples import examples_of
from fxfeedback.tracing.modes import eval_mode
from fxfeedback.tracing.wrapper import Wrapper, like_of, net_of

Read = Callable[[Any], dict[str, torch.Tensor]]


def readable(model: nn.Module, inputs: Any) -> FeedbackModel:
    """A network whose nodes can be read: the model, what an instructed network was made of, or one without connections.

    Args:
        model: any module that can be traced.
        inputs: of one batch, as `called` takes them.

    Raises:
        OptionError: a network that holds one with connections in a part.
    """
    while isinstance(model, BUTD):
        model = net_of(model)
    if isinstance(model, FeedbackModel):
        return model
    if isinstance(model, nn.Module) and any(isinstance(part, Wrapper) for part in model.modules()):
        raise OptionError("a part of the model has connections or instructions: compute prototypes of that part")
    args, named = called(inputs)
    made = FeedbackModel(model, (), 1, examples_of(model, example_inputs=named or args))
    return made.train(model.training)


def sources_of(model: nn.Module, net: FeedbackModel) -> list[str]:
    """What prototypes are of by default: the connections' sources, or the prediction head.

    Raises:
        NodeNameError: the model has neither.
    """
    if net.connections:
        return list(dict.fromkeys(connection.source for connection in net.connections))
    if isinstance(model, BUTD) and model.head:
        return [model.head]
    heads = BottomUp(bottom_up_of(net).graph).output_leaves()
    if len(heads) != 1:
        names = ", ".join(name_of(node) for node in heads)
        raise NodeNameError(f"the model returns {names}: say which nodes prototypes are of, sources=[...]")
    return [name_of(heads[0])]


def reader(net: FeedbackModel, sources: Sequence[str]) -> Read:
    """A function of a batch's inputs: source -> its value after the last pass (B, ...), in evaluation mode."""
    like = like_of(net)

    def moved(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(like.device, like.dtype if x.is_floating_point() else x.dtype, non_blocking=True)

    def read(inputs: Any) -> dict[str, torch.Tensor]:
        args, named = called(inputs)
        with eval_mode(net), torch.no_grad():
            found = net.readout(*map(moved, args), list(sources), **{name: moved(x) for name, x in named.items()})
        return {source: found[-1][source].value for source in sources}

    return read


def called(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of a call: one input, a tuple or a list of them, or a dict by name."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def parts_of(batch: Any) -> tuple[Any, list[Label]]:
    """Inputs and labels of a loader's batch, which may go on with anything else.

    Raises:
        InputError: there are none, or they are not whole numbers or strings.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise InputError(f"a labelled loader gives (inputs, labels), not a {type(batch).__name__}")
    return batch[0], labels_of(batch[1])


def labels_of(given: Any) -> list[Label]:
    """Several labels: a tensor (B,) of whole numbers, or a sequence of whole numbers or strings.

    Raises:
        InputError: they are something else.
    """
    if isinstance(given, torch.Tensor):
        if given.ndim != 1 or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise InputError(f"labels are whole numbers (B,), not {given.dtype} of shape {tuple(given.shape)}")
        return given.tolist()
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"labels are a tensor (B,) of whole numbers, or several numbers or strings, not {given!r}")
    return [label_of(one) for one in given]


def label_of(given: Any) -> Label:
    """One label, a whole number of any library's or a string.

    Raises:
        InputError: it is something else.
    """
    if isinstance(given, str):
        return given
    try:
        if str(getattr(given, "dtype", type(given).__name__)).endswith("bool"):  # of Python, numpy or torch
            raise TypeError
        return operator.index(given)
    except TypeError:
        raise InputError(f"a label is a whole number or a string, not {given!r}") from None


def check_values(values: Mapping[str, torch.Tensor], labels: Sequence[Label]) -> None:
    """Refuse what has no mean per class.

    Raises:
        InputError: a value that is no floating-point tensor (B, ...), or not finite.
    """
    for source, value in values.items():
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            raise InputError(f"{source!r} has no floating-point value: prototypes are of activations")
        if not value.ndim or len(value) != len(labels):
            raise InputError(f"{source!r} has shape {tuple(value.shape)} for {len(labels)} labels: no row per sample")
        finite = value.flatten(1).isfinite().all(1) if value.ndim > 1 else value.isfinite()
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise InputError(f"{source!r} is not finite (NaN or infinite) for a sample of class {labels[row]!r}")
