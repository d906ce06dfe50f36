"""A copy of the user's model that shares its tensors; and which models cannot be converted."""

import copy
from typing import Any

import torch
from torch import nn
from torch.ao.nn.quantized import FloatFunctional
from torch.nn.modules.lazy import LazyModuleMixin

from fxfeedback.errors import TraceError
from fxfeedback.graph.writable import NAME, NAMES

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
"""Packages of quantized modules; what computes with floats there are only the `FloatFunctional`s."""


def share(model: nn.Module) -> nn.Module:
    """A copy of `model` whose modules are new (modes, attributes) and whose parameters and buffers are the same.

    Raises:
        TraceError: a quantized, compiled, scripted, wrapped or uninitialized model, or one with a name that the code of
            a graph cannot say.
    """
    refuse_untraceable(model)
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors_of(model)})


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers, and what modules have in plain attributes."""
    kept = [tensor for module in model.modules() for tensor in _tensors_in(vars(module))]
    return [*model.parameters(), *model.buffers(), *kept]


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in an attribute's value: some models keep what they computed, in a dict or a list."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def put(model: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """`model` with the module at `path` replaced by `part`, in a copy that shares all tensors."""
    if not path:
        return part
    model = share(model)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, part)
    return model


def refuse_untraceable(model: nn.Module) -> None:
    """Say what to pass instead of a model, or a part of it, whose code or weights are out of reach."""
    for name, module in model.named_modules():
        reason = _untraceable(module)
        if reason:
            raise TraceError(f"{name or type(model).__name__!r} {reason}")
        for own in (*module._modules, *module._parameters, *module._buffers):
            if not NAME.fullmatch(own):
                raise TraceError(f"{name or type(model).__name__!r} has {own!r}, {NAMES}: rename it.")


def _untraceable(module: nn.Module) -> str:
    if type(module).__module__.startswith("torch._dynamo"):
        return "is compiled: convert the model inside, model._orig_mod, and compile what is returned"
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return f"is a {type(module).__name__}: convert the model inside, model.module, and wrap what is returned"
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript: pass the Python model that it was made from"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
        return "has no weights before its first call: call the model once"
    packed = type(module).__module__.startswith(QUANTIZED) and not isinstance(module, FloatFunctional)
    if packed or any(tensor.is_quantized for tensor in module._parameters.values() if tensor is not None):
        # Packed integers are nothing that could be modulated, transposed or learned.
        return (
            f"is quantized ({type(module).__name__}): convert the floating-point model, and quantize what is exported"
        )
    return ""
