"""A destination's modulation as it is run, in slices and with a backward pass of its own, against its formula."""

import contextlib
import functools
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxfeedback.graph.layout import Layout
from fxfeedback.lrm.modulation import Modulation, modulate
from fxfeedback.lrm.resizing import resize, resize_by_axis, resize_transposed
from marks import one_in

BATCH = 3
DESTINATIONS = {
    "map": ("map", (5, 6)),
    "channels last": ("map", (5, 6)),
    "line": ("map", (7,)),
    "volume": ("map", (3, 4, 2)),
    "last": ("last", (4, 6)),
    "tokens": ("tokens", (4, 4)),
    "class tokens": ("tokens", (4, 4)),
}


def value(layout, class_tokens=0):
    shape = {
        "vector": [layout.channels],
        "map": [layout.channels, *layout.size],
        "last": [*layout.size, layout.channels],
    }
    tokens = [layout.size[0] ** 2 + class_tokens, layout.channels] if layout.kind == "tokens" else None
    return torch.randn(BATCH, *(tokens or shape[layout.kind]), dtype=torch.double)


def formula(y, shares, activation, mode="multiply"):
    m = functools.reduce(torch.add, [block(a, y, strength) for block, a, strength in shares])
    modulated = y + m if mode == "add" else y + y * m
    return torch.relu(modulated) if activation == "relu" else modulated


@one_in(5)
@pytest.mark.parametrize("samples", [1, 2, BATCH])
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("mode", ["multiply", "add"])
@pytest.mark.parametrize(
    "name, resized", [*((name, "bilinear") for name in DESTINATIONS), ("map", "bicubic"), ("map", "area")]
)
def test_values_and_derivatives_are_the_formulas(name, resized, mode, activation, samples):
    torch.manual_seed(0)
    kind, size = DESTINATIONS[name]
    destination, class_tokens = Layout(kind, 4, size), 2 if name == "class tokens" else 0
    small = (2, 2) if kind == "tokens" else (2,) * len(size)
    sources = [Layout(kind, 3, small), Layout("map", 2, small), Layout("vector", 5, ())]
    y = value(destination, class_tokens)
    y = y.to(memory_format=torch.channels_last) if name == "channels last" else y
    strength = torch.tensor([0.7, -1.2]).double().requires_grad_()
    shares = [
        (Modulation(source, destination, resize=resized).double(), value(source), strength if i == 0 else None)
        for i, source in enumerate(sources)
    ]
    for block, *_ in shares:
        for parameter in block.parameters():
            nn.init.normal_(parameter)
    parameters = [parameter for block, *_ in shares for parameter in block.parameters()]
    tensors = [x.requires_grad_() for x in [y, *(a for _, a, _ in shares), strength, *parameters]]

    def results(function):
        out = function(y, shares, activation, mode)
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).square().sum()
        first = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again if g is not None), tensors, allow_unused=True)
        assert out.stride() == y.stride()
        return out, *first, *again, *second

    positions = y[0].numel() // destination.channels
    with mock.patch("fxfeedback.lrm.modulation.SLICE", samples * 5 * positions * 8):
        found, expected = results(modulate), results(formula)
        with torch.no_grad():
            torch.testing.assert_close(modulate(y, shares, activation, mode), found[0], rtol=0, atol=1e-12)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and (a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1)


SIZES = [((4,), (9,)), ((2, 3), (5, 7)), ((1, 4), (4, 2)), ((2, 3, 1), (4, 5, 3))]


@pytest.mark.parametrize(
    "small, large, mode",
    [
        *((*sizes, mode) for sizes in SIZES for mode in ("bilinear", "area")),
        *((*sizes, "bicubic") for sizes in SIZES if len(sizes[0]) == 2),  # torch has no other
    ],
)
def test_resizing_by_matrices(small, large, mode):
    x = torch.randn(2, 3, *small, dtype=torch.double, requires_grad=True)
    for laid in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        y = resize(laid, large, mode)
        torch.testing.assert_close(resize_by_axis(laid, large, mode), y, rtol=0, atol=1e-13)
        error = torch.randn_like(y)
        expected = torch.autograd.grad(y, x, error, retain_graph=True)[0]
        for e in (error, error.movedim(1, -1).contiguous().movedim(-1, 1)):
            torch.testing.assert_close(resize_transposed(e, small, mode), expected, rtol=0, atol=1e-12)


class Large(TorchDispatchMode):
    """Which ops make a float32 tensor of at least so many values."""

    def __init__(self, values):
        super().__init__()
        self.values, self.ops = values, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.numel() >= self.values:
                self.ops.append(str(function))
        return result


@contextlib.contextmanager
def cuda_autocast():
    """torch.autocast("cuda"), which without a GPU switches itself off."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("laid", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("run", [modulate, formula])
@pytest.mark.parametrize("mode", ["multiply", "add"])
def test_under_autocast_the_modulated_map_keeps_its_dtype(run, laid, mode):
    """On a GPU autocast resizes in float32, and what is computed of it would be in float32, too."""
    source, destination = Layout("map", 6, (4, 4)), Layout("map", 3, (16, 16))
    with FakeTensorMode(), cuda_autocast(), torch.no_grad(), mock.patch("fxfeedback.lrm.modulation.SLICE", 2**30):
        with torch.device("cuda"):
            block = Modulation(source, destination)
        y = torch.empty(9, 3, 16, 16, device="cuda", dtype=torch.bfloat16).to(memory_format=laid)
        a = torch.empty(9, 6, 4, 4, device="cuda", dtype=torch.bfloat16)
        with Large(y.numel()) as large:
            out = run(y, [(block, a, None), (block, a, None)], "relu", mode)
    assert out.dtype == y.dtype and out.stride() == y.stride()
    assert run is formula or large.ops == []


def test_a_hook_on_a_connections_block_sees_its_call():
    block = Modulation(Layout("map", 2, (2, 3)), Layout("map", 4, (5, 6))).double()
    y, a, seen = torch.randn(BATCH, 4, 5, 6).double(), torch.randn(BATCH, 2, 2, 3).double(), []
    block.register_forward_hook(lambda block, given, m: seen.append(m) or 2 * m)
    value = modulate(y, [(block, a, None)], "none")
    torch.testing.assert_close(value, y + y * seen[0] * 2, rtol=1e-9, atol=1e-9)
