"""One prediction head per task: all heads run at once, and the instruction picks its own."""

import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.channels import channels_of
from fxfeedback.graph.copies import copied
from fxfeedback.graph.nodes import name_of, spec_of, tell
from fxfeedback.graph.operands import operand
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.rules.core import constant
from fxfeedback.rules.ops import one_node


class TaskHeads(nn.Module):
    """The heads of all tasks, stacked along the output.

    A head with as many outputs as the model's own starts as that; the others as a new layer does.

    weight: (Σ sizes, inputs, ...); bias: (Σ sizes,) or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        bound = 1 / math.sqrt(weight[0].numel())  # what nn.Linear and the convolutions start from

        def stacked(own: torch.Tensor) -> nn.Parameter:
            own = own.detach()
            new = (own.new_empty(n, *own.shape[1:]).uniform_(-bound, bound) for n in sizes if n != len(own))
            return nn.Parameter(torch.cat([own if n == len(own) else next(new) for n in sizes]))

        self.weight = stacked(weight)
        self.bias = stacked(bias) if bias is not None else None

    @property
    def alike(self) -> bool:
        """Whether all have as many outputs."""
        return len(set(self.sizes)) == 1

    def by_task(self, name: str) -> torch.Tensor:
        """The weight or bias as (n_tasks, most outputs, ...), with zeros where a head has fewer."""
        most = max(self.sizes)
        parts = getattr(self, name).split(self.sizes)
        return torch.stack([F.pad(part, _after(part.ndim, 0, most - len(part))) for part in parts])


def _after(ndim: int, dim: int, count: int) -> list[int]:
    """What `F.pad` takes to put `count` after a dimension."""
    return [0, 0] * (ndim - 1 - dim % ndim) + [0, count]


@one_node
def closed_outputs(instruction: torch.Tensor, sizes: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Which outputs no instructed task has: (B, n_tasks) -> (B, *shape), where one size is that of the outputs."""
    numbers = torch.arange(max(sizes), device=instruction.device)
    asked = [(instruction[:, i : i + 1] != 0) & (numbers < n) for i, n in enumerate(sizes)]
    return torch.stack(asked).any(0).logical_not().reshape(-1, *shape)


constant(closed_outputs)


def with_task_heads(
    bu: fx.GraphModule, heads: TaskHeads, head_name: str | None, examples: Sequence[torch.Tensor]
) -> fx.GraphModule:
    """A BU graph with `heads` in the place of its prediction head, and shapes.

    Args:
        bu: a graph with shapes; it stays as it is.
        heads: weighted by a new last input, `instruction` (B, n_tasks).
        head_name: of the prediction head's node; None: the one there is.
        examples: the inputs that its shapes are of.
    """
    made = copied(bu)
    _put(made, heads, head_name)
    annotate_shapes(made, [*examples, examples[0].new_empty(1, len(heads.sizes))])
    unpack_tuples(made)
    return made


def _put(bu: fx.GraphModule, heads: TaskHeads, head_name: str | None) -> None:
    """Replace the prediction head of a BU graph.

    y = Σ over tasks of instruction * head(x), which for a one-hot instruction is that task's head. Outputs that no
    task of the instruction has are -inf.
    """
    graph, count, most = bu.graph, len(heads.sizes), max(heads.sizes)
    bu.task_heads = heads
    head = BottomUp(graph).find_head(head_name)
    channels, ndim = channels_of(head), len(spec_of(head).shape)
    tasks = ndim - 1 if channels == -1 else 1  # where the tasks lie once the channels are (tasks, outputs)
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        instruction = graph.placeholder("instruction")
        tell(instruction, name="instruction", instruction=True)
        own = {name: operand(head, name) for name in ("weight", "bias")}
        stacked = {node: graph.get_attr(f"task_heads.{name}") for name, node in own.items() if node is not None}
    with graph.inserting_before(head):
        args, kwargs = fx.map_arg((head.args, head.kwargs), lambda node: stacked.get(node, node))
        all_heads = graph.call_function(head.target, args, kwargs)
        steps = _by_task(graph, all_heads, heads, channels, tasks, ndim)
        shape = [count if d == tasks else -1 if d == 0 else 1 for d in range(ndim + 1)]
        weights = graph.call_function(torch.reshape, (instruction, shape))
        steps.append(graph.call_function(torch.mul, (steps[-1], weights)))
        steps.append(chosen := graph.call_function(torch.sum, (steps[-1], tasks)))
        last = [chosen]
        if not heads.alike:
            shape = [most if d == channels % ndim else 1 for d in range(1, ndim)]
            last = [graph.call_function(closed_outputs, (instruction, heads.sizes, shape))]
            last.append(graph.call_function(torch.masked_fill, (chosen, last[0], -math.inf)))
    for node in (*stacked.values(), *steps, weights, *last):
        tell(node, name=f"{name_of(head)}.{node.name}")
    tell(all_heads, name=name_of(head), heads="stacked")
    for node in steps:
        tell(node, heads="chosen")
    head.replace_all_uses_with(last[-1])
    graph.eliminate_dead_code()
    bu.recompile()


def _by_task(
    graph: fx.Graph, all_heads: fx.Node, heads: TaskHeads, channels: int, tasks: int, ndim: int
) -> list[fx.Node]:
    """The outputs of all heads with a dimension for tasks: the steps that make that, the last of which has it."""
    if heads.alike:
        return [graph.call_function(torch.unflatten, (all_heads, channels, (len(heads.sizes), -1)))]
    split = graph.call_function(torch.split, (all_heads, heads.sizes, channels))
    steps, padded = [split], []
    for i, n in enumerate(heads.sizes):
        steps.append(graph.call_function(operator.getitem, (split, i)))
        steps.append(graph.call_function(F.pad, (steps[-1], _after(ndim, channels, max(heads.sizes) - n))))
        padded.append(steps[-1])
    return [*steps, graph.call_function(torch.stack, (padded, tasks))]
