"""Example inputs: those that a user gave, or one made for a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fxfeedback.errors import InputError, OptionError
from fxfeedback.tracing.share import refuse_untraceable


def examples_of(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
) -> Sequence[Any] | Mapping[str, Any]:
    """The example inputs that a user gave, or one made for `input_size` (see `example_for`).

    Raises:
        InputError: they are not what they should be, or both are given.
        OptionError: the model is not a torch.nn.Module.
    """
    if example_inputs is None:
        return example_for(model, input_size)
    refuse_no_module(model)
    if input_size is not None:
        raise InputError("give input_size= or example_inputs=, not both")
    if isinstance(example_inputs, torch.Tensor):
        raise InputError("example_inputs= is a tensor: give a tuple with a tensor for each input, example_inputs=(x,)")
    leaves: list[Any] = tree_leaves(example_inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    for x in tensors[:1] or [*example_inputs, None][:1]:
        if not isinstance(x, torch.Tensor) or not any(each.ndim for each in tensors):
            what = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
            raise InputError(
                f"example_inputs= holds {what}: give a tensor for each input, with a batch dimension first"
            )
    if isinstance(example_inputs, Mapping):  # one tensor under two names is two inputs
        return {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in example_inputs.items()}
    return example_inputs


def example_for(model: nn.Module, input_size: Sequence[int] | None = None) -> tuple[torch.Tensor]:
    """The one-image example input for `model`: (1, *input_size), in the model's dtype.

    `input_size` defaults to 224 by 224 with the first convolution's channels, or, without a convolution, to the first
    linear layer's features.
    """
    refuse_no_module(model)
    refuse_untraceable(model)
    if input_size is None:
        input_size = _default_size(model)
    if not isinstance(input_size, Sequence) or not all(isinstance(n, int) and n >= 1 for n in input_size):
        raise InputError(f"input_size={input_size!r}: give the size of one input without its batch, as (3, 224, 224)")
    return (torch.empty(1, *input_size, dtype=_dtype_of(model), device="meta"),)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """That of most numbers in its parameters, or in its buffers where it has none: norms may be in another."""
    for tensors in (model.parameters(), model.buffers()):
        sizes: Counter[torch.dtype] = Counter()
        for tensor in tensors:
            if tensor.is_floating_point():
                sizes[tensor.dtype] += tensor.numel()
        if sizes:
            return sizes.most_common(1)[0][0]
    return torch.get_default_dtype()


def refuse_no_module(model: Any) -> None:
    """Say what to pass instead of something that is not a model."""
    if not isinstance(model, nn.Module):
        what = "None" if model is None else f"a {type(model).__name__}"
        hint = ": call it, and pass the module that it returns" if callable(model) else ""
        raise OptionError(f"the model is {what}, not a torch.nn.Module{hint}")


def _default_size(model: nn.Module) -> tuple[int, ...]:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return (module.in_channels, 224, 224)
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        if isinstance(module, (nn.Conv1d, nn.Conv3d)):
            break
    raise InputError(f"the input size of {type(model).__name__} cannot be guessed: pass input_size= or example_inputs=")
