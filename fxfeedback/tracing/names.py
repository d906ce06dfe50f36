"""What a node's op is called, and names of nodes among the arguments of a call."""

import itertools
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from fxfeedback.errors import NodeNameError


def op_name(node: fx.Node, module: nn.Module) -> str:
    """The class of the module that a node calls, or the name of the function."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target)) if node.op.startswith("call") else node.op


def without_names(inputs: Sequence[Any]) -> tuple[Sequence[Any], list[str]]:
    """A model's inputs, and the names of nodes after them.

    Raises:
        NodeNameError: there are no names.
    """

    def is_names(given: Any) -> bool:
        is_list = isinstance(given, (list, tuple)) and all(isinstance(name, str) for name in given)
        return isinstance(given, str) or is_list

    number = sum(1 for _ in itertools.takewhile(is_names, reversed(inputs)))
    own, names = inputs[: len(inputs) - number], inputs[len(inputs) - number :]
    if not number:
        raise NodeNameError("no node is named: readout(x, 'layer3', 'layer4') reads two, after the model's inputs")
    return own, [name for given in names for name in ([given] if isinstance(given, str) else given)]
