"""The law: Counter-Hebb updates with shared weights and GaLU equal autograd's gradients (float64, 1e-9)."""

import math
from collections.abc import Iterable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import fxfeedback
import published_nets
from fxfeedback.bottom_up import rectifies
from fxfeedback.feedback import FeedbackModel
from fxfeedback.rules import RULES, Rule, T, call, transpose
from networks import LARGE, SMALL, TRANSFORMERS, build

ALL_RULES = {id(rule): rule for rule in RULES.values()}.values()


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.name)
def test_every_rule_obeys_the_law(rule):
    fxfeedback.check_rule(rule)


def test_the_checker_finds_a_wrong_rule(monkeypatch):
    wrong = Rule("mul", lambda y, x, z: {"x": transpose(lambda t: t * 2.997)}, examples=[call(torch.mul, T(4, 3), 3)])
    monkeypatch.setitem(RULES, torch.mul, wrong)
    with pytest.raises(AssertionError, match=r"update of x is off by 1.0e-03"):
        fxfeedback.check_rule(wrong)


class Gated(TorchFunctionMode):
    """Multiplies the output of every activation function, in the order of the calls, by the next of `gates`, if any."""

    ACTIVATIONS = (F.relu, torch.relu, F.hardtanh, F.relu6, F.gelu, F.silu, F.hardswish)

    def __init__(self, gates: Iterable[torch.Tensor | None]) -> None:
        super().__init__()
        self.gates = iter(gates)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        in_block = kwargs.get("min_val") == -math.inf  # an LRM block takes what is below 0
        gate = next(self.gates) if function in self.ACTIVATIONS and not in_block else None
        return output if gate is None else output * gate


@pytest.mark.parametrize("instructed", [False, True], ids=["plain", "instructed"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [*SMALL, *TRANSFORMERS, *LARGE])
def test_networks_obey_the_law(name, train, instructed):
    model, x = build(name, train)
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    task = torch.tensor([0, 1, 2, 1]) if instructed else None
    butd = fxfeedback.to_butd(model, n_tasks=3, embedding=6, example_inputs=(x,))
    gates = {name: (t > 0).double() for name, t in butd.counter_neurons(task).items()} if instructed else {}
    assert gates or not instructed
    activations = [gates.get(node.meta["name"]) for node in butd.bu.graph.nodes if rectifies(node)]

    def gradients(network, tensors, **options):
        torch.manual_seed(1)  # of dropout's masks
        logits = network(x, **options)
        logits = torch.cat(logits) if isinstance(logits, list) else logits  # of all passes
        return logits, torch.autograd.grad(logits.square().sum(), tensors), [b.clone() for b in model.buffers()]

    x.requires_grad_()
    tensors = [x, *model.parameters()]
    logits, updates, statistics = gradients(butd, tensors, task=task)
    plain = model
    if isinstance(model, FeedbackModel):  # node by node, and not as it is trained, without the second of two ReLUs
        unrolled = model.unrolled()
        plain = lambda x: unrolled(x)[0]  # noqa: E731
    model.load_state_dict(buffers, strict=False)
    with Gated(activations) if instructed else nullcontext():
        expected, references, expected_statistics = gradients(plain, tensors)

    assert torch.allclose(logits, expected, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, statistics, expected_statistics))
    largest = max(gradient.abs().max() for gradient in references)
    for (key, _), update, gradient in zip([("input", x), *model.named_parameters()], updates, references, strict=True):
        # A bias before a batch norm has no gradient but rounding: there the scale is that of the other gradients.
        scale = max(gradient.abs().max(), 1e-6 * largest)
        assert (update - gradient).abs().max() <= 1e-9 * scale, key


@pytest.mark.parametrize("name", ["convnet", "published"])
def test_both_kinds_of_learning_have_the_same_losses(name):
    """From one seed, for 50 steps of Adam, each on a new random batch."""
    losses = {}
    for learning in ("counter_hebb", "backprop"):
        torch.manual_seed(0)
        net = published_nets.Net(published_nets.simple((8, 8), 50), 50, 10) if name == "published" else SMALL[name]()
        size = (1, 28, 28) if name == "published" else (2, 6, 6)
        butd = fxfeedback.to_butd(net.double().train(), n_tasks=2, embedding=50, input_size=size, learning=learning)
        optimizer = torch.optim.Adam([p for p in butd.parameters() if p.requires_grad], 5e-4)
        losses[learning] = []
        for _ in range(50):
            x, task = torch.randn(8, *size, dtype=torch.double), torch.randint(2, (8,))
            loss = F.cross_entropy(butd(x, task), torch.where(task == 0, x[:, 0, 0, 0] > 0, x[:, 0, 1, 1] > 0).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[learning].append(loss.item())
    ours, theirs = torch.tensor(losses["counter_hebb"]), torch.tensor(losses["backprop"])
    assert ours[-10:].mean() < ours[:10].mean()
    assert ((ours - theirs).abs() <= 1e-9 * theirs).all()


def test_the_batch_may_have_any_size():
    model, _ = build("residual", train=False)
    butd = fxfeedback.to_butd(model, input_size=(2, 6, 6))
    for batch in (1, 7, 3):
        x = torch.randn(batch, 2, 6, 6, dtype=torch.double)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        updates = torch.autograd.grad(butd(x).square().sum(), list(butd.parameters()))
        for a, b in zip(updates, expected, strict=True):
            assert (a - b).abs().max() <= 1e-9 * b.abs().max()


def test_gradients_accumulate_and_the_graph_may_be_kept():
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, input_size=(2, 6, 6))
    weight = model[0].weight
    loss = butd(x).square().sum()
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    assert torch.equal(weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_frozen_parameters_get_nothing_and_cost_nothing():
    model, x = build("convnet", train=False)
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    butd = fxfeedback.to_butd(model, input_size=(2, 6, 6))
    butd(x).sum().backward()
    assert model[0].weight.grad is None and model[4].weight.grad is not None
    made = [node.name for node in butd.learner.graph.nodes]
    assert "update_4_weight" in made and "update_0_weight" not in made
    assert "_4_td" in made and not any(name.startswith(("_3_td", "_2_td", "_1_td", "_0_td")) for name in made)
    model[0].requires_grad_(True)
    butd(x).sum().backward()
    assert model[0].weight.grad is not None


def test_the_input_gets_its_gradient_only_if_it_asks():
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model.requires_grad_(False), input_size=(2, 6, 6))
    assert butd(x).grad_fn is None
    x.requires_grad_()
    (update,) = torch.autograd.grad(butd(x).square().sum(), x)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    assert (update - gradient).abs().max() <= 1e-9 * gradient.abs().max()


def test_tied_parameters_get_the_sum():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(6, 3)).double()
    model[4].weight = nn.Parameter(model[4].weight)
    x = torch.randn(5, 6, dtype=torch.double)
    butd = fxfeedback.to_butd(model, input_size=(6,))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    updates = torch.autograd.grad(butd(x).square().sum(), list(model.parameters()))
    for a, b in zip(updates, expected, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


def test_the_learner_is_explicit_nodes():
    model, _ = build("convnet", train=False)
    learner = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6)).learner
    _, updates = learner.graph.output_node().args[0]
    assert set(updates) == {name for name, _ in model.named_parameters()}
    assert all(node.name == "update_" + name.replace(".", "_") for name, node in updates.items())
    assert all(node.name in learner.code for node in updates.values())
