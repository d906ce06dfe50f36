"""The state that TD may have beside the BU weights: twins, biases, norms, instruction head, heads per task."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import fx, nn

from fxfeedback.errors import OptionError
from fxfeedback.feedback_weights import bound
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.channels import channels_of
from fxfeedback.graph.nodes import spec_of
from fxfeedback.graph.operands import batch_norm_of, operand
from fxfeedback.graph.specs import Spec
from fxfeedback.tracing.saved import check_saved

BATCH_NORM = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class ByName(nn.Module):
    """Parameters, buffers or modules under dotted names, read-only: `td_weights["layer1.0.conv1.weight"]`."""

    def __init__(self, items: Mapping[str, torch.Tensor | nn.Module]) -> None:
        super().__init__()
        self.names = list(items)
        for name, item in items.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for step in path:
                if step not in owner._modules:
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            if isinstance(item, (nn.Parameter, nn.Module)):
                setattr(owner, leaf, item)
            else:
                owner.register_buffer(leaf, item)

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

    def values(self) -> list[Any]:
        """What has these names."""
        return [self[name] for name in self.names]

    def items(self) -> list[tuple[str, Any]]:
        """(dotted name, parameter, buffer or module) pairs."""
        return [(name, self[name]) for name in self.names]


def module_of(weight: str) -> str:
    """layer1.0.conv1.weight -> layer1.0.conv1"""
    return weight.rpartition(".")[0] or weight


def drawn_on_cpu(tensor: torch.Tensor, draw: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A tensor of this kind that `draw` fills, in place.

    By the CPU's generator, and in one order of memory: a seed gives the same on every device.
    """
    device = "meta" if tensor.is_meta else "cpu"
    return torch.empty_like(tensor).copy_(draw(torch.empty(tensor.shape, dtype=tensor.dtype, device=device)))


def twins(
    weights: Mapping[str, fx.Node], fetch: Callable[[str], torch.Tensor], init: str | None, noise: float, learn: bool
) -> ByName:
    """A TD weight for every BU weight: drawn anew as torch draws it, or a copy times 1 + noise * randn."""

    def draw(weight: torch.Tensor) -> torch.Tensor:
        if init == "symmetric":
            return weight * (1 + noise * drawn_on_cpu(weight, torch.Tensor.normal_)) if noise else weight.clone()
        return drawn_on_cpu(weight, functools.partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))

    return ByName({name: nn.Parameter(draw(fetch(name).detach()), learn) for name in weights})


def random_weights(like: Mapping[str, Spec], on: torch.Tensor) -> ByName:
    """Fixed random weights of these shapes and dtypes, Xavier-uniform, on the device of `on`."""

    def draw(name: str, spec: Spec) -> torch.Tensor:
        check_saved(f"td_weights.{name}", spec.shape)
        return drawn_on_cpu(on.new_empty(spec.shape, dtype=spec.dtype), nn.init.xavier_uniform_)

    return ByName({name: nn.Parameter(draw(name, spec), requires_grad=False) for name, spec in like.items()})


def magnitudes(weights: Mapping[str, fx.Node], fetch: Callable[[str], torch.Tensor], how: str | float | None) -> ByName:
    """Fixed magnitudes for the signs of every BU weight."""

    def draw(weight: torch.Tensor) -> torch.Tensor:
        b = bound(weight.shape, how or "xavier")
        return drawn_on_cpu(weight, lambda magnitude: magnitude.uniform_(0, b))

    return ByName({name: draw(fetch(name).detach()) for name in weights})


def td_biases(weights: Mapping[str, fx.Node], fetch: Callable[[str], torch.Tensor], learn: bool) -> ByName:
    """A bias per input channel after the transpose of every linear layer and convolution, drawn as torch draws it."""

    def draw(weight: torch.Tensor, node: fx.Node) -> torch.Tensor:
        bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
        return drawn_on_cpu(weight.new_empty(in_channels(node)), lambda bias: bias.uniform_(-bound, bound))

    biases = {module_of(name): draw(fetch(name).detach(), node) for name, node in weights.items()}
    return ByName({name: nn.Parameter(bias, learn) for name, bias in biases.items()})


def td_norms(bu: BottomUp, weights: Mapping[str, fx.Node]) -> ByName:
    """A batch norm after the transpose of every convolution that a batch norm follows, over its input channels."""
    normed = [weight for weight in dict.fromkeys(map(batch_norm_of, bu.nodes)) if weight is not None]
    kinds = {name: BATCH_NORM[len(spec_of(weights[name]).shape)] for name in normed}
    return ByName({module_of(name): kind(in_channels(weights[name])) for name, kind in kinds.items()})


def in_channels(node: fx.Node) -> int:
    """How many input channels a linear layer or convolution has."""
    return spec_of(operand(node, "input")).shape[channels_of(node)]


def instruction_head(
    size: int, embedding: int | Sequence[int] | nn.Module | None, features: int, bias: bool
) -> nn.Module:
    """Linear, ReLU, ..., Linear, ReLU from the instruction through hidden sizes to the head's features; or a module.

    Raises:
        OptionError: the user's module does not make `features` values of an instruction.
    """
    if isinstance(embedding, nn.Module):
        parameter = next(embedding.parameters(), torch.empty(0))
        made = embedding(parameter.new_zeros(2, size))
        if made.shape != (2, features):
            message = f"makes {tuple(made.shape[1:])} of an instruction; the prediction head takes ({features},)"
            raise OptionError(f"embedding=: the module {message}")
        return embedding
    hidden = [] if embedding is None else list(embedding) if isinstance(embedding, Sequence) else [embedding]
    layers = [(nn.Linear(i, o, bias=bias), nn.ReLU()) for i, o in pairwise([size, *hidden, features])]
    return nn.Sequential(*chain.from_iterable(layers))
