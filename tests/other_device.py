"""A GPU that is not there: torch's fake tensors on it, which take the ways of CUDA's kernels and have no values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Draw(NamedTuple):
    """An op that draws a tensor of random numbers: what decides which.

    layout: the sizes and strides by which one goes through its memory.
    """

    op: str
    device: str
    dtype: torch.dtype
    layout: tuple[tuple[int, int], ...]


def layout_of(x: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """(size, stride) of its dimensions, of which those that follow one another in memory are one."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if merged and merged[-1][1] == size * stride:
            merged[-1] = merged[-1][0] * size, stride
        elif size != 1:
            merged.append((size, stride))
    return tuple(merged)


COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._use_cudnn_ctc_loss.Tensor)
"""Ops that may take tensors of both."""


class Watch(TorchDispatchMode):
    """Notes the draws, and refuses ops that take tensors of this processor and of the GPU; single numbers may mix."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        copies = func in COPIES
        assert copies or not {"cpu", "cuda"} <= devices, f"{func} of {[(x.device.type, x.shape) for x in tensors]}"
        result = func(*args, **(kwargs or {}))
        x = next((value for value in tree_leaves(result) if isinstance(value, torch.Tensor)), None)
        if torch.Tag.nondeterministic_seeded in func.tags and x is not None and not x.is_meta:
            name = str(func.overloadpacket).removesuffix("_").removesuffix("_like")
            self.draws.append(Draw(name, x.device.type, x.dtype, layout_of(x)))
        return result


class Gpu:
    """A GPU that is not there.

    with gpu:  what is made, is made by this mode.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.known: dict[int, tuple[Any, Any]] = {}

    def tensor(self, like: torch.Tensor) -> Any:
        """A tensor on the GPU as this one; the same for the same one."""
        if like.device.type == "cuda":
            return like
        if id(like) not in self.known:
            with self.mode:
                made: Any = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cuda")
            made = nn.Parameter(made, like.requires_grad) if isinstance(like, nn.Parameter) else made
            self.known[id(like)] = like, made
        return self.known[id(like)][1]

    def move(self, module: Any) -> Any:
        """The module itself, with its parameters and buffers on the GPU: nn.Module.to takes no such tensors."""
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                tensors.update({name: None if x is None else self.tensor(x) for name, x in tensors.items()})
        return module

    @contextmanager
    def __call__(self) -> Iterator[Watch]:
        """What happens inside is watched."""

        def to(module: Any, like: Any) -> Any:
            return self.move(module)

        states = mock.patch("fxfeedback.tracing.trace.random_states", tuple)  # which would be read as numpy's arrays
        equal = mock.patch("torch.equal", lambda a, b: a.shape == b.shape)  # of values that there are none of
        fast = mock.patch("torch.backends.mha._is_fastpath_enabled", False)  # which torch 2.11 has no fake kernel of
        with self.mode, mock.patch.object(nn.Module, "to", to), states, equal, fast, Watch() as watch:
            yield watch
