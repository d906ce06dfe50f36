"""What is different in torch while a model's own code runs on proxies."""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.overrides import is_tensor_method_or_property
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction

from fxfeedback.ops import applying

SIZED = {
    torch: ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros"),
    torch.Tensor: ("expand", "repeat"),
}
"""What gives a tensor of the model's own a size, which may be a proxy: nodes, where it is one."""

UNTRACED = {owner: {name: getattr(owner, name) for name in names} for owner, names in SIZED.items()}
UNTRACED[nn.Module] = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}
"""All that is replaced while a model is traced, as it is otherwise."""


@contextmanager
def running_on_proxies() -> Iterator[None]:
    """While a model's code runs: only its own contexts count, and autograd functions stay whole."""
    around = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for device, enabled in around.items():
            torch.set_autocast_enabled(device, False)
            stack.callback(torch.set_autocast_enabled, device, enabled)
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", _applied()))
        yield


@contextmanager
def replaced(by: Mapping[Any, Mapping[str, Any]]) -> Iterator[None]:
    """Of each owner, these attributes are these."""
    with contextlib.ExitStack() as stack:
        for owner, attributes in by.items():
            stack.enter_context(mock.patch.multiple(owner, **attributes))
        yield


def untraced() -> Any:
    """While a model is traced: what runs in this context is not."""
    return replaced(UNTRACED)


@contextmanager
def recording_sized() -> Iterator[None]:
    """While a model is traced: it may make a tensor of its own that is as large as the batch, which is a proxy."""
    is_tensor_method_or_property(torch.relu)  # makes torch's own tables of functions, before some are replaced
    with torch.device("meta"):
        torch.empty(())
    with replaced({owner: {name: _recorded(UNTRACED[owner][name]) for name in SIZED[owner]} for owner in SIZED}):
        yield


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which becomes a node where it gets a proxy."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, fx.Proxy):
                return value.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    return call


def _applied() -> Any:
    """torch.autograd.Function.apply, which becomes a node where it gets a proxy; checkpoints are seen through."""
    original = inspect.getattr_static(torch.autograd.Function, "apply")

    def apply(kind: type, *args: Any, **kwargs: Any) -> Any:
        if kind is CheckpointFunction and any(isinstance(value, fx.Proxy) for value in args):
            function, _, *given = args
            return function(*given)
        if any(isinstance(value, fx.Proxy) for value in tree_leaves((args, kwargs))):
            return _recorded(applying(kind))(*args, **kwargs)
        return original.__get__(None, kind)(*args, **kwargs)

    return classmethod(apply)


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def building(model: nn.Module) -> Iterator[None]:
    """While graphs are made: by one thread at a time, and outside of inference mode, as their constants are kept."""
    with _ONE_AT_A_TIME, torch.inference_mode(False), settled(model):
        yield


@contextmanager
def settled(module: nn.Module) -> Iterator[None]:
    """Parametrizations in evaluation mode: to look at a weight is no step of training (spectral norm's iteration)."""
    owners = [owner for owner in module.modules() if parametrize.is_parametrized(owner)]
    parametrizations = [owner.get_submodule("parametrizations") for owner in owners]
    inner = [m for each in parametrizations for m in each.modules() if m.training]
    for m in inner:
        m.training = False
    try:
        yield
    finally:
        for m in inner:
            m.training = True
