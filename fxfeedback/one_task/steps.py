"""The kinds of ops, by what they do with channels: which they make constant, which they read, and the op on a few."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxfeedback.graph.channels import channel_dim
from fxfeedback.graph.nodes import spec_of, specs_of
from fxfeedback.graph.specs import Spec
from fxfeedback.one_task.emitter import Emitter
from fxfeedback.one_task.network import Channels, Network, Step, unknown
from fxfeedback.rules import RULES
from fxfeedback.rules.convolution import transposed_convolution
from fxfeedback.rules.dropout import identity


class Whole(Step):
    """An op of any kind: every channel of the output reads all channels of the operands."""

    def __init__(self, network: Network, node: fx.Node, channels: Channels | None = None) -> None:
        self.network, self.node = network, node
        self.channels = channels or unknown(*_whole(node))

    def reads(self, live: torch.Tensor) -> Iterator[tuple[fx.Node, torch.Tensor]]:
        for source in self.network.values(self.node):
            yield source, torch.ones_like(self.network.channels(source).known)

    def emit(self, out: Emitter, live: list[int]) -> tuple[fx.Node, list[int]]:
        return out.copy(self.node), list(range(self.channels.size))


def _whole(node: fx.Node) -> tuple[int | None, int]:
    """Where a value of any op has its channels, and how many: only a convenience for the ops after it."""
    spec = specs_of(node)
    if not isinstance(spec, Spec) or len(spec.shape) < 2 or 0 in spec.shape or not spec.dtype.is_floating_point:
        return None, 1
    dim = channel_dim(node) % len(spec.shape)
    return (None, 1) if spec.per_sample[dim] else (dim, spec.shape[dim])


class PerChannel(Step):
    """Each channel by itself: it reads the same channel of each operand, or what all channels share.

    dim: the dimension of the output's channels. along: that of each tensor operand's; None: all channels share it.
    on_maps: whether the op looks at more than one position, as at a map's border.
    zero_wins: whether one operand's zero makes the output zero, as in a product.
    """

    def __init__(
        self,
        network: Network,
        node: fx.Node,
        dim: int,
        along: dict[fx.Node, int | None],
        on_maps: bool = False,
        zero_wins: bool = False,
    ) -> None:
        self.network, self.node, self.dim, self.along = network, node, dim, along
        self.on_maps, self.zero_wins = on_maps, zero_wins
        self.channels = self._channels(spec_of(node).shape[dim])

    def _channels(self, size: int) -> Channels:
        all_known, zero = torch.ones(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
        if any(source in self.network.numbers for source in self.node.all_input_nodes):
            all_known[:] = False  # what is computed from the batch size is not constant
        for source, along in self.along.items():
            operand = self.network.along(source, along)
            constant = self.network.constant(source) is not None
            if along is not None:
                zero |= operand.known & (operand.number == 0)
                all_known &= operand.known | constant
            elif not constant:
                all_known[:] = False
        known, number = unknown(None, size).known, unknown(None, size).number
        if all_known.any():
            picked = all_known.nonzero().flatten()
            uniform, numbers = self._evaluate(picked)
            known[picked], number[picked] = uniform, numbers
        if self.zero_wins:
            known, number = known | zero, torch.where(zero, 0.0, number)
        return Channels(self.dim, known, number)

    def _evaluate(self, picked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The op on known channels: in which it gives one number everywhere, and which."""

        def operand(source: fx.Node) -> Any:
            along, constant = self.along.get(source), self.network.constant(source)
            if constant is not None:
                constant = constant.double().cpu() if constant.is_floating_point() else constant.cpu()
                return constant if along is None else constant.index_select(along, picked)
            assert along is not None
            shape = self.network.shape(source)
            column = [len(picked) if d == along else 1 for d in range(len(shape))]
            numbers = self.network.along(source, along).number[picked].reshape(column)
            wide = [len(picked) if d == along else size for d, size in enumerate(shape)]
            return numbers.expand(wide) if self.on_maps else numbers

        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), operand)
        result = self.node.target(*args, **kwargs).double().cpu().movedim(self.dim, 0).reshape(len(picked), -1)  # type: ignore[operator]
        low, high = result.amin(1), result.amax(1)
        uniform = torch.isfinite(result).all(1) & (high - low <= 1e-12 * torch.maximum(low.abs(), high.abs()))
        return uniform, torch.where(uniform, low, 0.0)

    def reads(self, live: torch.Tensor) -> Iterator[tuple[fx.Node, torch.Tensor]]:
        for source in self.network.values(self.node):
            along, channels = self.along.get(source), self.network.channels(source)
            yield source, live if along is not None and along == channels.dim else torch.ones_like(channels.known)

    def emit(self, out: Emitter, live: list[int]) -> tuple[fx.Node, list[int]]:
        live = self._in_order(out, live)
        operands: dict[fx.Node, fx.Node] = {}
        for source, along in self.along.items():
            constant = self.network.constant(source)
            if along is None:
                operands[source] = out.whole(source)
            elif constant is not None:
                operands[source] = out.attribute(str(source.target), pick(constant, along, live))
            else:
                operands[source] = out.aligned(source, along, live)
        same = self._same(out, operands)
        return (out.copy(self.node, operands) if same is None else operands[same]), live

    def _in_order(self, out: Emitter, live: list[int]) -> list[int]:
        """`live` in the order that an operand has already, if possible one that has no others."""
        wanted = set(live)
        sources = [s for s, d in self.along.items() if d is not None and s in out.lists]
        sources = [s for s in sources if self.network.channels(s).dim == self.along[s]]
        sources.sort(key=lambda s: (math.prod(self.network.shape(s)), set(out.lists[s]) == wanted))
        first = [channel for channel in out.lists[sources[-1]] if channel in wanted] if sources else []
        return first + sorted(wanted - set(first))

    def _same(self, out: Emitter, operands: dict[fx.Node, fx.Node]) -> fx.Node | None:
        """The operand that the op leaves as it is: the identity, and a product with open gates."""
        if RULES.get(self.node.target) is identity:
            return self.node.all_input_nodes[0]
        if not (self.zero_wins and len(operands) == 2 and self.node.target is torch.mul):
            return None
        (value, constant) = self.node.all_input_nodes
        if operands[constant].op != "get_attr" or value not in self.network.steps:
            return None
        ones = bool((out.tensors[str(operands[constant].target)] == 1).all())
        return value if ones and self.network.shape(value) == self.network.shape(self.node) else None


class Mixing(Step):
    """Convolutions and linear layers: each output channel reads all input channels of its group.

    weight: (groups, outputs, inputs, ...), the layer's weight in this order. padded: whether a known input channel that
    is not zero makes outputs that differ at the border, so that it must be there.
    """

    def __init__(self, network: Network, node: fx.Node, dim: int, groups: int, padded: bool) -> None:
        self.network, self.node, self.dim, self.groups = network, node, dim, groups
        rule = RULES[node.target]
        self.operands = rule.operands(node.args, dict(node.kwargs))
        self.input = self.operands["input"]
        self.transposed = rule is transposed_convolution
        self.weight = self._by_group(network.constant(self.operands["weight"]))
        read = network.along(self.input, dim)
        folded = read.known & (read.number == 0) if padded else read.known
        self.read = ~folded.reshape(groups, -1)
        outputs = self.weight.shape[1]
        known = ~self.read.any(1).repeat_interleave(outputs)
        self.shift = self._constant_part(torch.where(folded, read.number, 0.0))
        bias = network.constant(self.operands.get("bias"))
        number = self.shift + (0 if bias is None else bias.detach().double().cpu())
        self.channels = Channels(dim, known, torch.where(known, number, 0.0))

    def _by_group(self, weight: Any) -> torch.Tensor:
        weight = weight.detach().unflatten(0, (self.groups, -1))
        return weight.transpose(1, 2) if self.transposed else weight

    def _constant_part(self, number: torch.Tensor) -> torch.Tensor:
        """What the known inputs add to each output."""
        groups, outputs, inputs = self.weight.shape[:3]
        number = number.reshape(groups, inputs)
        shift = torch.zeros(groups, outputs, dtype=torch.double)
        for group, channel in number.nonzero().tolist():
            column = self.weight[group, :, channel].double().reshape(outputs, -1).sum(1).cpu()
            shift[group] += number[group, channel] * column
        return shift.flatten()

    def reads(self, live: torch.Tensor) -> Iterator[tuple[fx.Node, torch.Tensor]]:
        used = live.reshape(self.groups, -1).any(1, keepdim=True)
        channels = self.network.channels(self.input)
        mask = (self.read & used).flatten()
        yield self.input, mask if channels.dim == self.dim else torch.ones_like(channels.known)

    def emit(self, out: Emitter, live: list[int]) -> tuple[fx.Node, list[int]]:
        outputs, inputs = self.weight.shape[1:3]
        tracked = self.network.channels(self.input).dim == self.dim
        there = {channel: i for i, channel in enumerate(out.lists.get(self.input, []) if tracked else [])}
        wanted: dict[int, list[int]] = {}
        for channel in live:
            wanted.setdefault(channel // outputs, []).append(channel % outputs)
        read = {
            g: sorted(self.read[g].nonzero().flatten().tolist(), key=lambda i: there.get(g * inputs + i, -1))
            for g in wanted
        }
        used = sorted(wanted, key=lambda g: there.get(g * inputs + read[g][0], -1))
        # All groups of a convolution have the same sizes: smaller ones compute more outputs, and read an input again
        # with weight zero.
        n_out, n_in = max(map(len, wanted.values())), max(map(len, read.values()))
        weights, made, taken = [], [], []
        for g in used:
            rows = wanted[g] + [o for o in range(outputs) if o not in wanted[g]][: n_out - len(wanted[g])]
            columns = read[g] + read[g][:1] * (n_in - len(read[g]))
            part = pick(pick(self.weight[g], 0, rows), 1, columns)
            part[:, len(read[g]) :] = 0
            weights.append(part)
            made += [g * outputs + o for o in rows]
            taken += [g * inputs + i for i in columns]
        weight = torch.stack(weights)
        weight = (weight.transpose(1, 2) if self.transposed else weight).flatten(0, 1)
        return self._call(out, weight, made, taken, len(used)), made

    def _call(self, out: Emitter, weight: torch.Tensor, made: list[int], taken: list[int], groups: int) -> fx.Node:
        operands = dict(self.operands)
        name, bias = str(operands["weight"].target), self.network.constant(operands.get("bias"))
        bias_name = name.removesuffix("weight") + "bias" if bias is None else str(operands["bias"].target)
        shift = self.shift[made]
        if bias is not None or shift.any():
            total = shift + (0 if bias is None else pick(bias, 0, made).double().cpu())
            bias = torch.nn.Parameter(total.to(weight), requires_grad=self.network.learns(name))
            operands["bias"] = out.attribute(bias_name, bias)
        operands["weight"] = out.attribute(name, weight)
        operands["input"] = out.aligned(self.input, self.dim, taken)
        if "groups" in operands:
            operands["groups"] = groups
        return out.call(self.node, operands)


def pick(tensor: torch.Tensor, dim: int, channels: Sequence[int]) -> torch.Tensor:
    """Some channels of a tensor, in this order; the tensor itself where these are all."""
    if list(channels) == list(range(tensor.shape[dim])):
        return tensor
    return tensor.detach().index_select(dim, torch.tensor(channels, dtype=torch.long, device=tensor.device))
