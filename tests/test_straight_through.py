"""A learned instruction head: errors pass hard gates straight through, and run up the instruction pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback
from fxfeedback.errors import OptionError
from marks import long_but, one_in
from networks import build


class Step(torch.autograd.Function):
    """[t > 0], whose derivative is [|t| <= 1]."""

    @staticmethod
    def forward(ctx, t):
        ctx.near = t.abs() <= 1
        return (t > 0).to(t.dtype)

    @staticmethod
    def backward(ctx, e):
        return e * ctx.near


class Layer(torch.autograd.Function):
    """y = x Wᵀ + b, whose error runs down V."""

    @staticmethod
    def forward(ctx, x, layer, v):
        ctx.v = v
        return x @ layer.weight.T + layer.bias

    @staticmethod
    def backward(ctx, e):
        return e @ ctx.v, None, None


def three_layers():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def loss_of(y):
    return (y.sin() * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()


def gradients(y, module):
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss_of(y), [p for p in named.values() if p.requires_grad], allow_unused=True)
    return dict(zip([name for name, p in named.items() if p.requires_grad], found, strict=True))


@one_in(4)
@pytest.mark.parametrize(
    "task", [torch.tensor([0, 1, 1, 0, 1]), 1, torch.rand(5, 2).double()], ids=["ids", "one", "vectors"]
)
@pytest.mark.parametrize("weights", ["shared", "sign", "separate"])
def test_the_head_learns_as_autograd_has_it(weights, task):
    """By hand, with TD's weights as constants; what the model's weights learn is what it was."""
    torch.manual_seed(2)
    model = three_layers()
    butd = fxfeedback.to_butd(
        model, 2, embedding=12, input_size=(4,), instruction_learning="straight-through", weights=weights
    )
    x, head = torch.randn(5, 4, dtype=torch.double), butd.instruction_head
    instruction = (
        task if torch.is_tensor(task) and task.ndim == 2 else F.one_hot(torch.as_tensor(task).expand(5), 2).double()
    )
    v = {name: model.get_parameter(name).detach() for name in ("2.weight", "4.weight")}
    if weights == "separate":
        v = {name: butd.td_weights[name].detach() for name in v}
    elif weights == "sign":
        v = {name: butd.magnitudes[name] * w.sign() for name, w in v.items()}
    t3 = head(instruction)
    t1 = t3.relu() @ v["2.weight"]
    ours = gradients(butd(x, task), butd)
    below = Layer.apply(model[:2](x) * Step.apply(t1), model[2], v["2.weight"])
    y = Layer.apply(below.relu() * Step.apply(t3), model[4], v["4.weight"])
    theirs = gradients(y, butd)
    for name in ("instruction_head.0.weight", "instruction_head.2.weight"):
        assert theirs[name].any() and torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-12)
    fixed = fxfeedback.to_butd(model, 2, embedding=12, input_size=(4,), weights=weights)
    fixed.load_state_dict(butd.state_dict())
    for name, gradient in gradients(fixed(x, task), fixed).items():
        assert torch.allclose(ours[name], gradient, rtol=1e-10, atol=1e-14), name


@pytest.mark.parametrize("gating", ["unit", "channel"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("net", long_but(["convnet"], ["convnet", "residual", "vit"]))
def test_every_op_brings_it_up(net, train, gating):
    """Autograd through the instruction pass as a graph, which the rules' own transposes must equal."""
    model, x = build(net, train=train)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    butd = fxfeedback.to_butd(model, 2, input_size=x.shape[1:], instruction_learning="straight-through", gating=gating)
    task = torch.tensor([0, 1, 1, 0])
    other = fxfeedback.to_butd(model, 2, input_size=x.shape[1:], gating=gating, learning="backprop")
    other.load_state_dict(butd.state_dict())
    state = {name: value.clone() for name, value in butd.state_dict().items()}
    torch.manual_seed(1)
    ours = gradients(butd(x, task), butd)
    butd.load_state_dict(state)
    down = butd._graphs([x]).instructing(False, rectified=False)
    counters = down(F.one_hot(task, 2).double())
    graphs = other._graphs([x])
    positions = graphs.gating().positions
    gates = [
        Step.apply(t.mean(dims, keepdim=True) if dims else t)
        for t, dims in zip(counters.values(), positions, strict=True)
    ]
    torch.manual_seed(1)
    y = graphs.predicting(True)(x, *gates)
    theirs = torch.autograd.grad(loss_of(y), list(butd.instruction_head.parameters()))
    assert torch.allclose(ours["instruction_head.0.weight"], theirs[0], rtol=1e-9, atol=1e-9 * theirs[0].abs().max())
    assert theirs[0].any()


def test_a_head_that_learns_is_saved_and_one_that_does_not_is_frozen(tmp_path):
    butd = fxfeedback.to_butd(three_layers(), 2, input_size=(4,), instruction_learning="straight-through")
    assert all(p.requires_grad for p in butd.instruction_head.parameters())
    fxfeedback.save(butd, tmp_path)
    other, x, task = fxfeedback.load(tmp_path), torch.randn(5, 4).double(), torch.tensor([0, 1, 1, 0, 1])
    for name, gradient in gradients(other(x, task), other).items():
        assert torch.equal(gradient, gradients(butd(x, task), butd)[name])
    fixed = fxfeedback.to_butd(three_layers(), 2, input_size=(4,))
    assert not any(p.requires_grad for p in fixed.instruction_head.parameters())
    with torch.no_grad():
        assert torch.equal(butd(x, task), other(x, task))
    butd.instruction_head.requires_grad_(False)
    assert torch.equal(butd(x, task), other(x, task))


def test_an_instruction_is_learned():
    """Two tasks that one head of two outputs cannot do at once: gates that learn tell them apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    butd = fxfeedback.to_butd(model, 2, input_size=(2,), instruction_learning="straight-through")
    optimizer = torch.optim.Adam(butd.parameters(), lr=0.01)
    before = butd.instruction_head[0].weight.detach().clone()
    for _ in range(150):
        x, task = torch.randn(64, 2), torch.randint(2, (64,))
        loss = F.cross_entropy(butd(x, task), (x[torch.arange(64), task] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.35 and not torch.equal(before, butd.instruction_head[0].weight)


WRONG = {
    "n_tasks=, an instruction head": {},
    'learning="counter_hebb"': {"n_tasks": 2, "learning": "backprop"},
    'lateral="galu"': {"n_tasks": 2, "lateral": "multiply"},
    'td_magnitude="uniform" or "fixed"': {"n_tasks": 2, "weights": "sign", "td_magnitude": "batch"},
}


@pytest.mark.parametrize("needed", WRONG)
def test_what_it_needs_is_said(needed):
    with pytest.raises(OptionError, match=f"^instruction_learning='straight-through' needs {needed}"):
        fxfeedback.to_butd(three_layers(), input_size=(4,), instruction_learning="straight-through", **WRONG[needed])


def test_it_is_one_of_two():
    with pytest.raises(OptionError, match="instruction_learning='learned': choose one of 'fixed', 'straight-through'"):
        fxfeedback.to_butd(three_layers(), 2, input_size=(4,), instruction_learning="learned")


def test_a_learners_file_has_a_fixed_head(tmp_path):
    butd = fxfeedback.to_butd(three_layers(), 2, input_size=(4,), instruction_learning="straight-through")
    with pytest.raises(OptionError, match="the head of a learner's file is fixed"):
        fxfeedback.export_learner(butd, tmp_path / "learner.onnx")
