"""What has no rule of its own opens into PyTorch's decomposition of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback
from fxfeedback.errors import RuleError
from fxfeedback.graph.nodes import name_of
from fxfeedback.instructed.graphs import Graphs
from fxfeedback.rules import RULES, T, call
from marks import OLD_TORCH, one_in
from test_law import check

OPS = {
    "entr": call(lambda x: torch.special.entr(x.sigmoid()), T(4, 3)),
    "diff": call(torch.diff, T(4, 5)),
    "quantile": call(lambda x: torch.quantile(x, torch.tensor([0.3, 0.8]).double(), 1), T(4, 5)),
    "renorm": call(lambda x: torch.renorm(x, 2, 1, 1.0), T(4, 3, 2)),
    "kron": call(lambda x, w: torch.kron(x, w), T(4, 3), T(1, 2)),
    "block_diag": call(lambda x, w: torch.block_diag(w, w)[:, :4] @ x[:, :4, None], T(4, 5), T(2, 2)),
    "xlogy": call(lambda x, w: torch.xlogy(w, x.exp()), T(4, 3), T(3)),
    "logaddexp": call(torch.logaddexp, T(4, 3), T(3)),
    "trapezoid": call(torch.trapezoid, T(4, 5)),
    "huber_loss": call(lambda x, w: F.huber_loss(x, w.expand(x.shape), reduction="none"), T(4, 5), T(5)),
    "multi_margin_loss": call(lambda x: F.multi_margin_loss(x, x.argmin(1), reduction="none"), T(4, 5)),
    "nll_loss": call(lambda x: F.nll_loss(x.log_softmax(1), x.argmax(1), reduction="none"), T(4, 5)),
    "div, rounding": call(lambda x, w: torch.div(x, w, rounding_mode="floor") + x / w, T(4, 3), T(3)),
    "batch norm of aten": call(
        lambda x: torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0], T(4, 3)
    ),
    "layer norm of aten": call(lambda x, w: torch.native_layer_norm(x, [3], w, None, 1e-5)[0], T(4, 3), T(3)),
    "what autograd detaches": call(
        lambda x, w: x * torch.native_layer_norm(x * w, [3], None, None, 1)[1], T(4, 3), T(3)
    ),
    "the batch size": call(lambda x: torch.native_group_norm(x, None, None, x.shape[0], 4, 3, 2, 1e-5)[0], T(5, 4, 3)),
    "norms of matrices": call(lambda x: torch.linalg.norm(x, 2, (1, 2)) + torch.linalg.norm(x.mean(0), 1), T(4, 3, 2)),
    "several outputs": call(lambda x: torch.stack(torch.hsplit(x, 2), 1), T(4, 6)),
}


QUANTILE = pytest.mark.skipif(OLD_TORCH, reason="this torch's quantile looks at values, and so does not open")


@pytest.mark.parametrize("name", [pytest.param(name, marks=QUANTILE if name == "quantile" else ()) for name in OPS])
def test_the_law(name):
    check(OPS[name])


class Trunk(nn.Module):
    """A linear layer, and a function of what it makes and of its own input."""

    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.fc(x), x)


ONE_AFTER_ANOTHER = {
    "entr": lambda x: torch.special.entr(x.sigmoid()),
    "diff": lambda x: torch.diff(x, append=x[:, :1]),
    "renorm": lambda x: torch.renorm(x, 2, 1, 1.0),
    "logaddexp": lambda x: torch.logaddexp(x, x.flip(1)),
    "irfft": lambda x: torch.fft.irfft(torch.fft.fft(x), n=4),
    "layer norm of aten": lambda x: torch.native_layer_norm(x, [4], None, None, 1e-5)[0],
    "several outputs": lambda x: torch.cat(torch.hsplit(x, 2)[::-1], 1),
    "several, one read": lambda x: torch.hsplit(torch.cat([x, x], 1), 2)[1],
}


@one_in(9)
@pytest.mark.parametrize("second", ONE_AFTER_ANOTHER)
@pytest.mark.parametrize("first", ONE_AFTER_ANOTHER)
def test_what_opens_may_follow_what_opens(first, second):
    model = Trunk(lambda h, x: ONE_AFTER_ANOTHER[second](ONE_AFTER_ANOTHER[first](h)).sin()).double()
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    results = []
    for network in (fxfeedback.to_butd(model, input_size=(4,)), model):
        y = network(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12)


class Pooling(nn.Module):
    """Attention as open_clip pools by it: a call of the function, whose second output is None."""

    def __init__(self):
        super().__init__()
        self.w, self.v, self.out = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x, weights = x.transpose(0, 1), (self.w.weight, self.w.bias, None, None, False, 0.0, self.v.weight, self.v.bias)
        y, _ = F.multi_head_attention_forward(x, x, x, 4, 2, *weights, training=False, need_weights=False)
        return self.out(y[0])


def test_an_output_may_be_none():
    model, x = Pooling().double(), torch.randn(3, 5, 4, dtype=torch.double, requires_grad=True)
    results = []
    for network in (fxfeedback.to_butd(model, input_size=(5, 4)), model):
        y = network(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12)


def bottom_up(monkeypatch, function):
    """The BU graph of a trunk."""
    made = []
    original = Graphs.__init__
    monkeypatch.setattr(Graphs, "__init__", lambda self, *args: (original(self, *args), made.append(self))[0])
    fxfeedback.to_butd(Trunk(function), input_size=(4,))
    return made[0].bu.graph


def test_names_and_lines_are_those_of_the_call(monkeypatch):
    graph = bottom_up(monkeypatch, lambda y, x: torch.trapezoid(y, dim=1))
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert name_of(calls[-1]) == "trapezoid"
    assert len(calls) > 2 and all(name_of(node).startswith("trapezoid.") for node in calls[1:-1])
    assert all(node.target in RULES for node in calls)


@QUANTILE
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_stays_open(batch):
    """Also where a number of the decomposition depends on it: the rank of a quantile over the samples."""
    model = Trunk(lambda y, x: y * torch.quantile(y, 0.3, 0)).double()
    x, weights = torch.randn(batch, 4, dtype=torch.double), list(model.parameters())
    butd = fxfeedback.to_butd(model, input_size=(4,))
    torch.testing.assert_close(butd(x), model(x), rtol=1e-12, atol=1e-12)
    expected, found = (torch.autograd.grad(net(x).square().sum(), weights) for net in (model, butd))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Sign(torch.autograd.Function):
    """Its backward is not the derivative of its forward."""

    @staticmethod
    def forward(ctx, x):
        return torch.special.entr(x)

    @staticmethod
    def backward(ctx, error):
        return error


REFUSED = {
    "numbers that grow unevenly": (lambda y, x: y * torch.combinations(y[:, 0]).sum(), r"grow evenly with the batch"),
    "no decomposition": (lambda y, x: torch.igamma(x, y), r"no rule for torch.igamma \(at node 'igamma', called at"),
    "a derivative of its own": (lambda y, x: Sign.apply(y), r"no rule for test_open_operators.Sign"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_open_is_refused(name):
    function, message = REFUSED[name]
    with pytest.raises(fxfeedback.Error, match=message):
        fxfeedback.to_butd(Trunk(function), input_size=(4,))


def test_torch_no_grad_inside_of_an_op_is_refused(monkeypatch):
    def detached(y):
        with torch.no_grad():
            return torch.special.entr(y)

    detached.__module__ = "torch.somewhere"
    model = Trunk(lambda y, x: fx_call(detached, y))
    with pytest.raises(RuleError, match="it computes under torch"):
        fxfeedback.to_butd(model, input_size=(4,))


def fx_call(function, y):
    return y.tracer.create_proxy("call_function", function, (y,), {}) if isinstance(y, torch.fx.Proxy) else function(y)


def test_a_singular_matrix_is_an_error_still():
    model = Trunk(lambda y, x: torch.linalg.tensorinv(y.reshape(-1, 2, 2).mean(0) * 0 + x[0, 0], ind=1).sum() + y)
    butd, x = fxfeedback.to_butd(model, input_size=(4,), verify=False), torch.ones(3, 4)
    for network in (model, butd):
        with pytest.raises(torch.linalg.LinAlgError, match="singular"):
            network(x)
