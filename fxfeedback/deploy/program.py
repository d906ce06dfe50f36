"""What is exported: a graph, its inputs, and what its nodes are called in the file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

SPATIAL = {3: ["length"], 4: ["height", "width"], 5: ["depth", "height", "width"]}
"""How many dimensions an input has -> what those after the channels are called."""


@dataclass
class Input:
    """An input of the file.

    example: tensor without data, batch first (or without a batch: batch=None).
    batch: name of its batch dimension. default: its value when it is left out, with batch 1.
    any_size: whether the dimensions after the channels are free. own: whether it is one of the model's own inputs.
    """

    name: str
    example: torch.Tensor
    batch: str | None = "batch"
    default: torch.Tensor | None = None
    any_size: bool = False
    own: bool = False


@dataclass
class Program:
    """A graph to export.

    graph: in call_function, call_module and get_attr nodes; it is interpreted, so targets may be any callables.
    labels: what its nodes are called in the file.
    fetch: qualified name -> parameter or buffer; root: has them, and the modules that are called.
    output: what the output is called; empty where it is a dict whose keys name its parts.
    gates: site -> labels of the nodes one of which makes its gate, where gates may be given to the file.
    """

    graph: fx.Graph
    labels: dict[fx.Node, str]
    inputs: list[Input]
    root: nn.Module
    fetch: Callable[[str], torch.Tensor]
    metadata: dict[str, Any]
    output: str = "output"
    gates: Mapping[str, Sequence[str]] = field(default_factory=dict)


def leaves(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model's output, with names: `output`, `output_1`, `output.key`."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, item in enumerate(value, 1):
            yield from leaves(f"{name}_{number}", item)
