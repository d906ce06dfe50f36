"""The state that TD may have beside the BU weights: twins, biases, norms, instruction head, heads per task."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxfeedback.rules import RULES

BATCH_NORM = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class ByName(nn.Module):
    """Parameters or modules under dotted names, as a read-only mapping: `td_weights["layer1.0.conv1.weight"]`."""

    def __init__(self, items: Mapping[str, nn.Parameter | nn.Module]) -> None:
        super().__init__()
        self.names = list(items)
        for name, item in items.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for step in path:
                if step not in owner._modules:
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            setattr(owner, leaf, item)

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        path, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(path), leaf)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def keys(self) -> list[str]:
        """The dotted names."""
        return list(self.names)

    def items(self) -> list[tuple[str, Any]]:
        """(dotted name, parameter or module) pairs."""
        return [(name, self[name]) for name in self.names]


def module_of(weight: str) -> str:
    """layer1.0.conv1.weight -> layer1.0.conv1"""
    return weight.rpartition(".")[0] or weight


def twin(weight: torch.Tensor, init: str, noise: float) -> torch.Tensor:
    """A TD weight for a BU weight: drawn anew as torch draws it, or a copy times 1 + noise * randn."""
    weight = weight.detach()
    if init == "symmetric":
        return weight * (1 + noise * torch.randn_like(weight)) if noise else weight.clone()
    return nn.init.kaiming_uniform_(torch.empty_like(weight), a=math.sqrt(5))


def td_bias(weight: torch.Tensor, node: fx.Node) -> torch.Tensor:
    """A bias behind the transpose of a linear layer or convolution, one per input channel, drawn as torch draws biases."""
    bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
    return weight.detach().new_empty(in_channels(node)).uniform_(-bound, bound)


def td_norm(node: fx.Node) -> nn.Module:
    """A batch norm behind the transpose of a convolution, over its input channels."""
    return BATCH_NORM[len(node.meta["spec"].shape)](in_channels(node))


def in_channels(node: fx.Node) -> int:
    """How many input channels a linear layer or convolution has."""
    rule = RULES[node.target]
    return rule.operands(node.args, node.kwargs)["input"].meta["spec"].shape[rule.channels]


def instruction_head(size: int, hidden: int | Sequence[int] | None, features: int, bias: bool) -> nn.Sequential:
    """Linear, ReLU, ..., Linear, ReLU from the instruction through the hidden sizes to the prediction head's features."""
    inner = [] if hidden is None else [hidden] if isinstance(hidden, int) else list(hidden)
    sizes = [size, *inner, features]
    layers = [
        layer for i, o in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(i, o, bias=bias), nn.ReLU())
    ]
    return nn.Sequential(*layers)


class TaskHeads(nn.Module):
    """One prediction head per task, stacked along the output: weight (tasks * outputs, inputs, ...), bias likewise."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, n_tasks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([weight.detach()] * n_tasks))
        self.bias = nn.Parameter(torch.cat([bias.detach()] * n_tasks)) if bias is not None else None
