"""What TD reads in place of BU weights: signs, what is drawn, what decays and what is clipped."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback
from fxfeedback.errors import InputError, OptionError
from marks import long_but, one_in
from networks import build

SIGNS = {
    "uniform": {"weights": "sign"},
    "kaiming": {"weights": "sign", "td_scale": "kaiming"},
    "number": {"weights": "sign", "td_magnitude": "uniform", "td_scale": 0.3},
    "batch": {"weights": "sign", "td_magnitude": "batch"},
    "fixed": {"weights": "sign", "td_magnitude": "fixed", "td_scale": "kaiming"},
}
TINY = ("residual", "mlp", "convnet")


def three_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def updates(butd: nn.Module, x: torch.Tensor, *task: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the BU parameters, for a loss that weighs every output differently."""
    butd.zero_grad()
    torch.manual_seed(3)  # of dropout
    y = butd(x, *task)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {name: p.grad.clone() for name, p in butd.named_parameters() if p.grad is not None}


def with_hand_set(butd: fxfeedback.BUTD, model: nn.Module, x: torch.Tensor, **options) -> fxfeedback.BUTD:
    """The same network with fixed weights of its own, which are what `butd` reads: magnitudes times signs."""
    other = fxfeedback.to_butd(model, input_size=x.shape[1:], weights="separate", td_learning="fixed", **options)
    with torch.no_grad():
        for name, v in other.td_weights.items():
            v.copy_(butd.magnitudes[name] * model.get_parameter(name).sign())
    return other


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=1e-10, atol=1e-12) for name in a)


@one_in(25)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("net", "kind"), [("recurrent", "batch"), *((net, kind) for net in TINY for kind in SIGNS)])
def test_signs_are_a_weight_of_its_own_that_is_made_of_them(net, kind, train):
    model, x = build(net, train=train)
    butd = fxfeedback.to_butd(model, input_size=x.shape[1:], **SIGNS[kind])
    assert set(butd.magnitudes) == set(fxfeedback.to_butd(model, input_size=x.shape[1:], weights="separate").td_weights)
    state = copy.deepcopy(model.state_dict())
    butd(x)
    if kind == "batch":
        butd.magnitudes = dict(butd.magnitudes)  # so that dropout draws the same
    model.load_state_dict(state)
    first = updates(butd, x)
    model.load_state_dict(state)  # running statistics
    assert equal(first, updates(with_hand_set(butd, model, x), x))


@one_in(4)
@pytest.mark.parametrize("kind", SIGNS)
def test_both_passes_read_the_same_signs(kind):
    """Gates by an instruction, too: in training mode with the magnitudes that this call draws."""
    model, x = build("convnet", train=True)
    butd = fxfeedback.to_butd(model, n_tasks=3, input_size=x.shape[1:], **SIGNS[kind])
    task = torch.arange(len(x)) % 3
    first = updates(butd, x, task)
    other = with_hand_set(butd, model, x, n_tasks=3)
    other.instruction_head.load_state_dict(butd.instruction_head.state_dict())
    second = updates(other, x, task)
    assert equal(first, second)
    for name, parameter in model.named_parameters():
        assert name in first or not parameter.requires_grad
    signs = [node for node in butd.learner.graph.nodes if node.target is torch.sign]
    assert 0 < len(signs) <= len(butd.magnitudes)


def test_magnitudes():
    model, bounds = three_layers(), (math.sqrt(6 / 10), math.sqrt(6 / 11), math.sqrt(6 / 8))
    x = torch.randn(7, 4, dtype=torch.double)
    uniform = fxfeedback.to_butd(model, input_size=(4,), weights="sign").magnitudes
    assert [m.unique().item() for m in uniform.values()] == pytest.approx([b / math.sqrt(3) for b in bounds])
    torch.manual_seed(0)
    drawn = fxfeedback.to_butd(model, input_size=(4,), weights="sign", td_magnitude="batch")
    seen = []
    for _ in range(200):
        drawn(x)
        seen.append([m.clone() for m in drawn.magnitudes.values()])
    for several, b in zip(zip(*seen, strict=True), bounds, strict=True):
        values = torch.stack(several)
        assert 0 <= values.min() < 0.01 * b and 0.99 * b < values.max() <= b
        assert values.mean() == pytest.approx(b / 2, rel=0.02) and len(values.unique()) == values.numel()
    drawn.eval()
    assert [m.unique().item() for m in drawn.magnitudes.values()] == pytest.approx([b / 2 for b in bounds])
    fixed = fxfeedback.to_butd(model, input_size=(4,), weights="sign", td_magnitude="fixed", td_scale="kaiming")
    first = {name: m.clone() for name, m in fixed.magnitudes.items()}
    fixed(x)
    for name, m in fixed.magnitudes.items():
        assert torch.equal(m, first[name]) and m.min() >= 0 and m.max() <= model.get_parameter(name).shape[1] ** -0.5
    assert not fxfeedback.to_butd(model, input_size=(4,)).magnitudes


def test_magnitudes_are_set_until_they_are_deleted():
    butd = fxfeedback.to_butd(three_layers(), input_size=(4,), weights="sign", td_magnitude="batch")
    x, given = torch.randn(7, 4, dtype=torch.double), torch.rand(5, 6, dtype=torch.double)
    butd.magnitudes["2.weight"] = -given
    for _ in range(2):
        butd(x)
        assert torch.equal(butd.magnitudes["2.weight"], given)
    butd.magnitudes = {"4.weight": torch.ones(3, 5)}
    butd(x)
    assert not torch.equal(butd.magnitudes["2.weight"], given) and (butd.magnitudes["4.weight"] == 1).all()
    del butd.magnitudes["4.weight"]
    butd(x)
    assert len(butd.magnitudes["4.weight"].unique()) == 15
    with pytest.raises(InputError, match=r"'2.weight' have shape \(5, 6\), not \(6, 5\)"):
        butd.magnitudes["2.weight"] = given.T
    with pytest.raises(InputError, match="no weight is called 'x'"):
        butd.magnitudes["x"] = given
    with pytest.raises(OptionError, match="magnitudes can be set"):
        fxfeedback.to_butd(three_layers(), input_size=(4,), weights="sign").magnitudes["2.weight"] = given


def test_two_calls_before_their_backward_passes_keep_their_magnitudes():
    butd = fxfeedback.to_butd(three_layers(), input_size=(4,), weights="sign", td_magnitude="batch")
    x = torch.randn(7, 4, dtype=torch.double)
    butd(x)
    ys, magnitudes = [], []
    for _ in range(2):
        ys.append(butd(x))
        magnitudes.append(dict(butd.magnitudes))
    for y, own in zip(ys, magnitudes, strict=True):
        butd.zero_grad()
        y.sum().backward()
        found = butd.get_parameter("0.weight").grad.clone()
        butd.magnitudes = own
        butd.zero_grad()
        butd(x).sum().backward()
        assert torch.equal(found, butd.get_parameter("0.weight").grad)


def test_the_sign_of_zero_is_zero():
    model = three_layers()
    with torch.no_grad():
        model[4].weight.zero_()
    butd = fxfeedback.to_butd(model, input_size=(4,), weights="sign")
    butd(torch.randn(7, 4, dtype=torch.double)).sum().backward()
    assert not model[2].weight.grad.any() and model[4].weight.grad.any()


# -- Kolen and Pollack, and what is clamped ---------------------------------------------------------------------------


@pytest.mark.parametrize("net", TINY)
def test_under_sgd_the_difference_of_the_weights_shrinks_whatever_the_data(net):
    """W - V times (1 - lr k) per step, to rounding."""
    model, x = build(net, train=False)
    butd = fxfeedback.to_butd(model, input_size=x.shape[1:], weights="separate", td_decay=0.3)
    optimizer, steps = torch.optim.SGD(butd.parameters(), lr=0.01), 4
    before = {name: model.get_parameter(name).detach() - v.detach() for name, v in butd.td_weights.items()}
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim < 2}
    for _ in range(steps):
        updates(butd, torch.randn_like(x))
        optimizer.step()
    for name, v in butd.td_weights.items():
        assert torch.allclose(model.get_parameter(name) - v, before[name] * (1 - 0.003) ** steps, rtol=1e-9, atol=1e-11)
    assert any(not torch.equal(model.get_parameter(name), bias) for name, bias in biases.items())


def test_decay_is_that_of_both_weights_and_of_nothing_else():
    model, x = build("convnet", train=False)
    plain = fxfeedback.to_butd(model, input_size=x.shape[1:], weights="separate")
    decaying = fxfeedback.to_butd(model, input_size=x.shape[1:], weights="separate", td_decay=0.3)
    decaying.load_state_dict(plain.state_dict())
    first, second = updates(plain, x), updates(decaying, x)
    for name, update in first.items():
        decays = name in plain.td_weights or name.startswith("td_weights.")
        expected = update + 0.3 * plain.get_parameter(name) if decays else update
        assert torch.allclose(second[name], expected, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"weights": "sign"}, {"weights": "separate"}], ids=str)
def test_what_a_layer_hands_on_is_clamped(options):
    """By hand: what lies below sees clamped errors."""
    model = three_layers()
    butd = fxfeedback.to_butd(model, input_size=(4,), td_clip=0.5, **options)
    x = torch.randn(7, 4, dtype=torch.double, requires_grad=True)
    a = model[:2](x)
    b = model[2:4](a)
    e = torch.randn(7, 3, dtype=torch.double)
    butd(x).backward(e)
    for name, value in (("4", b), ("2", a), ("0", x)):
        assert torch.allclose(model.get_parameter(f"{name}.weight").grad, (e.T @ value).clamp(-0.5, 0.5), rtol=1e-12)
        assert torch.allclose(model.get_parameter(f"{name}.bias").grad, e.sum(0).clamp(-0.5, 0.5), rtol=1e-12)
        w = model.get_parameter(f"{name}.weight")
        v = w if not options else butd.td_weights[f"{name}.weight"] if "separate" in options.values() else None
        v = butd.magnitudes[f"{name}.weight"] * w.sign() if v is None else v
        e = (e @ v).clamp(-0.5, 0.5) * (value > 0 if name != "0" else 1)
    assert torch.allclose(x.grad, e, rtol=1e-12)


# -- alignment, storage, options --------------------------------------------------------------------------------------


def test_alignment_is_the_angle_and_the_ratio_of_lengths():
    model, x = build("convnet", train=False)
    shared = fxfeedback.to_butd(model, input_size=x.shape[1:]).alignment()
    separate = fxfeedback.to_butd(model, input_size=x.shape[1:], weights="separate")
    assert list(shared) == list(separate.td_weights)
    assert all(angle == pytest.approx(0, abs=1e-5) and ratio == pytest.approx(1) for angle, ratio in shared.values())
    name = "0.weight"
    w = model.get_parameter(name).detach()
    across = torch.randn_like(w)
    across -= w * (across * w).sum() / (w * w).sum()
    for degrees in (0, 60, 135, 180):
        turned = (
            math.cos(math.radians(degrees)) * w / w.norm() + math.sin(math.radians(degrees)) * across / across.norm()
        )
        separate.td_weights[name].data.copy_(3 * turned * w.norm())
        angle, ratio = separate.alignment()[name]
        assert angle == pytest.approx(degrees, abs=1e-5) and ratio == pytest.approx(3)


KINDS = [*SIGNS.values(), {"weights": "separate", "td_decay": 0.2, "td_clip": 0.1}, {"td_clip": 0.1}]


@one_in(9)
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_what_is_saved_learns_as_before(options, tmp_path):
    torch.manual_seed(0)
    butd = fxfeedback.to_butd(three_layers(), n_tasks=2, input_size=(4,), **options)
    x = torch.randn(6, 4, dtype=torch.double)
    fxfeedback.save(butd, tmp_path)
    for other in (fxfeedback.load(tmp_path), copy.deepcopy(butd), pickle.loads(pickle.dumps(butd))):
        assert other.options == butd.options
        if options.get("td_magnitude") == "batch":
            butd(x)
            other.magnitudes = butd.magnitudes = dict(butd.magnitudes)
        task = torch.tensor([0, 1, 1, 0, 0, 1])
        assert equal(updates(butd, x, task), updates(other, x, task))


@pytest.mark.parametrize("options", list(SIGNS.values()), ids=str)
def test_one_tasks_network_has_the_gates_of_the_signs(options):
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=3, gating="channel", input_size=x.shape[1:], **options)
    for task in range(3):
        assert torch.allclose(butd.select(task)(x), butd(x, task), rtol=1e-10, atol=1e-12)


WRONG = [
    {"td_magnitude": "batch"},
    {"td_magnitude": "other", "weights": "sign"},
    {"td_magnitude": "fixed", "weights": "separate"},
    {"td_scale": "kaiming"},
    {"td_scale": 0.1, "weights": "separate"},
    *({"td_scale": s, "weights": "sign"} for s in ("other", 0, -1, float("nan"), True)),
    *({"td_learning": how, "weights": "sign"} for how in ("mirror", "fixed", "weight_mirror")),
    {"td_init": "kaiming", "weights": "sign"},
    {"td_learning": "weight_mirror"},
    {"td_decay": 0.1},
    {"td_decay": 0.1, "weights": "sign"},
    {"td_decay": 0.1, "weights": "separate", "td_learning": "fixed"},
    {"td_decay": 0.1, "weights": "separate", "learning": "backprop"},
    *({"td_decay": k, "weights": "separate"} for k in (-0.1, "x", None, float("inf"))),
    *({"td_clip": c} for c in (0, -1, "x", True, float("nan"))),
    {"td_clip": 1.0, "learning": "backprop"},
]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_options_that_do_not_go_together_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        fxfeedback.to_butd(three_layers(), input_size=(4,), **options)


EVERY = {
    "sign": SIGNS["batch"],
    "separate": {"weights": "separate", "td_decay": 0.1, "td_clip": 1.0},
    "direct": {"weights": "direct"},
    "unit": {"weights": "direct", "direct": "unit"},
    "mirror": {"weights": "separate", "td_learning": "weight_mirror"},
}

CLASSIFIERS = ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "vit", "swin", "maxvit"]


@one_in(25)
@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("name", long_but(["resnet18", "squeezenet1_1", "vit", "swin"], CLASSIFIERS))
def test_torchvision_classifiers_take_every_kind(name, kind):
    """They build, instructed, and learn; the laws hold in the small."""
    model, x = build(name, train=False)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=x.shape[1:], **EVERY[kind])
    learned = updates(butd, x, torch.tensor([0, 1, 1, 0]))
    assert learned.keys() >= {name for name, p in model.named_parameters() if p.ndim > 1}
    assert all(update.isfinite().all() for update in learned.values())
    if kind == "mirror":
        butd.mirror_step(batch=2)
        assert all(v.grad.isfinite().all() and v.grad.any() for v in butd.td_weights.values())


def test_a_compiled_network_draws_in_every_call():
    butd = fxfeedback.to_butd(three_layers().float(), input_size=(4,), weights="sign", td_magnitude="batch")
    x, run = torch.randn(7, 4), torch.compile(butd, backend="eager", fullgraph=True)
    seen = []
    for _ in range(3):
        F.cross_entropy(run(x), torch.zeros(7).long()).backward()
        seen.append(butd.get_parameter("0.weight").grad.clone())
        butd.zero_grad()
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
