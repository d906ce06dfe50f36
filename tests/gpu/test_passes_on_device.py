"""Passes, instructions and one task's network: on a GPU they are what they are on the CPU, however they are called."""

import copy
import functools

import pytest
import torch
import torchvision
from torch import nn

import fxfeedback
from marks import long_but, one_in
from networks import TRANSFORMERS, convnet
from the_device import DEVICE, ON_GPU, assert_same, captured, compiled, ids, network, off

TIGHT, LOOSE = 1e-9, 1e-8
NETWORKS = {
    # what makes it, its connections, a source, the size of an image
    "convnet": (convnet, [("8", "4"), ("5", "1"), ("3", "9")], "8", (2, 6, 6)),
    "vit": (*TRANSFORMERS["vit"][:1], [("encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_0")]),
    "resnet18": (
        torchvision.models.resnet18,
        [("layer4", "layer3.0.conv1"), ("layer3", "layer1.0.conv1"), ("fc", "layer2.0.conv1")],
    ),
    "resnet50": (torchvision.models.resnet50, [("layer4", "layer3.0.conv1")]),
    "alexnet_lrm3": (torchvision.models.alexnet, [tuple(ends) for ends in fxfeedback.models.CONNECTIONS]),
}
SIZES = {"convnet": (2, 6, 6), "vit": (3, 16, 16), "alexnet_lrm3": (3, 128, 128)}


@functools.cache
def kept(name):
    make, connections = NETWORKS[name][:2]
    torch.manual_seed(0)
    size = SIZES.get(name, (3, 96, 96))
    model = fxfeedback.add_feedback(make(), connections, input_size=size).double()
    for parameter in model.parameters():
        if not parameter.any():  # a head that starts at zero would hide what is behind it
            nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # each device draws masks of its own
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model.eval(), torch.randn(4, *size, dtype=torch.double), connections[0][0]


def passes(name):
    """A network of passes on the CPU, images, and a source that can be steered."""
    model, x, source = kept(name)
    return copy.deepcopy(model), x, source


def steering(model, x, source, **options):
    seen = model.readout(x[:1], [source])[0][source].value.detach()
    return fxfeedback.Steering(source, seen.to(options.pop("device", x.device)), **options)


def gradients(model, x, **options):
    """Of all passes' mean squares, by name."""
    loss = sum(y.square().mean() for y in model(x, **options))
    named = dict(model.named_parameters())
    values = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, values, strict=True) if g is not None}


def from_a_state_on(model, x, source):
    first, state = model.unroll(x, passes=1)
    second, state = model.unroll(x, passes=2, state=state)
    return [*first, *second, *state.values()]


def learning(model, x, source):
    """In training mode: gradients, and the statistics afterwards."""
    found = gradients(model.train(), x)
    return found | {name: b for name, b in model.named_buffers() if b.is_floating_point()}


def channels_last(model, x, source):
    return model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))


def again_in_the_backward_pass(model, x, source):
    model.set_grad_checkpointing(True)
    return gradients(model, x)


WAYS = {
    "as it is": lambda model, x, source: model(x),
    "without gradients": lambda model, x, source: torch.no_grad()(model)(x),
    "inference mode": lambda model, x, source: torch.inference_mode()(model)(x),
    "five passes": lambda model, x, source: model(x, passes=5),
    "the last only": lambda model, x, source: [model(x, return_all=False)],
    "one image": lambda model, x, source: model(x[:1]),
    "channels last": channels_last,
    "steered": lambda model, x, source: model(x, steering=steering(model, x, source, strength=3.0)),
    "steered from the CPU": lambda model, x, source: model(
        x, steering=steering(model, x, source, device="cpu", strength=(0.5, 2.0), alpha=0.7), steer_first_pass=True
    ),
    "from a state on": from_a_state_on,
    "readout": lambda model, x, source: [seen[source].value for seen in model.readout(x, [source])],
    "unrolled": lambda model, x, source: list(model.unrolled(3)(x)[0]),
    "gradients": lambda model, x, source: gradients(model, x),
    "checkpoint": again_in_the_backward_pass,
    "learning": learning,
    "copied": lambda model, x, source: copy.deepcopy(model)(x),
}


def named(values):
    return values if isinstance(values, dict) else {str(i): value for i, value in enumerate(values)}


@one_in(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", long_but(["convnet"], NETWORKS))
def test_passes_are_those_of_the_cpu(name, way):
    """In float64, in every way of calling them."""
    (model, x, source), (there, _, _) = passes(name), passes(name)
    ours = named(WAYS[way](there.to(DEVICE), x.to(DEVICE), source))
    assert {value.device.type for value in ours.values()} == {torch.device(DEVICE).type}
    assert_same(ours, named(WAYS[way](model, x, source)), LOOSE if way == "learning" else TIGHT)


LOW = {
    "float32": (torch.float32, None, 1e-4),
    "bfloat16": (torch.bfloat16, None, 0.15),
    "autocast to bfloat16": (torch.float32, torch.bfloat16, 0.15),
    "autocast to float16": (torch.float32, torch.float16, 0.05),
}


@one_in(3)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["", "channels_last"])
@pytest.mark.parametrize("how", LOW)
@pytest.mark.parametrize("name", long_but(["convnet"], NETWORKS))
def test_passes_in_low_precision(name, how, layout):
    """As near to float64 as that allows, with gradients and without."""
    dtype, autocast, tolerance = LOW[how]
    model, x, _ = passes(name)
    with torch.no_grad():
        exact = model(x)
    model = model.to(DEVICE, dtype).to(memory_format=layout)
    x = x.to(DEVICE, dtype).contiguous(memory_format=layout)
    for records in (False, True):
        with torch.set_grad_enabled(records), torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            for y, expected in zip(model(x), exact, strict=True):
                assert off(y, expected) <= tolerance


# -- CUDA graphs, and torch.compile ------------------------------------------------------------------------------------


def replayed(run, static, other):
    """What the captured run gives for other values of its input."""
    with torch.no_grad():
        replay = captured(run)
        static.copy_(other)
        return [y.clone() for y in replay()]


@pytest.mark.parametrize("name", long_but(["convnet"], NETWORKS))
def test_captured_passes(name):
    model, x, _ = passes(name)
    model, x = model.to(DEVICE), x.to(DEVICE)
    static, other = x.clone(), x.flip(0) * 0.7
    found = replayed(lambda: model(static), static, other)
    with torch.no_grad():
        assert_same(named(found), named(model(other)), LOOSE)


def test_graphed_passes():
    """Forward and backward pass as two CUDA graphs."""
    model, x, _ = passes("convnet")
    model, x = model.to(DEVICE), x.to(DEVICE)
    expected = gradients(model, x)
    if ON_GPU:
        model = torch.cuda.make_graphed_callables(model, (x.clone(),))
    assert_same(gradients(model, x), expected, LOOSE)


@pytest.mark.parametrize("kind", ["instructed", "one id", "selected"])
@pytest.mark.parametrize("name", long_but(["convnet"], ["convnet", "resnet18"]))
def test_captured_instructions(name, kind):
    model, x = network(name, False)
    butd = fxfeedback.to_butd(model, n_tasks=4, gating="channel", input_size=x.shape[1:]).eval()
    task, static, other = ids(x, 4) if kind == "instructed" else 1, x.clone(), x.flip(0) * 0.7
    one = butd.select(1)
    run = {"selected": lambda: [one(static)]}.get(kind, lambda: [butd(static, task)])
    (found,) = replayed(run, static, other)
    with torch.no_grad():
        assert off(found, butd(other, task)) <= LOOSE


@pytest.mark.long
@pytest.mark.parametrize(
    "name, mode",
    [
        ("vit", "default"),
        ("resnet18", "default"),
        ("convnet", "reduce-overhead"),
        ("alexnet_lrm3", "reduce-overhead"),
    ],
)
def test_compiled_passes(name, mode):
    model, x, _ = passes(name)
    model, x = model.to(DEVICE), x.to(DEVICE)
    fast = compiled(model, mode=mode)
    with torch.no_grad():
        for _ in range(3 if ON_GPU and mode != "default" else 1):
            found = [y.clone() for y in fast(x)]
        assert_same(named(found), named(model(x)), LOOSE)


def test_a_compiled_network_of_one_task():
    model, x = network("convnet", False)
    one = fxfeedback.to_butd(model, n_tasks=4, gating="channel", input_size=x.shape[1:]).eval().select(1)
    with torch.no_grad():
        assert off(compiled(one, mode="reduce-overhead")(x), one(x)) <= LOOSE


# -- instructions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gating", ["unit", "channel"])
@pytest.mark.parametrize("name", long_but(["convnet"], ["convnet", "published", "vit", "resnet18", "mobilenet_v2"]))
def test_instructions_are_those_of_the_cpu(name, gating):
    """Ids as tensors of either device, lists, numbers and vectors; counter neurons; one task's network."""
    model, x = network(name, False)
    torch.manual_seed(1)
    butd = fxfeedback.to_butd(model, n_tasks=4, embedding=16, gating=gating, input_size=x.shape[1:]).eval()
    cpu, images, mixed = copy.deepcopy(butd).cpu(), x.cpu(), ids(x, 4)
    with torch.no_grad():
        assert_same(butd.counter_neurons(mixed), cpu.counter_neurons(mixed.cpu()), TIGHT)
        expected = cpu(images, mixed.cpu())
        vectors = nn.functional.one_hot(mixed, 4).double()
        for task in (mixed, mixed.cpu(), mixed.tolist(), vectors, mixed):
            assert off(butd(x, task), expected) <= TIGHT
        expected, one = cpu(images, 1), butd.select(1)
        for task in (1, torch.tensor(1, device=DEVICE), torch.ones_like(mixed)):
            assert off(butd(x, task), expected) <= TIGHT
        assert off(one(x), expected) <= TIGHT and off(cpu.select(1).to(DEVICE)(x), expected) <= TIGHT
    assert {t.device.type for t in one.state_dict().values()} == {torch.device(DEVICE).type}


@pytest.mark.parametrize("kind", ["instructed", "passes"])
def test_save_and_load(kind, tmp_path):
    """It is loaded onto the CPU, from where it goes anywhere."""
    if kind == "passes":
        model, x, _ = passes("convnet")
        model, x = model.to(DEVICE), x.to(DEVICE)
    else:
        plain, x = network("convnet", False)
        model = fxfeedback.to_butd(plain, n_tasks=2, embedding=8, input_size=x.shape[1:])
    fxfeedback.save(model, tmp_path)
    loaded = fxfeedback.load(tmp_path)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    given = (x,) if kind == "passes" else (x, ids(x))
    found, expected = loaded.to(DEVICE)(*given), model(*given)
    found, expected = ([y] if isinstance(y, torch.Tensor) else y for y in (found, expected))
    assert_same(named(found), named(expected), TIGHT)
