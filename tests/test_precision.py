"""Low and mixed precision, and how tensors lie in memory: as autograd takes them, on CPU."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback
import networks
from fxfeedback.errors import TraceError
from marks import long, long_but, one_in
from test_unrolling import names_of, reference

WINDOWED = ["swin_v2", "maxvit", "mvit"]
NETWORKS = ["convnet", "residual", "attention", "vit", "swin_v2", "maxvit", "mvit", "mixed"]


class Mixed(nn.Module):
    """What is written for low precision: softmax and a norm in float32; products with bare parameters."""

    def __init__(self):
        super().__init__()
        self.up, self.qkv = nn.Linear(2, 8), nn.Linear(8, 24)
        self.table, self.scale = nn.Parameter(torch.randn(36, 36)), nn.Parameter(torch.randn(8))
        self.mix, self.norm, self.head = nn.Parameter(torch.randn(8, 8)), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.up(x.flatten(2).mT)
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (0.3 * q @ k.mT + torch.tanh(self.table)).softmax(-1, dtype=torch.float32)
        x = self.norm((x + weights.to(v.dtype) @ v @ self.mix).mT).mT
        x = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.scale
        x = torch.einsum("bnc,cd->bnd", F.silu(x), torch.tanh(self.mix))
        return F.log_softmax(self.head(x.mean(1)), -1, dtype=torch.float32)


build = functools.partial(networks.build, others={"mixed": Mixed})
norm = torch.nn.utils.get_total_norm


def named_gradients(network, x, *task, autocast=None):
    """The output and the gradients of its mean square, from the same random masks."""
    torch.manual_seed(0)
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = network(x, *task)
    y = torch.stack(y) if isinstance(y, list) else y  # of all passes
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(y.double().square().mean(), list(named.values()), allow_unused=True)
    return y, {name: g for name, g in zip(named, values, strict=True) if g is not None}


def error(gradients, exact):
    """Of all gradients together, relative."""
    assert gradients.keys() == exact.keys()
    return norm([gradients[name].double() - exact[name] for name in exact]) / norm(list(exact.values()))


def compare(model, ours, theirs, exact):
    """Outputs differ by rounding; updates have their parameters' dtypes, and are as exact as autograd's gradients."""
    (y, updates), (expected, gradients) = ours, theirs
    assert y.dtype == expected.dtype
    assert (y - expected).double().norm() <= 2 * torch.finfo(y.dtype).eps * expected.double().norm()
    assert all(updates[name].dtype == p.dtype for name, p in model.named_parameters() if name in updates)
    assert error(updates, exact) < 1.2 * error(gradients, exact) + 1e-3


@one_in(5)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, torch.bfloat16) for name in NETWORKS if name not in WINDOWED),
        *(long(name, torch.bfloat16) for name in WINDOWED),
        ("residual", torch.float16),
        ("vit", torch.float16),
    ],
)
@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_low_precision(how, name, dtype, train):
    """Under autocast, and in a model that was cast as a whole."""
    model, x = build(name, train)
    exact = named_gradients(copy.deepcopy(model), x)[1]
    model, x = model.float(), x.float()
    autocast = dtype if how == "autocast" else None
    if how == "cast":
        model, x = model.to(dtype), x.to(dtype)
    start = copy.deepcopy(model.state_dict())
    theirs = named_gradients(model, x, autocast=autocast)
    model.load_state_dict(start)
    ours = named_gradients(fxfeedback.to_butd(model, input_size=x.shape[1:]), x, autocast=autocast)
    compare(model, ours, theirs, exact)


@one_in(3)
@pytest.mark.parametrize("name", long_but(["convnet", "residual", "attention", "vit", "mixed"], NETWORKS))
@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_an_instruction_in_bfloat16(how, name):
    model, x = build(name, train=False)
    model, x, task = model.float(), x.float(), torch.tensor([0, 1, 2, 1])
    autocast = torch.bfloat16 if how == "autocast" else None
    if how == "cast":
        model, x = model.bfloat16(), x.bfloat16()
    both = [fxfeedback.to_butd(model, input_size=x.shape[1:], learning=how) for how in ("counter_hebb", "backprop")]
    ours, theirs = (named_gradients(butd, x, task, autocast=autocast) for butd in both)
    assert error(ours[1], theirs[1]) < 0.01


class Norm(nn.LayerNorm):
    """In float32, whatever the model is in."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).type_as(x)


@pytest.mark.parametrize("first", [True, False])
def test_norms_in_float32_in_a_model_in_bfloat16(first):
    torch.manual_seed(0)
    layers = [nn.Linear(2, 8), Norm(8), nn.ReLU(), nn.Linear(8, 8), Norm(8), nn.GELU(), nn.Linear(8, 3)]
    model = nn.Sequential(*([Norm(2)] if first else []), *layers).bfloat16()
    for module in model:
        module.float() if isinstance(module, Norm) else None
    x, task = torch.randn(4, 6, 2, dtype=torch.bfloat16), torch.tensor([0, 1, 1, 0])
    both = [
        fxfeedback.to_butd(model, input_size=x.shape[1:], learning=learning)
        for learning in ("counter_hebb", "backprop")
    ]
    for given in ((x,), (x, task)):
        (y, updates), (expected, gradients) = (named_gradients(butd, *given) for butd in both)
        assert torch.equal(y, expected) and error(updates, gradients) < 0.01
        assert all(updates[name].dtype == p.dtype for name, p in model.named_parameters())


@one_in(4)
@pytest.mark.parametrize("name", ["residual", "vit"])
@pytest.mark.parametrize("instructed", [False, True])
def test_channels_last(name, instructed):
    model, x = build(name, train=True)
    task = (torch.tensor([0, 1, 2, 1]),) if instructed else ()
    x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for learning in ("counter_hebb", "backprop"):
        butd = fxfeedback.to_butd(copy.deepcopy(model), input_size=x.shape[1:], learning=learning)
        results.append(named_gradients(butd.to(memory_format=torch.channels_last), x, *task))
    (y, updates), (expected, gradients) = results
    assert torch.allclose(y, expected, rtol=1e-9) and error(updates, gradients) < 1e-9


@pytest.mark.parametrize("instructed", [False, True])
def test_channels_last_stays(instructed):
    """What a convolution makes of such a map is one, gated or not, and so is its error."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6)).to(memory_format=torch.channels_last)
    x = torch.randn(3, 2, 6, 6, dtype=torch.double).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = butd(x, 1) if instructed else butd(x)
    y.square().sum().backward()
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, x.grad, model[0].weight.grad))


def test_a_grad_scaler_leaves_an_overflowing_step_out(device="cpu"):
    model, x = build("vit", train=True)
    butd, x = fxfeedback.to_butd(model.float().to(device), n_tasks=2, input_size=x.shape[1:]), x.float().to(device)
    optimizer = torch.optim.Adam([p for p in butd.parameters() if p.requires_grad], 0.01)
    scaler, skipped = torch.amp.GradScaler(device, init_scale=2.0**30, growth_interval=1000), 0
    task, labels = torch.tensor([0, 1, 1, 0], device=device), torch.arange(4, device=device)
    for _ in range(30):
        before = copy.deepcopy(butd.state_dict())
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = F.cross_entropy(butd(x, task).float(), labels)
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            assert all(torch.equal(before[name], value) for name, value in butd.state_dict().items())
    assert 0 < skipped < 30


# -- passes ------------------------------------------------------------------------------------------------------------

NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "batch, without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "layer": lambda: nn.LayerNorm([4, 8, 8]),
    "group": lambda: nn.GroupNorm(2, 4),
}


class Passes(nn.Module):
    """Norms before, at and after destinations; layers that several passes use; a vector and a map as outputs."""

    def __init__(self, norm):
        super().__init__()
        self.below = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.above = nn.Sequential(norm(), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        self.map = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(6, 3, 1))
        self.vector = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x):
        x = self.above(self.below(x))
        return torch.cat([self.map(x).flatten(1), self.vector(x)], 1)


CONNECTIONS = [("vector.4", "below.3"), ("above.4", "below.3"), ("above.4", "map.1")]
CONNECTIONS += [("vector.4", "vector.2"), ("above.3", "vector.4")]


def passes_in(model, x, run, dtype, how):
    """Outputs of three passes, gradients, and running statistics, in low precision; `run` takes the model and x."""
    model, x = (model.to(dtype), x.to(dtype)) if how == "cast" else (model, x)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        outputs = run(model, x)
    sum(output.double().square().mean() for output in outputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    statistics = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return outputs, gradients, statistics


@one_in(29)
@pytest.mark.parametrize("how", ["autocast", "cast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, long(torch.float16)])
@pytest.mark.parametrize("train", [long(False), True])
@pytest.mark.parametrize("norms", NORMS)
def test_passes_in_low_precision(norms, train, dtype, how):
    """As exact as a plain loop over passes and nodes in the same precision, and in its dtypes.

    In training with what is computed again in the backward pass, too.
    """
    torch.manual_seed(0)
    net, x = Passes(NORMS[norms]).train(train), torch.randn(5, 2, 8, 8)
    model = fxfeedback.add_feedback(net, CONNECTIONS, passes=3, input_size=(2, 8, 8), checkpoint=train)

    def loop(model, x):
        net = model._net.train(train)
        return reference(net, names_of(net), model, x, 3)[0]

    exact, gradients, statistics = passes_in(copy.deepcopy(model).double(), x.double(), loop, None, None)
    theirs = passes_in(copy.deepcopy(model), x, loop, dtype, how)
    ours = passes_in(model, x, lambda model, x: model(x), dtype, how)
    for output, expected, y in zip(ours[0], theirs[0], exact, strict=True):
        assert output.dtype == expected.dtype
        assert (output - y).norm() <= 1.2 * (expected - y).norm() + torch.finfo(dtype).eps * y.norm()
    assert error(ours[1], gradients) < 1.5 * error(theirs[1], gradients) + 2 * torch.finfo(dtype).eps
    for name, value in statistics.items():
        assert ours[2][name].dtype == theirs[2][name].dtype
        assert (ours[2][name] - value).norm() <= 1.2 * (theirs[2][name] - value).norm() + 1e-3 * value.norm(), name


class AsksForDtypes(nn.Module):
    """At one size: what it adds depends on the dtype of a value of its own."""

    def __init__(self, ask) -> None:
        super().__init__()
        self.first, self.head, self.ask = nn.Linear(6, 6), nn.Linear(6, 3), ask

    def forward(self, x):
        return x if x.shape[1] > 100 else self.head(self.ask(self.first(x)))


def doubles_low_precision(y):
    return 2 * y if y.dtype == torch.bfloat16 else y


torch.fx.wrap("doubles_low_precision")
ASK = {
    "branches": lambda y: 2 * y if y.dtype == torch.bfloat16 else y,
    "size": lambda y: y * y.itemsize,
    "function": lambda y: doubles_low_precision(y),
    "limits": lambda y: y + (100 if torch.finfo(y.dtype).eps > 1e-3 else 0),
}
HARMLESS = {
    "alike": lambda y: y * torch.full((6,), 0.5, dtype=y.dtype),
    "floating": lambda y: 2 * y if y.is_floating_point() else y,
    "to": lambda y: y + torch.ones(6).to(y),
}


@one_in(3)
@pytest.mark.parametrize("ask", [*ASK, *HARMLESS])
def test_autocast_where_forward_asks_for_a_dtype(ask):
    torch.manual_seed(0)
    model, x = AsksForDtypes({**ASK, **HARMLESS}[ask]), torch.randn(4, 6)
    butd = fxfeedback.to_butd(model, input_size=(6,))
    feedback = fxfeedback.add_feedback(model, [("head", "first")], input_size=(6,))
    for call in (butd, lambda x: feedback(x)[0]):
        assert torch.equal(call(x), model(x))
        with torch.autocast("cpu", torch.bfloat16):
            if ask in ASK and (ask != "function" or call is butd):  # a function that stays whole asks at run time
                with pytest.raises(TraceError, match=r"under autocast .* asks what dtype a value has at node"):
                    call(x)
            else:
                torch.testing.assert_close(call(x), model(x), rtol=0.02, atol=0.02)
