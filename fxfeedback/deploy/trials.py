"""What an exported file and torch are called with, so that their outputs can be compared."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fxfeedback.deploy.half import Half
from fxfeedback.deploy.program import Input, leaves

Sizes = list[tuple[int, ...]]
"""Of each input of the model, without its batch."""


class Trial(NamedTuple):
    """What a file and torch are called with: the model's own inputs, and task=, steering= or state=."""

    inputs: list[torch.Tensor]
    options: dict[str, Any]


class Network(NamedTuple):
    """What was exported.

    model: in eval mode. call: runs it, or a copy, for a trial. inputs: those of the file. task_ids: how many ids it
    takes, if any. dynamic_batch: whether the file's batch is free. output: what the file calls what `call` returns.
    half: the half precision in which the file computes, if any.
    """

    model: nn.Module
    call: Callable[[Any, Trial], Any]
    inputs: Sequence[Input]
    task_ids: int
    dynamic_batch: bool
    output: str = "output"
    half: Half | None = None


def sizes_of(inputs: Sequence[Input]) -> Sizes:
    """Of the model's own inputs in their example."""
    return [tuple(given.example.shape[1:]) for given in inputs if given.own]


def other_sizes(inputs: Sequence[Input], example: Sizes) -> Iterator[Sizes]:
    """Sizes to try, smaller and larger, square ones last; some models take only multiples of 32 or such."""
    for change in (
        lambda n, k: max(n * (6 - k) // 8 - k, 1),
        lambda n, k: n * (5 + k) // 4 + 1,
        lambda n, k: max(n // 32 - 1 - k, 1) * 32,
        lambda n, k: (n // 32 + 1 + k) * 32,
        lambda n, _: max(n // 2, 1),
        lambda n, _: 2 * n,
    ):
        sizes = [
            (size[0], *(change(n, k) for k, n in enumerate(size[1:]))) if given.any_size else size
            for given, size in zip([given for given in inputs if given.own], example, strict=True)
        ]
        if sizes != example:
            yield sizes


def runs(network: Network, sizes: Sizes) -> bool:
    """Whether torch takes inputs of these sizes."""
    try:
        trial = next(trials(network, 1, sizes, 0))
        leaves("", network.call(network.model, trial))
        return True
    except Exception:  # whatever the user's model raises
        return False


def trials(network: Network, batch: int, sizes: Sizes, number: int) -> Iterator[Trial]:
    """The calls at this batch and these sizes, with numbers that depend on the draw's `number` only.

    Every second draw is positive, for models that take roots or logarithms.
    """
    generator = torch.Generator().manual_seed(number)
    device = next((t.device for t in network.model.parameters()), torch.device("cpu"))

    def draw(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if not dtype.is_floating_point:
            return torch.randint(2, shape, generator=generator).to(device, dtype)
        make = torch.rand if number % 2 else torch.randn
        return make(shape, generator=generator).to(device, dtype)

    own = [given for given in network.inputs if given.own]
    xs = [
        draw((batch, *size) if given.batch else (), given.example.dtype) for given, size in zip(own, sizes, strict=True)
    ]
    vectors = next((given.example for given in network.inputs if given.name == "instruction"), None)
    if vectors is None:
        yield Trial(xs, {})
    else:
        yield Trial(xs, {"task": torch.randn(batch, vectors.shape[1], generator=generator).to(device, vectors.dtype)})
    if vectors is not None and network.task_ids:
        yield Trial(xs, {"task": torch.randint(network.task_ids, (batch,), generator=generator).to(device)})
    steering = [
        {
            "source": given.name.removesuffix(".activation"),
            "activation": draw((1 if i else batch, *given.example.shape[1:]), given.example.dtype),
            "strength": (0.5, 1.5),
            "alpha": 0.7,
        }
        for i, given in enumerate(one for one in network.inputs if one.name.endswith(".activation") and one.batch)
        if given.default is not None
    ]
    if steering:
        yield Trial(xs, {"steering": steering})
    states = [given for given in network.inputs if given.name.endswith(".state") and given.default is not None]
    if states:
        drawn = [draw((batch, *given.example.shape[1:]), given.example.dtype) for given in states]
        yield Trial(
            xs, {"state": {given.name.removesuffix(".state"): x for given, x in zip(states, drawn, strict=True)}}
        )
