"""What the nodes of a growing graph are, on the meta device, at two batch sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxfeedback.graph.meta_device import MetaRun
from fxfeedback.graph.nodes import tell
from fxfeedback.graph.specs import EXAMPLE_BATCH, at_batch
from fxfeedback.tracing.while_tracing import untraced

BATCHES = (EXAMPLE_BATCH, 1009)
"""Two batch sizes: what is the same at both has nothing to do with the batch, as 2 // 4 would have with 3 // 4."""
SETTLED = (torch.dtype, torch.layout, torch.memory_format)
"""Kinds of facts that are the same in every call of one size and dtype."""
QUESTIONS = ("is_floating_point", "is_complex", "is_signed", "is_sparse", "is_quantized", "is_conj", "is_neg")
"""What is asked of a tensor's dtype and layout with yes or no."""
OF_DTYPE = ("element_size", "itemsize", "nbytes", "type")
"""What else depends on a tensor's dtype."""
CHANGING = (
    "stride",
    "storage_offset",
    "data_ptr",
    "storage",
    "untyped_storage",
    "is_leaf",
    "grad",
    "grad_fn",
    "_version",
)
"""What may differ from call to call at one size, and is not known."""


@dataclass
class Either:
    """What is answered to questions on which nothing should depend."""

    requires_grad: bool
    is_contiguous: bool
    asked: bool = False


class Shapes:
    """What each node of a growing graph is on the meta device, at two batch sizes: tensors without data, and numbers.

    examples: one tensor per input, batch first; only sizes and dtypes matter.
    """

    def __init__(self, root: Any, examples: Sequence[torch.Tensor]) -> None:
        inputs = [[at_batch(batch, x) for x in examples] for batch in BATCHES]
        self.small, self.large = (MetaRun(root, given, untraced) for given in inputs)
        self.running = False
        self.either: Either | None = None  # None: to ask for it is an error
        self.device = next((p.device for p in root.parameters()), torch.device("cpu"))

    def run(self, node: fx.Node) -> None:
        """Note what `node` is, as far as its arguments are known; a node that does not run here has no shape.

        Raises:
            RuntimeError: called while it runs: a proxy among the values makes nodes without end, each in a device mode.
        """
        if self.running:
            raise RuntimeError(f"a stand-in got among the values that it stands for, at {node}")
        if _asked(node) in CHANGING or (node.op == "get_attr" and node in self.small.values):
            return
        self.running = True
        try:
            with torch.device("meta"), torch.no_grad():
                small, large = self.small.value(node), self.large.value(node)
        except Exception:  # an operand is not known; or the op fails, which `annotate_shapes` will report
            return
        finally:
            self.running = False
        self.small.values[node], self.large.values[node] = small, large

    def of(self, node: fx.Node) -> list[Any] | None:
        """What the node is at both batch sizes, or None."""
        return [self.small.values[node], self.large.values[node]] if node in self.small.values else None

    def fact(self, node: fx.Node) -> Any:
        """What the node is, where it is a number or another fact that the batch has no say in; NotImplemented else."""
        small, large = self.of(node) or (None, None)
        if not isinstance(small, (int, *SETTLED)) or type(small) is not type(large) or small != large:
            return NotImplemented
        if type(small) is bool:
            asked = _asked(node)
            same = (asked == "eq" and small) or (asked == "ne" and not small)  # at two batch sizes, so at every one
            return small if same or asked in QUESTIONS or self._is_beyond(node) else NotImplemented
        return small

    def note_dtype(self, node: fx.Node) -> None:
        """Say of a value whose dtype `node` asks for that it was asked: under autocast it may have another."""
        small, _ = self.of(node) or (None, None)
        of_dtype = isinstance(small, torch.dtype) or _asked(node) in OF_DTYPE
        for source in node.all_input_nodes if of_dtype else ():
            if source.op not in ("placeholder", "get_attr"):
                tell(source, asked_dtype=True)

    def _is_beyond(self, node: fx.Node) -> bool:
        """Whether the node compares a number that grows with the batch with one that batch 1 is beyond already."""
        if _asked(node) not in ("gt", "ge", "lt", "le", "eq", "ne") or not isinstance(node.args[0], fx.Node):
            return False
        small, large = self.of(node.args[0]) or (None, None)
        if type(small) is not int or type(large) is not int or not isinstance(node.args[1], int):
            return False
        slope, rest = divmod(large - small, BATCHES[1] - BATCHES[0])
        least = small - slope * (BATCHES[0] - 1)
        exceeds = least >= node.args[1] if _asked(node) in ("ge", "lt") else least > node.args[1]
        return rest == 0 and slope > 0 and exceeds

    def answer(self, question: str) -> bool:
        """To a question about a tensor on which nothing should depend."""
        if self.either is None:
            raise ValueError(f"it asks for a tensor's {question}, which may differ from call to call")
        self.either.asked = True
        return getattr(self.either, question)

    def tensor(self, node: fx.Node) -> Any:
        """The parameter or buffer of a get_attr node."""
        return self.small.attribute(node)

    def of_model(self, root: Any) -> None:
        """From now on, nodes name modules and tensors of `root`."""
        self.small.root = self.large.root = root


def _asked(node: fx.Node) -> str:
    """The attribute, method or function that the node is a call of."""
    if node.target is getattr:
        return str(node.args[1])
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
