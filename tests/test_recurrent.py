"""Recurrent modules of torch in networks that learn by Counter-Hebb: outputs and updates are torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback
from marks import one_in

STEPS, FEATURES = 3, 4


class Recurrent(nn.Module):
    """Reads everything that the module returns; `given` states come from the input, too."""

    def __init__(self, module: nn.RNNBase, given: bool = False) -> None:
        super().__init__()
        self.first, self.module, self.given = nn.Linear(FEATURES, FEATURES), module, given
        self.head = nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        module = self.module
        hx = None
        if self.given:
            layers = module.num_layers * (2 if module.bidirectional else 1)
            wide = [x.mean(1).repeat(layers, 1, 3)[..., :n] for n in (module.proj_size or 6, 6)]
            hx = (wide[0], wide[1].sin()) if module.mode == "LSTM" else wide[0]
        y, end = module(x if module.batch_first else x.transpose(0, 1), hx)
        y = y if module.batch_first else y.transpose(0, 1)
        ends = end if module.mode == "LSTM" else (end,)
        return self.head(torch.cat([y.flatten(1), *[state.transpose(0, 1).flatten(1) for state in ends]], 1))


class Cell(nn.Module):
    """A cell that steps through the sequence, from nothing or from the input."""

    def __init__(self, cell: nn.RNNCellBase, given: bool = False) -> None:
        super().__init__()
        self.first, self.cell, self.given, self.head = nn.Linear(FEATURES, FEATURES), cell, given, nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        state = None
        if self.given:
            h = x.mean(1).repeat(1, 3)[:, :6]
            state = (h, h.sin()) if isinstance(self.cell, nn.LSTMCell) else h
        for i in range(STEPS):
            state = self.cell(x[:, i], state)
        return self.head(state[0] if isinstance(self.cell, nn.LSTMCell) else state)


NETWORKS = {
    "LSTM": lambda: Recurrent(nn.LSTM(FEATURES, 6)),
    "LSTM of all kinds": lambda: Recurrent(
        nn.LSTM(FEATURES, 6, 2, batch_first=True, bidirectional=True, proj_size=5, dropout=0.3), given=True
    ),
    "LSTM without biases": lambda: Recurrent(nn.LSTM(FEATURES, 6, bias=False, bidirectional=True)),
    "GRU": lambda: Recurrent(nn.GRU(FEATURES, 6, batch_first=True)),
    "GRU of all kinds": lambda: Recurrent(nn.GRU(FEATURES, 6, 3, bidirectional=True, dropout=0.5), given=True),
    "RNN": lambda: Recurrent(nn.RNN(FEATURES, 6, 2)),
    "RNN of rectifiers": lambda: Recurrent(nn.RNN(FEATURES, 6, nonlinearity="relu", batch_first=True), given=True),
    "LSTMCell": lambda: Cell(nn.LSTMCell(FEATURES, 6)),
    "LSTMCell with a state": lambda: Cell(nn.LSTMCell(FEATURES, 6, bias=False), given=True),
    "GRUCell": lambda: Cell(nn.GRUCell(FEATURES, 6), given=True),
    "RNNCell": lambda: Cell(nn.RNNCell(FEATURES, 6, nonlinearity="relu")),
}


@one_in(5)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_recurrent_modules_learn(make, train):
    torch.manual_seed(0)
    model = make().double().train(train)
    x = torch.randn(3, STEPS, FEATURES, dtype=torch.double)
    model(x)
    butd = fxfeedback.to_butd(model, n_tasks=8, input_size=(STEPS, FEATURES))
    results = []
    for network in (model, butd):
        torch.manual_seed(1)  # the same units drop out
        y = network(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    for own, torchs in zip(*results[::-1], strict=True):
        assert (own - torchs).abs().max() <= 1e-9 * torchs.abs().max()
    assert any(not torch.equal(butd(x, 0), butd(x, task)) for task in range(1, 8))


WITHOUT_BATCH = {
    "LSTM": nn.LSTM(FEATURES, 6, 2, bidirectional=True),
    "LSTM, projected": nn.LSTM(FEATURES, 6, batch_first=True, proj_size=2),
    "GRU": nn.GRU(FEATURES, 6, batch_first=True),
    "RNN": nn.RNN(FEATURES, 6, nonlinearity="relu"),
    "LSTMCell": nn.LSTMCell(FEATURES, 6),
    "GRUCell": nn.GRUCell(FEATURES, 6),
    "RNNCell": nn.RNNCell(FEATURES, 6),
}


class Alone(nn.Module):
    """One sequence for all samples, which is learned."""

    def __init__(self, module):
        super().__init__()
        steps = () if isinstance(module, nn.RNNCellBase) else (STEPS,)
        self.sequence, self.module = nn.Parameter(torch.randn(*steps, FEATURES)), module

    def forward(self, x):
        y = self.module(self.sequence)
        if isinstance(self.module, nn.RNNBase):  # from where the first ends, once more
            y, end = self.module(self.sequence, y[1])
            y = torch.cat([y.flatten(), *[t.flatten() for t in (end if self.module.mode == "LSTM" else [end])]])
        y = torch.cat(y) if isinstance(self.module, nn.LSTMCell) else y
        return y[None] * x.sum(1, keepdim=True)


@one_in(3)
@pytest.mark.parametrize("name", WITHOUT_BATCH)
def test_a_sequence_without_a_batch(name):
    model, x = Alone(WITHOUT_BATCH[name]).double(), torch.randn(3, 2, dtype=torch.double)
    butd = fxfeedback.to_butd(model, input_size=(2,))
    expected, updates = (torch.autograd.grad(net(x).square().sum(), list(model.parameters())) for net in (model, butd))
    for update, gradient in zip(updates, expected, strict=True):
        assert (update - gradient).abs().max() <= 1e-9 * gradient.abs().max()
