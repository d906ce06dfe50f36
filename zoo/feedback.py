"""A feedback connection in every model of torchvision: does it build, and does it behave? A table, one row per model.

    python zoo/feedback.py [NAME ...]

Each model gets a connection from its last linear layer or convolution back to the one at a quarter of the way. In
evaluation and in training mode, from the same random state:

- the first pass equals the plain model's output, bit for bit; the second differs, and equals what the plain model
  computes when a forward hook modulates the destination;
- gradients reach every new parameter;
- what a later pass computes again is what lies downstream of the modulated destination or of a random draw, no more
  and no less; networkx says what that is;
- in training every pass advances the running statistics as a run of the plain model does, and back in evaluation
  mode, with the statistics restored, the outputs are those of before.

torch.fx cannot trace the detection and optical flow models whole. There the part that computes their features is
rewritten, and the whole model must run with its own call: with one pass as the plain model does, bit for bit, with two
passes differently, in training mode with finite losses whose gradients reach every new parameter.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import torch
from models import PARTS, Problem, build, call_whole, input_of, leaves, models, restore, statistics_of, warm_up
from table import Line, Table, command
from torch import fx, nn

import fxfeedback
from fxfeedback.lrm.modulation import modulate

RANDOM = ("native_dropout", "survival", "surviving_channels")
"""The names of the functions that draw random numbers in an opened graph."""


TABLE = Table(
    "eval, train: how many nodes the second pass computes again, of all nodes, in evaluation and training mode",
    {"eval": 11, "train": 11},
    "connection, or what is wrong",
)


class Sharing(NamedTuple):
    """How many nodes the second pass computes again, of those that the first computes."""

    again: int
    total: int

    def __str__(self) -> str:
        return f"{self.again}/{self.total}"


class Row(NamedTuple):
    """What the table says of a model that is well."""

    connection: str
    evaluation: Sharing
    training: Sharing


# -- the checks --------------------------------------------------------------------------------------------------------


def connection_in(model: nn.Module, x: torch.Tensor, way: float = 1 / 4, back: float = 0) -> tuple[str, str]:
    """From the last linear layer or convolution of the input back to the one at a quarter of the way, or others."""
    nodes = fxfeedback.node_names(model, example_inputs=(x,))
    # Without a batch it is no layer of the input: Swin v2 computes its tables of position biases by layers, too.
    batched = {name: info.op for name, info in nodes.items() if info.shape and info.shape[0] is None}
    layers = [name for name, op in batched.items() if op in ("Linear", "Conv2d", "Conv3d", "conv3d")]
    weighted = layers or [name for name, op in batched.items() if op in ("linear", "conv2d")]  # of torch.export's door
    return weighted[-1 - int(len(weighted) * back)], weighted[int(len(weighted) * way)]


def check(name: str, kind: str) -> Row:
    """Build one model with and without feedback and compare them.

    Raises:
        Problem: they do not compare as they should.
    """
    torch.manual_seed(0)
    plain, x, path = build(name, kind).eval(), input_of(name, kind), PARTS.get(kind, "")
    plain_part = plain.get_submodule(path)
    warm_up(plain_part, x)
    source, destination = (f"{path}.{end}".lstrip(".") for end in connection_in(plain_part, x))
    model = fxfeedback.add_feedback(plain, [(source, destination)], input_size=x.shape[1:])
    part = model.get_submodule(path)
    before = [leaf.detach() for leaf in leaves(part(x))]
    statistics = statistics_of(plain)
    sharing = []
    for training in (False, True):
        compare(plain_part.train(training), part.train(training), x)
        sharing.append(check_sharing(part))
        if path:
            compare_whole(plain.train(training), model.train(training), part, kind, x)
        restore(plain, statistics)
    if not same(part.eval()(x), before):
        raise Problem("back in evaluation mode the outputs are not those of before")
    return Row(f"{source} -> {destination}", *sharing)


def compare(plain: nn.Module, model: fxfeedback.FeedbackModel, x: torch.Tensor) -> None:
    """Both passes against the plain model in its mode; the gradients; the running statistics."""
    mode = "training" if model.training else "evaluation"
    start = statistics_of(plain)
    torch.manual_seed(1)
    expected = by_hooks(plain, model, x)  # with gradients, too: without, attention takes other kernels
    advanced = statistics_of(plain)
    restore(plain, start)
    torch.manual_seed(1)
    outputs = model(x, return_all=True)
    for number, (output, reference) in enumerate(zip(outputs, expected, strict=True), 1):
        if not same(output, reference):
            raise Problem(f"{mode}: pass {number} differs from the plain model's by {difference(output, reference)}")
    if same(*outputs):
        raise Problem(f"{mode}: the second pass equals the first")
    for name, buffer in statistics_of(plain).items():
        if not torch.allclose(buffer, advanced[name], atol=1e-6):
            raise Problem(f"{mode}: the passes do not advance {name} as the plain model's do")
    check_gradients(model, sum(leaf.square().mean() for leaf in leaves(outputs[1])), mode)


def by_hooks(plain: nn.Module, model: fxfeedback.FeedbackModel, x: torch.Tensor) -> list[Any]:
    """The outputs of the plain model, and of a second pass that a forward hook modulates."""
    (connection,) = model.connections
    block = model.modulation(connection.source, connection.destination)
    # torchvision's subclasses of Conv3d are no leaves of the graph: their node is the function call inside.
    source, destination = (
        plain.get_submodule(end.removesuffix(".conv3d")) for end in (connection.source, connection.destination)
    )
    signals: list[torch.Tensor] = []

    def modulated(module: nn.Module, inputs: Any, y: torch.Tensor) -> torch.Tensor:
        if signals:
            rectified = "relu" if isinstance(module, nn.modules.conv._ConvNd) else "none"
            y = modulate(y, [(block, signals[0], None)], rectified)  # to the last bit as the passes compute it
        return y

    def hand_on(module: nn.Module, inputs: Any, y: torch.Tensor) -> None:
        signals.append(y.clone())  # an in-place ReLU may follow

    hooks = destination.register_forward_hook(modulated), source.register_forward_hook(hand_on)
    outputs = [plain(x), plain(x)]
    for hook in hooks:
        hook.remove()
    return outputs


def compare_whole(
    plain: nn.Module, model: nn.Module, part: fxfeedback.FeedbackModel, kind: str, x: torch.Tensor
) -> None:
    """The call of a model of which only a part is rewritten."""
    mode = "training" if model.training else "evaluation"
    results = []
    for whole, passes in ((plain, 1), (model, 1), (model, 2)):
        part.passes = passes
        torch.manual_seed(1)
        results.append(call_whole(whole, kind, x))
    expected, first, second = results
    if not leaves(expected) or not all(leaf.numel() for leaf in leaves(expected)):
        raise Problem(f"{mode}: the plain model returns nothing that could be compared")
    if not same(first, expected):
        raise Problem(f"{mode}: the whole model with one pass differs from the plain one")
    if same(second, expected):
        raise Problem(f"{mode}: the whole model with two passes equals the plain one")
    if not all(leaf.isfinite().all() for leaf in leaves(second)):
        raise Problem(f"{mode}: the whole model returns numbers that are not finite")
    if model.training:
        check_gradients(part, sum(leaves(second)), "training, through the losses")


def check_gradients(model: fxfeedback.FeedbackModel, loss: Any, mode: str) -> None:
    """The loss's gradients reach every new parameter."""
    model.zero_grad()
    loss.backward()
    for name, parameter in model.modulations.named_parameters():
        grad = parameter.grad
        if grad is None or not grad.isfinite().all() or not grad.any():
            what = "no gradient" if grad is None else "only a zero gradient" if not grad.any() else "no finite gradient"
            raise Problem(f"{mode}: {what} reaches {name}")
    model.zero_grad()


def check_sharing(model: fxfeedback.FeedbackModel, passes: int = 3) -> Sharing:
    """What each pass of the unrolled graph computes, against what it should."""
    mode = "training" if model.training else "evaluation"
    (connection,) = model.connections
    bu = model._bottom_up().graph
    computed: list[list[str]] = [[] for _ in range(passes)]
    for node in model.unrolled(passes).graph.nodes:
        if "name" in node.meta and computes(node):  # the nodes of the connection itself have no name
            computed[node.meta.get("pass", 1) - 1].append(node.meta["name"])
    should = to_compute(bu, connection.source, connection.destination, passes)
    for number, (names, expected) in enumerate(zip(computed, should, strict=True), 1):
        if sorted(names) != sorted(expected):
            wrong = sorted(set(names) ^ set(expected)) or ["a node twice"]
            raise Problem(
                f"{mode}: pass {number} computes {len(names)} nodes, not {len(expected)}; they differ in {wrong[:3]}"
            )
    return Sharing(len(computed[1]), len(computed[0]))


def to_compute(bu: fx.Graph, source: str, destination: str, passes: int) -> list[list[str]]:
    """Names of the nodes that each pass has to compute with one feedback connection: in the first pass all of them.

    Later, what lies downstream of the destination if its signal is a new one, and random draws and what lies
    downstream of them.
    """
    nodes = {node.meta["name"]: node for node in bu.nodes if "name" in node.meta}
    flow = nx.DiGraph([(operand, node) for node in bu.nodes for operand in node.all_input_nodes])
    needed = {node for node in nx.ancestors(flow, bu.output_node()) if computes(node)}
    drawn = {node for node in needed if getattr(node.target, "__name__", "") in RANDOM}
    always = drawn.union(*(nx.descendants(flow, node) for node in drawn))
    modulated = nx.descendants(flow, nodes[destination])
    sets, new_signal = [needed], True
    for _ in range(passes - 1):
        again = needed & (always | modulated if new_signal else always)
        new_signal = nodes[source] in again
        sets.append(again)
    return [[node.meta["name"] for node in chosen] for chosen in sets]


def computes(node: fx.Node) -> bool:
    """Whether the node computes a value. One that counts a batch norm's batches does not: `compare` looks at those."""
    return node.op.startswith("call") and node.target is not torch.Tensor.add_


def same(a: Any, b: Any) -> bool:
    """Whether two outputs are equal, bit for bit."""
    a, b = leaves(a), leaves(b)
    return len(a) == len(b) and all(map(torch.equal, a, b))


def difference(a: Any, b: Any) -> str:
    """The greatest difference between two outputs."""
    return f"{max((s - t).abs().max().item() for s, t in zip(leaves(a), leaves(b), strict=True)):.2g}"


# -- the table ---------------------------------------------------------------------------------------------------------


def main(names: Sequence[str], file: Path | None = None) -> int:
    """Print the table; returns how many models are not well."""

    def row(name: str, kind: str) -> Line:
        connection, evaluation, training = check(name, kind)
        return Line([str(evaluation), str(training)], True, connection)

    return TABLE.fill(dict(models()), names, row, file)


if __name__ == "__main__":
    command(main, "feedback.csv")
