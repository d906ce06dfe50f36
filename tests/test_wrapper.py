"""What users of torch expect of the module that `to_butd` returns, and of the model that they gave it."""

import copy
import io
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models.feature_extraction import get_graph_node_names

import fxfeedback
from marks import long, one_in
from networks import Auxiliary, build


def law_holds(model: nn.Module, butd: nn.Module, *inputs: torch.Tensor) -> None:
    """Same outputs, and updates equal to autograd's gradients, for every tensor that the model returns."""

    def flat(y):
        if isinstance(y, torch.Tensor):
            return [y]
        return [leaf for part in (y.values() if isinstance(y, dict) else y) for leaf in flat(part)]

    state = {key: value.clone() for key, value in model.state_dict().items()}
    results = []
    for network in (model, butd):
        model.load_state_dict(state)
        outputs = network(*inputs)
        loss = sum((y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in flat(outputs))
        results.append((outputs, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    (expected, gradients), (outputs, updates) = results
    assert type(outputs) is type(expected)
    for a, b in zip(flat(outputs), flat(expected), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    largest = max(b.abs().max() for b in gradients if b is not None)
    for a, b in zip(updates, gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= 1e-9 * max(b.abs().max(), 1e-6 * largest)


def test_the_users_model_stays_as_it_is():
    model, x = build("residual", train=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    expected = model(x)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6), td_bias=True, weights="separate").train()
    butd(x, torch.tensor([0, 1, 0, 1]))
    assert not any(module.training for module in model.modules())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    model.norm.load_state_dict({key.removeprefix("norm."): v for key, v in before.items() if key.startswith("norm.")})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), expected)


def test_parameters_and_buffers_are_shared_also_after_moving():
    model, _ = build("convnet", train=True)
    butd = fxfeedback.to_butd(model, input_size=(2, 6, 6)).float()
    ours = dict(butd.named_parameters()) | dict(butd.named_buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor is ours[name]
        assert tensor.dtype in (torch.float32, torch.int64)
    x = torch.randn(4, 2, 6, 6)
    butd(x).sum().backward()
    assert model[0].weight.grad is not None and model[1].num_batches_tracked == 1


def test_state_dict_has_the_models_names():
    model, _ = build("resnet18", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=4, embedding=8, input_size=(3, 64, 64))
    names = set(model.state_dict())
    assert names < set(butd.state_dict())
    checkpoint = torchvision.models.resnet18(num_classes=11).state_dict()
    missing, unexpected = butd.load_state_dict(checkpoint, strict=False)
    assert not unexpected and all(name.startswith("instruction_head.") for name in missing)
    assert torch.equal(model.fc.weight, checkpoint["fc.weight"].double())


def test_modes_follow_the_user_even_module_by_module():
    model, x = build("residual", train=False)
    butd = fxfeedback.to_butd(model, input_size=(2, 6, 6))
    for switch in (butd.train, butd.eval, lambda: butd.train().norm.eval(), lambda: butd.train().drop.eval()):
        switch()
        for ours, theirs in zip(butd.modules(), model.modules(), strict=False):
            theirs.train(ours.training) if not list(theirs.children()) else setattr(theirs, "training", ours.training)
        statistics = model.norm.running_mean.clone()
        torch.manual_seed(0)
        expected = model(x)
        model.norm.running_mean.copy_(statistics)
        torch.manual_seed(0)
        assert torch.allclose(butd(x), expected, rtol=1e-12)


def test_what_fxfeedback_adds_is_no_part_of_the_model():
    """A Sequential runs all its children; the instruction head must not become one when a new graph is traced."""
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6), weights="separate", td_bias=True)
    before = butd(x, 1)
    butd.train()(x, 1)
    assert [name for name, _ in model.named_children()] == [str(i) for i in range(11)]
    assert butd.eval()(x).shape == before.shape


@pytest.mark.parametrize("name", ["small", long("googlenet")])
def test_auxiliary_heads_come_in_training_mode_only(name):
    small = name == "small"
    model = Auxiliary() if small else torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    size = (2, 6, 6) if small else (3, 64, 64)
    model, x = model.double().eval(), torch.randn(2, *size, dtype=torch.double)
    butd = fxfeedback.to_butd(model, input_size=size)
    law_holds(model, butd, x)
    model.train(), butd.train()
    for module in (*model.modules(), *butd.modules()):
        module.p = 0.0 if isinstance(module, nn.Dropout) else None
    law_holds(model, butd, x)


class Several(nn.Module):
    """Two inputs, an option, and a dict of a tensor and a tuple for output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)

    def forward(self, x, z, scale=2.0, verbose=False, mask=None):
        y = torch.relu(self.a(x)) * scale
        if mask is not None:
            y = y * mask
        return {"out": y, "parts": (y + self.b(z), torch.chunk(y, 2, 1)[0])}


def test_several_inputs_and_outputs():
    model = Several().double()
    x, z = torch.randn(5, 4, dtype=torch.double), torch.randn(5, 3, dtype=torch.double)
    butd = fxfeedback.to_butd(model, example_inputs=(x, z))
    law_holds(model, butd, x, z)
    with pytest.raises(fxfeedback.errors.InputError, match="2 inputs"):
        butd(x)


@dataclass
class Answer:
    """What a model may return, as a named tuple."""

    logits: torch.Tensor
    features: torch.Tensor


class Answering(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        features = torch.relu(self.first(x))
        return Answer(self.last(features), features)


def test_a_dataclass_is_returned():
    model, x = Answering().double(), torch.randn(5, 4, dtype=torch.double)
    butd = fxfeedback.to_butd(model, n_tasks=2, head="last", input_size=(4,))
    feedback = fxfeedback.add_feedback(model, [("last", "first")], input_size=(4,))
    for output in (butd(x), feedback(x)[0], feedback.eval()(x)[0]):
        assert isinstance(output, Answer) and torch.equal(output.logits, model(x).logits)
    assert isinstance(butd.select(1)(x), Answer)
    butd(x).logits.sum().backward()
    (expected,) = torch.autograd.grad(model(x).logits.sum(), [model.first.weight])
    torch.testing.assert_close(model.first.weight.grad, expected)


UNTRACEABLE = {
    "is compiled: convert the model inside": lambda model: torch.compile(model),
    "is a DataParallel: convert the model inside": nn.DataParallel,
    "is TorchScript: pass the Python model": torch.jit.script,
    "has no weights before its first call": lambda model: nn.Sequential(model, nn.LazyLinear(3)),
}


@pytest.mark.parametrize("message", UNTRACEABLE)
def test_what_hides_its_code_or_weights_is_refused(message):
    model = UNTRACEABLE[message](nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6)))
    for inside in (model, nn.Sequential(model, nn.ReLU())):
        with pytest.raises(fxfeedback.errors.TraceError, match=message):
            fxfeedback.to_butd(inside, input_size=(4,))
        with pytest.raises(fxfeedback.errors.TraceError, match=message):
            fxfeedback.node_names(inside, input_size=(4,))


class Tuples(nn.Module):
    """Takes tuples whole, in slices, joined, and one in another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        a, b = torch.cat(x.chunk(2, 1), 1), torch.stack(x.unbind(1)[::-1], 1)
        rest = b.chunk(4, 1)[1:]
        c = torch.cat((rest[0] * 2, *a.split([2, 6], 1)), 1)
        d = torch.cat((c[:, :1],) + c[:, 1:].split(3, 1), 1)  # noqa: RUF005
        return self.last(d[:, :8] + a.max(1, keepdim=True).values)


def test_tuples_of_tensors():
    model, x = Tuples().double(), torch.randn(3, 4, dtype=torch.double)
    law_holds(model, fxfeedback.to_butd(model, input_size=(4,)), x)
    feedback = fxfeedback.add_feedback(model, [("last", "first")], input_size=(4,))
    assert torch.equal(feedback(x)[0], model(x))


def test_a_tuple_in_a_tuple():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.last = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(self.cell(x)[1][0][-1])

    model, x = Recurrent(), torch.randn(3, 5, 4)
    feedback = fxfeedback.add_feedback(model, [("last", "last")], input_size=(5, 4))
    assert torch.equal(feedback(x)[0], model(x))


def test_a_butd_network_is_no_part_of_another():
    butd = fxfeedback.to_butd(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), input_size=(4,))
    for model in (butd, nn.Sequential(butd, nn.ReLU())):
        with pytest.raises(fxfeedback.errors.TraceError, match="is a BU-TD network already"):
            fxfeedback.add_feedback(model, [("2", "0")], input_size=(4,))


class InPlace(nn.Module):
    """Overwrites values and reads them afterwards, under every spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.a(x)
        self.relu(x)
        y = self.b(x).mul_(2)
        torch.relu_(y)
        z = x + y
        z += y
        z.sub_(1)
        nn.functional.leaky_relu(z, 0.1, True)
        return z * 2 + y


class Masked(nn.Module):
    """Has a tensor that is neither a parameter nor a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.mask, self.last = nn.Linear(8, 8), torch.randn(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) * self.mask)


def test_tensors_that_are_mere_attributes():
    model, x = Masked(), torch.randn(3, 8)
    feedback = fxfeedback.add_feedback(model, [("last", "first")], input_size=(8,))
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(8,))
    for output in (feedback(x)[0], feedback.unrolled(passes=1)(x)[0][0], feedback.eval()(x)[0], butd(x)):
        assert torch.equal(output, model(x))
    torch.testing.assert_close(butd.select(1)(x), butd(x, 1))


def test_in_place_ops_keep_their_meaning():
    model = InPlace().double()
    law_holds(model, fxfeedback.to_butd(model, input_size=(4,)), torch.randn(5, 4, dtype=torch.double))


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_weights_learn_through_their_parametrization(parametrize):
    model = nn.Sequential(parametrize(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3)).double()
    law_holds(model, fxfeedback.to_butd(model, input_size=(4,)), torch.randn(5, 4, dtype=torch.double))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_every_padding_mode(mode):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode), nn.ReLU(), nn.Conv2d(3, 2, 2)).double()
    law_holds(model, fxfeedback.to_butd(model, input_size=(2, 6, 6)), torch.randn(3, 2, 6, 6, dtype=torch.double))


def test_another_input_size_builds_another_graph():
    model = torchvision.models.resnet18(num_classes=5).double().eval()
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(3, 64, 64))
    x = torch.randn(2, 3, 40, 72, dtype=torch.double)
    law_holds(model, butd, x)
    assert butd(x, torch.tensor([0, 1])).shape == (2, 5)


def test_copies_are_independent():
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6), weights="separate")
    task = torch.tensor([0, 1, 1, 0])
    expected = butd(x, task)
    buffer = io.BytesIO()
    torch.save(butd, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(butd), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x, task), expected)
        twin(x, task).sum().backward()
        assert model[0].weight.grad is None
        with torch.no_grad():
            twin.get_parameter("0.weight").zero_()
        assert torch.equal(butd(x, task), expected)


@pytest.mark.parametrize("name", ["resnet18", long("alexnet"), long("densenet121"), long("googlenet")])
def test_names_are_torchvisions(name):
    model = torchvision.models.get_model(name, weights=None).eval()
    names = fxfeedback.node_names(model)
    _, expected = get_graph_node_names(model, suppress_diff_warning=True)
    assert list(names) == expected
    with torch.no_grad():
        output = model(torch.zeros(1, 3, 224, 224))
    assert list(names.values())[-1].shape == (None, *output.shape[1:])


def test_names_reach_into_torchvisions_own_blocks():
    names = fxfeedback.node_names(torchvision.models.mobilenet_v2())
    assert names["features.3.conv.0.0"] == ("Conv2d", (None, 144, 56, 56))


def test_casting_a_converted_model():
    """Graphs are traced anew for the new dtype, whatever the example inputs were."""
    model, _ = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6)).float()
    feedback = fxfeedback.add_feedback(model, [("10", "0")], input_size=(2, 6, 6)).float()
    x = torch.randn(3, 2, 6, 6)
    assert butd(x, 1).dtype == feedback(x)[1].dtype == butd.counter_neurons(1)["2"].dtype == torch.float32
    assert "update_0_weight" in butd.learner.code
    assert butd.bfloat16()(x.bfloat16(), 1).dtype == torch.bfloat16


@one_in(3)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize(
    "convert",
    [
        lambda model: fxfeedback.to_butd(model, 2, input_size=(2, 6, 6)),
        lambda model: fxfeedback.add_feedback(model, [("8", "2")], input_size=(2, 6, 6)),
    ],
    ids=["butd", "feedback"],
)
def test_checkpoints_of_compiled_and_distributed_networks_load(convert, prefix):
    model, _ = build("convnet", train=False)
    network, other = convert(model), convert(copy.deepcopy(model))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    loaded = network.load_state_dict({prefix + name: tensor for name, tensor in other.state_dict().items()})
    assert not loaded.missing_keys and not loaded.unexpected_keys
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
