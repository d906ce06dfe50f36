"""Recurrent modules in ops that have rules: the cell's equations, as often as the sequence has steps.

The equations are those of torch.nn's documentation. What a cell takes of the input, W_ih x + b_ih, is one linear map
for the whole sequence.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def _lstm(x: Any, h: Any, state: tuple[Any, ...]) -> tuple[Any, Any]:
    """c' = σ(f) c + σ(i) tanh(g), h' = σ(o) tanh(c'); x and h are W_ih x + b_ih and W_hh h + b_hh."""
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Any, h: Any, state: tuple[Any, ...]) -> tuple[Any]:
    """h' = (1 - σ(z)) n + σ(z) h with n = tanh(x_n + σ(r) h_n)."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return (n + (x_z + h_z).sigmoid() * (state[0] - n),)


CELLS: dict[str, Callable[..., Any]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": lambda x, h, state: ((x + h).tanh(),),
    "RNN_RELU": lambda x, h, state: (F.relu(x + h),),
}


def sequence(module: nn.RNNBase, input: Any, hx: Any = None) -> tuple[Any, Any]:
    """(outputs of the last layer, last states of all layers and directions), as the module's forward returns them."""
    if input.ndim == 2:
        return _without_batch(module, input, hx)
    x = input.transpose(0, 1) if module.batch_first else input
    states = _states(hx, module.mode)
    last: list[tuple[Any, ...]] = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(1 + module.bidirectional):
            start = tuple(state[len(last)] for state in states) if states else _zeros(module, x)
            y, end = _through_time(module, f"_l{layer}" + "_reverse" * direction, x, start, direction == 1)
            outputs.append(y)
            last.append(end)
        x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        if layer + 1 < module.num_layers:
            x = F.dropout(x, module.dropout, module.training)
    ends = tuple(torch.stack(each) for each in zip(*last, strict=True))
    return x.transpose(0, 1) if module.batch_first else x, ends if module.mode == "LSTM" else ends[0]


def _without_batch(module: nn.RNNBase, input: Any, hx: Any) -> tuple[Any, Any]:
    """`sequence` of one sequence without a batch."""
    batch = 0 if module.batch_first else 1
    states = tuple(state.unsqueeze(1) for state in _states(hx, module.mode))
    start = None if hx is None else states if module.mode == "LSTM" else states[0]
    y, ends = sequence(module, input.unsqueeze(batch), start)
    last = tuple(end.squeeze(1) for end in ends) if module.mode == "LSTM" else ends.squeeze(1)
    return y.squeeze(batch), last


def _through_time(module: Any, suffix: str, x: Any, state: tuple[Any, ...], backwards: bool) -> tuple[Any, Any]:
    """(the outputs of one layer in one direction, the state after the last step)."""
    w_ih, w_hh = getattr(module, "weight_ih" + suffix), getattr(module, "weight_hh" + suffix)
    b_ih, b_hh = (getattr(module, name + suffix) if module.bias else None for name in ("bias_ih", "bias_hh"))
    steps = list(iter(F.linear(x, w_ih, b_ih).unbind(0)))
    outputs = []
    for step in steps[::-1] if backwards else steps:
        state = CELLS[module.mode](step, F.linear(state[0], w_hh, b_hh), state)
        if module.proj_size:
            state = F.linear(state[0], getattr(module, "weight_hr" + suffix)), *state[1:]
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _zeros(module: Any, x: Any) -> tuple[Any, ...]:
    """The state before the first step where none is given."""
    h = x.new_zeros(x.shape[1], module.proj_size or module.hidden_size)
    return (h, x.new_zeros(x.shape[1], module.hidden_size)) if module.mode == "LSTM" else (h,)


def _states(hx: Any, mode: str) -> tuple[Any, ...]:
    """The given states as a tuple, of nothing where none is given."""
    return () if hx is None else tuple(hx) if mode == "LSTM" else (hx,)


def cell(module: nn.RNNCellBase, input: Any, hx: Any = None) -> Any:
    """One step: nn.LSTMCell returns (h, c), the others h."""
    if isinstance(module, nn.RNNCell):
        mode = f"RNN_{module.nonlinearity.upper()}"
    else:
        mode = "LSTM" if isinstance(module, nn.LSTMCell) else "GRU"
    x = F.linear(input, module.weight_ih, module.bias_ih)
    state = _states(hx, mode) or (torch.zeros_like(x[..., : module.hidden_size]),) * 2  # with a batch or without
    h = F.linear(state[0], module.weight_hh, module.bias_hh)
    state = CELLS[mode](x, h, state)
    return state if mode == "LSTM" else state[0]
