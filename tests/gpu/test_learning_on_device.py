"""The law on a GPU: updates are gradients in float64, and as exact as autograd's in everything below."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback
import test_precision
from fxfeedback.rules import RULES
from marks import long, long_but, one_in
from networks import SMALL, TRANSFORMERS
from test_precision import error, named_gradients
from the_device import DEVICE, ON_GPU, assert_same, captured, compiled, ids, network, off, on_a_stream_of_its_own

REAL = ["resnet18", "resnet50", "mobilenet_v2", "alexnet", "efficientnet_b0", "convnext_tiny", "swin_v2_t", "vit_b_16"]
NETWORKS = ["published", *SMALL, *TRANSFORMERS, *(REAL if ON_GPU else REAL[:1])]  # other tests have them on the CPU
IN_EVALUATION = ["published", "vit", "resnet18", "residual", "attention", "recurrent"]
LAYOUTS = {"": torch.contiguous_format, "channels_last": torch.channels_last}
MAPS = ["resnet18", "mobilenet_v2", "residual", "vit"]
TIGHT, LOOSE = 1e-9, 1e-8
"""Of what is computed in another order the sums differ."""
AT_A_GATE = 0.02
"""What one unit may change that lies at its gate's zero, where rounding opens it in only one of two computations; and
one window with two winners."""


def both(model, x, **options):
    """The same instructed network with either kind of learning, Counter-Hebb first."""
    networks = []
    for learning in ("counter_hebb", "backprop"):
        torch.manual_seed(1)
        options = {"n_tasks": 2, "embedding": 16, "input_size": x.shape[1:], **options}
        networks.append(fxfeedback.to_butd(copy.deepcopy(model), learning=learning, **options))
    return networks


def floating(buffers):
    return {name: value for name, value in buffers if value.is_floating_point()}


def cases():
    """Of every network the training mode; of some the others."""
    for name in NETWORKS:
        for mode in ("train", "eval"):
            for layout in LAYOUTS:
                if (mode == "train" or name in IN_EVALUATION) and (not layout or (mode == "train" and name in MAPS)):
                    short = (name, mode) == ("published", "train") or (name == "residual" and layout)
                    yield (name, mode, layout) if short else long(name, mode, layout)


@pytest.mark.parametrize("name, mode, layout", list(cases()))
def test_updates_are_gradients(name, mode, layout):
    """Those of the plain network and, instructed, those of the gated one; so are outputs and statistics."""
    model, x = network(name, mode == "train")
    if layout:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    plain, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    butd = fxfeedback.to_butd(model, input_size=x.shape[1:])
    (y, updates), (expected, gradients) = named_gradients(butd, x), named_gradients(plain, x)
    assert off(y, expected) <= TIGHT
    assert_same(updates, gradients, TIGHT)
    assert_same(floating(model.named_buffers()), floating(plain.named_buffers()), TIGHT)
    if layout:
        maps = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in maps)
    model.load_state_dict(start)
    (y, updates), (expected, gradients) = (named_gradients(one, x, ids(x)) for one in both(model, x))
    assert off(y, expected) <= TIGHT
    assert_same(updates, gradients, TIGHT)


def in_low_precision():
    """Network, dtype, autocast or cast, mode, layout."""
    real = [*REAL[:3], "convnext_tiny", "swin_v2_t"] if ON_GPU else REAL[:1]
    for name in ("published", "residual", "attention", "vit", *real):
        quick = (lambda *case: case) if name == "residual" else long
        yield quick(name, "float32", "cast", "train", "")
        yield quick(name, "bfloat16", "autocast", "train", "")
    for name in ("resnet18", "vit"):
        yield long(name, "float32", "cast", "eval", "")
        yield long(name, "bfloat16", "autocast", "eval", "")
        yield long(name, "bfloat16", "cast", "train", "")
        yield long(name, "float16", "autocast", "train", "")
    yield long("resnet18", "bfloat16", "autocast", "train", "channels_last")
    yield long("resnet18", "float32", "cast", "train", "channels_last")


def kinks(model):
    """Whether it has gates or winners: a value that rounds otherwise there has another derivative."""
    return any(isinstance(module, (nn.ReLU, nn.ReLU6, nn.MaxPool2d)) for module in model.modules())


@one_in(2)
@pytest.mark.parametrize("name, dtype, how, mode, layout", list(in_low_precision()))
def test_as_exact_as_autograd(name, dtype, how, mode, layout):
    """Measured by the gradients in float64; instructed, by those of backpropagation through the same graph."""
    model, x = network(name, mode == "train")
    _, exact = named_gradients(copy.deepcopy(model), x)
    low = getattr(torch, dtype)
    model, x = (model.to(low), x.to(low)) if how == "cast" else (model.float(), x.float())
    if layout:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    autocast = low if how == "autocast" else None
    expected, theirs = named_gradients(copy.deepcopy(model), x, autocast=autocast)
    instructed = both(model, x)
    y, ours = named_gradients(fxfeedback.to_butd(model, input_size=x.shape[1:]), x, autocast=autocast)
    assert y.dtype == expected.dtype
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    rounding = error(theirs, exact)
    where = ", ".join(f"{key} {error({key: ours[key]}, {key: exact[key]}):.0e}" for key in list(ours)[::4])
    allowed = AT_A_GATE if kinks(model) else 1e-3 if dtype == "float32" else 0.01
    assert error(ours, exact) <= 1.2 * rounding + allowed, f"autograd's are off by {rounding:.1e}; {where}"
    ours, theirs = (named_gradients(one, x, ids(x), autocast=autocast)[1] for one in instructed)
    where = ", ".join(f"{key} {error({key: ours[key]}, {key: theirs[key].double()}):.0e}" for key in list(ours)[::4])
    allowed = max(1e-3 if dtype == "float32" else 0.05, 2 * rounding)
    assert error(ours, {key: g.double() for key, g in theirs.items()}) <= allowed, where


@pytest.mark.long
def test_a_grad_scaler():
    test_precision.test_a_grad_scaler_leaves_an_overflowing_step_out(DEVICE)


def test_backward_on_a_stream_of_its_own():
    model, x = network("convnet", False)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=x.shape[1:])
    _, expected = named_gradients(butd, x, ids(x))
    if ON_GPU:
        torch.cuda.synchronize()
    with on_a_stream_of_its_own():
        _, updates = named_gradients(butd, x, ids(x))
    if ON_GPU:
        torch.cuda.synchronize()
    assert_same(updates, expected, TIGHT)


OPTIONS = {
    "separate weights": {"weights": "separate", "td_init": "symmetric", "td_noise": 0.1},
    "feedback alignment": {"weights": "separate", "td_learning": "fixed", "td_bias": True},
    "separate norms": {"weights": "separate", "td_bias": True, "norm": "separate"},
    "update noise": {"update_noise": 0.1},
    "multiply": {"lateral": "multiply"},
    "add": {"lateral": "add"},
    "heads per task": {"heads": "per_task"},
    "channels": {"gating": "channel"},
}


@one_in(4)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option):
    """Built on the CPU and moved there, or there: one network, which stays there."""
    results = []
    for first in ("cpu", DEVICE):
        model, x = network("convnet", False)
        torch.manual_seed(1)
        model = model.to(first)
        butd = fxfeedback.to_butd(model, n_tasks=2, embedding=8, input_size=x.shape[1:], **OPTIONS[option]).to(DEVICE)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():  # what was drawn on the CPU differs from what was drawn on a GPU
            for value in butd.state_dict().values():
                if value.is_floating_point():
                    value.copy_(torch.rand(value.shape, generator=generator, dtype=value.dtype) - 0.3)
        for name, buffer in butd.named_buffers():
            if name.endswith("running_var"):
                buffer.abs_().add_(0.5)
        results.append(named_gradients(butd, x, ids(x)))
        assert {value.device.type for value in butd.state_dict().values()} == {torch.device(DEVICE).type}
        assert off(butd.eval()(x, 1), butd(x, torch.ones_like(ids(x)))) <= TIGHT
    (y, updates), (expected, same) = results
    assert off(y, expected) <= TIGHT
    assert_same(updates, same, TIGHT)


def a_step(butd, x, optimizer):
    """One of learning, on what x then holds; returns the loss."""
    task, labels = ids(x), ids(x, 5)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(butd(x, task), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


@pytest.mark.parametrize("name", long_but(["convnet"], ["convnet", "published", "resnet18", "vit"]))
def test_a_captured_step_of_learning(name):
    """As a CUDA graph: the same weights and statistics after three steps on other images."""
    states = []
    for how in (lambda step: step, captured):
        model, x = network(name, name != "vit")  # dropout's masks are those of the moment
        torch.manual_seed(1)
        butd = fxfeedback.to_butd(model, n_tasks=2, embedding=8, input_size=x.shape[1:])
        images, start = x.clone(), copy.deepcopy(butd.state_dict())
        learning = [p for p in butd.parameters() if p.requires_grad]
        step = how(a_step(butd, images, torch.optim.SGD(learning, 1e-3)))
        with torch.no_grad():
            for key, value in butd.state_dict().items():  # capturing has taken steps
                value.copy_(start[key])
        for i in range(3):
            images.copy_(x.roll(i, 0))
            step()
        states.append(floating(copy.deepcopy(butd.state_dict()).items()))
    assert_same(*states, LOOSE)


@pytest.mark.parametrize("name", long_but(["convnet"], ["convnet", "resnet18"]))
def test_a_graphed_callable(name):
    """Forward and backward pass as two CUDA graphs: the same updates."""
    model, x = network(name, False)
    butd = fxfeedback.to_butd(model, n_tasks=2, embedding=8, input_size=x.shape[1:])
    expected, gradients = named_gradients(butd, x, ids(x))
    if ON_GPU:
        butd = torch.cuda.make_graphed_callables(butd, (x.clone(), ids(x)))
    y, updates = named_gradients(butd, x, ids(x))
    assert off(y, expected) <= LOOSE
    assert_same(updates, gradients, LOOSE)


@pytest.mark.parametrize(
    "name, mode",
    [
        ("convnet", "default"),
        long("resnet18", "default"),
        long("vit", "default"),
        long("convnet", "reduce-overhead"),
        long("published", "reduce-overhead"),
    ],
)
def test_compiled_learning(name, mode):
    """Compiled whole: the same output and the same updates."""
    model, x = network(name, name != "vit")
    torch.manual_seed(1)
    butd = fxfeedback.to_butd(model, n_tasks=2, embedding=8, input_size=x.shape[1:])
    start = copy.deepcopy(butd.state_dict())
    expected, gradients = named_gradients(butd, x, ids(x))
    named, fast = [key for key, p in butd.named_parameters() if p.requires_grad], compiled(butd, mode=mode)
    for _ in range(3 if ON_GPU and mode != "default" else 1):  # the third call of a mode with CUDA graphs replays them
        butd.load_state_dict(start)
        y = fast(x, ids(x))
        loss = y.double().square().mean()
        values = torch.autograd.grad(loss, [butd.get_parameter(key) for key in named], allow_unused=True)
        found = {key: g.clone() for key, g in zip(named, values, strict=True) if g is not None}
        y = y.detach().clone()
    assert off(y, expected) <= LOOSE
    assert_same(found, gradients, LOOSE)


@one_in(40)
@pytest.mark.parametrize("rule", list(dict.fromkeys(RULES.values())), ids=lambda rule: rule.name)
def test_every_rule_obeys_the_law(rule):
    fxfeedback.check_rule(rule, DEVICE)
