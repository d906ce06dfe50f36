"""The second door: models that torch.fx cannot trace, by torch.export; and the same network through either door."""

import copy
import functools
import inspect
import random
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import nn

import fxfeedback
from fxfeedback import add_feedback, to_butd
from fxfeedback.errors import OptionError, TraceError
from fxfeedback.graph.nodes import module_path_of, name_of
from fxfeedback.tracing.share import share
from fxfeedback.tracing.trace_at_size import trace_for
from marks import long, one_in, sweep

M = torchvision.models


def relative(a, b):
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-9))


def learned(model, call, *inputs, **named):
    """What a call returns, the updates, and the buffers after it, from a fresh start."""
    model.zero_grad()
    torch.manual_seed(3)
    y = call(*inputs, **named)
    leaves = [y] if isinstance(y, torch.Tensor) else list(y.values() if isinstance(y, dict) else y)
    sum(leaf.square().sum() for leaf in leaves).backward()
    return y, {name: p.grad for name, p in model.named_parameters()}, {n: b.clone() for n, b in model.named_buffers()}


def check_law(model, *inputs, **how):
    """A network by torch.export computes, learns and writes buffers as the model does, trained by autograd."""
    model = model.double()
    twin = copy.deepcopy(model)
    butd = to_butd(model, example_inputs=inputs, door="export", **how)
    assert butd.door == "export"
    y, updates, buffers = learned(butd, butd, *inputs)
    expected, gradients, written = learned(twin, twin, *inputs)
    assert type(y) is type(expected)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (y, expected)), strict=True):
        assert relative(a, b) < 1e-9
    scale = max(float(g.abs().max()) for g in gradients.values() if g is not None)
    for name, gradient in gradients.items():
        gradient = torch.zeros(()) if gradient is None else gradient
        assert float((updates[name] - gradient).abs().max()) < 1e-9 * max(scale, 1e-9), name
    assert all(relative(buffers[name], written[name]) < 1e-9 for name in written)
    return butd


# -- both doors -------------------------------------------------------------------------------------------------------


def names_by(door, model, size):
    module, _ = trace_for(share(model), [torch.empty(1, *size, device="meta")], door=door)
    calls = [node for node in module.graph.nodes if node.op.startswith("call")]
    return {name_of(n): module_path_of(n) for n in calls}


NAMED = {
    "alexnet": 64,
    "vgg11_bn": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "squeezenet1_1": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "efficientnet_b0": 64,
    "convnext_tiny": 64,
    "regnet_y_400mf": 64,
    "vit_b_16": 224,
    "swin_t": 64,
}
OF_FUNCTIONS = ("stochastic_depth", "getitem", "floordiv", "size", "getattr", "shifted_window_attention")
"""Ops that one of the doors has and the other does not."""


@one_in(20)
@pytest.mark.parametrize(
    "name, train",
    [*((name, train) for train in (False, True) for name in ("alexnet", "resnet18"))]
    + [long(name, number % 2 == 0) for number, name in enumerate(NAMED) if name not in ("alexnet", "resnet18")],
)
def test_both_doors_give_the_same_names(name, train):
    model = getattr(M, name)().train(train)
    by_fx, by_export = (names_by(door, model, (3, NAMED[name], NAMED[name])) for door in ("fx", "export"))
    modules = {node: path for node, path in by_fx.items() if path is not None}
    assert modules
    assert {node: by_export.get(node) for node in modules} == modules
    if name not in ("vit_b_16", "swin_t", "regnet_y_400mf"):
        assert not [n for n in by_fx if n not in by_export and not n.rstrip("_0123456789").endswith(OF_FUNCTIONS)]


BOTH = {
    "resnet18": (lambda: M.resnet18(num_classes=10), (3, 64, 64)),
    "vit": (lambda: M.VisionTransformer(32, 16, 2, 2, 24, 48, dropout=0.1, num_classes=10), (3, 32, 32)),
    "swin": (lambda: M.SwinTransformer([4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=10), (3, 64, 64)),
    "densenet": (lambda: M.DenseNet(8, (2, 2), 16, num_classes=10), (3, 64, 64)),
    "mnasnet": (lambda: M.mnasnet0_5(num_classes=10), (3, 64, 64)),
    "mobilenet": (lambda: M.mobilenet_v3_small(num_classes=10), (3, 64, 64)),
    "regnet": (lambda: M.regnet_y_400mf(num_classes=10), (3, 64, 64)),
    "shufflenet": (lambda: M.shufflenet_v2_x0_5(num_classes=10), (3, 64, 64)),
    "squeezenet": (lambda: M.squeezenet1_1(num_classes=10), (3, 64, 64)),
    "transformer": (
        lambda: nn.Sequential(
            nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 32, 0.0), nn.Flatten(), nn.Linear(192, 10)
        ),
        (3, 8, 8),
    ),
}


@one_in(3)
@pytest.mark.parametrize(
    "name, train",
    [("resnet18", False), ("resnet18", True)]
    + [
        (long if name in ("squeezenet", "transformer", "vit") else sweep)(name, number % 2 == 0)
        for number, name in enumerate(BOTH)
        if name != "resnet18"
    ],
)
def test_both_doors_give_the_same_network(name, train):
    torch.manual_seed(0)
    make, size = BOTH[name]
    model = make().double().train(train)
    x, instruction = torch.randn(3, *size, dtype=torch.double), torch.randn(3, 10, dtype=torch.double)
    results = {}
    for door in ("fx", "export"):
        butd = to_butd(copy.deepcopy(model), input_size=size, door=door)
        assert butd.door == door
        results[door] = [learned(butd, butd, x), learned(butd, butd, x, task=instruction)]
        results[door].append(("gates", butd.counter_neurons(instruction), {}))
    for (y, updates, buffers), (y2, updates2, buffers2) in zip(*results.values(), strict=True):
        assert isinstance(y, str) or relative(y, y2) < 1e-9
        assert updates.keys() == updates2.keys()
        assert all(relative(updates[name], updates2[name]) < 1e-9 for name in updates)
        assert all(relative(buffers[name].double(), buffers2[name].double()) < 1e-9 for name in buffers)


@pytest.mark.long
def test_feedback_through_both_doors():
    torch.manual_seed(0)
    model, x = M.resnet18(num_classes=5).double(), torch.randn(2, 3, 64, 64, dtype=torch.double)
    outputs = []
    for door in ("fx", "export"):
        torch.manual_seed(1)
        made = add_feedback(
            copy.deepcopy(model), [("layer3.0.relu_1", "layer1.0.relu")], input_size=(3, 64, 64), door=door
        )
        assert made.door == door
        outputs.append(made(x))
    assert len(outputs[0]) == 2
    assert all(relative(a, b) < 1e-9 for a, b in zip(*outputs, strict=True))


# -- what only torch.export takes -------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Branches on what torch.fx's proxies do not know."""

    def __init__(self):
        super().__init__()
        self.linear, self.other = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x, scale=None, *, double=False):
        y = torch.relu(self.linear(x))
        if not issubclass(type(y), torch.Tensor):
            raise TypeError("no tensor")
        y = y * self.table if torch.empty(2).ndim == 1 else y
        y = y if scale is None else y * scale
        return self.other(2 * y if double else y)


def checked(function):
    """A decorator that looks at its arguments' classes in a way that proxies do not pass."""

    @functools.wraps(function)
    def call(self, *args, **kwargs):
        bound = inspect.signature(function).bind(self, *args, **kwargs)
        for value in bound.arguments.values():
            assert issubclass(type(value), (nn.Module, torch.Tensor))
        return function(self, *args, **kwargs)

    return call


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    @checked
    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


@pytest.mark.parametrize("make", [Branching, Decorated])
def test_what_torch_fx_cannot_trace_goes_in_by_export(make, tmp_path):
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(4, 6, dtype=torch.double)
    with pytest.raises(TraceError):
        to_butd(copy.deepcopy(model), example_inputs=(x,), door="fx")
    butd = to_butd(copy.deepcopy(model), example_inputs=(x,))
    assert butd.door == "export"
    assert relative(butd(x), model(x)) < 1e-9
    check_law(model, x)
    fxfeedback.draw(butd, tmp_path / "net.svg")
    assert f"{make.__name__} by torch.export, drawn" in (tmp_path / "net.svg").read_text()


def test_inputs_by_keyword_and_flags():
    model, x, scale = Branching().double(), torch.randn(4, 6, dtype=torch.double), torch.rand(4, 1, dtype=torch.double)
    butd = to_butd(model, example_inputs={"x": x, "scale": scale}, door="export")
    for named in ({"scale": scale}, {}, {"double": True}, {"scale": scale, "double": True}):
        assert relative(butd(x, **named), model(x, **named)) < 1e-9
    assert relative(butd(x[:1]), model(x[:1])) < 1e-9


@pytest.mark.long
def test_a_whole_transformer_encoder():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True), 2)
    butd = check_law(encoder, torch.randn(3, 5, 16, dtype=torch.double))
    assert {"layers.0.linear1", "layers.1.norm2", "layers.0.self_attn.linear"} <= set(map(name_of, butd.bu.graph.nodes))
    check_law(encoder.eval(), torch.randn(3, 5, 16, dtype=torch.double))


class Training(nn.Module):
    """What training mode does: statistics, dropout, a buffer that forward writes into, in whole and in part."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3)
        self.head = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x):
        y = torch.relu_(self.norm(self.conv(x)))
        with torch.no_grad():
            mean = y.mean((0, 2, 3))
            self.mean.mul_(0.9).add_(mean, alpha=0.1)
            self.count[1] += 1
        y = y * mean[:, None, None] + torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=y.dtype)[:, None, None]
        y[:, 0] = 0.5 * y[:, 1]
        mask = torch.ones(y.shape[-1], dtype=y.dtype)
        mask[:2] = 0
        return self.head(self.drop(y * mask).mean((2, 3)) + torch.rand(4, dtype=y.dtype))


def test_training_mode():
    torch.manual_seed(0)
    model, x = Training(), torch.randn(5, 3, 8, 8, dtype=torch.double)
    butd = check_law(model, x)
    first, second = butd(x), butd(x)
    assert not torch.equal(first, second)  # each call draws
    check_law(model.eval(), x)


class Pair(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor


@dataclass
class Record:
    logits: torch.Tensor
    features: torch.Tensor | None = None
    name: str = "record"


@pytest.mark.parametrize(
    "returned",
    [
        lambda y, f: Pair(y, f),
        lambda y, f: Record(y, f),
        lambda y, f: Record(y),
        lambda y, f: {"out": y, "more": [f, (y, None)]},
        lambda y, f: (y, y),
    ],
)
def test_outputs_come_back_as_what_they_were(returned):
    class Net(Decorated):
        def forward(self, x):
            features = torch.relu(self.body(x))
            return returned(self.head(features), features)

    model, x = Net(), torch.randn(4, 6)
    made = to_butd(model, example_inputs=(x,), door="export")
    found, expected = made(x), model(x)
    assert type(found) is type(expected)
    assert repr(found.__dict__ if isinstance(found, Record) else found).split("grad")[0][:20]
    one, other = (r.__dict__ if isinstance(r, Record) else r for r in (found, expected))
    a, b = (torch.utils._pytree.tree_flatten(r) for r in (one, other))
    assert a[1] == b[1]
    for u, v in zip(a[0], b[0], strict=True):
        assert u == v if not isinstance(u, torch.Tensor) else torch.allclose(u, v)


def test_the_model_stays_as_it_is():
    model = Training()
    before = {name: id(p) for name, p in model.named_parameters()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    to_butd(model, input_size=(3, 8, 8), door="export")
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.long
def test_a_saved_network_comes_back_by_its_door(tmp_path):
    model, x = Branching(), torch.randn(4, 6)
    butd = to_butd(M.resnet18(num_classes=3), input_size=(3, 32, 32), door="export")
    fxfeedback.save(butd, tmp_path / "net")
    assert fxfeedback.load(tmp_path / "net").door == "export"
    assert to_butd(model, example_inputs=(x,)).door == "export"


# -- what neither takes -----------------------------------------------------------------------------------------------


class Body(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.linear, self.body, self.n, self.plain = nn.Linear(6, 6), body, 0, torch.ones(6)

    def forward(self, x):
        return self.body(self, x)


def counting(net, x):
    net.n += 1
    return net.linear(x) * net.n


def keeping(net, x):
    net.kept = net.linear(x)
    return net.kept


def writing(net, x):
    net.plain.add_(1)
    return net.linear(x) * net.plain


def writing_without_gradient(net, x):
    y = net.linear(x)
    with torch.no_grad():
        y.clamp_(0)
    return y


REFUSED = {
    "no_grad": (writing_without_gradient, "writes under torch.no_grad"),
    "batch": (lambda net, x: net.linear(x) if x.shape[0] > 4 else x, "branches on the batch size"),
    "even": (lambda net, x: net.linear(x) if x.shape[0] % 2 else x, "branches on the batch size"),
    "values": (lambda net, x: net.linear(x) if x.sum() > 4 else x, "torch.export cannot export Body: Could not guard"),
    "number": (lambda net, x: net.linear(x) * random.random(), "draws random numbers"),
    "counts": (counting, "keeps state from call to call, in 'n'"),
    "keeps": (keeping, "'kept'|kept"),
    "writes": (writing, "plain attribute"),
    "layout": (lambda net, x: net.linear(x) if x.stride(0) == 6 else x, "stride, which may differ from call to call"),
    "autocast": (lambda net, x: torch.autocast("cpu")(net.linear)(x), "switches autocast on"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what):
    body, message = REFUSED[what]
    with pytest.raises(TraceError, match=message):
        to_butd(Body(body), example_inputs=(torch.randn(3, 6),), door="export")


def test_the_errors_of_both_doors_are_said():
    net = Body(lambda net, x: net.linear(x) if x.sum() > 4 else x)
    with pytest.raises(
        TraceError, match=r"torch.fx cannot trace Body(.|\n)*Nor does torch.export take it: torch.export"
    ):
        to_butd(net, example_inputs=(torch.randn(3, 6),))
    with pytest.raises(TraceError, match=r"Nor does torch.export take it"):
        add_feedback(net, [("linear", "linear")], example_inputs=(torch.randn(3, 6),))


def test_a_door_that_does_not_exist():
    with pytest.raises(OptionError, match="door='back'"):
        to_butd(Decorated(), example_inputs=(torch.randn(3, 6),), door="back")
