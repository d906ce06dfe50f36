"""Training of LRM networks: what the backward pass does not keep changes no value, and how much memory that takes."""

import copy
import gc
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from lrm_inference import NETWORKS
from lrm_training import activations
from torch import nn
from torch.utils._pytree import tree_leaves

import fxfeedback
from fxfeedback.lrm import feedback_model
from fxfeedback.lrm.modulation import modulate
from fxfeedback.lrm.recompute import brief, lean, segmented
from marks import long, long_but, one_in, sweep


def convnet():
    """Dropout, batch norms that average in both ways, linear layers used in every pass."""
    return nn.Sequential(
        *[nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)],
        *[nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=None), nn.ReLU(), nn.Dropout2d(0.5)],
        *[nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 5)],
    )


MODELS = {
    "convnet": (convnet, [("7", "0"), ("13", "4"), ("3", "4"), ("11", "11")], (2, 8, 8)),
    "resnet18": (torchvision.models.resnet18, [("layer4", "layer1.1.relu_1"), ("fc", "layer2.0.conv1")], (3, 32, 32)),
    "vit": (
        lambda: torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 16, dropout=0.1),
        [("encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_0")],
        (3, 16, 16),
    ),
}


def test_a_silent_source_has_the_formulas_gradient():
    """Its z is 0 everywhere, where P has a kink: pos_scale counts, as `where z < 0` says."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2, padding=1)).double()
    block = fxfeedback.add_feedback(net, [("2", "0")], input_size=(2, 8, 8)).modulation("2", "0")
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    silent, y = torch.zeros(2, 4, 4, 4, dtype=torch.double, requires_grad=True), torch.randn(2, 3, 8, 8).double()
    nn.init.zeros_(block.norm.bias)
    z = F.interpolate(torch.tanh(block.norm(silent)), (8, 8), mode="bilinear", align_corners=True)
    scaled = torch.where(z < 0, block.neg_scale * z, block.pos_scale * z)
    expected = F.conv2d(scaled, block.modulation.weight, block.modulation.bias)
    ours, theirs = (torch.autograd.grad((m * y).sum(), silent)[0] for m in (block(silent, y), expected))
    assert theirs.any() and (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@one_in(7)
@pytest.mark.parametrize("slice_size", [1, 2**24])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", long_but(["convnet", "vit"], MODELS))
def test_nothing_changes_but_what_is_kept(name, train, slice_size):
    make, connections, size = MODELS[name]
    torch.manual_seed(0)
    net, seen = make().double().train(train), []
    blocks = fxfeedback.add_feedback(net, connections, input_size=size).modulations.state_dict()
    blocks = {key: value + 0.3 * torch.randn_like(value) for key, value in blocks.items()}
    for steps in ((), (lean,), (lean, segmented)):
        model = fxfeedback.add_feedback(copy.deepcopy(net), connections, input_size=size, checkpoint=len(steps) == 2)
        model.modulations.load_state_dict(blocks)
        assert feedback_model.steps(model.checkpoint) == (steps or (lean,))
        torch.manual_seed(1)
        x = torch.randn(5, *size, dtype=torch.double, requires_grad=True)
        with (
            mock.patch.object(feedback_model, "steps", lambda checkpoint, steps=steps: steps),
            mock.patch("fxfeedback.lrm.modulation.SLICE", slice_size),
        ):
            outputs = model(x, passes=3)
            sum((output * (i + 1)).cos().sum() for i, output in enumerate(outputs)).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        outputs = dict(enumerate(outputs))
        seen.append({"x": x.grad, **gradients, **dict(model.named_buffers()), **outputs, "random": torch.rand(1)})
    for other in seen[1:]:
        for key, value in seen[0].items():
            assert (value is None) == (other[key] is None), key
            if value is not None:
                near = 1e-9 * max(1.0, value.abs().max().item())  # batch norms of five values amplify rounding
                torch.testing.assert_close(
                    other[key], value, rtol=1e-9, atol=near, msg=lambda m, key=key: f"{key}: {m}"
                )


@pytest.mark.long
@pytest.mark.parametrize("checkpoint, batch, most", [sweep(True, 128, 1.3), (False, 128, 2.5)])
def test_memory_of_activations(checkpoint, batch, most):
    plain = torchvision.models.alexnet().train()
    model = fxfeedback.add_feedback(plain, NETWORKS["alexnet"], checkpoint=checkpoint, verify=False)
    gc.disable()  # what only the garbage collector frees counts
    try:
        assert activations(model, batch) < most * activations(plain, batch)
    finally:
        gc.enable()


def test_a_model_that_is_checkpointed(tmp_path):
    model = fxfeedback.add_feedback(convnet(), [("7", "0")], input_size=(2, 8, 8), checkpoint=True)
    fxfeedback.save(model, tmp_path)
    assert fxfeedback.load(tmp_path).checkpoint and copy.deepcopy(model).checkpoint
    x = torch.randn(3, 2, 8, 8)
    loss = model(x)[1].sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    loss.backward()  # computed again once more
    assert all(torch.allclose(2 * a, p.grad) for a, p in zip(first, model.parameters(), strict=True))
    assert model.get_buffer("1.num_batches_tracked") == 2
    model.set_grad_checkpointing(False)
    assert not model.checkpoint


@pytest.mark.parametrize("checkpoint", [long(False), True])
def test_others_who_rewrite_gradients_find_the_flat_graph(checkpoint):
    model = fxfeedback.add_feedback(convnet().eval(), [("7", "0")], input_size=(2, 8, 8), checkpoint=checkpoint)
    x, parameters = torch.randn(3, 2, 8, 8), dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,))[1].square().sum()

    loss(parameters).backward()
    functional = torch.func.grad(loss)(parameters)
    compiled = torch.autograd.grad(compile_whole(model)(x)[1].square().sum(), list(parameters.values()))
    for (name, p), gradient in zip(parameters.items(), compiled, strict=True):
        torch.testing.assert_close(functional[name], p.grad)
        torch.testing.assert_close(gradient, p.grad)


def compile_whole(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_autocast_and_second_derivatives(checkpoint):
    model = fxfeedback.add_feedback(convnet().eval(), [("7", "0"), ("13", "4")], input_size=(2, 8, 8))
    model.checkpoint = checkpoint
    x = torch.randn(3, 2, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)[1].float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    (slope,) = torch.autograd.grad(model(x)[1].square().sum(), x, create_graph=True)
    ours = torch.autograd.grad(slope.square().sum(), x)
    with mock.patch.object(feedback_model, "steps", lambda checkpoint: ()):
        (slope,) = torch.autograd.grad(model(x)[1].square().sum(), x, create_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(slope.square().sum(), x))


@pytest.mark.parametrize("slice_size", [1, 2**23])
def test_nothing_changes_without_gradients(slice_size):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    model = fxfeedback.add_feedback(net, [("3", "0"), ("4", "2")], passes=3, input_size=(2, 9, 9)).double()
    x, found = torch.randn(5, 2, 9, 9, dtype=torch.double), []
    with torch.no_grad():
        for steps in ((brief,), ()):
            with (
                mock.patch.object(feedback_model, "steps", lambda checkpoint, steps=steps: steps),
                mock.patch("fxfeedback.lrm.modulation.SLICE", slice_size),
            ):
                found.append((model(x), model.readout(x, ["0", "1", "2", "3"])))
    for a, b in zip(*map(tree_leaves, found), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    ops = [node.target for node in brief(model.unrolled()).graph.nodes if node.op == "call_function"]
    assert ops.count(modulate) == 4 and ops.count(F.relu) == 2  # those of the first pass
