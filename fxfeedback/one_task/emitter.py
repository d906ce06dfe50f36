"""The network of the live channels, with weights cut to size."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfeedback.graph.nodes import identifier, name_of, spec_of, specs_of, tell_only
from fxfeedback.graph.specs import EXAMPLE_BATCH, Spec
from fxfeedback.one_task.network import Channels, Network


class Emitter:
    """Makes the network of the live channels.

    nodes: old node -> its node there. lists: old node -> the channels that this one has, in order.
    tensors: name -> tensor of the new network.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.graph = network, fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.lists: dict[fx.Node, list[int]] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self._made: dict[Any, fx.Node] = {}

    def emit(self, node: fx.Node) -> None:
        """The node on its live channels, if it has any."""
        if node.op == "placeholder":
            self.nodes[node] = self.graph.node_copy(node)
            self.lists[node] = list(range(self.network.channels(node).size))
        elif node.op == "output":
            self.graph.output(fx.map_arg(node.args[0], self.whole))
        elif node in self.network.steps and self.network.live[node].any():
            live = self.network.live[node].nonzero().flatten().tolist()
            self.nodes[node], self.lists[node] = self.network.steps[node].emit(self, live)

    def used(self) -> dict[str, torch.Tensor]:
        """The tensors that the emitted graph names."""
        return {str(node.target): self.tensors[str(node.target)] for node in self.graph.nodes if node.op == "get_attr"}

    # -- nodes --------------------------------------------------------------------------------------------------------

    def copy(self, node: fx.Node, operands: Mapping[fx.Node, fx.Node] | None = None) -> fx.Node:
        """The same call; operands are whole where nothing else is given."""
        given = operands or {}
        made = self.graph.node_copy(node, lambda source: given.get(source) or self.whole(source))
        tell_only(made, name=name_of(node))
        return made

    def call(self, node: fx.Node, operands: Mapping[str, Any]) -> fx.Node:
        """The node's function with other operands; the first three by position."""
        names = ("input", "weight", "bias")
        others = {name: value for name, value in operands.items() if name not in names}
        return self.insert(node.target, tuple(operands.get(name) for name in names), node, **others)

    def insert(self, function: Any, args: tuple[Any, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
        """A new call, named after an old node."""
        made = self.graph.create_node("call_function", function, args, kwargs, name=like.name)
        tell_only(made, name=name_of(like))
        return made

    def attribute(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """The get_attr node of a tensor; different ones of one name get numbers."""
        original = self.network.tensors.get(name)
        for number in range(1, len(self.tensors) + 2):
            unique = name if number == 1 else f"{name}_{number}"
            kept = self.tensors.get(unique)
            if kept is None:
                kept = tensor.detach().clone()
                if isinstance(original, nn.Parameter) or isinstance(tensor, nn.Parameter):
                    kept = nn.Parameter(kept, requires_grad=(tensor if original is None else original).requires_grad)
                self.tensors[unique] = kept
            if kept.shape == tensor.shape and kept.dtype == tensor.dtype and torch.equal(kept, tensor):
                if ("get_attr", unique) not in self._made:
                    node = self.graph.create_node("get_attr", unique, name=identifier(unique))
                    self._made["get_attr", unique] = node
                return self._made["get_attr", unique]
        raise AssertionError("there are more numbers than tensors")

    # -- values -------------------------------------------------------------------------------------------------------

    def whole(self, node: fx.Node) -> fx.Node:
        """A value, constant or size as it was, with all of its channels."""
        constant = self.network.constant(node)
        if constant is not None:
            return self.attribute(str(node.target), constant)
        if node in self.network.numbers:
            return self._number(node)
        channels = self.network.channels(node)
        return self.nodes[node] if channels.dim is None else self.aligned(node, channels.dim, range(channels.size))

    def aligned(self, node: fx.Node, dim: int, wanted: Sequence[int]) -> fx.Node:
        """A value with the channels `wanted` along `dim`, in this order; known ones hold their numbers."""
        key = (node, dim, tuple(wanted))
        if key not in self._made:
            channels = self.network.channels(node)
            if channels.dim == dim:
                self._made[key] = self._aligned(node, channels, list(wanted))
            else:
                whole = self.whole(node)
                everything = list(wanted) == list(range(self.network.shape(node)[dim]))
                self._made[key] = whole if everything else self._picked(whole, dim, list(wanted), node)
        return self._made[key]

    def _aligned(self, node: fx.Node, channels: Channels, wanted: list[int]) -> fx.Node:
        have = self.lists.get(node, [])
        if have == wanted:
            return self.nodes[node]
        assert channels.dim is not None
        dim, spec = channels.dim, spec_of(node)
        numbers = channels.number[wanted]
        column = numbers.reshape([len(wanted) if d == dim else 1 for d in range(len(spec.shape))]).to(spec.dtype)
        if not set(have) & set(wanted):
            sizes = [len(wanted) if d == dim else self._size(spec, d) for d in range(len(spec.shape))]
            return self.insert(torch.Tensor.expand, (self._constant(node, "numbers", column), sizes), node)
        place = {channel: i for i, channel in enumerate(have)}
        missing = [channel for channel in wanted if channel not in place]
        value = self.nodes[node]
        if wanted == have + missing:  # zeros after the channels that are there
            value = self._padded(value, spec, dim, len(missing), node)
        else:
            value = self._padded(value, spec, dim, 1, node) if missing else value
            value = self._picked(value, dim, [place.get(channel, len(have)) for channel in wanted], node)
        present = torch.tensor([channel in place for channel in wanted]).reshape(column.shape)
        column = torch.where(present, 0, column)
        return self.insert(torch.add, (value, self._constant(node, "numbers", column)), node) if column.any() else value

    def _padded(self, value: fx.Node, spec: Spec, dim: int, more: int, like: fx.Node) -> fx.Node:
        return self.insert(F.pad, (value, [0, 0] * (len(spec.shape) - 1 - dim) + [0, more]), like)

    def _picked(self, value: fx.Node, dim: int, places: list[int], like: fx.Node) -> fx.Node:
        if places == list(range(places[0], places[0] + len(places))):
            return self.insert(torch.narrow, (value, dim, places[0], len(places)), like)
        return self.insert(
            torch.index_select, (value, dim, self._constant(like, "channels", torch.tensor(places))), like
        )

    def _constant(self, node: fx.Node, what: str, tensor: torch.Tensor) -> fx.Node:
        some = next(iter(self.network.tensors.values()), tensor)
        return self.attribute(f"{node.name}_{what}", tensor.to(some.device))

    # -- sizes --------------------------------------------------------------------------------------------------------

    def _number(self, node: fx.Node) -> fx.Node:
        if node not in self._made:
            if node.target is torch.Tensor.size:
                size = self._size(specs_of(node.args[0]), node.args[1])  # type: ignore[union-attr, arg-type]
                self._made[node] = size
            else:
                self._made[node] = self.graph.node_copy(node, self._number)
        return self._made[node]

    def _size(self, spec: Spec, dim: int) -> Any:
        """The size along one dimension: a number, or a node that computes it from the batch size."""
        slope = spec.per_sample[dim]
        if not slope:
            return spec.shape[dim]
        if "batch" not in self._made:
            first = next(node for node in self.graph.nodes if node.op == "placeholder")
            self._made["batch"] = self.graph.call_function(torch.Tensor.size, (first, 0))
        size, rest = self._made["batch"], spec.shape[dim] - slope * EXAMPLE_BATCH
        size = size if slope == 1 else self.graph.call_function(operator.mul, (size, slope))
        return size if not rest else self.graph.call_function(operator.add, (size, rest))
