"""Parameters that forward reads by hand, beside the module that has them: each is one node, and its updates add up."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fxfeedback
from fxfeedback.errors import OptionError, RuleError
from marks import long, one_in


def near(a, b, tolerance=1e-9):
    return bool((a - b).abs().max() <= tolerance * max(1.0, b.abs().max()))


def model_of(init, forward):
    """A model with `enc`, `dec` (6 to 6) and `fc` (6 to 4), and what `init` adds or changes."""

    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.dec, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
            init(self)

        def forward(self, x):
            return forward(self, x)

    torch.manual_seed(0)
    return ByHand().double()


def nothing(m):
    pass


def tie(m):
    m.dec.weight = m.enc.weight


def norm(m):
    m.norm = nn.BatchNorm1d(6)


def table(m):
    m.table = nn.Embedding(6, 6)


def free(m):
    m.w, m.ws = nn.Parameter(torch.randn(6, 6)), nn.ParameterList(nn.Parameter(torch.randn(6, 6)) for _ in range(2))
    m.register_buffer("scale", torch.rand(6) + 0.5)
    m.register_buffer("tied_scale", m.scale)


def weight_norm(m):
    parametrizations.weight_norm(m.enc)


def spectral_norm(m):
    parametrizations.spectral_norm(m.enc)


def copies(m):
    """Two layers with one parametrized class: torch's copies share it."""
    weight_norm(m)
    m.dec = copy.deepcopy(m.enc)
    nn.init.normal_(m.dec.parametrizations.weight.original1)


def hidden(m, x):
    return torch.relu(m.enc(x))


def without_gradient(w):
    with torch.no_grad():
        return 2 * w


def unread(m):
    """A parameter and a buffer of which forward never uses the first name, and a nested module never."""
    m.bias, m.scales = m.enc.bias, nn.ParameterList([m.fc.weight])
    m.insert = nn.Sequential(nn.Sequential(nn.Linear(6, 6)))
    m.enc.weight = m.insert[0][0].weight
    m.norm = nn.BatchNorm1d(6)
    m.register_buffer("mean", m.norm.running_mean)


CASES = {
    "tied autoencoder": (nothing, lambda m, x: F.linear(hidden(m, x), m.enc.weight.t())),
    "module, hand": (nothing, lambda m, x: F.linear(hidden(m, x), m.enc.weight, m.enc.bias)),
    "hand, module": (nothing, lambda m, x: m.enc(torch.relu(F.linear(x, m.enc.weight)))),
    "hand, module, hand": (nothing, lambda m, x: F.linear(m.enc(F.linear(x, m.enc.weight)), m.enc.weight)),
    "module, module, hand": (nothing, lambda m, x: m.enc(hidden(m, x)) @ m.enc.weight),
    "cosine head": (nothing, lambda m, x: m.fc(x) + F.linear(F.normalize(hidden(m, x)), F.normalize(m.fc.weight))),
    "two ops": (nothing, lambda m, x: F.linear(x @ m.enc.weight, m.enc.weight) * m.enc.weight[0]),
    "biases": (nothing, lambda m, x: hidden(m, x) * m.enc.bias + m.enc.bias),
    "slice": (nothing, lambda m, x: F.linear(m.fc(x), m.fc.weight[:3, :4])),
    "penalty": (nothing, lambda m, x: m.enc(x) + m.enc.weight.square().sum()),
    "detached": (nothing, lambda m, x: F.linear(m.enc(x), m.enc.weight.detach())),
    "data": (nothing, lambda m, x: F.linear(m.enc(x), m.enc.weight.data)),
    "no_grad": (nothing, lambda m, x: F.linear(m.enc(x), without_gradient(m.enc.weight))),
    "past getattr": (nothing, lambda m, x: F.linear(m.enc(x), m.enc._parameters["weight"])),
    "two names": (tie, lambda m, x: m.dec(hidden(m, x)) @ m.dec.weight),
    "second name, first name": (tie, lambda m, x: F.linear(m.dec(x), m.enc.weight) + m.dec.weight[0]),
    "names that are not read": (unread, lambda m, x: F.linear(m.norm(m.enc(x)), m.enc.weight.t()) @ m.fc.weight.t()),
    "norm": (norm, lambda m, x: m.norm(m.enc(x)) * m.norm.weight + m.norm.bias + m.norm.running_var),
    "table": (table, lambda m, x: F.linear(hidden(m, x) + m.table(torch.arange(6))[2], m.table.weight)),
    "free": (free, lambda m, x: F.linear(torch.relu(x @ m.w), m.w) @ m.ws[0] @ m.ws[1] + m.ws[0][0] @ m.w),
    "buffers": (free, lambda m, x: hidden(m, x) * m.scale + m.tied_scale * m.scale),
    "weight norm": (weight_norm, lambda m, x: F.linear(hidden(m, x), m.enc.weight.t())),
    "weight norm, hand first": (weight_norm, lambda m, x: m.enc(F.linear(x, m.enc.weight))),
    "only by hand, normalised": (weight_norm, lambda m, x: m.dec(x) @ m.enc.weight.t() + m.enc.bias),
    "weight norm's own": (weight_norm, lambda m, x: m.enc(x) @ m.enc.parametrizations.weight.original1),
    "copies with weight norm": (copies, lambda m, x: F.linear(m.dec(hidden(m, x)), m.dec.weight)),
    "spectral norm": (spectral_norm, lambda m, x: F.linear(hidden(m, x), m.enc.weight)),
}


@one_in(5)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CASES)
def test_read_by_hand_and_by_a_module_a_parameter_gets_both_updates(name, train):
    model = model_of(*CASES[name]).train(train)
    twin, x = copy.deepcopy(model), torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    if name == "spectral norm" and train:
        with pytest.raises(RuleError, match=r"reads the weight of 'enc' again.*one more step"):
            fxfeedback.to_butd(model, input_size=(6,))
        return
    butd = fxfeedback.to_butd(model, input_size=(6,))
    results = []
    for network, own in ((butd, model), (twin, twin)):
        y = network(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *own.parameters()], allow_unused=True)
        results.append((y, gradients, list(own.buffers())))
    (y, updates, buffers), (expected, gradients, expected_buffers) = results
    assert near(y, expected) and all(map(torch.equal, buffers, expected_buffers))
    for update, gradient in zip(updates, gradients, strict=True):
        assert (update is None) == (gradient is None)
        assert gradient is None or near(update, gradient)
    names = [str(node.target) for node in butd.bu.graph.nodes if node.op == "get_attr"]
    assert len(names) == len(set(names))


def tied():
    model = model_of(*CASES["tied autoencoder"])
    return model, torch.randn(3, 6, dtype=torch.double)


def test_passes_on_a_tied_weight_learn_as_autograd_does():
    results = []
    for learning in ("counter_hebb", "backprop"):
        model, _ = tied()
        feedback = fxfeedback.add_feedback(model, [("linear", "relu")], passes=3, input_size=(6,))
        butd = fxfeedback.to_butd(feedback, input_size=(6,), learning=learning)
        outputs = butd(torch.ones(2, 6, dtype=torch.double) * torch.arange(6))
        tensors = [p for name, p in butd.named_parameters() if not name.startswith(("dec.", "fc."))]
        results.append([outputs[-1], *torch.autograd.grad(sum(y.square().sum() for y in outputs), tensors)])
    assert len(outputs) == 3 and all(map(near, *results))


@pytest.mark.parametrize("name", ["tied autoencoder", "cosine head", "module, module, hand", "two names"])
def test_a_task_is_selected_where_a_weight_is_read_twice(name):
    """Channels that one reader does not need stay for the other."""
    model = model_of(*CASES[name]).eval()
    head = "linear" if name == "cosine head" else None
    butd = fxfeedback.to_butd(model, n_tasks=2, gating="channel", head=head, input_size=(6,)).eval()
    x = torch.randn(5, 6, dtype=torch.double)
    for task in (0, 1):
        assert near(butd.select(task)(x), butd(x, task))


@pytest.mark.parametrize("name", ["tied autoencoder", long("second name, first name"), long("biases"), "slice"])
def test_a_device_learns_a_weight_that_is_read_twice(name, tmp_path):
    runtime = pytest.importorskip("fxfeedback.runtime")
    model = model_of(*CASES[name]).float().eval()
    butd = fxfeedback.to_butd(model, input_size=(6,)).eval()
    fxfeedback.export_learner(butd, tmp_path / "learner.onnx", loss="mse")
    x = torch.randn(4, 6)
    target = torch.randn_like(model(x))
    learner = runtime.Learner(tmp_path / "learner.onnx")
    learner.step(x.numpy(), target.numpy(), lr=0.1)
    F.mse_loss(model(x), target).backward()
    for key, parameter in model.named_parameters(remove_duplicate=False):
        expected = parameter if parameter.grad is None else parameter - 0.1 * parameter.grad
        assert near(torch.from_numpy(learner.state_dict()[key]), expected.detach(), 1e-5), key


def test_a_td_bias_learns_at_both_places_of_its_weight():
    """Its update is the BU values at the layer's inputs, summed over the calls of the layer."""
    model = model_of(nothing, lambda m, x: m.fc(torch.relu(m.enc(torch.relu(m.enc(x))))))
    butd = fxfeedback.to_butd(model, n_tasks=2, td_bias=True, input_size=(6,))
    x = torch.randn(3, 6, dtype=torch.double)
    butd(x).square().sum().backward()
    assert near(butd.td_biases["enc"].grad, (x + torch.relu(model.enc(x))).mean(0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tied autoencoder", {"weights": "separate"}, r"weights=\"separate\".*'linear', called at.*computed"),
        ("tied autoencoder", {"td_bias": True, "n_tasks": 2}, r"td_bias=True.*'linear', called at.*computed"),
        ("tied autoencoder", {"heads": "per_task", "n_tasks": 2}, r"per_task.*'linear' are read or computed at 't'"),
        ("module, hand", {"heads": "per_task", "n_tasks": 2}, r"per_task.*'linear' are read or computed at 'enc'"),
    ],
)
def test_what_has_no_state_of_its_own_is_refused(name, options, message):
    with pytest.raises(OptionError, match=message):
        fxfeedback.to_butd(model_of(*CASES[name]), input_size=(6,), **options)


def written_through_data(m, x):
    m.enc.weight.data.clamp_(-0.1, 0.1)
    return m.enc(x)


def written_through_a_slice(m, x):
    with torch.no_grad():
        m.enc.weight[0].zero_()
    return m.enc(x)


def data_is_set(m, x):
    m.enc.weight.data = F.normalize(m.enc.weight.data)
    return m.enc(x)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (written_through_data, r"writes into 'enc.weight' through a view"),
        (written_through_a_slice, r"writes into 'enc.weight' through a view"),
        (data_is_set, r"sets .data of a tensor"),
    ],
)
def test_a_weight_that_forward_changes_under_another_name_is_refused(forward, message):
    with pytest.raises(fxfeedback.Error, match=message):
        fxfeedback.to_butd(model_of(nothing, forward), input_size=(6,))


def test_a_weight_that_forward_clamps_is_clamped():
    def clamped(m, x):
        with torch.no_grad():
            m.enc.weight.clamp_(-0.1, 0.1)
        return m.enc(x)

    model = model_of(nothing, clamped)
    twin, x = copy.deepcopy(model), torch.randn(3, 6, dtype=torch.double)
    assert torch.equal(fxfeedback.to_butd(model, input_size=(6,))(x), twin(x))
    assert torch.equal(model.enc.weight, twin.enc.weight)
