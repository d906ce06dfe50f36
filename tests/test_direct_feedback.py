"""Direct feedback and weight mirrors: against independent computations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback
from fxfeedback.errors import InputError, OptionError
from fxfeedback.graph.nodes import counterpart_of
from networks import SMALL, build


class Replaced(torch.autograd.Function):
    """The value itself; its gradient is what `instead` says."""

    @staticmethod
    def forward(ctx, value, instead):
        ctx.instead, ctx.shape = instead, value.shape
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.instead(ctx.shape), None


def broadcast(module: nn.Module, b: torch.Tensor, e: torch.Tensor, shape: torch.Size, out: torch.Size) -> torch.Tensor:
    """The error at the logits, brought to a layer's input by its transpose with b, ungrouped."""
    if isinstance(module, nn.Linear):
        t = (e @ b).repeat_interleave(shape[0] // len(e), 0)
        return t.reshape(len(t), *[1] * (len(shape) - 2), shape[-1]).expand(shape)
    e = e[:, :, None, None].expand(*e.shape, *out[2:])
    how = module.stride, module.padding, module.dilation
    if isinstance(module, nn.ConvTranspose2d):
        return F.conv2d(e, b, None, *how)
    padding = [(k - 1) // 2 for k in module.kernel_size] if module.padding == "same" else module.padding
    return torch.nn.grad.conv2d_input(shape, b, e, module.stride, padding, module.dilation)


def reference(model: nn.Module, x: torch.Tensor, weights) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The gradients of a loss by autograd, where every layer's input gets the error, broadcast."""
    error: list[torch.Tensor] = []
    hooks = []

    def wrap(name, module):
        def before(module, inputs):
            with torch.no_grad():
                out = type(module).forward(module, inputs[0]).shape
            instead = lambda shape: broadcast(module, weights[f"{name}.weight"], error[0], shape, out)  # noqa: E731
            return (Replaced.apply(inputs[0], instead), *inputs[1:])

        hooks.append(module.register_forward_pre_hook(before))

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            wrap(name, module)
    y = model(x)
    y.register_hook(lambda e: error.append(e))
    named = {"x": x, **dict(model.named_parameters())}
    gradients = torch.autograd.grad(loss_of(y), list(named.values()), allow_unused=True)
    for hook in hooks:
        hook.remove()
    return dict(zip(named, gradients, strict=True))


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return (y.sin() * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()


def updates(butd: nn.Module, model: nn.Module, x: torch.Tensor, *task: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {"x": x, **dict(model.named_parameters())}
    return dict(
        zip(named, torch.autograd.grad(loss_of(butd(x, *task)), list(named.values()), allow_unused=True), strict=True)
    )


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.allclose(ours[name], expected, rtol=1e-9, atol=1e-9 * expected.abs().max()), name


class Windows(nn.Module):
    """Windows of tokens in the batch dimension, as in Swin, and a sum of branches."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x.flatten(2).permute(0, 2, 1).reshape(-1, 9, 4, 2).flatten(2).repeat(1, 1, 1)[..., :6])
        w = x.unflatten(1, (3, 3)).flatten(0, 1)
        x = x + F.gelu(self.mix(w)).unflatten(0, (-1, 3)).flatten(1, 2)
        return self.head(x.mean(1))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("net", ["residual", "convnet", "mlp", "windows"])
def test_every_layer_hands_its_input_the_broadcast_error(net, train):
    model, x = build(net, train=train, others={"windows": Windows})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    butd = fxfeedback.to_butd(model, input_size=x.shape[1:], weights="direct")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = updates(butd, model, x.requires_grad_())
    model.load_state_dict(state)
    assert_equal(ours, reference(model, x, butd.td_weights))


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_kinds_are_the_papers_on_chains_of_linear_layers(activation):
    """By hand, as in the paper: e at a pre-activation is (B e) f'(a), whatever lies above."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 7), ACTIVATIONS[activation](), nn.Linear(7, 6), ACTIVATIONS[activation](), nn.Linear(6, 3)]
    model = nn.Sequential(*layers).double()
    by_op = fxfeedback.to_butd(model, input_size=(4,), weights="direct")
    by_unit = fxfeedback.to_butd(model, input_size=(4,), weights="direct", direct="unit", sites=["1", "3"])
    assert list(by_unit.td_weights) == ["1", "3"]
    with torch.no_grad():
        for site, above in (("1", "2.weight"), ("3", "4.weight")):
            by_unit.td_weights[site].copy_(by_op.td_weights[above])
    x = torch.randn(6, 4, dtype=torch.double)
    values = [x]
    for layer in model:
        values.append(layer(values[-1]).detach().requires_grad_())
    e = torch.autograd.grad(loss_of(values[-1]), values[-1])[0]
    expected = {"4": e}
    for site, below in (("3", "2"), ("1", "0")):
        a = values[int(below) + 1]
        expected[below] = torch.autograd.grad(model[int(site)](a), a, e @ by_unit.td_weights[site])[0]
    for butd in (by_op, by_unit):
        found = updates(butd, model, x.requires_grad_())
        for name, error in expected.items():
            assert torch.allclose(found[f"{name}.weight"], error.T @ values[int(name)], rtol=1e-10)
            assert torch.allclose(found[f"{name}.bias"], error.sum(0), rtol=1e-10)


def test_a_site_gets_its_own_error_behind_an_open_gate():
    """Convolutions, and an instruction: (B e) [gate] f', with B over all units."""
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=x.shape[1:], weights="direct", direct="unit")
    task = torch.tensor([0, 1, 1, 0])
    gates = {name: (t > 0).double() for name, t in butd.counter_neurons(task).items()}
    assert list(gates) == list(butd.td_weights)
    error, y = [], x.requires_grad_()
    for name, module in model.named_children():
        y = module(y)
        if name in gates:
            y = Replaced.apply(y * gates[name], lambda shape, b=butd.td_weights[name]: (error[0] @ b).view(shape))
    y.register_hook(lambda e: error.append(e))
    named = {"x": x, **dict(model.named_parameters())}
    theirs = dict(zip(named, torch.autograd.grad(loss_of(y), list(named.values())), strict=True))
    assert_equal(updates(butd, model, x, task), theirs)


@pytest.mark.parametrize("direct", ["op", "unit"])
def test_no_update_waits_for_a_deeper_layer(direct):
    model = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 3))
    butd = fxfeedback.to_butd(model, input_size=(4,), weights="direct", direct=direct)
    updated = butd.learner.graph.output_node().args[0][1]
    for name, node in updated.items():
        waits, behind = {node}, []
        for other in reversed(butd.learner.graph.nodes):
            if other in waits:
                waits.update(other.all_input_nodes)
                behind.append(counterpart_of(other) or "")
        layers = {int(one) for one in behind if one.isdecimal() and int(one) % 2 == 0}
        own = 0 if name == "input:input" else int(name.split(".")[0])
        assert layers <= {own, own + 2}, name


# -- weight mirrors ---------------------------------------------------------------------------------------------------


class Padded(nn.Module):
    """Layers whose taps lie outside of the map at some positions, or always; groups; one weight used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, (3, 2), stride=2, padding=(2, 1), dilation=2, groups=2)
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)
        self.token, self.head = nn.Linear(3, 3), nn.Linear(3, 5)

    def forward(self, x):
        x = self.up(torch.relu(self.grouped(torch.relu(self.conv(x))))).flatten(2).transpose(1, 2)
        return self.head(self.token(torch.relu(self.token(x))).mean(1))


def test_a_weight_mirrors_mean_is_the_difference_of_the_weights():
    model, x = build("padded", train=False, others={"padded": Padded})
    butd = fxfeedback.to_butd(model, input_size=x.shape[1:], weights="separate", td_learning="weight_mirror")
    seen = {name: [] for name in butd.td_weights}
    for _ in range(300):
        butd.zero_grad()
        butd.mirror_step(sigma=0.7, batch=8)
        for name, v in butd.td_weights.items():
            seen[name].append(v.grad)
    for name, grads in seen.items():
        grads = torch.stack(grads)
        expected = (butd.td_weights[name] - model.get_parameter(name)).detach()
        assert (grads.mean(0) - expected).abs().max() < 5 * grads.std(0).max() / 300**0.5, name
        assert (grads.std(0) > 0).all()


def test_a_weight_mirror_aligns_without_data():
    torch.manual_seed(0)
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, input_size=x.shape[1:], weights="separate", td_learning="weight_mirror")
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss_of(butd(x)).backward()
    assert all(v.grad is None for v in butd.td_weights.values())  # no error teaches them
    assert all(p.grad is not None for p in model.parameters())
    optimizer = torch.optim.SGD(butd.td_weights.parameters(), lr=0.2)
    for _ in range(100):
        optimizer.zero_grad()
        butd.mirror_step()
        optimizer.step()
    assert all(angle < 15 and 0.9 < ratio < 1.1 for angle, ratio in butd.alignment().values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_taps_that_never_lie_in_the_map_stay_as_they_are():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
    butd = fxfeedback.to_butd(model, input_size=(1, 1, 1), weights="separate", td_learning="weight_mirror")
    butd.mirror_step()
    grad = butd.td_weights["0.weight"].grad
    assert (grad[:, :, 1, 1] != 0).all() and grad.count_nonzero() == 2


# -- what is refused --------------------------------------------------------------------------------------------------


class Turns(nn.Module):
    """Time steps of all samples in one dimension, the samples of a step together."""

    def __init__(self):
        super().__init__()
        self.each, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.each(x.flatten(1, 2).transpose(0, 1).flatten(0, 1))
        return self.head(x.unflatten(0, (12, -1)).mean(0))


MLP = SMALL["mlp"]
FLAT = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
WRONG = {
    "unit without direct": (MLP, {"direct": "unit"}, "direct='unit': weights='shared' has no direct"),
    "unknown": (MLP, {"weights": "direct", "direct": "layer"}, "direct='layer': choose one of 'op', 'unit'"),
    "td_learning": (MLP, {"weights": "direct", "td_learning": "fixed"}, "td_learning='fixed'"),
    "td_init": (MLP, {"weights": "direct", "td_init": "kaiming"}, "td_init='kaiming'"),
    "decay": (MLP, {"weights": "direct", "td_decay": 0.1}, "td_decay"),
    "backprop": (MLP, {"weights": "direct", "learning": "backprop"}, 'weights="direct" acts in the error pass'),
    "a map": (lambda: nn.Conv2d(2, 3, 1), {"weights": "direct"}, r"the model returns \(batch, 3, 6, 6\)"),
    "passes": (SMALL["feedback"], {"weights": "direct"}, r"the model returns \(batch, 5\), \(batch, 5\)"),
    "rows in turn": (Turns, {"weights": "direct"}, "rows of 'each'.* are of different samples in turn"),
    "no sites": (
        lambda: FLAT,
        {"weights": "direct", "direct": "unit"},
        "sites=",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_direct_feedback_has_one_place_to_come_from(case):
    make, options, message = WRONG[case]
    with pytest.raises(OptionError, match=message):
        fxfeedback.to_butd(make(), input_size=(2, 6, 6), **options)


def test_units_are_those_of_the_examples_size():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    butd = fxfeedback.to_butd(model, input_size=(2, 6, 6), weights="direct", direct="unit")
    with pytest.raises(InputError, match="the site '1' has 75 units at this input size, and 48 at that of the example"):
        butd(torch.randn(3, 2, 7, 7))
    fxfeedback.to_butd(model, input_size=(2, 6, 6), weights="direct")(torch.randn(3, 2, 7, 7)).sum().backward()


@pytest.mark.parametrize("options", [{"sigma": s} for s in (0, -1, "x", True)] + [{"batch": b} for b in (0, 2.5, "x")])
def test_a_mirror_step_refuses_by_name(options):
    butd = fxfeedback.to_butd(MLP(), input_size=(2, 6, 6), weights="separate", td_learning="weight_mirror")
    with pytest.raises(OptionError, match=f"^{next(iter(options))}="):
        butd.mirror_step(**options)
    with pytest.raises(OptionError, match="mirror_step: make the network"):
        fxfeedback.to_butd(MLP(), input_size=(2, 6, 6), weights="separate").mirror_step()


@pytest.mark.parametrize("options", [{}, {"direct": "unit"}], ids=str)
def test_direct_feedback_is_saved(options, tmp_path):
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=x.shape[1:], weights="direct", **options)
    fxfeedback.save(butd, tmp_path)
    other, task = fxfeedback.load(tmp_path), torch.tensor([0, 1, 1, 0])
    x.requires_grad_()
    loaded = {name: p for name, p in other.named_parameters() if name in dict(model.named_parameters())}
    grads = torch.autograd.grad(loss_of(other(x, task)), list(loaded.values()))
    expected = updates(butd, model, x, task)
    assert all(torch.allclose(grad, expected[name], rtol=1e-10) for name, grad in zip(loaded, grads, strict=True))
