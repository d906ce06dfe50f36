"""What the calls of a BU-TD network run: graphs as functions, and what these take."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Call(NamedTuple):
    """What a call without learning runs.

    inputs: the names of its inputs (see `key_of`).
    run: (None, *inputs, *attributes) -> what the model returns.
    attributes: the names of the parameters and buffers that it takes.
    all_attributes: of those that BU and TD have.
    """

    inputs: tuple[str, ...]
    run: Callable[..., Any]
    attributes: list[str]
    all_attributes: list[str]


class Gating(NamedTuple):
    """The instruction pass.

    size: length of an instruction.
    run: (module with instruction head and TD norms, instruction, *magnitudes drawn, *attributes) -> site name ->
        counter neurons.
    positions: of each site the dimensions over which a channel is one gate; none: every unit is.
    batch_first: whether a sample's gates can be picked by their first dimension.
    """

    size: int
    run: Callable[..., Any]
    attributes: list[str]
    positions: list[list[int]]
    batch_first: bool
