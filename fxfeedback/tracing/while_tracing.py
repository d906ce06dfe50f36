"""What is different in torch while a model's own code runs on proxies."""

import builtins
import contextlib
import functools
import inspect
import itertools
import linecache
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.overrides import is_tensor_method_or_property
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction

from fxfeedback.graph.nodes import is_torchs
from fxfeedback.rules.ops import applying
from fxfeedback.tracing.refusals import Refusal

SIZED = {
    torch: ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros"),
    torch.Tensor: ("expand", "repeat"),
}
"""What gives a tensor of the model's own a size, which may be a proxy: nodes, where it is one."""

UNTRACED = {owner: {name: getattr(owner, name) for name in names} for owner, names in SIZED.items()}
UNTRACED[nn.Module] = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}
"""All that is replaced while a model is traced, as it is otherwise."""


_ONE_AT_A_TIME = threading.RLock()
_REPLACED: list[contextlib.ExitStack] = []


def _in_forked_child() -> None:
    """A thread that was tracing in the parent is not here: neither are its lock and what it had replaced."""
    global _ONE_AT_A_TIME
    if _ONE_AT_A_TIME._is_owned():  # type: ignore[attr-defined]  # the thread that forks traces itself, and goes on
        return
    _ONE_AT_A_TIME = threading.RLock()
    while _REPLACED:
        _REPLACED[-1].close()
    for name, value in UNTRACED[nn.Module].items():  # which torch.fx replaces
        setattr(nn.Module, name, value)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Without torch's log of what fails on tensors without data: an error of ours says it."""
    names = [name for name in ["torch", *logging.root.manager.loggerDict] if name.partition(".")[0] == "torch"]
    loggers = [logger for logger in map(logging.getLogger, names) if not logger.disabled]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger in loggers:
            logger.disabled = False


def is_rewritten() -> bool:
    """Whether others rewrite the present call: torch.compile, or a transform of torch.func."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


@contextmanager
def running_on_proxies() -> Iterator[None]:
    """While a model's code runs: only its own contexts count, and autograd functions stay whole.

    By one thread at a time, as some of what this replaces is torch's for all threads; what it is replaced by does the
    same as before for the others.
    """
    around = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.enter_context(torch.enable_grad())
        for device, enabled in around.items():
            torch.set_autocast_enabled(device, False)
            stack.callback(torch.set_autocast_enabled, device, enabled)
        inside = {torch.autograd.Function: {"apply": _applied()}, fx.Proxy: {"__setattr__": _set}}
        stack.enter_context(replaced({**inside, builtins: {"isinstance": _isinstance_of}}))
        yield


def _set(proxy: fx.Proxy, name: str, value: Any) -> None:
    """Setting an attribute of a stand-in: not those that tensors have."""
    if hasattr(torch.Tensor, name):
        raise Refusal(
            f"it sets .{name} of a tensor, which a graph cannot hold: change a parameter with an op in place, such as "
            "copy_, under torch.no_grad(), and freeze parameters before the model is converted"
        )
    object.__setattr__(proxy, name, value)


@contextmanager
def replaced(by: Mapping[Any, Mapping[str, Any]]) -> Iterator[None]:
    """Of each owner, these attributes are these."""
    with contextlib.ExitStack() as stack:
        _REPLACED.append(stack)
        stack.callback(_REPLACED.remove, stack)
        for owner, attributes in by.items():
            stack.enter_context(mock.patch.multiple(owner, **attributes))
        yield


def untraced() -> Any:
    """While a model is traced: what runs in this context is not."""
    return replaced(UNTRACED)


ISINSTANCE = isinstance


def _isinstance_of(value: Any, kinds: Any, /) -> bool:
    """isinstance, to which a stand-in in the model's code is what it stands for.

    A stand-in whose `__class__` said so would be a tensor to torch's C code as well, which then looks for its memory.
    """
    if ISINSTANCE(value, kinds):
        return True
    stands_for = getattr(type(value), "stands_for", None)
    if stands_for is None:
        return False
    asking = sys._getframe(1).f_code
    of_layers = re.search(r"[/\\]torch[/\\]nn[/\\]", asking.co_filename) or asking.co_name == "is_tensor"
    if is_torchs(asking.co_filename) and not of_layers:
        return False  # torch.fx asks whether it is a proxy
    return ISINSTANCE(stands_for(value), kinds)


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


@contextmanager
def building(model: nn.Module) -> Iterator[list[str]]:
    """While graphs are made: by one thread at a time, and outside of inference mode, as their constants are kept.

    Yields:
        a list, in which the names of the files are afterwards in which torch.fx has their code (see `forget`).
    """
    sources: list[str] = []
    with _ONE_AT_A_TIME, torch.inference_mode(False), settled(model):
        n_before = len(_SOURCES)
        yield sources
        sources += itertools.islice(_SOURCES, n_before, None)


_SOURCES: dict[str, str] = getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", {})


def forget(sources: Sequence[str]) -> None:
    """Let go of the code of graphs that are gone: for tracebacks, torch.fx keeps the text of each for ever."""
    for source in sources:
        _SOURCES.pop(source, None)
        linecache.cache.pop(source, None)


@contextmanager
def settled(module: nn.Module) -> Iterator[None]:
    """Parametrizations in evaluation mode: reading a weight is not a step of training (spectral norm's iteration)."""
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


@contextmanager
def parametrized_once() -> Iterator[None]:
    """A parametrized weight is one tensor, however often it is read (torch's own cache takes a module's copies for it).

    Other threads compute theirs as always.
    """
    made: dict[nn.Module, Any] = {}
    call, thread = parametrize.ParametrizationList.__call__, threading.get_ident()

    def once(parametrization: nn.Module) -> Any:
        if threading.get_ident() != thread:
            return call(parametrization)
        if parametrization not in made:
            made[parametrization] = call(parametrization)
        return made[parametrization]

    with mock.patch.object(parametrize.ParametrizationList, "__call__", once):
        yield
