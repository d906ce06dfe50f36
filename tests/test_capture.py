"""Calls that a CUDA graph can be captured from: they look at no values, as a GPU's would have to be waited for.

The CPU stands for a GPU here, by `waiting.AWAY`; what would wait there is refused.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxfeedback
from fxfeedback.tracing import fingerprint, waiting
from marks import long, long_but, one_in
from networks import SMALL, build, convnet

WAITING = ("_local_scalar_dense", "item", "equal", "is_nonzero", "allclose")
SIZED_BY_VALUES = (
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "unique",
    "_unique",
    "_unique2",
    "unique_dim",
    "bincount",
)


class Captured(TorchDispatchMode):
    """Refuses what looks at values, or makes a tensor whose size depends on them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        assert name not in (*WAITING, *SIZED_BY_VALUES), name
        masks = [i for i in tree_leaves(args[1:]) if isinstance(i, torch.Tensor) and i.dtype == torch.bool]
        assert not (name in ("index", "index_put", "index_put_") and masks), f"{name} with a mask"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def away(monkeypatch):
    """The CPU is another device."""
    monkeypatch.setattr(waiting, "AWAY", ("cpu",))


def check(call, *changes):
    """A call returns what it returned before, captured as well; so it does after each change."""
    for change in (lambda: None, *changes):
        change()
        torch.manual_seed(0)
        expected = call()
        for _ in range(2):
            torch.manual_seed(0)
            with Captured():
                found = call()
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def step(network, call):
    """The updates of a training step, which leaves the network as it was."""
    learning = [p for p in network.parameters() if p.requires_grad]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(learning, 0.1)
    optimizer.zero_grad()
    outputs = [y for y in tree_leaves(call()) if isinstance(y, torch.Tensor)]
    sum(y.square().sum() for y in outputs).backward()
    updates = [p.grad.clone() for p in learning if p.grad is not None]
    optimizer.step()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            value.copy_(before[name])
    return [y.detach() for y in outputs], updates


NAMES = long_but(["convnet"], [name for name in SMALL if name != "feedback"])


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NAMES)
def test_instructed_networks(away, name, train):
    model, x = build(name, train)
    butd = fxfeedback.to_butd(model, n_tasks=3, embedding=6, example_inputs=(x,)).train(train)
    batch = len(tree_leaves(x)[0])
    ids, vectors = torch.arange(batch) % 3, torch.rand(batch, 3, dtype=torch.double)
    others = [lambda: ids.copy_(ids.flip(0)), lambda: ids.fill_(1), lambda: vectors.mul_(-1)]

    @torch.no_grad()
    def evaluated():
        return [butd(x), butd(x, ids), butd(x, vectors), butd(x, ids[:1].expand(batch)), butd.counter_neurons(ids)]

    check(evaluated, *others)
    for task in ((), (ids,), (vectors,)):
        check(lambda task=task: step(butd, lambda: butd(x, *task)), *others)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_passes(away, train):
    model = fxfeedback.add_feedback(convnet(), [("8", "5")], passes=3, input_size=(2, 8, 8)).train(train)
    x = torch.randn(2, 2, 8, 8)
    (before,) = model.eval().readout(x, ["8"], passes=1)
    steering = fxfeedback.Steering("8", before["8"].value.detach(), strength=(1.5, 2.0), alpha=0.5)
    model.train(train)
    _, state = model.unroll(x)
    graph = model.unrolled(passes=2)
    calls = [lambda: model(x), lambda: model(x, steering=steering), lambda: model.unroll(x, passes=1, state=state)]
    for call in (*calls, lambda: graph(x)):
        check(torch.no_grad()(call), lambda: x.neg_())
        check(lambda call=call: step(model, call))


@pytest.mark.parametrize("gating", ["unit", "channel"])
def test_a_selected_network(away, gating):
    model, x = build("convnet", False)
    one = fxfeedback.to_butd(model, n_tasks=3, gating=gating, input_size=x.shape[1:]).eval().select(1)
    check(lambda: one(x), lambda: x.neg_())


@one_in(7)
@pytest.mark.parametrize("ids", [[0, 3], long([-1, 0]), long([0, 1 << 40])])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_ids_out_of_range_are_never_silent(away, ids, how):
    """The device itself refuses them; numbers, and tensors of the CPU, are looked at first."""
    torch._dynamo.reset()
    butd = fxfeedback.to_butd(convnet(), n_tasks=3, input_size=(2, 8, 8))
    call = torch.compile(butd, backend="aot_eager", fullgraph=True) if how == "compiled" else butd
    x = torch.randn(2, 2, 8, 8)
    call(x, torch.tensor([0, 2]))
    with pytest.raises(RuntimeError, match="ids lie between 0 and 2"):
        call(x, torch.tensor(ids))


class Reading(nn.Module):
    """What a graph has to take for constants: a tensor of its own, and what it decides by a buffer."""

    def __init__(self):
        super().__init__()
        self.fc, self.own = nn.Linear(3, 3), torch.ones(3)
        self.register_buffer("mask", torch.ones(3) * 2)

    def forward(self, x):
        return torch.relu(self.fc(x) * self.own) * self.mask * (2 if self.mask.sum() > 4 else 3)


def test_what_a_graph_has_for_a_constant_is_not_looked_at_while_captured(away, monkeypatch):
    butd = fxfeedback.to_butd(Reading(), input_size=(3,))
    x = torch.randn(2, 3)
    expected = butd(x)
    with pytest.raises(AssertionError, match="equal"), Captured():
        butd(x)
    monkeypatch.setattr(fingerprint, "is_captured", lambda tensor: True)
    with Captured():
        found = butd(x)
    assert torch.equal(found, expected)
    butd.get_buffer("mask").fill_(1.0)
    torch.testing.assert_close(butd(x), expected * 0.75)
