"""The law: Counter-Hebb updates with shared weights and GaLU equal autograd's gradients (float64, 1e-9)."""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import fxfeedback
import published_nets
from fxfeedback.feedback import FeedbackModel
from fxfeedback.graph.operands import rectifies
from fxfeedback.rules import RULES, Rule, T, call, transpose
from marks import long, one_in
from networks import LARGE, SMALL, TRANSFORMERS, build

ALL_RULES = list(dict.fromkeys(RULES.values()))


@one_in(5)
@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.name)
def test_every_rule_obeys_the_law(rule):
    fxfeedback.check_rule(rule)


def test_the_checker_finds_a_wrong_rule(monkeypatch):
    wrong = Rule("mul", lambda y, x, z: {"x": transpose(lambda t: t * 2.997)}, examples=[call(torch.mul, T(4, 3), 3)])
    monkeypatch.setitem(RULES, torch.mul, wrong)
    with pytest.raises(AssertionError, match=r"update of x is off by 1.0e-03"):
        fxfeedback.check_rule(wrong)


def check(*examples):
    """The law, for calls that are no rule's examples."""
    fxfeedback.check_rule(Rule("mul", RULES[torch.mul].table, examples=list(examples)))


ONE, TWO, THREE = (3, 7), (3, 6, 7), (3, 4, 5, 4)  # maps without a batch
WITHOUT_BATCH = {
    "conv1d": (lambda m, w, b: F.conv1d(m, w, b, 2, padding=1), ONE, T(4, 3, 3), T(4)),
    "conv1d, same": (lambda m, w: F.conv1d(m, w, padding="same"), ONE, T(4, 3, 2)),
    "conv2d": (F.conv2d, TWO, T(4, 3, 3, 2), T(4)),
    "conv2d, same": (lambda m, w: F.conv2d(m, w, padding="same", dilation=2), TWO, T(4, 3, 3, 2)),
    "conv2d, groups": (lambda m, w: F.conv2d(m, w, groups=3), TWO, T(6, 1, 3, 3)),
    "conv3d": (lambda m, w: F.conv3d(m, w, stride=(2, 1, 1)), THREE, T(2, 3, 2, 2, 2)),
    "conv_transpose1d": (lambda m, w: F.conv_transpose1d(m, w, None, 2, output_padding=1), ONE, T(3, 2, 3)),
    "conv_transpose2d": (F.conv_transpose2d, TWO, T(3, 4, 3, 2), T(4)),
    "conv_transpose3d": (F.conv_transpose3d, THREE, T(3, 2, 2, 2, 2)),
    "avg_pool1d": (lambda m: F.avg_pool1d(m, 3, 2, 1), ONE),
    "avg_pool2d": (lambda m: F.avg_pool2d(m, (3, 2), ceil_mode=True), TWO),
    "avg_pool3d": (lambda m: F.avg_pool3d(m, 2, 1), THREE),
    "max_pool1d": (lambda m: F.max_pool1d(m, 3, 2), ONE),
    "max_pool2d": (lambda m: F.max_pool2d(m, 3, 2, 1), TWO),
    "max_pool3d": (lambda m: F.max_pool3d(m, 2), THREE),
    "adaptive_avg_pool1d": (lambda m: F.adaptive_avg_pool1d(m, 1), ONE),
    "adaptive_avg_pool2d": (lambda m: F.adaptive_avg_pool2d(m, (4, None)), TWO),
    "adaptive_avg_pool3d": (lambda m: F.adaptive_avg_pool3d(m, (2, 3, 1)), THREE),
    "adaptive_max_pool1d": (lambda m: F.adaptive_max_pool1d(m, 4), ONE),
    "adaptive_max_pool2d": (lambda m: F.adaptive_max_pool2d(m, (None, 3)), TWO),
    "adaptive_max_pool3d": (lambda m: F.adaptive_max_pool3d(m, (2, None, 3)), THREE),
    "lp_pool2d": (lambda m: F.avg_pool2d(m.abs() ** 3, 2) ** (1 / 3), TWO),
    "layer_norm": (lambda m, w, b: F.layer_norm(m, m.shape, w, b), ONE, T(*ONE), T(*ONE)),
    "rms_norm": (lambda m, w: F.rms_norm(m, m.shape, w), ONE, T(*ONE)),
    "pixel_shuffle": (lambda m: F.pixel_shuffle(m, 2), (8, 3, 2)),
    "unfold": (lambda m: F.unfold(m, 2), TWO),
    "fold": (lambda m: F.fold(m, (4, 3), 2), (8, 6)),
    "pad": (lambda m: F.pad(m, (1, -2, 2, 1), "reflect"), TWO),
    "prelu": (F.prelu, (5,), T()),
    "linear": (F.linear, (3,), T(2, 3), T(2)),
}


@one_in(4)
@pytest.mark.parametrize("of", ["a parameter", "a sample", "the batch"])
@pytest.mark.parametrize("name", WITHOUT_BATCH)
def test_maps_without_a_batch(name, of):
    """As torch takes them: what a parameter, one sample, or the batch in the place of channels is."""
    function, shape, *more = WITHOUT_BATCH[name]
    if of == "a parameter":
        check(call(lambda x, m, *more: x.sum() * function(m, *more), T(2, 2), T(*shape), *more))
    elif of == "a sample":
        check(call(lambda x, *more: function(x[1], *more) * x.sum(), T(2, *shape), *more))
    elif "pool" in name or name == "pad":
        check(call(function, T(*shape)))


POWERS = [0, 0.0, 0.5, 1, 1.5, 2, 3, math.inf, -math.inf, -1]
NORMS = {
    "normalize": lambda x, p: F.normalize(x, p, -1),
    "normalize, at eps": lambda x, p: F.normalize(x.sign() * 0.5 + 0 * x, p, -1, eps=0.5),
    "norm": lambda x, p: torch.norm(x, p, -1),
    "vector_norm": lambda x, p: torch.linalg.vector_norm(x, p, (1, 2), keepdim=True),
    "linalg.norm": lambda x, p: torch.linalg.norm(x, p, 1),
    "cdist": lambda x, p: torch.cdist(x, x * 0.5 + x.flip(1), p),
}


@one_in(4)
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("name", NORMS)
def test_norms_by_every_power(name, p):
    """Also where values are zero, or equal: the slope that torch takes there."""
    norm = NORMS[name]
    if name != "cdist" or p >= 0:
        check(call(lambda x: norm(x, p), T(4, 3, 5)))
    if p >= 0:
        check(call(lambda x: norm(torch.relu(x - 0.3), p), T(12, 2, 3)))
        check(call(lambda x: norm(torch.cat([x, -x, x], -1), p), T(4, 3, 2)))


CALLS = {
    "div, rounded": call(lambda x, w: x * torch.div(x, w, rounding_mode="floor") + w, T(4, 5), T(5)),
    "index_fill with a value, twice": call(lambda x, z: x.index_fill(1, torch.tensor([2, 0, 2]), z), T(4, 5), T()),
    "linalg.norm, fro": call(lambda x: torch.linalg.norm(x, "fro", (1, 2)), T(4, 5, 3)),
    "take_along_dim of all": call(lambda x: torch.take_along_dim(x, x.argmax()) * x, T(4, 5)),
    "take_along_dim from the end": call(lambda x: torch.take_along_dim(x, torch.tensor([[-1, 0]]), 1), T(4, 5)),
    "repeat_interleave, unevenly": call(
        lambda x: x.repeat_interleave(torch.tensor([2, 0, 1]), 1, output_size=3), T(4, 3, 2)
    ),
    "cosine_similarity below eps": call(lambda x, w: F.cosine_similarity(torch.relu(x), w, eps=2.0), T(9, 2), T(1, 2)),
    "pad that takes away": call(lambda x: F.pad(x, (-1, 1, -2, 1), "circular"), T(3, 2, 4, 5)),
    "a number by all": call(lambda x, w: x * w.sum(0) * w.mean(-1, keepdim=True) * w.amax(0), T(4, 5), T()),
    "prelu of a number": call(lambda x, w: x * F.prelu(x.mean(), w), T(4), T(1)),
    "products of a number": call(lambda x, w: x * w.prod(0) * w.cumprod(0), T(4), T()),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_at_the_edges(name):
    check(CALLS[name])


class Unbatched(nn.Module):
    """Modules that look at how many dimensions their input has, on what is no batch of maps."""

    def __init__(self):
        super().__init__()
        self.map, self.drop = nn.Parameter(torch.randn(3, 5, 5)), nn.Dropout3d(0.5)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding="same", bias=False), nn.InstanceNorm2d(4, affine=True)
        self.pool, self.plain = nn.MaxPool2d(2), nn.InstanceNorm2d(3)

    def forward(self, x):
        y = self.pool(self.norm(self.conv(self.map))).sum() + F.dropout1d(self.map.flatten(1), 0.5, self.training).sum()
        return x.flatten(1).sum(1, keepdim=True) * y * self.drop(self.plain(x).unsqueeze(1)).square().mean()


@pytest.mark.parametrize("train", [False, True])
def test_modules_on_maps_without_a_batch(train):
    torch.manual_seed(0)
    model, x = Unbatched().double().train(train), torch.randn(3, 3, 4, 5, dtype=torch.double)
    results = []
    for network in (model, fxfeedback.to_butd(model, input_size=(3, 4, 5))):
        torch.manual_seed(1)
        y = network(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    for theirs, ours in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


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


def corners() -> Iterator[Any]:
    """In evaluation and training, with and without an instruction: all four for small networks, two for large ones."""
    for name in [*SMALL, *TRANSFORMERS, *LARGE]:
        for mode, how in itertools.product(["eval", "train"], ["plain", "instructed"]):
            across = (mode, how) in [("eval", "instructed"), ("train", "plain")]
            if across or name not in LARGE:
                quick = name in SMALL or (across and name in QUICK)
                slow = name in ("vgg11_bn", "densenet121", "resnet50")
                marks = () if quick else pytest.mark.sweep if slow else pytest.mark.long
                yield pytest.param(name, mode, how, marks=marks)


QUICK = ("vit", "swin", "mvit", "resnet18")


@one_in(5)
@pytest.mark.parametrize("name, mode, how", corners())
def test_networks_obey_the_law(name, mode, how):
    instructed = how == "instructed"
    model, x = build(name, mode == "train")
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


@pytest.mark.parametrize("name, steps", [("convnet", 8), long("convnet", 50), long("published", 50)])
def test_both_kinds_of_learning_have_the_same_losses(name, steps):
    """From one seed, by Adam, each step on a new random batch; of 50 steps the last have smaller losses."""
    losses = {}
    for learning in ("counter_hebb", "backprop"):
        torch.manual_seed(0)
        net = published_nets.Net(published_nets.simple((8, 8), 50), 50, 10) if name == "published" else SMALL[name]()
        size = (1, 28, 28) if name == "published" else (2, 6, 6)
        butd = fxfeedback.to_butd(net.double().train(), n_tasks=2, embedding=50, input_size=size, learning=learning)
        optimizer = torch.optim.Adam([p for p in butd.parameters() if p.requires_grad], 5e-4)
        losses[learning] = []
        for _ in range(steps):
            x, task = torch.randn(8, *size, dtype=torch.double), torch.randint(2, (8,))
            loss = F.cross_entropy(butd(x, task), torch.where(task == 0, x[:, 0, 0, 0] > 0, x[:, 0, 1, 1] > 0).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[learning].append(loss.item())
    ours, theirs = torch.tensor(losses["counter_hebb"]), torch.tensor(losses["backprop"])
    assert steps < 50 or ours[-10:].mean() < ours[:10].mean()
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


FRAMES = {
    "batch_norm": nn.BatchNorm2d(4),
    "max_pool": nn.MaxPool2d(2),
    "avg_pool": nn.AvgPool2d(2),
    "adaptive_avg_pool": nn.AdaptiveAvgPool2d(2),
    "conv": nn.Conv2d(4, 3, 3),
    "group_norm": nn.GroupNorm(2, 4),
    "upsample": nn.Upsample(scale_factor=2, mode="bilinear"),
    "attention": nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(36, 2, 8, 0.0, batch_first=True)),
}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", FRAMES)
def test_fused_kernels_take_the_frames_of_each_sample_as_their_batch(name, train):
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Conv3d(2, 4, 1), FRAMES[name]

        def forward(self, x):
            frames = self.first(x).transpose(1, 2)
            return self.layer(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    torch.manual_seed(0)
    model = Video().double().train(train)
    x = torch.randn(3, 2, 5, 6, 6, dtype=torch.double)
    results = []
    for network in (fxfeedback.to_butd(model, input_size=x.shape[1:]), model):
        y = network(x)
        results.append([y, *torch.autograd.grad((y - y.detach().roll(1, 0)).square().sum(), [*model.parameters()])])
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-9)
