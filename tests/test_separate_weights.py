"""TD with weights of its own: what it computes, what it learns, and that it aligns."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback
from networks import build


def angle(w: torch.Tensor, v: torch.Tensor) -> float:
    """Degrees between two tensors."""
    return torch.rad2deg(F.cosine_similarity(w.flatten(), v.flatten(), dim=0).clamp(-1, 1).acos()).item()


def three_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("td_learning", ["mirror", "fixed"])
def test_errors_run_down_the_twins(td_learning):
    """By hand: e_l = (e_(l+1) B) [a > 0], where B is the twin, and every update is e xᵀ."""
    torch.manual_seed(0)
    model = three_layers()
    butd = fxfeedback.to_butd(model, input_size=(4,), weights="separate", td_learning=td_learning)
    twins = butd.td_weights
    x = torch.randn(7, 4, dtype=torch.double)
    a = model[:2](x)
    b = model[2:4](a)
    e3 = torch.randn(7, 3, dtype=torch.double)
    butd(x).backward(e3)
    e2 = (e3 @ twins["4.weight"]) * (b > 0)
    e1 = (e2 @ twins["2.weight"]) * (a > 0)
    for name, e, value in (("4", e3, b), ("2", e2, a), ("0", e1, x)):
        assert torch.allclose(model.get_parameter(f"{name}.weight").grad, e.T @ value, rtol=1e-12)
        assert torch.allclose(model.get_parameter(f"{name}.bias").grad, e.sum(0), rtol=1e-12)
        mirrored = twins[f"{name}.weight"].grad
        assert mirrored is None if td_learning == "fixed" else torch.equal(mirrored, e.T @ value)


def test_convolutions_run_down_the_twins():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 3, 2, groups=1), nn.Flatten()).double()
    butd = fxfeedback.to_butd(model, input_size=(2, 8, 8), weights="separate", head="2")
    x = torch.randn(5, 2, 8, 8, dtype=torch.double)
    a = model[:2](x)
    e2 = torch.randn(5, 3, 2, 2, dtype=torch.double)
    butd(x).backward(e2.flatten(1))
    e1 = F.conv_transpose2d(e2, butd.td_weights["2.weight"]) * (a > 0)
    assert torch.allclose(model[0].weight.grad, torch.nn.grad.conv2d_weight(x, (4, 2, 3, 3), e1, stride=2), rtol=1e-10)


def test_where_twins_start():
    model = three_layers()
    copy = fxfeedback.to_butd(model, input_size=(4,), weights="separate", td_init="symmetric").td_weights
    noisy = fxfeedback.to_butd(model, input_size=(4,), weights="separate", td_init="symmetric", td_noise=0.1).td_weights
    drawn = fxfeedback.to_butd(model, input_size=(4,), weights="separate").td_weights
    assert list(copy) == list(noisy) == list(drawn) == ["0.weight", "2.weight", "4.weight"]
    for name in copy:
        w = model.get_parameter(name)
        assert torch.equal(copy[name], w) and copy[name] is not w
        assert 0 < angle(noisy[name], w) < 20
        assert angle(drawn[name], w) > 30
        assert drawn[name].abs().max() <= w.shape[1] ** -0.5  # torch's own bounds


def test_mirrored_updates_and_weight_decay_align_the_weights():
    """Both get the same updates and forget where they started: the angle between W and its twin shrinks."""
    torch.manual_seed(0)
    model = three_layers()
    butd = fxfeedback.to_butd(model, input_size=(4,), weights="separate")
    optimizer = torch.optim.SGD(butd.parameters(), lr=0.05, weight_decay=0.02)
    angles = []
    for _ in range(600):
        x = torch.randn(32, 4, dtype=torch.double)
        loss = F.cross_entropy(butd(x), (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        angles.append([angle(model.get_parameter(name), twin) for name, twin in butd.td_weights.items()])
    start, middle, end = (torch.tensor(angles[i]) for i in (0, 300, -1))
    assert (start > 60).all() and (middle < start).all() and (end < middle).all() and (end < 0.5 * start).all()


def test_noise_on_updates_is_one_draw_per_weight():
    torch.manual_seed(0)
    model = three_layers()
    noisy = fxfeedback.to_butd(model, input_size=(4,), weights="separate", td_init="symmetric", update_noise=0.3)
    x = torch.randn(7, 4, dtype=torch.double)
    expected = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(model(x).sum(), list(model.parameters())), strict=True)
    )
    factors = []
    for _ in range(200):
        noisy.zero_grad()
        noisy(x).sum().backward()
        for name in ("2.weight", "4.weight"):
            ratios = [
                update / expected[name] for update in (model.get_parameter(name).grad, noisy.td_weights[name].grad)
            ]
            ratios = [ratio[expected[name] != 0] for ratio in ratios]
            assert all(torch.allclose(ratio, ratio[0], rtol=1e-9) for ratio in ratios)  # one factor for all of a weight
            factors += [ratio[0] for ratio in ratios]
        assert torch.allclose(model[2].bias.grad, expected["2.bias"], rtol=1e-12)
    factors = torch.stack(factors)
    assert len(factors.unique()) == len(factors)  # the twin's draw is its own
    assert abs(factors.mean() - 1) < 0.05 and abs(factors.std() - 0.3) < 0.05


def test_norms_and_tables_have_no_twins():
    model, x = build("residual", train=False)
    butd = fxfeedback.to_butd(model, input_size=(2, 6, 6), weights="separate")
    twins = set(butd.td_weights)
    assert twins == {n for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1}
    butd(x).sum().backward()
    assert model.norm.weight.grad is not None and model.scale.grad is not None


def test_separate_norms_learn_their_own_statistics():
    model, x = build("convnet", train=True)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6), norm="separate")
    assert list(butd.td_norms) == ["0"] and butd.td_norms["0"].num_features == 2
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1),
        nn.ReLU(),
        *model[3:4],
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    butd = fxfeedback.to_butd(model.double(), n_tasks=2, input_size=(2, 6, 6), norm="separate").train()
    norm = butd.td_norms["3"]
    task = torch.tensor([0, 1, 1, 1])
    t = butd.instruction_head(F.one_hot(task, 2).double()).relu().view(4, 4, 1, 1)
    below = F.conv_transpose2d(t, model[3].weight).detach()
    expected = torch.cat([below.mean((0, 2, 3)) * 0.1, 0.9 + 0.1 * below.transpose(0, 1).flatten(1).var(1)])
    butd(x, task)
    assert torch.allclose(torch.cat([norm.running_mean, norm.running_var]), expected, rtol=1e-10)
