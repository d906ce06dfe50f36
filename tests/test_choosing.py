"""Where to connect, how to start, and what to train: what a new user asks first."""

import copy
import json
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fxfeedback
from fxfeedback import Connection
from fxfeedback.commands.main import main
from fxfeedback.errors import OptionError
from marks import long, one_in, sweep
from networks import build, convnet
from training.images import embedded

DIGITS = [("9", "4"), ("7", "1"), ("4", "4")]


@pytest.fixture(scope="module")
def trained():
    """A small network that reads digits, and the digits: training and test."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(4), nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    train, test = embedded(None, False)
    fit(net, train, net.parameters(), 0.004, lambda outputs, labels: F.cross_entropy(outputs, labels), 4)
    return net.eval(), train, test


def fit(model, data, parameters, rate, loss, epochs=1):
    optimizer = torch.optim.Adam(parameters, rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.images)).split(100):
            optimizer.zero_grad()
            loss(model(data.images[rows]), data.labels[rows]).backward()
            optimizer.step()


def right(model, data):
    """Of each pass, which images it reads right."""
    with torch.no_grad():
        outputs = model(data.images)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return [output.argmax(1) == data.labels for output in outputs]


def over_passes(outputs, labels):
    return sum(F.cross_entropy(output, labels) for output in outputs[1:])


# -- a start that changes nothing -------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("mode", ["multiply", long("add")])
def test_a_start_at_identity_keeps_every_image_and_learns_from_there(trained, mode):
    net, train, test = trained
    (before,) = right(net, test)
    assert before.float().mean() > 0.85
    connections = [Connection(*ends, mode=mode, init="identity") for ends in DIGITS]
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxfeedback.errors.ActivationWarning)
        model = fxfeedback.add_feedback(net, connections, 3, input_size=(1, 28, 28)).eval()
    for after in right(model, test):
        assert torch.equal(before, after)
    over_passes(model(train.images[:20]), train.labels[:20]).backward()
    for name, parameter in model.modulations.named_parameters():
        assert parameter.grad.any() == (".modulation." in name)  # the rest learns once these are not zero
    model.freeze_backbone()
    fit(model, train, model.feedback_parameters(), 0.001, over_passes)
    for after in right(model, test):
        assert after.float().mean() >= before.float().mean()
    assert all(p.any() for p in model.feedback_parameters())


EVERYWHERE = {
    "convnet": ["0", "1", "2", "3", "5", "8", "10"],
    "resnet18": ["conv1", "bn1", "maxpool", "layer1.0.conv1", "layer2.0.relu", "layer3.1.add", "avgpool", "fc"],
    "swin_t": ["features.0", "features.1.0.norm1", "features.3.1.attn", "features.3.1", "norm", "head"],
}


@one_in(2)
@pytest.mark.parametrize("name", [name if name != "swin_t" else long(name) for name in EVERYWHERE])
def test_at_identity_all_passes_are_the_model_to_the_bit(name):
    net, x = build(name, train=False)
    connections = [Connection(EVERYWHERE[name][-1], end, init="identity") for end in EVERYWHERE[name]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxfeedback.errors.ActivationWarning)
        model = fxfeedback.add_feedback(net, connections, 3, example_inputs=(x[:1],)).double()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected = net(x)
            for output in model(x):
                assert torch.equal(output, expected)


def test_a_start_that_would_change_something_is_refused():
    net, _ = build("convnet", train=False)
    with pytest.raises(OptionError, match="'4' is not rectified"):
        fxfeedback.add_feedback(net, [Connection("8", "4", activation="relu", init="identity")], input_size=(2, 6, 6))
    with pytest.raises(OptionError, match=r"init='zero'.*'random', 'identity'"):
        fxfeedback.add_feedback(net, [Connection("8", "4", init="zero")], input_size=(2, 6, 6))


# -- training only the feedback ---------------------------------------------------------------------------------------


def test_the_backbone_and_the_feedback_are_all_parameters_once():
    net, _ = build("convnet", train=False)
    model = fxfeedback.add_feedback(net, [("8", "5")], input_size=(2, 6, 6))
    feedback, backbone = (set(map(id, some)) for some in (model.feedback_parameters(), model.backbone_parameters()))
    assert not feedback & backbone and feedback | backbone == set(map(id, model.parameters()))
    assert backbone == set(map(id, net.parameters()))


class Tied(nn.Sequential):
    """Two layers with one weight, and one that is frozen."""

    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self[2].weight = self[0].weight
        self[4].bias.requires_grad_(False)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_frozen_backbone_leaves_the_original_as_it_was(checkpoint, tmp_path):
    net, x = Tied(), torch.randn(8, 4)
    before, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    model = fxfeedback.add_feedback(net, [("3", "1")], input_size=(4,), checkpoint=checkpoint)
    model(x)  # a graph that is kept
    model.freeze_backbone()
    assert [p.requires_grad for p in net.parameters()] == flags
    assert not any(p.requires_grad for p in model.backbone_parameters())
    assert all(p.requires_grad for p in model.feedback_parameters())
    assert list(model.state_dict()) == list(fxfeedback.add_feedback(net, [("3", "1")], input_size=(4,)).state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 1.0, weight_decay=0.5)  # which has no gradients to follow
    model(x)[-1].square().sum().backward()
    optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) and torch.equal(model.state_dict()[name], value)
    with torch.no_grad():
        net[0].weight.mul_(2)  # in the memory of both
    assert torch.equal(model(x)[0], net(x)) and model.get_parameter("2.weight") is model.get_parameter("0.weight")
    fxfeedback.save(model, tmp_path / "it")
    frozen = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in fxfeedback.load(tmp_path / "it").parameters()] == frozen
    model.freeze_backbone(False)
    assert [p.requires_grad for p in model.backbone_parameters()] == flags
    net(x).sum().backward()
    assert net[0].weight.grad is not None and model.get_parameter("0.weight").grad is None


def test_a_network_made_of_a_frozen_one_trains_its_feedback_by_counter_hebb_learning():
    net, x = Tied(), torch.randn(8, 4)
    model = fxfeedback.add_feedback(net, [("3", "1")], input_size=(4,))
    model.freeze_backbone()
    butd = fxfeedback.to_butd(model, input_size=(4,))
    butd(x)[-1].square().sum().backward()
    assert all(p.grad is None for p in butd.backbone_parameters())
    updates = [p.grad.clone() for p in butd.feedback_parameters()]
    model.zero_grad()
    model(x)[-1].square().sum().backward()
    for update, parameter in zip(updates, model.feedback_parameters(), strict=True):
        torch.testing.assert_close(update, parameter.grad, rtol=1e-4, atol=1e-5)


# -- where channels are -----------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Patches, a class token before them, and a residual stream that no layer has normalised yet."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm, self.mix = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 8)
        self.first, self.scale, self.head = (
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Parameter(torch.ones(8)),
            nn.Linear(8, 5),
        )

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.scale * self.mix(self.norm(x))
        back = x[:, 1:].permute(0, 2, 1).unflatten(2, (4, 4))
        return self.head(x[:, 0] + back.mean((2, 3)))


LAYOUTS = {
    "transpose": "tokens",
    "cat": "tokens",
    "mul": "tokens",
    "add": "tokens",
    "permute": "map",
    "unflatten": "map",
}


@pytest.mark.parametrize("node", LAYOUTS)
def test_channels_are_found_through_permutations_and_behind_parameters(node):
    model = fxfeedback.add_feedback(Tokens(), [Connection("head", node, activation="none")], input_size=(3, 16, 16))
    layout = model.modulation("head", node).destination
    assert (layout.kind, layout.channels) == (LAYOUTS[node], 8)
    if layout.kind == "tokens":
        assert layout.size == (4, 4)


# -- where to connect -------------------------------------------------------------------------------------------------

PUBLISHED = {
    "alexnet": ["classifier.6 -> features.7", "features.11 -> features.4", "features.7 -> features.1"],
    "resnet18": ["fc -> layer3.1.relu_1", "layer4.1.relu_1 -> layer2.1.relu_1", "layer3.1.relu_1 -> layer1.1.relu_1"],
}


@pytest.mark.parametrize("name", ["alexnet", long("resnet18")])
def test_suggestions_lead_back_stage_by_stage_and_say_what_they_cost(name):
    net = torchvision.models.get_model(name, num_classes=1000)
    suggested = fxfeedback.suggest_connections(net)
    assert [f"{one.source} -> {one.destination}" for one in suggested] == PUBLISHED[name]
    whole = sum(p.numel() for p in net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxfeedback.errors.ActivationWarning)
        warnings.simplefilter("error", fxfeedback.errors.HeavyWarning)
        model = fxfeedback.add_feedback(net, suggested, input_size=(3, 224, 224))
    assert all(type(one) is Connection for one in model.connections)
    for one in suggested:
        size = sum(p.numel() for p in model.modulation(one.source, one.destination).parameters())
        assert (one.parameters, one.share) == (size, size / whole) and one.share <= 0.1
        assert 0 < one.operations < 1.1 * one.whole and f"{size:,} parameters" in str(one)


@pytest.mark.parametrize(
    "name", ["convnet", "mlp", "attention", long("vit"), long("mobilenet_v3_small"), sweep("shufflenet_v2_x0_5")]
)
def test_every_suggestion_can_be_made_and_runs(name):
    net, x = build(name, train=False)
    for n in (1, 3):
        suggested = fxfeedback.suggest_connections(net, n, example_inputs=(x[:1],))
        assert len(suggested) <= n
    assert suggested or name == "attention"
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxfeedback.errors.ActivationWarning)
        model = fxfeedback.add_feedback(net, suggested, example_inputs=(x[:1],)).double()
    assert torch.equal(model(x)[0], net(x)) and (not suggested or not torch.equal(model(x)[1], net(x)))
    with pytest.raises(OptionError, match="n=0: give a whole number"):
        fxfeedback.suggest_connections(net, 0)


def test_node_names_mark_legal_and_good_ends():
    names = fxfeedback.node_names(torchvision.models.resnet18(), (3, 64, 64))
    good = [name for name, info in names.items() if info.destination == "good"]
    assert good == ["relu", "layer1.1.relu_1", "layer2.1.relu_1", "layer3.1.relu_1", "layer4.1.relu_1"]
    assert [name for name, info in names.items() if info.source == "good"] == [*good, "fc"]
    assert names["layer1.0.bn1"].destination == "legal" and names["x"].op == "placeholder"
    assert names["layer1.0.bn1"][:2] == ("BatchNorm2d", (None, 64, 16, 16))


def test_a_heavy_block_and_a_size_that_nobody_gave_are_warned_of():
    errors = fxfeedback.errors
    net = torchvision.models.resnet18()
    with pytest.warns(
        errors.HeavyWarning, match=r"layer4 -> layer1 adds 3,\d+,\d+ parameters, 28% .*channel\" has 1,024"
    ):
        fxfeedback.add_feedback(net, [("layer4", "layer1")], input_size=(3, 224, 224))
    with pytest.warns(errors.SizeWarning, match=r"of 256 x 56 x 56, as the model is made for inputs of 3 x 224 x 224"):
        fxfeedback.add_feedback(net, [("fc", "layer3"), ("layer3", "layer1")])
    wide = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 9))
    with pytest.warns(errors.HeavyWarning, match=r"2 -> 1 adds .*its 1x1 convolution leads from 9 channels to 9"):
        fxfeedback.add_feedback(wide, [("2", "1")])
    with warnings.catch_warnings():
        for kind in (errors.HeavyWarning, errors.SizeWarning):
            warnings.simplefilter("error", kind)
        fxfeedback.add_feedback(net, [Connection("layer4", "layer1", norm="channel"), ("fc", "layer3")])


def test_the_command_line_marks_good_ends_and_suggests(capsys):
    given = ["networks:convnet", "--input-size", "2x6x6"]
    assert main(["nodes", *given, "--json"]) == 0
    nodes = {node["name"]: node for node in json.loads(capsys.readouterr().out)["nodes"]}
    assert [name for name in nodes if nodes[name]["good_destination"]] == ["2", "5"]
    assert [name for name in nodes if nodes[name]["good_source"]] == ["2", "5", "10"]
    assert main(["nodes", *given]) == 0
    assert re.search(r"^5 .* good +good$", capsys.readouterr().out, re.MULTILINE)
    assert main(["feedback", *given, "--suggest", "2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["connections"]
    wanted = fxfeedback.suggest_connections(convnet(), 2, input_size=(2, 6, 6))
    assert [(one["source"], one["parameters"]) for one in made] == [(one.source, one.parameters) for one in wanted]
    assert main(["feedback", *given, "--suggest", "2", "--connect", "8:5"]) == 2
