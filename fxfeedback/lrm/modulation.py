"""The LRM block: how one connection modulates its destination (Konkle and Alvarez, "Cognitive Steering in Deep Neural
Networks via Long-Range Modulatory Feedback Connections", NeurIPS 2023).

    z    = resize(tanh(N(a)))             a: the source's activation; resized to the destination's present size;
                                          a vector is broadcast
    P(z) = neg_scale z where z < 0, pos_scale z elsewhere
    m    = conv1x1(P(z))                  the source's channels -> the destination's

The destination y becomes relu(y + y Σ m), the sum running over its connections (see rewrite.py); with mode="add"
relu(y + Σ m).

A source is mostly smaller than its destination. Then P(z) = pos_scale z + (neg_scale - pos_scale) min(z, 0) saves work:
the first term is projected before it is resized, which is the same for linear maps, and min(z, 0) is one look at the
large map.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxfeedback.errors import OptionError
from fxfeedback.graph.layout import Layout
from fxfeedback.lrm.enlarged import How, enlarged, working_dtype
from fxfeedback.lrm.resizing import channels_last, resize
from fxfeedback.tracing.fingerprint import HOOKS

ORDERS = ("norm-squash-resize", "resize-norm-squash")
NORMS = ("layer", "channel")
RESIZES = ("bilinear", "bicubic", "area")
SLICE: int | None = None
"""Bytes of a source's map, resized, that `modulate` works on at a time; None: see `_slice_bytes`."""
CACHE, GPU_PART = 2**23, 512
"""What a CPU's caches hold at least; the part of a GPU's memory, which its kernels take some 50 microseconds for."""


class Norm(nn.Module):
    """Layer norm of a vector or a map, eps 1e-5.

    over "layer": over (C, ...) together; weight and bias are (C, *size), resized to the map's present size.
    over "channel": over the channels of each position; weight and bias are (C,). A vector has no other norm.
    """

    def __init__(self, channels: int, size: Sequence[int], over: str) -> None:
        super().__init__()
        self.over = over if size else "channel"
        shape = (channels, *size) if self.over == "layer" else (channels,)
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def of_vector(self, a: torch.Tensor) -> torch.Tensor:
        """Normalise (B, C) over its channels; a map's weight and bias are averaged over its positions."""
        weight, bias = (p.reshape(len(p), -1).mean(1) for p in (self.weight, self.bias))
        return F.layer_norm(a, a.shape[1:], weight, bias)

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """Normalise a map (B, C, ...)."""
        if self.over == "channel":
            return F.layer_norm(a.movedim(1, -1), self.weight.shape, self.weight, self.bias).movedim(-1, 1)
        weight, bias = (resize(p.unsqueeze(0), a.shape[2:]).squeeze(0) for p in (self.weight, self.bias))
        return F.layer_norm(a, a.shape[1:], weight, bias)


class Modulation(nn.Module):
    """The block of one connection.

    Args:
        source, destination: the layouts of the two values when the model is built.
        order: "norm-squash-resize", or "resize-norm-squash".
        norm: "layer", or "channel".
        resize: "bilinear", "bicubic" or "area".
    """

    def __init__(
        self,
        source: Layout,
        destination: Layout,
        order: str = "norm-squash-resize",
        norm: str = "layer",
        resize: str = "bilinear",
    ) -> None:
        super().__init__()
        for name, value, choices in (("order", order, ORDERS), ("norm", norm, NORMS), ("resize", resize, RESIZES)):
            if value not in choices:
                raise OptionError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}")
        self.source, self.destination, self.order, self.resize = source, destination, order, resize
        smaller = math.prod(source.size) < math.prod(self._onto(destination.size))
        self.enlarges = smaller and order == "norm-squash-resize"
        one_position = all(n == 1 for n in source.size)
        self.norm = Norm(source.channels, () if one_position else self._onto(destination.size), norm)
        self.neg_scale = nn.Parameter(torch.ones(1))
        self.pos_scale = nn.Parameter(torch.ones(1))
        self.modulation = nn.Conv2d(source.channels, destination.channels, 1)

    def forward(self, a: Any, y: torch.Tensor, strength: torch.Tensor | None = None) -> torch.Tensor:
        """The connection's share m of the modulation of y.

        Args:
            a: the source's activation, or what `squash` makes of it.
            y: the destination, of which only the size matters.
            strength: factors on the two scales, (2,): negative, positive.

        Returns:
            m in y's layout, broadcasting to y.
        """
        z, of_class = a if isinstance(a, tuple) else self.squash(a, y)
        size = self._onto(self.destination.sizes_of(y))
        if z.ndim == 2:
            m = self.project(z, strength)[(...,) + (None,) * len(size)]  # broadcast
        elif self.order == "resize-norm-squash":
            m = self.project(torch.tanh(self.norm(resize(z, size, self.resize))), strength)
        elif self.enlarges:
            m = self._project_onto(z, size, strength)
        else:
            m = self.project(resize(z, size, self.resize), strength)
        if z.ndim == 2 and self.destination.kind == "tokens":
            return m.flatten(2).transpose(1, 2)  # one for all tokens
        of_class = None if of_class is None else self.project(of_class, strength)
        return self.destination.from_map(m, of_class, self.destination.class_tokens(y))

    def squash(self, a: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is done at the source's own size: tanh(N(a)), and that of what modulates y's class tokens, or None."""
        a, class_token = self.source.to_map(a)
        if class_token is not None and self.destination.kind == "vector":
            a, class_token = class_token, None  # what a class token is for
        if a.ndim == 2:
            return self._squash_class(a), None
        of_class = None
        if self.destination.class_tokens(y):
            of_class = self._squash_class(a.flatten(2).mean(2) if class_token is None else class_token)
        return a if self.order == "resize-norm-squash" else torch.tanh(self.norm(a)), of_class

    def _onto(self, size: Sequence[int]) -> Sequence[int]:
        """The size that the source's map is resized to: the destination's, or one position for a vector."""
        return size or [1] * max(len(self.source.size), 1)

    def _squash_class(self, a: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm.of_vector(a))

    def _scales(self, strength: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if strength is None:
            return self.neg_scale, self.pos_scale
        return self.neg_scale * strength[0], self.pos_scale * strength[1]

    def project(self, z: torch.Tensor, strength: torch.Tensor | None) -> torch.Tensor:
        """conv1x1(P(z)), of a vector or a map of any number of dimensions."""
        neg, pos = self._scales(strength)
        return self._mix(torch.where(z < 0, neg * z, pos * z), self.modulation.bias)

    def _project_onto(self, z: torch.Tensor, size: Sequence[int], strength: torch.Tensor | None) -> torch.Tensor:
        """conv1x1(P(resize(z)))"""
        neg, pos = self._scales(strength)
        z = channels_last(z)
        low = self._mix(pos * z, self.modulation.bias)
        whole = resize(low, size, self.resize).type_as(low)  # which autocast does in float32
        z = resize(z, size, self.resize)
        # Of the clamps only this one has the same derivative at 0, none, in every version of torch.
        below = F.hardtanh(z, -math.inf, 0.0, inplace=not torch.is_grad_enabled())
        return torch.addcmul(whole, (neg - pos).type_as(whole), self._mix(below))

    def enlarged(
        self, z: torch.Tensor, dtype: torch.dtype, strength: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of what m of a source that is enlarged is made: z, and with a scale each the low-resolution product and the
        weight.

        Args:
            z: of `squash`.
            dtype: of all three.
            strength: as in `forward`.

        Returns:
            (B, C_s, ...), (B, C_d, ...) and (1, C_d, C_s): m = resize(low) + weight min(resize(z), 0)
        """
        neg, pos = self._scales(strength)
        weight = self.modulation.weight
        z = z if z.dtype == dtype else channels_last(z, dtype)  # a copy only where there is one anyway: it is kept
        low = self._mix(z, self.modulation.bias, pos * weight)
        return z, low.to(dtype), ((neg - pos) * weight.flatten(1)).to(dtype).unsqueeze(0)

    def _mix(
        self, z: torch.Tensor, bias: torch.Tensor | None = None, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The 1x1 convolution, of its weight or of another one."""
        weight = self.modulation.weight if weight is None else weight
        if z.ndim == 4:
            return F.conv2d(z, weight, bias)
        return F.linear(z.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


Share = tuple[Modulation, torch.Tensor, torch.Tensor | None]
"""One connection's part in a modulation: its block, its source's activation, and the strength."""


def modulate(y: torch.Tensor, shares: Sequence[Share], activation: str, mode: str = "multiply") -> torch.Tensor:
    """relu(y + y Σ m), or relu(y + Σ m), slice by slice of the batch.

    What the blocks compute at y's size stays in a processor's cache.
    A backward pass keeps nothing of it that is larger than y, and computes it again.
    """

    def modulated(y: torch.Tensor, *sources: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        modulations = [block(a, y, strength) for (block, _, strength), a in zip(shares, sources, strict=True)]
        m = functools.reduce(torch.add, modulations)
        value = y + m if mode == "add" else torch.addcmul(y, y, m)
        return value.relu_() if activation == "relu" else value

    sources = [block.squash(a, y) for block, a, _ in shares]
    if all(z.ndim == 2 for z, _ in sources):
        return modulated(y, *sources)  # nothing in these blocks is large
    positions = y.shape[1:].numel() // shares[0][0].destination.channels
    widest = max(block.source.channels for block, _, _ in shares) * positions * y.element_size()
    samples = max(1, (SLICE or _slice_bytes(y.device)) // widest)
    both = zip(shares, sources, strict=True)
    if all(z.ndim == 2 or (_enlarges(block) and len(z) == len(y)) for (block, _, _), (z, _) in both):
        return _enlarged(y, shares, sources, (activation == "relu", mode == "add"), samples)
    sliced = [_sliced(x, len(y), samples) for x in (y, *itertools.chain(*sources))]
    again = functools.partial(checkpoint, modulated, use_reentrant=False, preserve_rng_state=False)
    run: Callable[..., Any] = again if torch.is_grad_enabled() else modulated
    parts = [run(y, *zip(x[::2], x[1::2], strict=True)) for y, *x in zip(*sliced, strict=False)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _enlarges(block: Modulation) -> bool:
    """Whether its source is enlarged, and no hook waits for its call."""
    return block.enlarges and not any(vars(block)[kind] for kind in HOOKS)


def _enlarged(
    y: torch.Tensor, shares: Sequence[Share], sources: Sequence[Any], ends: tuple[bool, bool], samples: int
) -> torch.Tensor:
    """`modulate` with sources that are vectors or are enlarged; ends: whether the sum is rectified, and m added."""
    dtype = working_dtype(y)
    both = list(zip(shares, sources, strict=True))
    maps = [(share, source) for share, source in both if source[0].ndim > 2]
    terms = [block.enlarged(z, dtype, strength) for (block, _, strength), (z, _) in maps]
    vectors = [block(source, y, strength) for (block, _, strength), source in both if source[0].ndim == 2]
    classes = [block.project(token, strength) for (block, _, strength), (_, token) in maps if token is not None]
    rest, of_class = (functools.reduce(torch.add, ms).to(dtype) if ms else None for ms in (vectors, classes))
    how = How(shares[0][0].destination, *ends, tuple([block.resize for (block, _, _), _ in maps]), samples)
    return enlarged(how, y, rest, of_class, *itertools.chain(*terms))


def _slice_bytes(device: torch.device) -> int:
    """What stays in the caches of a CPU's threads; of a GPU, where a slice takes launches, a part of the memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // GPU_PART
    cache = os.sysconf("SC_LEVEL2_CACHE_SIZE") if "SC_LEVEL2_CACHE_SIZE" in os.sysconf_names else 0
    return max(CACHE, cache * torch.get_num_threads())


def _sliced(x: torch.Tensor | None, batch: int, samples: int) -> Iterable[torch.Tensor | None]:
    """`samples` at a time; what is one for all samples, always."""
    return itertools.repeat(x) if x is None or len(x) != batch else x.split(samples)
