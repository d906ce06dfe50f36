"""Random numbers that a model's own code draws while it is traced: they would be constants of the graph."""

import functools
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxfeedback.tracing.buffers import memory
from fxfeedback.tracing.refusals import Refusal
from fxfeedback.tracing.while_tracing import replaced

DRAWS = (
    "its forward draws random numbers that do not depend on its input's values or size, and would be the same in every "
    "call: draw them with torch.rand_like(x), x.new_empty(...).bernoulli_(p) or nn.Dropout"
)


class _Refusing(TorchDispatchMode):
    """While a model is traced: no op of this thread's draws random numbers, but on the meta device for its shape.

    And none writes into the model's parameters, which are the user's own.

    generators: those of the model's own that last from call to call. parameters: by name.
    """

    def __init__(self, generators: list[torch.Generator], parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.generators = [*generators, torch.default_generator, None]
        self.names = {memory(p): name for name, p in parameters.items() if p.numel() and not p.is_meta}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and any(
            kwargs.get("generator") is g for g in self.generators
        ):
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            device = torch.device(kwargs.get("device") or "cpu")
            if device.type != "meta" and not any(tensor.is_meta for tensor in tensors):
                raise Refusal(DRAWS)
        if func._schema.is_mutable:
            self.check_writing(func._schema.arguments, args, kwargs)
        return func(*args, **kwargs)

    def check_writing(self, arguments: Any, args: Any, kwargs: Any) -> None:
        """Refuse to write into a parameter: it would be done once, in tracing, and to the user's model."""
        given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        written = [given.get(argument.name) for argument in arguments if argument.is_write]
        for tensor in tree_leaves(written):
            name = self.names.get(memory(tensor)) if isinstance(tensor, torch.Tensor) else None
            if name is not None:
                raise Refusal(
                    f"its forward writes into the parameter {name!r}, and not by its name: write with an op in place, "
                    "as self.weight.copy_(...) under torch.no_grad(), or do it outside of forward"
                )


@contextmanager
def refusing_draws(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While a model is traced: a random number of torch's, or of a new generator of numpy's, is an error.

    And so is an op that writes into one of these parameters.
    """
    values = [value for module in model.modules() for value in vars(module).values()]
    numpy = {module: {"default_rng": _seeded(module.default_rng)} for module in _numpys()}
    generators = [value for value in values if isinstance(value, torch.Generator)]
    with _Refusing(generators, parameters), replaced(numpy):
        yield


def _seeded(default_rng: Callable[..., Any]) -> Callable[..., Any]:
    return _watched(default_rng, lambda seed=None: seed is None)


def _watched(function: Callable[..., Any], draws: Callable[..., bool]) -> Callable[..., Any]:
    """The function, which this thread may not call so that it draws."""
    thread = threading.get_ident()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread and draws(*args, **kwargs):
            raise Refusal(DRAWS)
        return function(*args, **kwargs)

    return call


def _numpys() -> list[Any]:
    return [sys.modules["numpy.random"]] if "numpy.random" in sys.modules else []


def seed(device: torch.device, number: int) -> None:
    """Seed the generators of the CPU and of this device. torch.manual_seed seeds those of all GPUs as well."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(number)
    elif device.type != "cpu":
        torch.manual_seed(number)


def random_states() -> tuple[Any, ...]:
    """Of the generators that all threads share: torch's, Python's, numpy's."""
    numpy = [pickle.dumps(module.get_state(legacy=False)) for module in _numpys()]
    return bytes(torch.get_rng_state().numpy()), random.getstate(), *numpy


@contextmanager
def watching_draws() -> Iterator[None]:
    """Find out who changes these generators: doing so in this thread is an error. Python's profiler sees every call."""
    shared = (random.random.__self__, torch.default_generator)  # type: ignore[attr-defined]

    def watch(frame: Any, event: str, called: Any) -> None:
        owner = getattr(called, "__self__", None) if event == "c_call" else None
        if any(owner is one for one in shared) and not called.__name__.startswith(("get_state", "getstate", "initial")):
            raise Refusal(DRAWS)

    def of_numpy(module: Any) -> dict[str, Any]:
        owners = {name: type(getattr(f, "__self__", None)).__name__ for name, f in vars(module).items()}
        drawing = [name for name, owner in owners.items() if owner == "RandomState" and name != "get_state"]
        return {name: _watched(getattr(module, name), lambda *a, **k: True) for name in drawing}

    before = sys.getprofile()
    with replaced({module: of_numpy(module) for module in _numpys()}):
        sys.setprofile(watch)
        try:
            yield
        finally:
            sys.setprofile(before)
