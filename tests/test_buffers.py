"""What forward computes from a buffer follows the buffer: loaded, changed in place, or in a copy."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback
from fxfeedback.tracing.trace import PathTracer
from marks import one_in


class Reads(nn.Module):
    """Two layers with a factor between that `read` computes from the buffers `mask`, `table` and `scale`."""

    def __init__(self, read):
        super().__init__()
        self.first, self.head, self.read = nn.Linear(6, 6), nn.Linear(6, 3), read
        self.register_buffer("mask", torch.rand(6) + 0.5)
        self.register_buffer("table", torch.randn(3, 6), persistent=False)
        self.register_buffer("scale", torch.rand(1, 6))
        self.register_buffer("index", torch.tensor([0, 2, 1, 5, 4, 3]))
        self.plain = torch.rand(6)

    def forward(self, x):
        return self.head(torch.relu(self.first(x)) * self.read(self))


def changed_view(m):
    w = m.mask * 2
    w[1:3].mul_(3)
    return w


def changed_between(m):
    w = m.mask.exp()
    first = w * torch.ones(6).double()
    w.mul_(2)
    return first + w


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, e):
        return e * 2


READS = {
    "a product": lambda m: m.mask * 2,
    "a reversed difference": lambda m: 1 - m.mask,
    "a softmax": lambda m: F.softmax(m.table, 0).sum(0),
    "exp": lambda m: m.scale.exp(),
    "an index": lambda m: m.table[1],
    "an index by a buffer": lambda m: m.mask[m.index],
    "several": lambda m: (m.mask * m.scale).tanh() + m.table.mean(0),
    "parts": lambda m: m.table.chunk(3)[1] + m.table.max(0).values,
    "transposed": lambda m: m.table.T.sum(1) + m.table.data[0],
    "a size": lambda m: m.mask.expand(m.table.shape[0], 6).sum(0) / m.table.numel(),
    "another dtype": lambda m: m.mask.float().double().clone().detach(),
    "without a gradient": torch.no_grad()(lambda m: m.mask.square()),
    "a branch": lambda m: m.mask * (2 if m.mask.sum() > 4 else 3),
    "a number": lambda m: float(m.mask[0]) + m.scale.max().item(),
    "a list": lambda m: torch.tensor(m.mask.tolist(), dtype=torch.double),
    "NumPy": lambda m: torch.from_numpy(np.sqrt(m.mask.numpy())),
    "positions": lambda m: m.mask[(m.mask > 0.9).nonzero().flatten()].sum(),
    "a boolean index": lambda m: m.mask[m.mask > 0.9].sum(),
    "an op without a rule": lambda m: torch.linalg.inv(torch.diag(m.mask)).diagonal(),
    "in place on what was made": lambda m: m.mask.clone().mul_(2),
    "a view in place": changed_view,
    "changed between two uses": changed_between,
    "past the version counter": lambda m: changed_past(m.mask.exp()),
    "an autograd function": lambda m: Doubled.apply(m.mask),
    "a module": lambda m: nn.Softplus()(m.mask),
    "a plain attribute": lambda m: m.plain.exp() * m.mask,
}


def changed_past(w):
    w.data.mul_(3)
    return w


def load(m):
    m.load_state_dict({k: torch.rand_like(t) if k in ("mask", "scale") else t for k, t in m.state_dict().items()})


def in_place(m):
    with torch.no_grad():
        for name in ("mask", "table", "scale", "plain"):
            getattr(m, name).mul_(-0.7 if name == "table" else 0.7)


CHANGES = {
    "loaded": load,
    "in place": in_place,
    "through .data": lambda m: m.mask.data.copy_(torch.linspace(0.5, 2, 6)),
}


def agree(butd, feedback, model, x):
    expected = model(x)
    torch.testing.assert_close(butd(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(feedback(x)[0], expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(net(x).sum(), [net.get_parameter("first.weight")])[0] for net in (butd, model)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@one_in(11)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_is_computed_from_a_buffer_follows_it(read, change):
    torch.manual_seed(0)
    model, x = Reads(read).double(), torch.randn(4, 6, dtype=torch.double)
    model.plain = model.plain.double()
    before = {name: b.clone() for name, b in model.named_buffers()}
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(6,))
    feedback = fxfeedback.add_feedback(model, [("head", "relu")], input_size=(6,))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    for network in (butd, feedback):
        assert {name for name, _ in network.named_buffers()} >= before.keys()
    agree(butd, feedback, model, x)
    change(butd)  # tensors are shared
    agree(butd, feedback, model, x)
    agree(copy.deepcopy(butd), copy.deepcopy(feedback), model, x)


@pytest.mark.parametrize("convert", [fxfeedback.to_butd, lambda m, **k: fxfeedback.add_feedback(m, [], **k)])
def test_constants_do_not_pile_up(convert):
    """Graphs that are made again use the constants that are there."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.k = nn.Linear(6, 3), 1.0

        def forward(self, x):
            return self.fc(x * torch.arange(6)) * self.k

    network, x = convert(Constant(), input_size=(6,)), torch.randn(2, 6)
    n_buffers = len(list(network.buffers()))
    for k in range(5):
        network.k = float(k)
        network(x)
    assert len(list(network.buffers())) == n_buffers


def decayed(m, x):
    for p in m.parameters():
        p.data.mul_(0.9)
    return m[0](x)


def decayed_together(m, x):
    torch._foreach_mul_([p.detach() for p in m.parameters()], 0.9)
    return m[0](x)


def normalized(m, x):
    with torch.no_grad():
        nn.init.zeros_(next(m.parameters()))
    return m[0](x)


@pytest.mark.parametrize("forward", [decayed, decayed_together, normalized])
def test_a_forward_that_writes_into_parameters_by_the_way_is_refused(forward):
    """And has not done so to the user's model."""

    class Writes(nn.Sequential):
        def forward(self, x):
            return forward(self, x)

    model = Writes(nn.Linear(6, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fxfeedback.errors.TraceError, match=r"writes into the parameter '0\.weight'"):
        fxfeedback.to_butd(model, input_size=(6,))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_model_that_is_its_own_copy_may_have_constants():
    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            return self

        def forward(self, x):
            return super().forward(x) * torch.ones(3)

    model, x = Single(4, 3), torch.randn(2, 4)
    expected = model(x)
    torch.testing.assert_close(fxfeedback.to_butd(model, input_size=(4,))(x), expected)


class Counting(nn.Module):
    """Batch norms that count their batches themselves, as timm's, where the code asks for sizes."""

    def __init__(self, n):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(n))

    def forward(self, x):
        assert x.shape[-1] > 1
        for norm in self.norms:
            norm.num_batches_tracked.add_(1)
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1)
        return x.mean((2, 3))


def test_counters_make_no_more_nodes_than_there_are_calls(monkeypatch):
    made, create = [], PathTracer.create_node
    monkeypatch.setattr(PathTracer, "create_node", lambda self, *a, **k: made.append(a) or create(self, *a, **k))
    counts = []
    for n in (4, 8):
        made.clear()
        fxfeedback.to_butd(Counting(n).train(), input_size=(3, 4, 4), verify=False)
        counts.append(len(made))
    assert counts[1] < 2.2 * counts[0]
