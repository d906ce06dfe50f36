"""The checks find faults: each mending is undone in turn, and what is promised is then noticed to be broken.

What is planted is a way in which a graph was once silently wrong; `promise` is the check that belongs to it: the
self-check of `to_butd` where it sees the fault, else the comparison with torch.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.autograd.function import once_differentiable

import fxfeedback
from fxfeedback.instructed.autograd_bridge import CounterHebb
from fxfeedback.tracing import trace
from fxfeedback.tracing.attributes import Stage
from fxfeedback.tracing.fingerprint import Fingerprint
from fxfeedback.tracing.open_modules import _Opener
from fxfeedback.tracing.wrapper import Wrapper


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 4)

    def forward(self, x):
        return F.linear(torch.relu(self.encoder(x)), self.encoder.weight.t())


class Dilated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 1, 3), nn.Linear(1, 2)

    def forward(self, x):
        x = x.unsqueeze(1)
        for k in (1, 2):
            self.conv.dilation = self.conv.padding = (k,)
            x = torch.relu(self.conv(x))
        return self.head(x.mean(2))


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.last = nn.Linear(6, 6), None

    def forward(self, x):
        y = self.fc(x) + (0 if self.last is None else self.last)
        self.last = y.detach()
        return y


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.fc(x))

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


def updates_are_gradients():
    model, x = Tied().double(), torch.randn(3, 6, dtype=torch.double)
    butd = fxfeedback.to_butd(model, input_size=(6,))
    (update,), (gradient,) = (
        torch.autograd.grad(network(x).square().sum(), [model.encoder.weight]) for network in (butd, model)
    )
    assert torch.allclose(update, gradient, rtol=1e-9)


def penalties_count():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    butd, x = fxfeedback.to_butd(model, input_size=(6,)), torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    penalties = []
    for network in (butd, model):
        (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(slope.square().sum(), [model[0].weight])[0])
    assert torch.allclose(*penalties, rtol=1e-9)


def changed_attributes_count():
    model = nn.Sequential(nn.Linear(6, 99), nn.Dropout(0.5), nn.Linear(99, 2)).train()
    butd, x = fxfeedback.to_butd(model, input_size=(6,)), torch.ones(1, 6)
    assert not torch.equal(butd(x), butd(x))
    butd.get_submodule("1").p = 0.0
    assert torch.equal(butd(x), butd(x))


def modes_are_the_models_own():
    model = Frozen().train()
    butd = fxfeedback.to_butd(model, input_size=(6,)).train()
    before = model.norm.running_mean.clone()
    butd(torch.randn(3, 6))
    assert torch.equal(model.norm.running_mean, before)


def self_check(model: type[nn.Module]) -> Callable[[], None]:
    return lambda: fxfeedback.to_butd(model(), input_size=(6,)) and None


def a_node_for_each_reading(opener, tensor):
    name = opener.tensors.name_of(tensor)
    proxy = fx.Tracer.create_proxy(opener, "get_attr", name, (), {})
    proxy.node.meta["name"] = name
    return proxy


class Fault(NamedTuple):
    planted: list[tuple[object, str, object]]
    promise: Callable[[], None]
    noticed: str | None = None


FAULTS = {
    "a parameter read twice keeps one update": Fault(
        [(_Opener, "parameter", a_node_for_each_reading)], updates_are_gradients, "gets two updates"
    ),
    "updates have no derivatives": Fault(
        [(CounterHebb, "backward", staticmethod(once_differentiable(CounterHebb.backward)))], penalties_count
    ),
    "a layer has the same attributes in every call": Fault(
        [(Stage, "as_called", lambda stage, module: None)], self_check(Dilated), "they differ .first at node 'conv'"
    ),
    "attributes that change later are ignored": Fault(
        [(Fingerprint, "holds", lambda fingerprint: True)], changed_attributes_count
    ),
    "state on self is dropped": Fault(
        [(trace, "_check_next_call", lambda *call: None), (Stage, "forget", lambda stage, kept: None)],
        self_check(Remembers),
        "something else when it is called again",
    ),
    "a model's own train is not called": Fault([(Wrapper, "train", nn.Module.train)], modes_are_the_models_own),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    torch.manual_seed(0)
    planted, promise, noticed = FAULTS[fault]
    if promise in (updates_are_gradients, penalties_count, changed_attributes_count, modes_are_the_models_own):
        promise()  # which is kept otherwise
    for owner, name, instead in planted:
        monkeypatch.setattr(owner, name, instead)
    with pytest.raises((fxfeedback.Error, AssertionError, RuntimeError), match=noticed):
        promise()
