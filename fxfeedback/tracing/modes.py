"""A model in its own evaluation mode for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxfeedback.tracing.wrapper import innermost


@contextmanager
def eval_mode(model: Any, but: tuple[type, ...] = ()) -> Iterator[None]:
    """The model in its own eval mode, but for modules of a kind in `but`; afterwards all is as it was.

    What learns is the same meanwhile: a model's own eval may freeze parameters.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    learning = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters(False)]
    nets = map(innermost, modules)
    attributes = [(net, dict(vars(net))) for net in nets if type(net).train is not nn.Module.train]
    try:
        if modules:
            model.eval()
        _put_back(((module, mode) for module, mode in modes if isinstance(module, but)), learning)
        yield
    finally:
        for net, before in attributes:
            if net.training != before["training"]:
                net.train(before["training"])  # it may undo what its eval did, as layers that merge weights do
            vars(net).clear()
            vars(net).update(before)
        _put_back(modes, learning)


def _put_back(modes: Iterable[tuple[nn.Module, bool]], learning: Iterable[tuple[nn.Parameter, bool]]) -> None:
    for module, mode in modes:
        module.training = mode
    for parameter, learns in learning:
        parameter.requires_grad = learns
