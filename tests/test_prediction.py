"""Predictive coding: an independent interpreter of the formulas, what is shared, what learns, and what is refused."""

import copy
import math
import operator
import pickle

import onnx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fxfeedback
from fxfeedback import Prediction
from fxfeedback.errors import InputError, NodeNameError, OptionError, RuleError, TraceError
from fxfeedback.rules.resizing import interpolate_by_matrices
from marks import long_but, one_in

TIGHT = 1e-12


def reference(blocks, head, parts, x, steps, create_graph=False):
    """Outputs and what is read out of every step. `parts`: of each block predictor, β, λ, α, and c of a prediction."""
    held, outputs, read = [], [], []
    for _ in range(steps):
        below, new, now = x, [], []
        for i, (block, (predictor, beta, feedback, alpha, c)) in enumerate(zip(blocks, parts, strict=True)):
            f = r = block(below)
            if held:
                last = i + 1 == len(blocks)
                up = 0 if last else feedback * held[i + 1][1]
                memory = 1 - beta - (0 if last else feedback)
                r = beta * f + up + memory * held[i][0] - alpha * held[i][2]
            with torch.enable_grad():
                at = r if create_graph else r.detach().requires_grad_()
                error = predictor(at) - (below if create_graph else below.detach())
                (g,) = torch.autograd.grad((error.square().sum() * c(error) / 2), at, create_graph=create_graph)
            p = predictor(r)
            new.append((r, p, g))
            now.append((r, p, (p - below).square().mean(), f))
            below = r
        held = new
        outputs.append(head(below))
        read.append(now)
    return outputs, read


def scaled(scaling):
    """c of an error, by `scaling`."""
    if scaling == "mean":
        return lambda error: 2 / error.numel()
    if scaling == "sample":
        return lambda error: 2 / error[0].numel()
    return lambda error: 2 / math.sqrt(scaling)


class Chain(nn.Module):
    """Blocks, of which each predicts the one below, and a head."""

    def __init__(self, blocks, head):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), head

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.Softplus, nn.Identity)


def random_case(seed):
    """A chain of maps and vectors, with predictors of random kinds, multipliers and scalings."""
    torch.manual_seed(seed)
    pick = lambda *values: values[int(torch.randint(len(values), ()))]  # noqa: E731
    channels, size, blocks, predictors = 3, 12, [], []
    for _ in range(pick(1, 2, 3)):
        out, stride = pick(2, 4, 5), pick(1, 1, 2)
        convolution = nn.Conv2d(channels, out, 3, stride, 1)
        blocks.append(nn.Sequential(convolution, pick(*ACTIVATIONS)()))
        wider = nn.ConvTranspose2d(out, channels, 3, stride, 1, output_padding=stride - 1)
        hidden = nn.Sequential(nn.Conv2d(out, out, 1), pick(*ACTIVATIONS)(), copy.deepcopy(wider))
        predictors.append(pick(None, nn.Sequential(wider, pick(*ACTIVATIONS)()), hidden))
        channels, size = out, (size - 1) // stride + 1
    if pick(True, False):
        units = channels * size * size
        blocks.append(nn.Sequential(nn.Flatten(), nn.Linear(units, 7), pick(*ACTIVATIONS)()))
        predictors.append(nn.Sequential(nn.Linear(7, units), nn.Unflatten(1, (channels, size, size))))
        blocks.append(nn.Sequential(nn.Linear(7, 6), nn.ReLU()))
        predictors.append(None)
        head = nn.Linear(6, 4)
    else:
        head = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 4))
    numbers = [[float(torch.rand(()) * 0.5) for _ in range(3)] for _ in blocks]
    scalings = [pick("mean", "sample", 5.0, 40) for _ in blocks]
    predictions = [
        Prediction(f"blocks.{i}", predictors[i], *numbers[i], scaling=scalings[i]) for i in range(len(blocks))
    ]
    return Chain(blocks, head).double(), predictions


def made(seed, **options):
    """A random model with predictions, and what the reference takes of it."""
    net, predictions = random_case(seed)
    model = fxfeedback.add_prediction(net, predictions, input_size=(3, 12, 12), **options)
    parts = [(model.predictor(p.node), p.feedforward, p.feedback, p.error, scaled(p.scaling)) for p in predictions]
    return model, net, parts, [p.node for p in predictions]


def assert_close(a, b, tolerance=TIGHT):
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("seed", long_but(range(5), range(12)))
def test_it_is_what_plain_loops_and_autograd_compute(seed):
    model, net, parts, nodes = made(seed)
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    outputs, read = reference(net.blocks, net.head, parts, x, 4)
    for ours, theirs in zip(model(x, steps=4), outputs, strict=True):
        assert_close(ours, theirs)
    for ours, theirs in zip(model.readout(x, nodes, steps=4), read, strict=True):
        for node, expected in zip(nodes, theirs, strict=True):
            for one, other in zip(ours[node], expected, strict=True):
                assert_close(one, other)


@one_in(9)
@pytest.mark.parametrize("detach_error", [True, False])
@pytest.mark.parametrize("seed", long_but(range(2), range(6)))
def test_its_gradients_are_those_of_plain_loops(seed, detach_error):
    model, net, parts, _ = made(seed, detach_error=detach_error)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    weights = torch.randn(4, 2, 4, dtype=torch.float64)
    parameters = list(model.parameters())

    def gradients(outputs):
        loss = (torch.stack(outputs) * weights).sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    expected = gradients(reference(net.blocks, net.head, parts, x, 4, create_graph=not detach_error)[0])
    for ours, theirs in zip(gradients(model(x, steps=4)), expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, theirs, 1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_a_call_goes_on_from_a_state(seed):
    model, *_ = made(seed)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    whole, state = model(x, steps=5), None
    outputs = []
    for steps in (1, 3, 1):
        more, state = model.unroll(x, steps=steps, state=state)
        outputs += more
    assert all(torch.equal(*pair) for pair in zip(outputs, whole, strict=True))
    assert not any(value.requires_grad for held in state.values() for value in held)


def test_gradients_flow_through_a_state_that_keeps_its_graph():
    model, *_ = made(1)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    first, state = model.unroll(x, steps=2, keep_graph=True)
    second, _ = model.unroll(x, steps=2, state=state)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(second[-1].sum() + first[0].sum(), parameters, allow_unused=True)
    outputs = model(x, steps=4)
    theirs = torch.autograd.grad(outputs[-1].sum() + outputs[0].sum(), parameters, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert one is other is None or torch.allclose(one, other, rtol=1e-12)


def convnet():
    layers = {
        "conv0": nn.Conv2d(3, 4, 3, padding=1),
        "norm": nn.BatchNorm2d(4),
        "conv1": nn.Conv2d(4, 6, 3, 2, padding=1),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(6, 5, 3, padding=1),
        "relu2": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(5, 7),
    }
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net.double()


def with_predictions(predictions=("relu1", "relu2"), **options):
    torch.manual_seed(0)
    return fxfeedback.add_prediction(convnet(), predictions, input_size=(3, 10, 12), **options)


def image(batch=2):
    return torch.randn(batch, 3, 10, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
def test_one_step_is_the_model_bit_for_bit(training):
    net = convnet().train(training)
    model, x = fxfeedback.add_prediction(net, ["relu1", "relu2"], input_size=(3, 10, 12)), image()
    assert model.training == training
    assert torch.equal(model(x, steps=1)[0], net(x))
    assert torch.equal(model(x, steps=3)[0], net(x))


def test_what_lies_below_the_first_prediction_is_computed_once_and_the_last_step_predicts_nothing():
    model = with_predictions(steps=4)
    graph = model.unrolled().graph
    names = [node.name for node in graph.nodes]

    def count(start):
        return sum(name == start or name.startswith(f"{start}_step") for name in names)

    assert [count(name) for name in ("conv0", "norm", "conv1", "relu1")] == [1, 1, 1, 1]
    assert [count(name) for name in ("conv2", "fc")] == [4, 4]
    assert [count(name) for name in ("predictors_relu1_1", "predictors_relu2_0")] == [3, 3]
    assert {node.target for node in graph.nodes if node.op == "call_function"} >= {torch.detach, operator.mul}
    assert not any(str(node.target).startswith("autograd") for node in graph.nodes)


def test_shared_statistics_advance_once_per_step():
    net = convnet().train()
    model, x = fxfeedback.add_prediction(net, ["relu1"], steps=3, input_size=(3, 10, 12)), image()
    expected = copy.deepcopy(net)
    for _ in range(3):
        expected(x)
    model(x)
    assert torch.allclose(model.norm.running_mean, expected.norm.running_mean, rtol=1e-12)


def test_with_mean_a_result_depends_on_the_batch_and_with_sample_it_does_not():
    for scaling, same in (("mean", False), ("sample", True), ("window", True)):
        model = with_predictions([Prediction("relu1", scaling=scaling, error=5.0)]).eval()
        x = image(4)
        assert torch.allclose(model(x)[-1][:2], model(x[:2])[-1], rtol=1e-9) == same


def test_the_window_is_counted():
    window = Prediction("relu2", nn.Sequential(nn.ConvTranspose2d(5, 6, 5, padding=2), nn.ReLU()), scaling="window")
    number = Prediction(
        "relu2", window.predictor, scaling=6 * 5 * 5
    )  # at the central cell the window lies within the map of 5 by 6
    x = image()
    one, other = (with_predictions(["relu1", each], steps=3)(x)[-1] for each in (window, number))
    assert torch.equal(one, other)


def test_a_target_by_name():
    model = with_predictions([Prediction("relu2", target="norm", scaling="sample")])
    x = image()
    norm = model.readout(x, ["norm"], steps=1)[0]["norm"]
    read = model.readout(x, "relu2", "norm", steps=1)[0]
    assert torch.equal(read["norm"].representation, norm.representation)
    assert read["norm"].prediction is read["norm"].error is read["norm"].feedforward is None
    predicted = model.predictor("relu2")(read["relu2"].representation)
    assert_close(read["relu2"].error, F.mse_loss(predicted, norm.representation))


def test_predictors_learn_from_their_own_loss_only():
    model, x = with_predictions(), image()
    losses = model.prediction_losses(x)
    assert list(losses) == ["relu1", "relu2"]
    parameters = {node: list(model.predictor(node).parameters()) for node in losses}
    for node, loss in losses.items():
        for other, own in parameters.items():
            gradients = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
            assert all((gradient is not None) == (node == other) for gradient in gradients)


def test_predictors_learn_to_predict():
    model, x = with_predictions(), image(4)
    optimizer = torch.optim.Adam(model.predictors.parameters(), 0.05)
    losses = []
    for _ in range(60):
        loss = torch.stack(list(model.prediction_losses(x).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_multipliers_are_buffers_of_the_models_dtype():
    model = with_predictions([Prediction("relu1", feedforward=0.5, feedback=0.2, error=0.7), "relu2"])
    buffers = {name: value for name, value in model.named_buffers() if name.startswith("multipliers.")}
    assert {value.dtype for value in buffers.values()} == {torch.float64}
    assert float(buffers["multipliers.relu1.feedforward"]) == 0.5 and float(buffers["multipliers.relu2.error"]) == 0.01
    assert {value.dtype for name, value in model.float().named_buffers() if "multipliers" in name} == {torch.float32}
    x = image().float()
    before = model(x)[-1]
    model.multipliers["relu1"].error.fill_(20.0)
    assert not torch.allclose(before, model(x)[-1])


def test_multipliers_that_are_learned_start_where_the_fixed_ones_are():
    predictions = [Prediction("relu1", feedforward=0.5, feedback=0.2, error=3.0), Prediction("relu2", feedback=0.4)]
    fixed, learned = with_predictions(predictions), with_predictions(predictions, learn_multipliers=True)
    learned.load_state_dict(fixed.state_dict(), strict=False)
    x = image()
    for one, other in zip(learned(x), fixed(x), strict=True):
        assert_close(one, other)
    assert {name for name, _ in learned.multipliers.named_parameters()} == {
        f"relu1.{name}" for name in ("u", "v", "w", "alpha")
    } | {f"relu2.{name}" for name in ("u", "w", "alpha")}
    learned(x)[-1].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad != 0 for parameter in learned.multipliers.parameters())


def test_weights_are_shared_with_the_users_model_and_predictors():
    net, predictor = convnet(), nn.ConvTranspose2d(6, 3, 4, 2, 1).double()
    model = fxfeedback.add_prediction(net, [Prediction("relu1", predictor)], input_size=(3, 10, 12))
    assert model.conv0.weight is net.conv0.weight and model.predictor("relu1").weight is predictor.weight
    assert isinstance(model.predictor("relu1"), nn.ConvTranspose2d) and model.predictor("relu1") is not predictor


def test_a_predictors_own_mode_and_attributes_count():
    predictor = nn.Sequential(nn.Dropout(0.5), nn.ConvTranspose2d(6, 3, 4, 2, 1)).double()
    model, x = with_predictions([Prediction("relu1", predictor, error=50.0)], steps=2), image()
    assert not torch.equal(model(x)[1], model(x)[1])
    model.eval()
    assert torch.equal(model(x)[1], model(x)[1])
    model.train()
    model.predictor("relu1")[0].p = 0.0
    assert torch.equal(model(x)[1], model(x)[1])


def test_another_size_builds_its_graph():
    net = convnet().eval()
    model = fxfeedback.add_prediction(net, ["relu1", "relu2"], input_size=(3, 8, 8))
    x = torch.randn(2, 3, 16, 20, dtype=torch.float64)
    other = fxfeedback.add_prediction(net, ["relu1", "relu2"], input_size=(3, 16, 20))
    other.load_state_dict(model.state_dict())
    for one, expected in zip(model(x), other(x), strict=True):
        assert torch.equal(one, expected)


class Tokens(nn.Module):
    """From tokens to tokens: each is mixed, and so are they."""

    def __init__(self, tokens, channels):
        super().__init__()
        self.norm, self.channels, self.tokens = (
            nn.LayerNorm(channels),
            nn.Linear(channels, channels),
            nn.Linear(tokens, tokens),
        )

    def forward(self, x):
        return self.tokens(torch.tanh(self.channels(self.norm(x))).transpose(1, 2)).transpose(1, 2)


def test_tokens_of_a_vision_transformer():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(32, 8, 3, 2, 24, 48, num_classes=5).double().eval()
    nn.init.normal_(vit.heads.head.weight)
    nodes = [f"encoder.layers.encoder_layer_{i}" for i in range(3)]
    predictions = [Prediction(node, Tokens(17, 24), scaling="sample", error=2.0) for node in nodes[1:]]
    predictions[0] = Prediction(nodes[1], Tokens(17, 24), target=nodes[0], error=3.0)
    model = fxfeedback.add_prediction(vit, predictions, steps=3, input_size=(3, 32, 32))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    outputs = model(x)
    assert torch.equal(outputs[0], vit(x)) and not torch.allclose(outputs[2], outputs[0])
    tokens = model.readout(x, nodes[0])[0][nodes[0]].representation
    layers = list(vit.encoder.layers)
    parts = [(model.predictor(p.node), 0.3, 0.3, p.error, scaled(p.scaling)) for p in predictions]

    def head(t):
        return vit.heads(vit.encoder.ln(t)[:, 0])

    for ours, theirs in zip(outputs, reference(layers[1:], head, parts, tokens, 3)[0], strict=True):
        assert_close(ours, theirs)


# -- what is refused --------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(3, 5)

    def forward(self, a, b):
        return self.first(a) + self.second(b)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


wrong = nn.ConvTranspose2d(6, 3, 3, 2, 1).double()
REFUSED = {
    "a string": ({"predictions": "relu1"}, OptionError, "give a list"),
    "none": ({"predictions": []}, OptionError, "empty"),
    "no prediction": ({"predictions": [3]}, OptionError, "3 is not a prediction"),
    "an unknown field": ({"predictions": [{"node": "relu1", "rate": 2}]}, OptionError, "rate"),
    "an unknown node": ({"predictions": ["rellu1"]}, NodeNameError, "relu1"),
    "a node that is read by nothing": ({"predictions": ["conv1", "relu1", "relu1"]}, OptionError, "one node"),
    "a shape": (
        {"predictions": [Prediction("relu1", wrong)]},
        OptionError,
        r"\(batch, 3, 9, 11\).*\(batch, 3, 10, 12\)",
    ),
    "a shape of a node": (
        {"predictions": ["relu1", Prediction("relu2", nn.Conv2d(5, 4, 1).double())]},
        OptionError,
        r"\(batch, 4, 5, 6\).*'relu1'.*\(batch, 6, 5, 6\)",
    ),
    "no module": ({"predictions": [Prediction("relu1", "conv")]}, OptionError, "torch.nn.Module"),
    "two values": ({"predictions": [Prediction("relu1", Pair())]}, OptionError, "one tensor"),
    "no graph": ({"predictions": [Prediction("relu1", Branching())], "door": "fx"}, TraceError, "predictor at 'relu1'"),
    "other channels": ({"predictions": [Prediction("relu1", nn.Conv2d(5, 3, 1))]}, TraceError, "predictor at 'relu1'"),
    "no default": ({"predictions": ["fc"]}, OptionError, "give predictor="),
    "a multiplier": ({"predictions": [Prediction("relu1", feedforward="a")]}, OptionError, "feedforward='a'"),
    "no number": ({"predictions": [Prediction("relu1", error=math.nan)]}, OptionError, "finite"),
    "a scaling": ({"predictions": [Prediction("relu1", scaling="batch")]}, OptionError, "'mean'"),
    "a scaling of 0": ({"predictions": [Prediction("relu1", scaling=0)]}, OptionError, "positive"),
    "a later target": ({"predictions": [Prediction("relu1", target="relu2")]}, OptionError, "before"),
    "itself": ({"predictions": [Prediction("relu1", target="relu1")]}, OptionError, "before"),
    "an unknown target": ({"predictions": [Prediction("relu1", target="norn")]}, NodeNameError, "norm"),
    "a target that is none": ({"predictions": [Prediction("relu1", target=3)]}, OptionError, "target=3"),
    "no steps": ({"steps": 0}, OptionError, "steps=0"),
    "half a step": ({"steps": 1.5}, OptionError, "steps=1.5"),
    "a door": ({"door": "back"}, OptionError, "door"),
    "a share of 0": (
        {"predictions": [Prediction("relu1", feedforward=0.0)], "learn_multipliers": True},
        OptionError,
        "feedforward",
    ),
    "no memory": (
        {"predictions": [Prediction("relu1", feedforward=0.6, feedback=0.4), "relu2"], "learn_multipliers": True},
        OptionError,
        "memory",
    ),
    "a feedback of another shape": (
        {"predictions": ["relu1", Prediction("relu2", target="norm")]},
        OptionError,
        r"fed back to 'relu1'.*\(batch, 6, 5, 6\).*\(batch, 4, 10, 12\).*feedback=0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses(case):
    options, error, message = REFUSED[case]
    net = convnet()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=message):
        fxfeedback.add_prediction(net, **{"predictions": ["relu1"], "input_size": (3, 10, 12), **options})
    assert list(before) == list(net.state_dict())


def test_several_inputs_need_a_target():
    example = (torch.randn(2, 4), torch.randn(2, 3))
    with pytest.raises(OptionError, match="give target="):
        fxfeedback.add_prediction(TwoInputs(), ["add"], example_inputs=example)
    model = fxfeedback.add_prediction(TwoInputs(), [Prediction("add", target="b")], steps=2, example_inputs=example)
    assert [tuple(output.shape) for output in model(*example)] == [(2, 5), (2, 5)]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "give what unroll returned"),
        ("yes", "give what unroll returned"),
        ({"relu1": 3, "relu2": 4}, "r, p and g"),
        ("another batch", r"not \(2, 6, 5, 6\)"),
    ],
)
def test_a_state_that_is_not_its_own(state, message):
    model = with_predictions()
    if state == "another batch":
        _, state = model.unroll(image(3))
    with pytest.raises(InputError, match=message):
        model.unroll(image(), state=state)


def test_a_call_is_refused_in_words():
    model, x = with_predictions(), image()
    with pytest.raises(OptionError, match="steps=0"):
        model(x, steps=0)
    with pytest.raises(InputError, match="state= is an option of unroll"):
        model(x, state={})
    with pytest.raises(InputError, match="float32"):
        model(x.float())
    with pytest.raises(NodeNameError, match="no node is named"):
        model.readout(x)
    with pytest.raises(NodeNameError, match="there is no prediction at 'conv0'"):
        model.predictor("conv0")


def test_an_op_without_a_rule_is_named():
    class Sorted(nn.Module):
        def forward(self, x):
            x = F.interpolate(x, (10, 12))[:, :3].square() + 1
            return torch.igamma(x, x)

    with pytest.raises(RuleError, match=r"no rule for torch\.igamma"):
        with_predictions([Prediction("relu1", Sorted())])


# -- with the rest of the library -------------------------------------------------------------------------------------


def gradients_of(outputs, weights, model):
    """Name -> gradient, or None, of a weighted sum of outputs."""
    loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


@one_in(7)
@pytest.mark.parametrize("learn_multipliers", [True, False])
@pytest.mark.parametrize("detach_error", [True, False])
def test_counter_hebb_updates_are_its_gradients(detach_error, learn_multipliers):
    predictions = [Prediction("relu1", error=3.0), Prediction("relu2", scaling="window", error=0.1)]
    model = with_predictions(predictions, steps=3, detach_error=detach_error, learn_multipliers=learn_multipliers)
    butd, x = fxfeedback.to_butd(model.eval(), input_size=(3, 10, 12)), image()  # a bias before a norm learns then, too
    weights = [torch.randn(2, 7, dtype=torch.float64) for _ in range(3)]
    ours, theirs = gradients_of(butd(x), weights, butd), gradients_of(model(x), weights, model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] is None) == (gradient is None), name
        if gradient is not None:
            assert (ours[name] - gradient).abs().max() <= 1e-9 * gradient.abs().max().clamp(min=1e-9), name


def test_an_instruction_goes_down_through_the_steps():
    butd = fxfeedback.to_butd(with_predictions(steps=2).eval(), n_tasks=3, embedding=6, input_size=(3, 10, 12))
    x = image()
    outputs = butd(x, torch.tensor([0, 2]))
    assert [tuple(output.shape) for output in outputs] == [(2, 7)] * 2
    assert not torch.allclose(outputs[-1], butd(x)[-1])


def test_predictions_and_connections_go_together():
    x, connection = image(), ("conv2", "norm")
    with_feedback = fxfeedback.add_feedback(convnet().eval(), [connection], passes=2, input_size=(3, 10, 12))
    both = fxfeedback.add_prediction(with_feedback, ["relu1", "relu2"], steps=3, input_size=(3, 10, 12))
    outputs = both(x)
    assert len(outputs) == 3 and all(torch.allclose(*pair) for pair in zip(outputs[0], with_feedback(x), strict=True))
    assert not torch.allclose(outputs[2][0], outputs[0][0])

    predicting = with_predictions(steps=3).eval()
    both = fxfeedback.add_feedback(predicting, [connection], passes=2, input_size=(3, 10, 12))
    outputs = both(x)
    assert len(outputs) == 2
    assert all((a - b).abs().max() < TIGHT for a, b in zip(outputs[0], predicting(x), strict=True))
    assert not torch.allclose(outputs[1][0], outputs[0][0])


@one_in(2)
@pytest.mark.parametrize("learn_multipliers", [True, False])
def test_it_comes_back_from_a_file(tmp_path, learn_multipliers):
    predictor = nn.Sequential(nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.ReLU()).double()
    predictions = [Prediction("relu1", predictor, error=2.0, scaling="window"), Prediction("relu2", scaling="sample")]
    model = with_predictions(predictions, steps=3, learn_multipliers=learn_multipliers, detach_error=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.multipliers.requires_grad_(False)
    fxfeedback.save(model, tmp_path)
    loaded, x = fxfeedback.load(tmp_path), image()
    assert isinstance(loaded, fxfeedback.PredictiveModel) and loaded.steps == 3 and not loaded.detach_error
    assert all(torch.equal(*pair) for pair in zip(loaded(x), model(x), strict=True))
    assert not any(parameter.requires_grad for parameter in loaded.multipliers.parameters())
    learner = fxfeedback.to_butd(loaded, input_size=(3, 10, 12))
    fxfeedback.save(learner, tmp_path / "learner")
    again = fxfeedback.load(tmp_path / "learner")
    assert all(torch.equal(*pair) for pair in zip(again(x), learner(x), strict=True))


def test_it_can_be_copied_and_pickled():
    model, x = with_predictions(["relu1", Prediction("relu2", nn.Conv2d(5, 6, 1).double())]), image()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(*pair) for pair in zip(other(x), model(x), strict=True))
        assert other.predictor("relu1")[1].weight is not model.predictor("relu1")[1].weight


@one_in(2)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_it_compiles_whole(mode):
    model, x = with_predictions(steps=3, detach_error=False), image()
    getattr(model, mode)()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weights = [torch.randn(2, 7, dtype=torch.float64) for _ in range(3)]
    expected = gradients_of(model(x), weights, model)
    for name, gradient in gradients_of(compiled(x), weights, model).items():
        assert (gradient is None) == (expected[name] is None)
        assert gradient is None or torch.allclose(gradient, expected[name], rtol=1e-9, atol=1e-12), name


def test_under_autocast_it_runs_in_low_precision():
    model, x = with_predictions([Prediction("relu1", error=1.0), "relu2"], steps=3).float(), image().float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x)
    for output, exact in zip(outputs, model(x), strict=True):
        assert output.dtype == torch.bfloat16 and torch.allclose(output.float(), exact, atol=0.1)
    torch.stack(outputs).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


ZOO = {
    "vgg11": ["features.1", "features.4", "features.9"],
    "resnet18": ["relu", "layer1", "layer3.1.relu_1"],
    "mobilenet_v3_small": ["features.0.2", "features.3", "features.6"],
    "efficientnet_b0": ["features.1", "features.3"],
    "convnext_tiny": ["features.1", "features.3"],
    "densenet121": ["features.pool0", "features.denseblock1"],
    "shufflenet_v2_x0_5": ["conv1.2", "stage2"],
    "googlenet": ["maxpool1", "inception3a"],
}


@one_in(5)
@pytest.mark.parametrize("name", long_but(["vgg11", "resnet18", "mobilenet_v3_small"], ZOO))
def test_classifiers_of_torchvision(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    net = torchvision.models.get_model(name, weights=None, num_classes=5, **options).eval()
    predictions = [Prediction(node, scaling="sample", error=1.0) for node in ZOO[name]]
    model, x = fxfeedback.add_prediction(net, predictions, steps=3, input_size=(3, 64, 64)), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        outputs = model(x)
        assert torch.equal(outputs[0], net(x)) and all(output.isfinite().all() for output in outputs)
        assert not torch.equal(outputs[2], outputs[0])


@pytest.mark.parametrize("name", long_but([], ["vgg11", "resnet18"]))
def test_its_file_computes_what_it_does(name, tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None, num_classes=5).eval()
    predictions = [Prediction(node, error=1.0) for node in ZOO[name]]
    assert_file_agrees(fxfeedback.add_prediction(net, predictions, 4, input_size=(3, 64, 64)), (3, 64, 64), tmp_path)


def test_a_file_of_a_small_network(tmp_path):
    predictions = [
        Prediction("relu1", nn.Sequential(nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.ReLU()), error=3.0),
        Prediction("relu2", scaling="window"),
    ]
    net = convnet().float().eval()
    model = fxfeedback.add_prediction(net, predictions, 4, learn_multipliers=True, input_size=(3, 10, 12))
    assert_file_agrees(model, (3, 10, 12), tmp_path)


def assert_file_agrees(model, size, folder):
    path = folder / "model.onnx"
    fxfeedback.export(model, path, check=False)
    x = torch.randn(3, *size)
    outputs = fxfeedback.runtime.Session(path, "cpu")(x.numpy())
    for expected, output in zip(model.eval()(x), outputs, strict=True):
        assert abs(output - expected.detach().numpy()).max() <= 1e-4 * expected.abs().max().item()
    nodes = [node.name for node in onnx.load(path).graph.node]
    last = model.predictions[-1].node
    assert any(name.split("/")[0] == "step2" and last in name for name in nodes)
    assert not any(name.startswith(f"step1/{model.predictions[0].node}/") for name in nodes)
    assert path.stat().st_size < 1.2 * sum(t.numel() * t.element_size() for t in model.state_dict().values()) + 2e5


def test_an_export_takes_options_of_its_own(tmp_path):
    model = with_predictions().float()
    for options in ({"passes": 2}, {"task": 1}, {"steerable": True}, {"dynamic_size": True}):
        with pytest.raises(OptionError, match=f"{next(iter(options))}="):
            fxfeedback.export(model, tmp_path / "model.onnx", **options)
    with pytest.raises(OptionError, match="steps= belongs"):
        fxfeedback.export(fxfeedback.to_butd(convnet(), input_size=(3, 10, 12)), tmp_path / "model.onnx", steps=2)


RESIZINGS = [
    {"scale_factor": 2.0, "mode": "bilinear"},
    {"scale_factor": (1.7, 0.6), "mode": "bilinear", "align_corners": False},
    {"scale_factor": 1.7, "mode": "bilinear", "recompute_scale_factor": True},
    {"size": (8, 3), "mode": "bilinear", "align_corners": True},
    {"size": (3, 2), "mode": "bilinear", "antialias": True},
    {"size": 9, "mode": "nearest"},
]


@pytest.mark.parametrize("how", RESIZINGS)
def test_matrices_resize_as_the_kernels_do(how):
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert_close(interpolate_by_matrices(x, **how), F.interpolate(x, **how))


CONVOLUTIONS = [
    nn.ConvTranspose2d(6, 4, 3, padding=1),
    nn.ConvTranspose2d(6, 4, (3, 5), padding=(0, 2), groups=2, bias=False),
    nn.ConvTranspose2d(6, 4, 3, padding=3, dilation=2),
    nn.ConvTranspose2d(6, 4, 1, padding=1),
    nn.ConvTranspose2d(6, 4, 4, 2, 1, output_padding=1),
]


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_transposed_convolutions_in_steps_are_what_they_are(convolution):
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = convolution

        def forward(self, x):
            return F.interpolate(self.convolution(x)[:, :3], (10, 12), mode="bilinear")

    model, x = with_predictions([Prediction("relu1", Sized().double(), scaling="sample", error=5.0)], steps=3), image()
    for one, exact in zip(model(x), model.unrolled()(x)[0], strict=True):
        assert_close(one, exact)


def test_its_picture_has_an_arrow_down_for_each_prediction(tmp_path):
    model = with_predictions(steps=3).eval()
    for network in (model, fxfeedback.to_butd(model, n_tasks=2, input_size=(3, 10, 12))):
        fxfeedback.draw(network, tmp_path / "picture.svg")
        picture = (tmp_path / "picture.svg").read_text()
        first = "input" if network is model else "inputs"
        assert f"1: prediction relu1 → {first}; " in picture and "2: prediction relu2 → relu1; " in picture
        assert "2 predictions with 441 parameters; 3 steps." in picture
