"""One prediction head per task: all heads run at once, and the instruction picks its own."""

import torch
from torch import fx, nn

from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.channels import channels_of
from fxfeedback.graph.nodes import name_of, spec_of, tell
from fxfeedback.graph.operands import operand


class TaskHeads(nn.Module):
    """The heads of all tasks, stacked along the output; each starts as the model's own.

    weight: (n_tasks * outputs, inputs, ...); bias: (n_tasks * outputs,) or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, n_tasks: int) -> None:
        super().__init__()
        self.n_tasks = n_tasks
        self.weight = nn.Parameter(torch.cat([weight.detach()] * n_tasks))
        self.bias = nn.Parameter(torch.cat([bias.detach()] * n_tasks)) if bias is not None else None


def put_task_heads(bu: fx.GraphModule, heads: TaskHeads, head_name: str | None) -> None:
    """Replace the prediction head of a BU graph by `heads`, weighted by a new input, `instruction` (B, n_tasks).

    y = Σ over tasks of instruction * head(x), which for a one-hot instruction is that task's head.
    """
    graph, count = bu.graph, heads.n_tasks
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
        by_task = graph.call_function(torch.unflatten, (all_heads, channels, (count, -1)))
        shape = [count if d == tasks else -1 if d == 0 else 1 for d in range(ndim + 1)]
        weights = graph.call_function(torch.reshape, (instruction, shape))
        weighted = graph.call_function(torch.mul, (by_task, weights))
        chosen = graph.call_function(torch.sum, (weighted, tasks))
    for node in (*stacked.values(), by_task, weights, weighted, chosen):
        tell(node, name=f"{name_of(head)}.{node.name}")
    tell(all_heads, name=name_of(head), heads="stacked")
    for node in (by_task, weighted, chosen):
        tell(node, heads="chosen")
    head.replace_all_uses_with(chosen)
    graph.eliminate_dead_code()
    bu.recompile()
