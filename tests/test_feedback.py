"""What users see of `add_feedback`: passes, state, steering, readout, and errors that say what to do."""

import copy
import io
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fxfeedback
from fxfeedback import Connection, Steering
from fxfeedback.errors import ActivationWarning, InputError, NodeNameError, OptionError, TraceError
from fxfeedback.graph.signs import never_negative
from fxfeedback.lrm.connections import legal_ends
from marks import long_but, one_in
from networks import Attention, build

SIZE = (2, 6, 6)
FEEDBACK = [("8", "4"), ("5", "1")]  # in networks.convnet: a linear layer onto a convolution, a ReLU onto a batch norm


def convnet(connections=FEEDBACK, train=False, **options):
    """The plain net, the same with connections, and a batch for both."""
    net, x = build("convnet", train)
    return net, fxfeedback.add_feedback(net, connections, input_size=SIZE, **options), x


def close(a, b, tolerance=1e-12):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def tensors(output):
    """The tensors in what a model returns."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for part in (output.values() if isinstance(output, dict) else output) for t in tensors(part)]


# -- passes ------------------------------------------------------------------------------------------------------------

REAL = {
    "alexnet": ("classifier.6", "features.8"),
    "resnet18": ("layer4", "layer1"),
    "densenet121": ("features.denseblock4", "features.denseblock1.denselayer2.conv1"),
    "mobilenet_v2": ("features.18", "features.3.conv.0.0"),
    "mobilenet_v3_small": ("features.12", "features.4.block.2.fc1"),
    "efficientnet_b0": ("classifier.1", "features.2.0.block.0.0"),
    "googlenet": ("inception5b", "inception3a.branch1.conv"),
    "squeezenet1_1": ("features.12", "features.3.squeeze"),
    "shufflenet_v2_x0_5": ("conv5", "stage2.1.branch2.0"),
}


@pytest.mark.parametrize("name", long_but(["squeezenet1_1"], REAL))
def test_pass_one_is_the_model_and_pass_two_is_not(name):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    net, x = torchvision.models.get_model(name, num_classes=9, **options), torch.randn(2, 3, 64, 64)
    model = fxfeedback.add_feedback(net.eval(), [REAL[name]], input_size=(3, 64, 64))
    outputs = model(x)
    assert isinstance(outputs, list) and len(outputs) == 2
    assert torch.equal(outputs[0], net(x))
    assert not torch.equal(outputs[1], outputs[0])
    outputs[1].square().sum().backward()
    for parameter in model.modulations.parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    model.train()
    outputs = model(x, passes=3)
    assert len(outputs) == 3 and all(torch.isfinite(t).all() for output in outputs for t in tensors(output))
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x)[0], net.eval()(x))


def test_attention_with_masks_and_dropout_stays_as_it_is():
    """Also torch's own modules, and kernels whose masks are not known before they run."""
    torch.manual_seed(0)
    net, x = Attention(), torch.randn(2, 2, 6, 6)
    model = fxfeedback.add_feedback(net, [("flatten_1", "layer")], input_size=(2, 6, 6))
    torch.manual_seed(1)
    first, second = model(x)
    torch.manual_seed(1)
    assert torch.equal(first, net(x)) and not torch.equal(second, first)
    names = fxfeedback.node_names(model, input_size=(2, 6, 6))
    assert [name for name in names if name.startswith("layer")] == ["layer", "layer.pass2"]


@torch.fx.wrap
def noisy(x):
    return x + torch.randn(x.shape)


DRAWING = {
    "rand_like": lambda x: x * torch.rand_like(x),
    "rand": lambda x: x * torch.rand(x.shape[0], 1),
    "in place": lambda x: x * x.new_empty(x.shape).bernoulli_(0.5),
    "dropout": F.dropout,
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel_softmax": F.gumbel_softmax,
    "a function of the user's": noisy,
    "a recurrent module": nn.LSTM(4, 4, 2, dropout=0.5),
}


@pytest.mark.parametrize("draws", DRAWING.values(), ids=DRAWING)
def test_every_pass_draws_its_own_random_numbers(draws):
    """As calling the model again does; what draws none is shared by the passes, which is bit for bit the same."""

    class Net(nn.Module):
        def __init__(self, below):
            super().__init__()
            self.first, self.below, self.last = nn.Linear(4, 4), below, nn.Linear(4, 4)

        def forward(self, x):
            y = self.below(self.first(x))
            return self.last(y[0] if isinstance(self.below, nn.LSTM) else y)

    for below in (draws, F.gelu):
        model = fxfeedback.add_feedback(Net(below), [("last", "last")], input_size=(4,))
        model.modulation("last", "last").requires_grad_(False).pos_scale.zero_()
        model.modulation("last", "last").neg_scale.zero_()
        read = model.readout(torch.randn(3, 4), ["last"])
        assert torch.equal(read[0]["last"].before, read[1]["last"].before) == (below is F.gelu)


def test_gradients_reach_every_parameter():
    _, model, x = convnet()
    sum(output.square().sum() for output in model(x, passes=3)).backward()
    assert {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()} == set()
    assert len(list(model.modulations.parameters())) == 2 * 6


def test_the_number_of_passes_is_the_models_or_the_calls():
    net, model, x = convnet(passes=3)
    assert [len(model(x)), len(model(x, passes=1)), len(model(x, passes=5))] == [3, 1, 5]
    assert torch.equal(model(x, passes=1)[0], net(x))
    assert all(torch.equal(a, b) for a, b in zip(model(x), model(x, passes=5), strict=False))


def test_only_the_last_pass():
    _, model, x = convnet()
    for passes in (1, 2, 4):
        assert torch.equal(model(x, passes=passes, return_all=False), model(x, passes=passes)[-1])
    output, state = model.unroll(x, passes=2, return_all=False)
    assert torch.equal(output, model(x)[-1]) and set(state) == {"8", "5"}


def test_a_skip_acts_in_the_first_pass():
    net, model, x = convnet([("2", "8")])
    first, second = model(x)
    assert not torch.equal(first, net(x)) and torch.equal(first, second)


def test_a_model_that_returns_a_dict_returns_one_per_pass():
    torch.manual_seed(0)
    net = torchvision.models.segmentation.fcn_resnet50(num_classes=3, weights_backbone=None, aux_loss=True).eval()
    connections = [("backbone.layer4", "backbone.layer1")]
    model, x = fxfeedback.add_feedback(net, connections, input_size=(3, 32, 32)), torch.randn(1, 3, 32, 32)
    outputs, plain = model(x), net(x)
    for output in outputs:
        assert output.keys() == plain.keys()
    assert all(torch.equal(outputs[0][key], plain[key]) for key in plain)
    assert not torch.equal(outputs[1]["out"], plain["out"])


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.head = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, image, vector):
            return self.head(torch.relu(self.conv(image)).mean((2, 3)) + self.fc(vector))

    net, inputs = Two(), (torch.randn(3, 3, 6, 6), torch.randn(3, 5))
    model = fxfeedback.add_feedback(net, [("fc", "conv"), ("head", "fc")], example_inputs=inputs)
    assert len(model(*inputs)) == 2
    assert not torch.equal(model(*inputs)[1], net(*inputs))
    state = model.unroll(*inputs, passes=1)[1]
    assert close(model.unroll(*inputs, passes=1, state=state)[0][0], model(*inputs)[1], 1e-6)


# -- the user's model, its tensors and its modes -----------------------------------------------------------------------


def test_the_users_model_stays_as_it_is():
    net, x = build("convnet", train=False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    expected = net(x)
    model = fxfeedback.add_feedback(net, FEEDBACK, input_size=SIZE)
    sum(output.sum() for output in model(x)).backward()
    assert not net.training and torch.equal(net(x), expected)
    assert {name: set(vars(module)) for name, module in net.named_modules()} == attributes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == hooks
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net[0].weight is model.get_parameter("0.weight") and net[0].weight.grad is not None


def test_an_in_place_model_leaves_the_input_alone():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 3, 1), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))
    x = torch.randn(2, 2, 4, 4)
    model, kept = fxfeedback.add_feedback(net, [("3", "1")], input_size=(2, 4, 4)), x.clone()
    first, _ = model(x)
    assert torch.equal(x, kept) and torch.equal(first, net(x.clone()))


def test_state_dict_keeps_the_models_names():
    torch.manual_seed(0)
    net, x = torchvision.models.alexnet(num_classes=9).eval(), torch.randn(1, 3, 64, 64)
    model = fxfeedback.add_feedback(net, [("classifier.6", "features.8")], input_size=(3, 64, 64))
    assert set(net.state_dict()) < set(model.state_dict())
    new = set(model.state_dict()) - set(net.state_dict())
    assert all(name.startswith("modulations.classifier_6_to_features_8.") for name in new)
    checkpoint = torchvision.models.alexnet(num_classes=9).state_dict()
    missing, unexpected = model.load_state_dict(checkpoint, strict=False)
    assert set(missing) == new and not unexpected
    assert torch.equal(net.features[0].weight, checkpoint["features.0.weight"])

    other = fxfeedback.add_feedback(torchvision.models.alexnet(num_classes=9).eval(), model.connections, passes=2)
    assert other.load_state_dict(fxfeedback.add_feedback(net, model.connections).state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = fxfeedback.add_feedback(
        torchvision.models.alexnet(num_classes=9).eval(), model.connections, input_size=(3, 64, 64)
    )
    again.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(again(x), model(x), strict=True))


def test_deep_copies_are_independent():
    _, model, x = convnet()
    before = model(x)
    twin = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(twin(x), before, strict=True))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert all(torch.equal(a, b) for a, b in zip(model(x), before, strict=True))
    assert not torch.equal(twin(x)[0], before[0])
    assert twin.connections == model.connections
    twin.modulation("8", "4")  # and the copy's blocks are its own
    assert twin.modulation("8", "4").pos_scale is not model.modulation("8", "4").pos_scale


def test_new_values_of_a_block_act_at_once():
    _, model, x = convnet()
    before = model(x)
    with torch.no_grad():
        model.modulation("8", "4").pos_scale.fill_(3.0)
    after = model(x)
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


@pytest.mark.parametrize("node", ["0", "3"])
def test_dropout_and_identity_have_names_in_both_modes(node):
    """node_names lists them, so connections may use them, and a train/eval switch keeps them."""
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 5), nn.ReLU(), nn.Identity(), nn.Linear(5, 3))
    assert node in fxfeedback.node_names(net, input_size=(4,))
    x = torch.randn(2, 4)
    for train in (True, False):
        model = fxfeedback.add_feedback(net.train(train), [("4", node), (node, "2")], input_size=(4,))
        for mode in (train, not train):
            assert len(model.train(mode)(x)) == 2
        model.eval()
        assert torch.equal(
            model.readout(x, [node])[0][node].value, x if node == "0" else model.readout(x, ["2"])[0]["2"].value
        )
        assert not torch.equal(model(x)[0], model(x)[1])


def test_the_input_is_a_node_like_any_other():
    net, model, x = convnet([("8", "input")])
    assert "input" in fxfeedback.node_names(net, input_size=SIZE)
    first, second = model(x)
    assert torch.equal(first, net(x)) and not torch.equal(first, second)
    m = model.modulation("8", "input")(net[:9](x), x)
    assert close(second, net(torch.relu(x + x * m)))
    skip = fxfeedback.add_feedback(net, [("input", "4")], input_size=SIZE)
    assert not torch.equal(skip(x, passes=1)[0], first)
    assert torch.equal(skip.readout(x, ["input"])[0]["input"].value, x)


def test_batch_statistics_advance_once_per_pass():
    for passes in (1, 2, 3):
        net, model, x = convnet(train=True)
        model(x, passes=passes)
        assert net[1].num_batches_tracked == passes


# -- sizes, layouts, dtypes --------------------------------------------------------------------------------------------


def test_any_batch_and_any_size_at_run_time():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=5).double().eval()
    model = fxfeedback.add_feedback(net, [("layer4", "layer1"), ("fc", "layer2")], input_size=(3, 64, 64))
    for shape in ((1, 3, 64, 64), (3, 3, 64, 64), (2, 3, 96, 70), (2, 3, 33, 40), (2, 3, 64, 64)):
        x = torch.randn(shape, dtype=torch.double)
        first, second = model(x)
        assert torch.equal(first, net(x)) and first.shape == second.shape == (shape[0], 5)
        assert not torch.equal(first, second)
    model = fxfeedback.add_feedback(net, [("layer4", "layer1"), ("layer3", "fc")], input_size=(3, 64, 64))
    x = torch.randn(4, 3, 96, 70, dtype=torch.double)
    with torch.no_grad():
        whole, parts = model(x)[1], [model(part)[1] for part in x.split(1)]
    assert close(whole, torch.cat(parts), 1e-9)


def test_the_size_at_build_time_does_not_matter_for_other_sizes_of_the_norm():
    """Norm weights have the destination's size at build time and are resized."""
    net, _ = build("convnet", train=False)
    model = fxfeedback.add_feedback(net, [("5", "1")], input_size=SIZE)
    assert model.modulation("5", "1").norm.weight.shape == (8, 6, 6)
    a, y = torch.randn(2, 8, 5, 7).double(), torch.randn(2, 6, 9, 11).double()
    block = model.modulation("5", "1")
    nn.init.normal_(block.norm.weight)
    weight = F.interpolate(block.norm.weight[None], (5, 7), mode="bilinear", align_corners=True)[0]
    z = F.interpolate(torch.tanh(F.layer_norm(a, (8, 5, 7), weight)), (9, 11), mode="bilinear", align_corners=True)
    assert close(block(a, y), F.conv2d(z, block.modulation.weight, block.modulation.bias))


def test_channels_last_memory():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=5).double().eval()
    model = fxfeedback.add_feedback(net, [("layer4", "layer1"), ("fc", "layer2")], input_size=(3, 64, 64))
    x = torch.randn(2, 3, 64, 64, dtype=torch.double)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    outputs = model(x.contiguous(memory_format=torch.channels_last))
    assert all(close(a, b, 1e-9) for a, b in zip(outputs, expected, strict=True))


def test_dtypes_follow_the_model():
    net, model, x = convnet()
    assert {p.dtype for p in model.parameters()} == {torch.double}
    expected = model(x)
    model.float()
    outputs = model(x.float())
    assert {output.dtype for output in outputs} == {torch.float} and net[0].weight.dtype == torch.float
    assert all(close(a.double(), b, 1e-4) for a, b in zip(outputs, expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x.float())
    assert all(torch.isfinite(output).all() for output in outputs)
    assert all(close(a.double(), b, 0.1) for a, b in zip(outputs, expected, strict=True))


def test_the_default_size_and_modes():
    net = nn.Sequential(nn.Conv2d(3, 4, 7, 8), nn.ReLU(), nn.Conv2d(4, 4, 3, 2))
    model = fxfeedback.add_feedback(net, [("2", "0")])
    assert model.modulation("2", "0").norm.weight.shape == (4, 28, 28)
    assert model.training and not fxfeedback.add_feedback(net.eval(), [("2", "0")]).training
    assert len(model(torch.randn(1, 3, 100, 100))) == 2


# -- connections -------------------------------------------------------------------------------------------------------


def test_connections_in_every_form():
    outputs = []
    for form in (
        lambda s, d: (s, d),
        lambda s, d: [s, d],
        lambda s, d: {"source": s, "destination": d},
        lambda s, d: Connection(s, d),
        lambda s, d: Connection(source=s, destination=d, order="norm-squash-resize", norm="layer", activation="relu"),
    ):
        torch.manual_seed(1)
        net, x = build("convnet", train=False)
        torch.manual_seed(2)
        outputs.append(fxfeedback.add_feedback(net, [form(*pair) for pair in FEEDBACK], input_size=SIZE)(x))
    assert all(torch.equal(a, b) for other in outputs for a, b in zip(other, outputs[0], strict=True))


def test_no_connections_at_all():
    net, model, x = convnet([])
    assert all(torch.equal(output, net(x)) for output in model(x, passes=3))


@one_in(3)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": "resize-norm-squash"},
        {"norm": "channel"},
        {"resize": "bicubic"},
        {"resize": "area"},
        {"activation": "none"},
        {"mode": "add"},
        {"mode": "add", "order": "resize-norm-squash", "activation": "none"},
        {"order": "resize-norm-squash", "norm": "channel", "resize": "area", "activation": "relu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("pair", [("5", "1"), ("5", "8"), ("8", "1"), ("10", "8"), ("4", "4")], ids=str)
def test_options_of_a_connection(pair, options):
    """A map or a vector onto a map or a vector: pass 2 by hand."""
    net, model, x = convnet([Connection(*pair, **options)])
    block = model.modulation(*pair)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    source, destination = int(pair[0]), int(pair[1])
    y, skip = net[: destination + 1](x), source < destination
    a = net[: source + 1](x)
    z = a if a.ndim == 4 else a[:, :, None, None]
    size = y.shape[2:] if y.ndim == 4 else (1, 1)

    def resize(z):
        if options.get("resize") == "area":
            return F.adaptive_avg_pool2d(z, size)
        return F.interpolate(z, size, mode=options.get("resize", "bilinear"), align_corners=True)

    def norm(z):
        if a.ndim == 2 or options.get("norm") == "channel":
            channels_last = F.layer_norm(z.movedim(1, -1), z.shape[1:2], block.norm.weight, block.norm.bias)
            return channels_last.movedim(-1, 1)
        affine = (
            F.interpolate(p[None], z.shape[2:], mode="bilinear", align_corners=True)[0]
            for p in (block.norm.weight, block.norm.bias)
        )
        return F.layer_norm(z, z.shape[1:], *affine)

    z = torch.tanh(norm(resize(z))) if options.get("order", "n")[0] == "r" else resize(torch.tanh(norm(z)))
    m = F.conv2d(torch.where(z < 0, block.neg_scale, block.pos_scale) * z, *block.modulation.parameters())
    m = m if y.ndim == 4 else m.flatten(1)
    after = y + (m if options.get("mode") == "add" else y * m)
    after = after if options.get("activation") == "none" else torch.relu(after)
    expected = net[destination + 1 :](after)
    assert close(model(x)[0], expected if skip else net(x))
    assert close(model(x)[1], expected)


def test_connections_into_one_destination_agree_when_they_mean_the_same():
    net, model, x = convnet([("8", "4"), Connection("10", "4", activation="relu")])
    assert torch.equal(model(x)[0], net(x)) and len(model.connections) == 2


def test_several_connections_into_one_destination_add_up():
    net, model, x = convnet([("8", "1"), ("5", "1"), ("10", "1")])
    values = [net[:1](x)]
    for layer in net[1:]:
        values.append(layer(values[-1]))
    y = values[1]
    m = sum(model.modulation(source, "1")(values[int(source)], y) for source in ("8", "5", "10"))
    assert close(model(x)[1], net[2:](torch.relu(y + y * m)))


def test_a_source_that_is_modulated_hands_on_its_modulated_value():
    outputs = []
    for order in ([("8", "4"), ("4", "1")], [("4", "1"), ("8", "4")]):
        net, x = build("convnet", train=False)
        model = fxfeedback.add_feedback(net, order, input_size=SIZE)
        for i, connection in enumerate(sorted(order)):
            torch.manual_seed(i)
            for parameter in model.modulation(*connection).parameters():
                nn.init.normal_(parameter)
        outputs.append(model(x, passes=4))
        one, two = (one_pass["4"] for one_pass in model.readout(x, ["4"]))
        assert torch.equal(one.after, one.before) and not torch.equal(two.after, two.before)
        third = model.readout(x, ["1"], passes=3)[2]["1"]
        assert close(third.modulation, model.modulation("4", "1")(two.after, third.before))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_modules_name_stands_for_its_last_node():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=5).eval()
    x, outputs = torch.randn(1, 3, 64, 64), []
    for connection in (("layer4", "layer1.0"), ("layer4.1.relu_1", "layer1.0.relu_1"), ("layer4.1", "layer1.0.relu_1")):
        torch.manual_seed(1)
        model = fxfeedback.add_feedback(net, [connection], input_size=(3, 64, 64))
        assert isinstance(model.modulation(*connection), nn.Module)
        outputs.append(model(x)[1])
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


# -- state and steering ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", [FEEDBACK, [*FEEDBACK, ("2", "8"), ("4", "4")]], ids=["feedback", "mixed"])
def test_two_calls_continue_one(connections):
    _, model, x = convnet(connections)
    whole, last = model.unroll(x, passes=5)
    first, state = model.unroll(x, passes=2)
    second, state = model.unroll(x, passes=3, state=state)
    assert all(close(a, b) for a, b in zip([*first, *second], whole, strict=True))
    assert state.keys() == last.keys() == {source for source, _ in connections}
    assert all(close(state[name], last[name]) for name in state)
    assert torch.equal(model(x)[0], whole[0])  # nothing is kept between calls


def history(value):
    """The nodes of the graph that autograd keeps for a value."""
    seen, todo = set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return seen


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_loop_over_a_stream_keeps_one_call(checkpoint):
    """Unless it is asked for, a state brings no history along, and what is learned is each call's own."""
    _, model, x = convnet([*FEEDBACK, ("2", "8")], checkpoint=checkpoint)
    state, lengths = None, []
    for _ in range(4):
        outputs, state = model.unroll(x, passes=2, state=state)
        assert not any(value.requires_grad for value in state.values())
        lengths.append(len(history(outputs[-1])))
    assert lengths[1] == lengths[2] == lengths[3]
    kept, state = [], None
    for _ in range(3):
        outputs, state = model.unroll(x, passes=2, state=state, keep_graph=True)
        kept.append(len(history(outputs[-1])))
    assert kept[0] < kept[1] < kept[2]


def test_a_state_may_be_optimised():
    _, model, x = convnet()
    _, state = model.unroll(x, passes=1)
    state = {name: value.requires_grad_() for name, value in state.items()}
    model.unroll(x, passes=1, state=state)[0][0].square().sum().backward()
    assert all(value.grad.any() for value in state.values())


def test_state_carries_gradients_on_request():
    _, model, x = convnet()
    _, state = model.unroll(x, passes=1, keep_graph=True)
    outputs, _ = model.unroll(x, passes=1, state=state)
    direct = model(x, passes=2)[1]
    weight = model.get_parameter("0.weight")
    (a,), (b,) = (torch.autograd.grad(o.square().sum(), weight, retain_graph=True) for o in (outputs[0], direct))
    assert close(a, b, 1e-10)


def test_steering_forms_agree():
    _, model, x = convnet()
    activation = torch.randn(4, 7).double()
    options = {"strength": 2.5, "alpha": 0.3}
    steering = Steering("8", activation, **options)
    expected = model(x, passes=3, steering=steering)
    for same in ([steering], (steering,), {"source": "8", "activation": activation, **options}):
        assert all(torch.equal(a, b) for a, b in zip(model(x, passes=3, steering=same), expected, strict=True))
    pair = Steering("8", activation, (2.5, 2.5), torch.tensor(0.3, dtype=torch.double))
    assert all(close(a, b) for a, b in zip(model(x, passes=3, steering=[pair]), expected, strict=True))
    assert not torch.equal(model(x, passes=3)[1], expected[1])
    for nothing in ((), [], None):
        assert torch.equal(model(x, steering=nothing)[1], model(x)[1])


def test_steering_acts_after_every_pass_and_before_the_first_on_request():
    net, model, x = convnet([("8", "4")])
    activation = torch.randn(1, 7).double()
    steering = Steering("8", activation)
    plain, steered = model(x, passes=3), model(x, passes=3, steering=steering)
    assert torch.equal(steered[0], plain[0]) and not torch.equal(steered[1], plain[1])
    assert close(steered[1], steered[2])  # the same signal again
    first = model(x, passes=1, steering=steering, steer_first_pass=True)[0]
    assert close(first, steered[1])
    y = net[:5](x)
    m = model.modulation("8", "4")(activation.expand(4, 7), y)
    assert close(first, net[5:](torch.relu(y + y * m)))
    _, state = model.unroll(x, passes=1, steering=steering)
    assert close(state["8"].expand(4, 7), activation.expand(4, 7))


def test_alpha_mixes_the_activation_with_the_signal():
    net, model, x = convnet([("8", "4")])
    activation, y, a = torch.randn(4, 7).double(), net[:5](x), net[:9](x)
    for alpha in (0.0, 0.25, 1.0):
        output = model(x, steering=Steering("8", activation, alpha=alpha))[1]
        m = model.modulation("8", "4")(alpha * activation + (1 - alpha) * a, y)
        assert close(output, net[5:](torch.relu(y + y * m)))
    assert close(model(x, steering=Steering("8", activation, alpha=0.0))[1], model(x)[1])


def test_strength_multiplies_the_scales():
    _, model, x = convnet([("8", "4")])
    activation = torch.randn(1, 7).double()
    block = model.modulation("8", "4")
    steered = model(x, steering=Steering("8", activation, (0.5, 3.0)))[1]
    both = model(x, steering=Steering("8", activation, 3.0))[1]
    with torch.no_grad():
        block.neg_scale.mul_(0.5), block.pos_scale.mul_(3.0)
        assert close(model(x, steering=Steering("8", activation))[1], steered)
        block.neg_scale.mul_(6.0)
        assert close(model(x, steering=Steering("8", activation))[1], both)


def test_of_a_skip_only_the_strength_acts():
    _, model, x = convnet([("2", "8")])
    shape = torch.randn(1, 6, 6, 6).double()
    plain = model(x, passes=2)
    steered = model(x, passes=2, steering=Steering("2", shape, strength=1.0))
    assert all(close(a, b) for a, b in zip(steered, plain, strict=True))
    stronger = model(x, passes=2, steering=Steering("2", shape, strength=4.0))
    assert close(stronger[0], plain[0]) and not close(stronger[1], plain[1])
    first = model(x, passes=1, steering=Steering("2", shape, strength=4.0), steer_first_pass=True)[0]
    assert close(first, stronger[1])


def test_a_batch_of_one_broadcasts():
    _, model, x = convnet()
    vector, shape = torch.randn(1, 7).double(), torch.randn(1, 8, 3, 3).double()
    for alpha in (1.0, 0.4):
        one = [Steering("8", vector, alpha=alpha), Steering("5", shape, alpha=alpha)]
        four = [
            Steering("8", vector.expand(4, -1), alpha=alpha),
            Steering("5", shape.expand(4, -1, -1, -1), alpha=alpha),
        ]
        for first in (False, True):
            a, b = (model(x, passes=3, steering=s, steer_first_pass=first) for s in (one, four))
            assert all(close(p, q) for p, q in zip(a, b, strict=True))


def test_each_image_has_its_own_query():
    _, model, x = convnet()
    queries = torch.randn(4, 7).double()
    together = model(x, passes=3, steering=Steering("8", queries))
    for i in range(4):
        alone = model(x[i : i + 1], passes=3, steering=Steering("8", queries[i : i + 1]))
        assert all(close(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


def test_several_sources_are_steered_in_one_call():
    _, model, x = convnet()
    one, two = Steering("8", torch.randn(1, 7).double()), Steering("5", torch.randn(1, 8, 3, 3).double(), 2.0)
    both = model(x, steering=[one, two])[1]
    assert torch.equal(both, model(x, steering=[two, one])[1])
    assert not close(both, model(x, steering=one)[1]) and not close(both, model(x, steering=two)[1])


def test_queries_can_be_optimised():
    _, model, x = convnet()
    query, alpha = torch.zeros(1, 7, dtype=torch.double, requires_grad=True), torch.tensor(0.9, requires_grad=True)
    strength = torch.tensor([1.0, 2.0], dtype=torch.double, requires_grad=True)

    def output(query):
        return model(x, steering=Steering("8", query, strength, alpha))[1]

    losses, optimizer = [], torch.optim.Adam([query], 0.1)
    for _ in range(10):
        loss = F.cross_entropy(output(query), torch.full((4,), 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert query.grad.any() and alpha.grad.any() and strength.grad.any()
    assert torch.autograd.gradcheck(output, torch.randn(1, 7, dtype=torch.double, requires_grad=True))


def test_activations_take_the_models_dtype():
    _, model, x = convnet()
    vector = torch.randn(1, 7)
    assert torch.equal(
        model(x, steering=Steering("8", vector))[1], model(x, steering=Steering("8", vector.double()))[1]
    )
    assert model(x, steering=Steering("8", vector.numpy()))[1].dtype == torch.double


# -- readout -----------------------------------------------------------------------------------------------------------


def test_readout_of_any_node_per_pass():
    net, model, x = convnet()
    read = model.readout(x, ["4", "2", "10", "8"], passes=3)
    assert [set(one_pass) for one_pass in read] == [{"4", "2", "10", "8"}] * 3
    outputs = model(x, passes=3)
    for one_pass, output in zip(read, outputs, strict=True):
        assert torch.equal(one_pass["10"].value, output)
        assert one_pass["10"].before is None and one_pass["10"].modulation is None and one_pass["10"].after is None
    for node in ("4", "2", "10", "8"):
        assert torch.equal(read[0][node].value, net[: int(node) + 1](x))
    at = [one_pass["4"] for one_pass in read]
    assert at[0].modulation is None and torch.equal(at[0].before, at[0].after)
    for previous, present in zip(read, at[1:], strict=False):
        assert torch.equal(present.value, present.after)
        assert close(present.modulation, model.modulation("8", "4")(previous["8"].value, present.before))
        assert close(present.after, torch.relu(present.before * (1 + present.modulation)))


def test_readout_takes_what_the_call_takes():
    _, model, x = convnet()
    steering = Steering("8", torch.randn(1, 7).double(), 2.0)
    for options in ({"steering": steering}, {"steering": [steering], "steer_first_pass": True}):
        read = model.readout(x, ["10"], passes=2, **options)
        for one_pass, output in zip(read, model(x, passes=2, **options), strict=True):
            assert torch.equal(one_pass["10"].value, output)
    assert len(model.readout(x, ["10"])) == 2 and model.readout(x, [], passes=2) == [{}, {}]


def test_readout_by_the_name_that_was_asked_for():
    torch.manual_seed(0)
    net, x = torchvision.models.resnet18(num_classes=5).eval(), torch.randn(1, 3, 64, 64)
    model = fxfeedback.add_feedback(net, [("layer4", "layer1")], input_size=(3, 64, 64))
    names = ["layer1", "layer1.1.relu_1", "layer3.0.add", "fc", "layer4"]
    read = model.readout(x, names)
    assert list(read[1]) == names
    assert torch.equal(read[1]["layer1"].after, read[1]["layer1.1.relu_1"].after)
    assert read[1]["layer1"].modulation.shape[1:] == read[1]["layer1"].before.shape[1:] == (64, 16, 16)
    assert torch.equal(read[1]["fc"].value, model(x)[1])
    with pytest.raises(NodeNameError, match="did you mean 'layer1"):
        model.readout(x, ["layr1"])


def test_names_to_read_are_given_one_by_one_or_in_a_list():
    _, model, x = convnet()
    wanted = model.readout(x, ["4", "2"])
    for names in (("4", "2"), (("4", "2"),), (["4"], "2")):
        read = model.readout(x, *names)
        assert [list(one) for one in read] == [["4", "2"]] * 2
        assert all(torch.equal(a["2"].value, b["2"].value) for a, b in zip(read, wanted, strict=True))
    assert list(model.readout(x, "10")[0]) == ["10"]
    with pytest.raises(NodeNameError, match="no node is named: readout"):
        model.readout(x)


def test_the_unrolled_graph_is_a_module():
    _, model, x = convnet()
    graph = model.unrolled(passes=2)
    assert isinstance(graph, torch.fx.GraphModule) and "pass2" in graph.code
    outputs, state, _ = graph(x)
    torch.testing.assert_close(outputs, model(x), rtol=1e-12, atol=1e-12)  # a call computes less, in another order
    assert set(state) == {"8", "5"}
    graph.graph.lint()


# -- mistakes ----------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A value that is no tensor, one that is a list, and one on which the output does not depend."""

    def __init__(self):
        super().__init__()
        self.conv, self.side, self.fc = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        y = self.conv(x)
        n = y.size(0)
        a, b = y.chunk(2, 1)
        return self.fc(torch.cat([a, b], 1).mean((2, 3)).view(n, 4)), self.side(x).shape


MISTAKES = {
    "unknown source": ([("9x", "4")], {}, NodeNameError, r"no node is called '9x'.*did you mean '9'.*node_names"),
    "unknown destination": ([("8", "conv4")], {}, NodeNameError, r"no node is called 'conv4'.*node_names"),
    "no name": ([("8", "")], {}, NodeNameError, r"no node is called ''"),
    "twice": ([("8", "4"), ("5", "1"), ("8", "4")], {}, OptionError, r"8 -> 4 is given twice"),
    "twice in two forms": ([("8", "4"), Connection("8", "4", norm="channel")], {}, OptionError, r"given twice"),
    "a parameter": ([("8", "4.bias")], {}, NodeNameError, r"4\.bias"),
    "order": ([Connection("8", "4", order="squash")], {}, OptionError, r"order='squash'.*'norm-squash-resize'"),
    "norm": ([Connection("8", "4", norm="batch")], {}, OptionError, r"norm='batch'.*'layer', 'channel'"),
    "resize": ([Connection("8", "4", resize="nearest")], {}, OptionError, r"resize='nearest'.*'bilinear', 'bicubic'"),
    "activation": ([Connection("8", "4", activation="gelu")], {}, OptionError, r"activation='gelu'.*'relu', 'none'"),
    "activations": (
        [Connection("8", "4", activation="none"), Connection("10", "4", activation="relu")],
        {},
        OptionError,
        r"agree on activation",
    ),
    "mode": ([Connection("8", "4", mode="subtract")], {}, OptionError, r"mode='subtract'.*'multiply', 'add'"),
    "modes": ([Connection("8", "4", mode="add"), ("10", "4")], {}, OptionError, r"10 -> 4.*agree on mode="),
    "one name": ([("8",)], {}, OptionError, r"give \(source, destination\), a dict or a Connection"),
    "misspelt key": ([{"source": "8", "dest": "4"}], {}, OptionError, r"dest.*give \(source, destination\)"),
    "a number": ([3], {}, OptionError, r"3 is not a connection"),
    "no string": ([(8, 4)], {}, fxfeedback.Error, r"8"),
    "no passes": (FEEDBACK, {"passes": 0}, OptionError, r"passes=0: give a whole number from 1 on"),
    "half a pass": (FEEDBACK, {"passes": 1.5}, OptionError, r"passes=1.5"),
    "size": (FEEDBACK, {"input_size": (3, 6, 6)}, TraceError, r"does not run on an input of size \(1, 3, 6, 6\)"),
}


def raises(kind, message):
    return pytest.raises(kind, match=f"(?s){message}")


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_building(case):
    connections, options, kind, message = MISTAKES[case]
    net, x = build("convnet", train=False)
    before, expected = {name: set(vars(module)) for name, module in net.named_modules()}, net(x)
    with raises(kind, message) as caught:
        fxfeedback.add_feedback(net, connections, **{"input_size": SIZE, **options})
    assert isinstance(caught.value, fxfeedback.Error)
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("end", ["size", "chunk"])
@pytest.mark.parametrize("as_source", [True, False])
def test_an_end_that_is_no_tensor(end, as_source):
    pair = (end, "conv") if as_source else ("fc", end)
    role = "source" if as_source else "destination"
    with raises(NodeNameError, f"the {role} '{end}'"):
        fxfeedback.add_feedback(Odd(), [pair], input_size=(2, 6, 6))


def test_a_destination_that_the_output_does_not_depend_on():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.side = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3)
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x):
            self.seen.copy_(self.side(x).mean((0, 2, 3)))
            return self.conv(x)

    net = Aside()
    assert "side" in fxfeedback.node_names(net, input_size=(2, 6, 6))
    with raises(NodeNameError, "output does not depend on 'side'"):
        fxfeedback.add_feedback(net, [("conv", "side")], input_size=(2, 6, 6))


@pytest.mark.parametrize("pair", [("last", "conv"), ("conv", "last"), ("reshape", "conv")])
def test_maps_are_not_resized_to_another_number_of_dimensions(pair):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv1d(4, 3, 1)

        def forward(self, x):
            y = self.conv(x)
            y = y.reshape(y.shape[0], 4, 2, 3, 2, 3).mean((4, 5))
            return self.last(y.flatten(2)).mean(2)

    with raises(NodeNameError, f"{pair[0]} -> {pair[1]}: a source with .* cannot be resized to a destination with"):
        fxfeedback.add_feedback(Rows(), [pair], input_size=(2, 6, 6))


WRONG_CALLS = {
    "channels": (
        lambda m, x: m(x, steering=Steering("8", torch.zeros(1, 6))),
        InputError,
        r"'8'.*\(batch, 7\).*\(1, 6\)",
    ),
    "dimensions": (lambda m, x: m(x, steering=Steering("8", torch.zeros(7))), InputError, r"\(batch, 7\), not \(7,\)"),
    "map for a vector": (
        lambda m, x: m(x, steering=Steering("8", torch.zeros(1, 7, 1, 1))),
        InputError,
        r"not \(1, 7, 1, 1\)",
    ),
    "size of a map": (
        lambda m, x: m(x, steering=Steering("5", torch.zeros(1, 8, 2, 3))),
        InputError,
        r"'5'.*\(batch, 8, 3, 3\).*not \(1, 8, 2, 3\)",
    ),
    "size of a map, mixed": (
        lambda m, x: m(x, steering=Steering("5", torch.zeros(1, 8, 2, 3), alpha=0.5)),
        InputError,
        r"'5'.*not \(1, 8, 2, 3\)",
    ),
    "channels at a place of their own size": (
        lambda m, x: m(x, steering=Steering("5", torch.zeros(1, 3, 8, 3))),
        InputError,
        r"not \(1, 3, 8, 3\)",
    ),
    "batch": (lambda m, x: m(x, steering=Steering("8", torch.zeros(3, 7))), InputError, r"'8'.*not \(3, 7\)"),
    "strength": (lambda m, x: m(x, steering=Steering("8", torch.zeros(1, 7), (1, 2, 3))), fxfeedback.Error, "strength"),
    "no source": (
        lambda m, x: m(x, steering=Steering("4", torch.zeros(1, 8, 3, 3))),
        NodeNameError,
        "'4'.*not a source",
    ),
    "unknown": (
        lambda m, x: m(x, steering=Steering("88", torch.zeros(1, 7))),
        NodeNameError,
        r"no node is called '88'",
    ),
    "steered twice": (
        lambda m, x: m(x, steering=[Steering("8", torch.zeros(1, 7)), Steering("8", torch.ones(1, 7))]),
        OptionError,
        r"steered twice",
    ),
    "no input": (lambda m, x: m(), InputError, r"takes 1 inputs, not 0"),
    "two inputs": (lambda m, x: m(x, x), InputError, r"takes 1 inputs, not 2"),
    "one image without its batch": (lambda m, x: m(x[0]), InputError, r"\(2, 6, 6\).*\(batch, 2, 6, 6\)"),
    "an array": (lambda m, x: m(x.numpy()), InputError, r"takes tensors, not a ndarray"),
    "misspelt key": (lambda m, x: m(x, steering={"source": "8", "value": 1}), fxfeedback.Error, "value"),
    "not a steering": (lambda m, x: m(x, steering=["8"]), fxfeedback.Error, "Steering"),
    "passes": (lambda m, x: m(x, passes=0), OptionError, r"passes=0"),
    "passes of unrolled": (lambda m, x: m.unrolled(passes=0), OptionError, r"passes=0"),
    "state": (lambda m, x: m.unroll(x, state={"nowhere": x}), fxfeedback.Error, "nowhere"),
    "state of no source": (lambda m, x: m.unroll(x, state={"4": x}), fxfeedback.Error, "4"),
    "state of another batch": (
        lambda m, x: m.unroll(x, state={"8": torch.zeros(3, 7).double()}),
        InputError,
        r"\(3, 7\)",
    ),
    "state of other channels": (
        lambda m, x: m.unroll(x, state={"8": torch.zeros(4, 6).double()}),
        InputError,
        r"the state of '8' has shape \(batch, 7\), not \(4, 6\)",
    ),
    "state of another dtype": (
        lambda m, x: m.unroll(x, state={"8": torch.zeros(4, 7)}),
        InputError,
        r"state in torch.float32, as it was made for .*state in torch.float64",
    ),
    "state that is no dict": (lambda m, x: m.unroll(x, state=x), InputError, r"give what unroll returned"),
    "other channels": (
        lambda m, x: m(x[:, :1]),
        InputError,
        r"does not run on \(batch, 1, 6, 6\) in .*\(batch, 2, 6, 6\)",
    ),
    "another dtype": (lambda m, x: m(x.float()), InputError, r"does not run on .*torch.float32, as .*torch.float64"),
    "integers": (lambda m, x: m(x.int()), InputError, r"does not run on .*torch.int32, as .*torch.float64"),
    "too small": (lambda m, x: m(x[..., :1, :1]), InputError, r"does not run on \(batch, 2, 1, 1\)"),
    "no connection": (
        lambda m, x: m.modulation("8", "1"),
        NodeNameError,
        r"no connection 8 -> 1; there are: 8 -> 4, 5 -> 1",
    ),
    "readout": (lambda m, x: m.readout(x, ["11"]), NodeNameError, r"no node is called '11'"),
}


@pytest.fixture(scope="module")
def called():
    return convnet()


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_mistakes_in_calls(case, called):
    call, kind, message = WRONG_CALLS[case]
    net, model, x = called
    with raises(kind, message) as caught:
        call(model, x)
    assert isinstance(caught.value, fxfeedback.Error)
    assert torch.equal(model(x)[0], net(x))  # and the model is usable afterwards


def test_a_name_that_is_taken():
    net = nn.Sequential()
    net.add_module("modulations", nn.Linear(4, 3))
    with raises(OptionError, r"'modulations'.*rename it"):
        fxfeedback.add_feedback(net, [], input_size=(4,))


def test_a_quantized_model_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its quantization packages
        model = torchvision.models.quantization.resnet18(quantize=True)
    with raises(TraceError, r"'conv1' is quantized"):
        fxfeedback.add_feedback(model, [("fc", "conv1")])


class Holder(nn.Module):
    """A child is called as one of our methods, and code outside asks for an attribute."""

    def __init__(self):
        super().__init__()
        self.out_channels = 5
        self.readout = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.passes = nn.Linear(6, 5)

    def forward(self, x):
        return self.passes(self.readout(x))


def test_children_may_have_the_names_of_our_methods():
    net = Holder()
    model = fxfeedback.add_feedback(net, [("passes", "readout.0")], input_size=(4,))
    x = torch.randn(3, 4)
    assert torch.equal(model(x)[0], net(x)) and not torch.equal(model(x)[1], net(x))
    assert model.out_channels == 5


def test_a_replaced_head_is_used():
    net, model, x = convnet()
    head = nn.Linear(7, 3).double()
    setattr(model, "10", head)
    assert model(x)[1].shape == (len(x), 3)
    assert torch.equal(model(x)[0], head(net[:10](x)))
    assert model.state_dict()["10.weight"].shape == (3, 7)


def test_mistakes_name_the_nearest_nodes():
    with pytest.raises(NodeNameError) as caught:
        fxfeedback.add_feedback(torchvision.models.resnet18(), [("layer4.1.relu_2", "layer1")], input_size=(3, 64, 64))
    assert re.search(r"did you mean 'layer4\.1\.relu_?1?'", str(caught.value))


# -- the closing ReLU --------------------------------------------------------------------------------------------------


class Signs(nn.Module):
    """Rectified values, what keeps their signs, and what does not."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.six, self.drop = nn.ReLU(inplace=True), nn.ReLU6(), nn.Dropout(0.5)
        self.pool, self.mean, self.flat = nn.MaxPool2d(2), nn.AvgPool2d(2, ceil_mode=True), nn.Flatten()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.over = nn.Upsample(scale_factor=2, mode="bicubic")
        self.linear, self.gelu, self.last = nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        y = self.pool(x + self.six(x - 1)) * torch.sigmoid(x[:, :, ::2, ::2])
        y = torch.cat([self.drop(y), self.over(self.mean(y)), self.up(y)[:, :, 2:6, 2:6] - 1], 1)[:, :8]
        y = self.linear(F.adaptive_avg_pool2d(y.clamp(min=0.0), 2).flatten(1))
        return self.last(self.gelu(y) + y.softmax(-1) + y.relu())


RECTIFIED = {
    "signs": (Signs, (2, 8, 8)),
    "convnet": (lambda: build("convnet", False)[0], (2, 6, 6)),
    "residual": (lambda: build("residual", False)[0], (2, 6, 6)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), (3, 32, 32)),
    "alexnet": (lambda: torchvision.models.alexnet(num_classes=5), (3, 64, 64)),
    "densenet": (lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=5), (3, 32, 32)),
}


def destinations(net, size):
    """The names of all destinations, and those which the model rectifies."""
    graph = fxfeedback.feedback.FeedbackModel(net, [], 2, [torch.empty(1, *size)])._bottom_up().graph
    rectified = never_negative(graph)
    legal = [node for node in graph.nodes if node in legal_ends(graph)[1]]
    return [node.meta["name"] for node in legal], [node.meta["name"] for node in legal if node in rectified]


@one_in(3)
@pytest.mark.parametrize("activation", ["auto", "none"])
@pytest.mark.parametrize("name", RECTIFIED)
def test_with_all_modulations_at_zero_every_pass_is_the_model(name, activation):
    """Bit for bit, and without a warning: for all destinations that are rectified; with "none" for all."""
    torch.manual_seed(0)
    make, size = RECTIFIED[name]
    net, x = make().double().eval(), torch.randn(3, *size, dtype=torch.double)
    names, rectified = destinations(net, size)
    assert len(names) > len(rectified) > 2
    chosen = names if activation == "none" else rectified
    with warnings.catch_warnings():
        warnings.simplefilter("error", ActivationWarning)
        connections = [Connection(names[-1], destination, activation=activation) for destination in chosen]
        model = fxfeedback.add_feedback(net, connections, passes=3, input_size=size)
    for block in model.modulations.values():
        nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(block.modulation.bias)
    assert all(torch.equal(output, net(x)) for output in model(x))
    read = model.readout(x, rectified, passes=1)[0]
    assert all((values.value >= 0).all() for values in read.values())


@one_in(3)
@pytest.mark.parametrize(
    "destination, instead", [("0", "'2', which"), ("1", "'2', which"), ("8", "'9', which"), ("10", "a node")]
)
def test_a_destination_that_is_rectified_in_some_passes_only(destination, instead):
    """The default says so where the user calls, with what to do; a choice says nothing."""
    with pytest.warns(
        ActivationWarning, match=f"destination '{destination}' is not rectified.*connect to {instead}"
    ) as seen:
        convnet([("10", destination)])
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ActivationWarning)
        for activation in ("relu", "none"):
            convnet([Connection("10", destination, activation=activation)])
        fxfeedback.models.alexnet_lrm3()
