"""Where a value has its channels and positions, and how it becomes a map with channels first, and back.

vector    (B, C)                no positions
map       (B, C, H, W)          or 1 or 3 spatial dimensions
last      (B, H, W, C)          a map with its channels last
tokens    (B, N, C)             a sequence; class tokens, if any, come before a square grid of patches
"""

import math
from dataclasses import dataclass

import torch
from torch import fx

from fxfeedback.graph.channels import channel_dim
from fxfeedback.graph.nodes import spec_of, specs_of
from fxfeedback.graph.specs import Spec

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
"""How a map with so many dimensions of positions is resized linearly."""
MOST_CLASS_TOKENS = 4
"""Class, distillation and register tokens, at the most, before a grid of patches."""


@dataclass(frozen=True)
class Layout:
    """The layout of a value when the model was built.

    kind: "vector", "map", "last" or "tokens"; channels: how many; size: of the map, () for a vector.
    """

    kind: str
    channels: int
    size: tuple[int, ...]

    def to_map(self, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The value as a vector or a map with channels first, and its class token (B, C) or None."""
        if self.kind == "last":
            return a.movedim(-1, 1), None
        if self.kind != "tokens":
            return a, None
        before, grid = token_grid(a.shape[1])
        patches = a[:, before:].transpose(1, 2).unflatten(2, grid)
        return patches, a[:, 0] if before else None

    def sizes_of(self, y: torch.Tensor) -> tuple[int, ...]:
        """The present size of y's map."""
        if self.kind == "tokens":
            return token_grid(y.shape[1])[1]
        return tuple(y.shape[1:-1] if self.kind == "last" else y.shape[2:])

    def class_tokens(self, y: torch.Tensor) -> int:
        """How many class tokens y has."""
        return token_grid(y.shape[1])[0] if self.kind == "tokens" else 0

    def from_map(self, m: torch.Tensor, of_class: torch.Tensor | None, class_tokens: int) -> torch.Tensor:
        """A map (B, C, ...) with channels first in this layout; `of_class` (B, C) for the class tokens."""
        if self.kind == "vector":
            return m.flatten(1)
        if self.kind == "map":
            return m
        if self.kind == "last":
            return m.movedim(1, -1)
        patches = m.flatten(2).transpose(1, 2)
        if of_class is None or not class_tokens:
            return patches
        return torch.cat([of_class.unsqueeze(1).expand(-1, class_tokens, -1), patches], 1)


def is_vector_or_map(node: fx.Node) -> bool:
    """Whether a value is one floating-point tensor with a batch and at least one more dimension."""
    spec = specs_of(node)
    return isinstance(spec, Spec) and len(spec.shape) >= 2 and spec.dtype.is_floating_point


def layout_of(node: fx.Node) -> Layout:
    """The layout of a node's value, from its shape and from where the op that made it has its channels."""
    shape = spec_of(node).shape
    if len(shape) == 2:
        return Layout("vector", shape[1], ())
    if channel_dim(node) % len(shape) == 1:
        return Layout("map", shape[1], tuple(shape[2:]))
    if len(shape) == 3:
        return Layout("tokens", shape[2], token_grid(shape[1])[1])
    return Layout("last", shape[-1], tuple(shape[1:-1]))


def token_grid(length: int) -> tuple[int, tuple[int, ...]]:
    """(class tokens, grid) of a sequence: the fewest class tokens that leave a square, or a line of all tokens."""
    for before in range(MOST_CLASS_TOKENS + 1):
        side = math.isqrt(max(length - before, 0))
        if side > 1 and side * side == length - before:
            return before, (side, side)
    return 0, (length,)
