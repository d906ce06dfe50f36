"""Each step of the pipeline takes a graph and returns one, and can be used alone."""

import re
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import fx

import fxfeedback
from fxfeedback.graph import nodes
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.rules import RULES
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.share import share
from fxfeedback.tracing.trace import trace
from marks import long_but
from networks import LARGE, build


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", long_but(["residual", "resnet18"], ["residual", *LARGE]))
def test_tracing_and_opening_change_nothing(name, train):
    model, x = build(name, train)
    model, x = model.float(), x.float()
    results = []
    for step in (lambda net: net, trace, lambda net: open_modules(trace(net))):
        network = step(share(model))
        state = {key: value.clone() for key, value in model.state_dict().items()}
        torch.manual_seed(0)
        results.append([network(x.clone()), *(b.clone() for b in model.buffers())])
        model.load_state_dict(state)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("name", long_but(["residual", "resnet18"], ["residual", *LARGE]))
def test_opened_graphs_are_functional_and_named(name):
    model, _ = build(name, train=True)
    traced = trace(share(model))
    opened = open_modules(traced)
    kinds = {node.op for node in opened.graph.nodes}
    assert kinds == {"placeholder", "get_attr", "call_function", "output"}
    names = [node.meta["name"] for node in opened.graph.nodes if node.op == "call_function"]
    assert len(set(names)) == len(names)
    kept = {node.meta["name"] for node in traced.graph.nodes if node.op.startswith("call")}
    # What computes nothing (identity, dropout that is off) leaves no node behind; every other node keeps its name.
    assert len(kept - set(names)) <= sum(isinstance(m, torch.nn.Identity) for m in model.modules())
    in_place = [n for n in opened.graph.nodes if getattr(n.target, "__name__", "").endswith("_")]
    assert {n.args[0].target.rpartition(".")[2] for n in in_place} <= {"num_batches_tracked"}


def test_shapes_say_what_grows_with_the_batch():
    class Windows(torch.nn.Module):
        def forward(self, x):
            windows = x.unfold(1, 4, 4).reshape(-1, 4)
            return torch.cat([windows, windows]), windows.t(), x.mean()

    module = trace(Windows())
    annotate_shapes(module, (torch.empty(5, 12),))
    cat, transposed, mean = (node.meta["spec"] for node in module.graph.output_node().args[0])
    assert cat.sizes == (None, 4) and cat.per_sample == (6, 0)
    assert transposed.sizes == (4, None) and transposed.per_sample == (0, 3)
    assert mean.sizes == ()


@pytest.mark.parametrize("name", long_but(["residual", "resnet18"], ["residual", *LARGE]))
def test_the_head_is_the_last_layer_that_all_paths_cross(name):
    """Without the head no path is left; without any later linear layer or convolution there still is one."""
    model, x = build(name, train=False)
    module = open_modules(trace(share(model)))
    annotate_shapes(module, (x,))
    bu = BottomUp(module.graph)
    head, start, end = bu.find_head(None), bu.inputs[0], bu.nodes[-1]

    def connected_without(node: fx.Node) -> bool:
        graph = bu.digraph.copy()
        graph.remove_node(node)
        return nx.has_path(graph, start, end)

    assert not connected_without(head)
    later = bu.nodes[bu.nodes.index(head) + 1 :]
    assert all(connected_without(node) for node in later if bu.is_weighted(node))


def test_the_graphs_can_be_printed():
    model, _ = build("residual", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6))
    for graph in (butd.bu, butd.td, butd.learner):
        assert isinstance(graph, fx.GraphModule)
        assert "depthwise_weight" in graph.code
        graph.graph.lint()
    instruction = torch.eye(2, dtype=torch.double)
    for ours, theirs in zip(butd.td(instruction).values(), butd.counter_neurons(instruction).values(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_printed_learner_is_what_loss_backward_runs():
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6))
    gates = [(t > 0).double() for t in butd.counter_neurons([0, 1, 1, 0]).values()]
    error = torch.randn(4, 5, dtype=torch.double)
    outputs, updates = butd.learner(x, *gates, error)
    logits = butd(x, [0, 1, 1, 0])
    logits.backward(error)
    assert torch.equal(outputs, logits)
    for name, parameter in model.named_parameters():
        assert torch.equal(updates[name], parameter.grad)


def test_every_op_has_one_rule_and_every_rule_says_its_formula():
    for target, rule in RULES.items():
        assert target in rule.targets
        assert rule.table.__doc__ and rule.examples


def test_passes_speak_of_nodes_through_the_accessors_alone():
    """`graph/nodes.py` lists every key of node.meta, has a reader for each, and is the only file that touches it."""
    package = Path(fxfeedback.__file__).parent
    own = Path(nodes.__file__)
    others = [path for path in package.rglob("*.py") if path != own]
    lines = [line for path in others for line in path.read_text().splitlines() if re.search(r"\.meta\b", line)]
    torchs = ("nn_module_stack", '"val"', "module.meta")
    assert all(any(key in line for key in torchs) for line in lines), "torch.export's entries are the only others"
    read = re.findall(
        r'node\.meta\.get\("(\w+)"|node\.meta\["(\w+)"\]|"(\w+)" in node\.meta|"(\w+)"[,}]', own.read_text()
    )
    assert {key for found in read for key in found if key} >= set(nodes.KEYS)
    with pytest.raises(AssertionError, match="should stand in KEYS"):
        nodes.tell(torch.fx.Graph().placeholder("x"), colour="red")


def test_nodes_say_what_they_are_for():
    """What they are the counterpart of, which site they gate, whose error they take, whose update they are."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    butd = fxfeedback.to_butd(net, n_tasks=2, heads="per_task", input_size=(4,))
    named = {nodes.name_of(node) for node in butd.bu.graph.nodes}
    down = [node for node in butd.td.graph.nodes if nodes.counterpart_of(node) is not None]
    assert {"1"} <= set(map(nodes.counterpart_of, down)) <= named and {"instruct"} == set(map(nodes.role_of, down))
    learner = list(butd.learner.graph.nodes)
    back = [node for node in learner if nodes.role_of(node) is not None]
    assert {"0", "1.gated", "2"} <= set(map(nodes.counterpart_of, back)) and {"error"} == set(map(nodes.role_of, back))
    updates = {nodes.update_of(node) for node in learner} - {None}
    assert updates == {"0.weight", "0.bias", "task_heads.weight", "task_heads.bias"}
    assert sum(map(nodes.is_error, learner)) == 1 and sum(map(nodes.is_own_input, learner)) == 1
    assert {"1", None} == set(map(nodes.gate_of, learner)) == set(map(nodes.gated_site_of, learner))
    assert [nodes.task_heads_of(node) for node in learner if nodes.task_heads_of(node)] == ["stacked", *["chosen"] * 3]
