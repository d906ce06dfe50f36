"""What is known of the channels of every value in a graph, and which of the others are read.

A channel is *known* when it holds one number, whatever the network's input is: zero after a closed gate, β after the
batch norm of such a channel. It is *live* when it is not known and is read.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxfeedback.graph.nodes import spec_of


@dataclass(frozen=True)
class Channels:
    """The channels of a value.

    dim: the dimension that they lie along; None: the value is taken as one channel.
    known: (size,), whether a channel is known; number: (size,) float64, what it holds then, 0 elsewhere.
    """

    dim: int | None
    known: torch.Tensor
    number: torch.Tensor

    @property
    def size(self) -> int:
        return len(self.known)


def unknown(dim: int | None, size: int = 1) -> Channels:
    """Channels of which nothing is known."""
    return Channels(dim, torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.double))


class Step:
    """What one op of the network does with channels; steps.py and moving.py have the kinds."""

    network: "Network"
    node: fx.Node
    channels: Channels

    def reads(self, live: torch.Tensor) -> Iterator[tuple[fx.Node, torch.Tensor]]:
        """The channels of the operands that the channels `live` of the output are computed from."""
        raise NotImplementedError

    def emit(self, out: Any, live: list[int]) -> tuple[fx.Node, list[int]]:
        """A node made by `out`, an Emitter, with at least the channels `live`, and which it has, in order."""
        raise NotImplementedError


class Network:
    """What is known of every value's channels, and which of the others are read.

    steps: every op and input, but for constants and sizes. numbers: the sizes at batch `EXAMPLE_BATCH`.
    live: for every step's node (size,), the channels that must be computed. step_of: how a node's op treats channels.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Mapping[str, torch.Tensor],
        step_of: Callable[["Network", fx.Node], "Step"],
    ) -> None:
        self.graph, self.tensors = graph, tensors
        self.steps: dict[fx.Node, Step] = {}
        self.numbers: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op in ("get_attr", "output"):
                continue
            if self._is_number(node):
                self.numbers[node] = self._number(node)
            else:
                self.steps[node] = step_of(self, node)
        self.live = self._read()

    def _is_number(self, node: fx.Node) -> bool:
        """Whether the node is a size, or is computed from sizes."""
        if node.target is torch.Tensor.size and len(node.args) == 2:
            return True
        return bool(node.all_input_nodes) and all(source in self.numbers for source in node.all_input_nodes)

    def _number(self, node: fx.Node) -> Any:
        if node.target is torch.Tensor.size:
            return self.shape(node.args[0])[node.args[1]]  # type: ignore[index]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.numbers.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _read(self) -> dict[fx.Node, torch.Tensor]:
        """From the outputs backwards: which unknown channels are read."""
        read = {node: torch.zeros_like(step.channels.known) for node, step in self.steps.items()}
        for leaf in self.graph.output_node().all_input_nodes:
            if leaf in read:
                read[leaf][:] = True
        for node, step in reversed(self.steps.items()):
            read[node] &= ~step.channels.known
            if read[node].any():
                for source, channels in step.reads(read[node]):
                    read[source] |= channels
        return read

    def values(self, node: fx.Node) -> list[fx.Node]:
        """The node's operands that depend on the input."""
        return [source for source in node.all_input_nodes if source in self.steps]

    def constant(self, node: Any) -> torch.Tensor | None:
        """The tensor of a get_attr node; None for anything else."""
        return self.tensors[str(node.target)] if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def shape(self, node: Any) -> tuple[int, ...]:
        """A tensor's shape, at batch size `EXAMPLE_BATCH`."""
        constant = self.constant(node)
        return tuple(spec_of(node).shape if constant is None else constant.shape)

    def channels(self, node: fx.Node) -> Channels:
        """What is known of a value's channels."""
        return self.steps[node].channels

    def along(self, node: fx.Node, dim: int | None) -> Channels:
        """What is known of the channels along `dim`, of a value or a constant."""
        constant = self.constant(node)
        if dim is None:
            return unknown(None)
        if constant is None:
            own = self.channels(node)
            return own if own.dim == dim else unknown(dim, self.shape(node)[dim])
        if not constant.numel():
            return unknown(dim, constant.shape[dim])
        by_channel = constant.detach().double().cpu().movedim(dim, 0).reshape(constant.shape[dim], -1)
        uniform = by_channel.amin(1) == by_channel.amax(1)
        return Channels(dim, uniform, torch.where(uniform, by_channel[:, 0], 0.0))

    def learns(self, name: str) -> bool:
        """Whether a tensor asks for a gradient."""
        return self.tensors[name].requires_grad
