"""A model's own `train` and `eval`: what is made of a model goes into the modes that the model itself goes into."""

import copy
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback
from marks import long, one_in


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.norm, self.drop, self.f = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x):
        return self.f(self.drop(torch.relu(self.norm(self.c(x))).mean((2, 3))))


class FrozenNorm(Plain):
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class DropoutStaysOn(Plain):
    def train(self, mode=True):
        super().train(mode)
        self.drop.train()
        return self


class OwnEval(Plain):
    def eval(self):
        super().eval()
        self.drop.train()
        return self


class MoreArguments(Plain):
    def train(self, mode=True, norm=False, *, drop=True):
        super().train(mode)
        self.norm.train(mode and norm)
        self.drop.train(mode and drop)
        return self


class FreezesWeights(Plain):
    def train(self, mode=True):
        super().train(mode)
        self.c.requires_grad_(not mode)
        self.norm.eval()
        return self


class OtherWays(Plain):
    def finetune(self):
        self.train()
        self.norm.eval()

    def extra(self):
        self.training = False
        self.drop.train()


class Merging(nn.Conv2d):
    """Adds its low-rank part to its weight in eval mode, and takes it out again in training."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.low, self.merged = nn.Parameter(torch.randn(self.out_channels, 1, 1, 1)), False

    def forward(self, x):
        y = F.conv2d(x, self.weight, self.bias)
        if self.merged:
            return y
        return y + self.low.view(-1, 1, 1) * F.avg_pool2d(x, 3, 1, divisor_override=1).sum(1, keepdim=True)

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.weight.add_(self.low, alpha=-1 if mode else 1)
            self.merged = not mode
        return self


class PartOfItsOwn(Plain):
    def __init__(self):
        super().__init__()
        self.c = Merging(3, 4, 3)


KINDS = [Plain, FrozenNorm, DropoutStaysOn, OwnEval, MoreArguments, FreezesWeights, OtherWays, PartOfItsOwn]
SWITCHES = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "train(False)": lambda m: m.train(False),
    "one module": lambda m: m.train().drop.eval(),
    "arguments": lambda m: m.train(True, True, drop=False) if isinstance(_net(m), MoreArguments) else m.train(),
    "another method": lambda m: m.finetune() if isinstance(_net(m), OtherWays) else m.train(),
    "by hand": lambda m: m.extra() if isinstance(_net(m), OtherWays) else m.eval(),
}
SIZE = (3, 8, 8)


def _net(model: nn.Module) -> nn.Module:
    return _net(model._net) if hasattr(model, "_net") else model


def with_feedback(model):
    return fxfeedback.add_feedback(model, [("f", "c")], passes=1, input_size=SIZE)


MADE = {
    "butd": lambda model: fxfeedback.to_butd(model, n_tasks=2, norm="separate", input_size=SIZE),
    "feedback": with_feedback,
    "both": lambda model: fxfeedback.to_butd(with_feedback(model), input_size=SIZE),
}


def logits(output):
    return output[-1] if isinstance(output, list) else output


@one_in(7)
@pytest.mark.parametrize("how", MADE)
@pytest.mark.parametrize("kind", KINDS)
def test_every_switch_is_the_models_own(kind, how):
    """Modes, what learns, outputs and statistics, after each switch in turn; in copies of both kinds, too."""
    torch.manual_seed(0)
    model = kind().double().train()
    twin, x = copy.deepcopy(model), torch.randn(4, *SIZE, dtype=torch.double)
    made = MADE[how](model)
    for name in [*SWITCHES, *reversed(SWITCHES)]:
        SWITCHES[name](twin), SWITCHES[name](made)
        for changed in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            names = dict(twin.named_modules())
            assert {n: m.training for n, m in changed.named_modules() if n in names} == {
                n: m.training for n, m in names.items()
            }, name
            learning = {n: p.requires_grad for n, p in twin.named_parameters()}
            assert {n: p.requires_grad for n, p in changed.named_parameters() if n in learning} == learning, name
        torch.manual_seed(1)
        expected = twin(x)
        torch.manual_seed(1)
        torch.testing.assert_close(logits(made(x)), expected, rtol=1e-9, atol=1e-12)
        buffers = dict(made.named_buffers())
        assert all(torch.allclose(value, buffers[n], rtol=1e-9) for n, value in twin.named_buffers()), name


@one_in(3)
@pytest.mark.parametrize("kind", KINDS)
def test_one_tasks_network_is_that_of_the_models_own_eval(kind):
    """And to make it leaves the network as it was, weights, modes and attributes."""
    model, x = kind().double().train(), torch.randn(4, *SIZE, dtype=torch.double)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=SIZE)
    SWITCHES["arguments"](butd)
    before = copy.deepcopy(butd)
    selected = butd.select(1)
    for name, module in before.named_modules():
        now = butd.get_submodule(name)
        assert now.training == module.training and getattr(now, "merged", 0) == getattr(module, "merged", 0)
    for (name, tensor), other in zip(before.state_dict().items(), butd.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-12, atol=1e-12, msg=name)
    assert [p.requires_grad for p in before.parameters()] == [p.requires_grad for p in butd.parameters()]
    butd.eval()
    torch.manual_seed(1)
    expected = butd(x, 1)
    torch.manual_seed(1)
    torch.testing.assert_close(selected(x), expected)


def run(path, *xs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [session.run(None, {session.get_inputs()[0].name: x})[0] for x in xs]


@pytest.mark.parametrize(
    ("how", "kind"), [long("butd", PartOfItsOwn), ("feedback", FrozenNorm), ("both", PartOfItsOwn)]
)
def test_a_file_is_the_model_in_its_own_eval_mode(kind, how, tmp_path):
    made, x = MADE[how](kind().train()), torch.randn(2, *SIZE)
    task = {} if how == "feedback" else {"task": 1}
    fxfeedback.export(made, tmp_path / "net.onnx", **task)
    assert made.training
    expected = logits(made.eval()(x, **task)).detach().numpy()
    np.testing.assert_allclose(run(tmp_path / "net.onnx", x.numpy())[0], expected, rtol=1e-4, atol=1e-5)


def test_dropout_that_eval_keeps_on_is_on_in_a_file(tmp_path):
    """ONNX Runtime leaves out a Dropout node that is on: the file draws random numbers instead."""
    made = fxfeedback.add_feedback(DropoutStaysOn(), [("f", "c")], passes=1, input_size=SIZE)
    with pytest.warns(UserWarning, match="the check leaves out 'output_1', which depends on random numbers"):
        fxfeedback.export(made, tmp_path / "net.onnx")
    x = np.ones((4096, *SIZE), np.float32)
    first, second = run(tmp_path / "net.onnx", x, x)
    assert not np.array_equal(first, second)
    made.eval().drop.eval()
    expected = made(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_allclose(first.mean(0), expected.mean(0), atol=0.1)


@pytest.mark.parametrize("how", MADE)
def test_modes_are_saved(how, tmp_path):
    made = MADE[how](FrozenNorm().train())
    fxfeedback.save(made, tmp_path)
    loaded = fxfeedback.load(tmp_path)
    assert [m.training for m in loaded.modules()] == [m.training for m in made.modules()]
    assert _net(loaded).training
    assert not loaded.train().norm.training
