"""What a file has, while a network is made for it, and the names in checkpoints."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from fxfeedback.errors import CheckpointError

SAVED: ContextVar[Mapping[str, torch.Size] | None] = ContextVar("SAVED", default=None)
"""While a file is loaded: the shapes of the tensors that it has, by name below the wrapper that is made."""


Part = TypeVar("Part", bound=nn.Module)


def own_part(name: str, make: Callable[[], Part], like: torch.Tensor) -> Part:
    """A part that a wrapper adds; for a file it is made only where the file has its tensors (see `check_saved`).

    The CPU's generator draws it, so that a seed gives the same on every device; then it goes to that of `like`.
    """
    if SAVED.get() is not None:
        with torch.device("meta"):
            for key, tensor in make().state_dict().items():
                check_saved(f"{name}.{key}", tensor.shape)
    with torch.device("meta" if like.is_meta else "cpu"):
        return make().to(like)


def check_saved(name: str, shape: Sequence[int]) -> None:
    """While a file is loaded: whether it has a tensor that a wrapper is about to make, in this size.

    Raises:
        CheckpointError: it has not. Nothing was allocated, however much the file asks for.
    """
    saved = SAVED.get()
    if saved is not None and saved.get(name) != torch.Size(shape):
        has = tuple(saved[name]) if name in saved else "none"
        raise CheckpointError(f"it asks for {name!r} with shape {tuple(shape)}; the file has {has}")


def without_prefixes(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """The tensors without the prefixes that a compiled or a wrapped model has before all of its names."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # compiled and then wrapped, or the other way round
        own = prefix.removesuffix(".") in model._modules
        if state and not own and all(name.startswith(prefix) for name in state):
            state = copy.copy(state)
            consume_prefix_in_state_dict_if_present(state, prefix)  # type: ignore[arg-type]
    return state
