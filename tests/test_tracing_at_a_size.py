"""Models whose code looks at sizes: traced at the inputs' size, by both rewritings, and again at another size."""

import random

import einops
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback
from fxfeedback.errors import TraceError
from networks import Recurrent


class BranchesOnSize(nn.Module):
    """Pads to a multiple of 4 where it must; its loop runs over columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.grid = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        if width % 4 != 0:
            x = F.pad(x, (0, 4 - width % 4))
        if self.grid is None or len(self.grid) != height:
            self.grid = torch.linspace(0, 1, height)[:, None].double()
        x = F.gelu(self.norm(self.conv(x))) * self.grid
        columns = [x[..., i] * (i + 1) for i in range(x.shape[-1])]
        return self.head(sum(columns).mean(-1).reshape(batch, -1))


def add_shortcut(x: torch.Tensor, shortcut: torch.Tensor) -> None:
    """Writes into a part of its argument, and returns nothing."""
    x[:, 1:] += shortcut[:, 1:]
    x[:, 0].zero_()


torch.fx.wrap("add_shortcut")


class WritesIntoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        z = F.relu(y)
        add_shortcut(y, z * 2)
        return self.head((y * z).mean((2, 3)))


class WrittenWithEinops(nn.Module):
    """Attention over positions, as vision transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
        self.first, self.project = nn.Parameter(torch.randn(1, 4)), nn.Linear(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2 if x.is_cuda else x
        tokens = einops.rearrange(self.conv(x), "b c h w -> b (h w) c")
        first = einops.repeat(self.first, "n c -> b n c", b=x.shape[0])
        parts = self.project(torch.cat([first, tokens], 1)).chunk(3, dim=-1)
        query, key, value = map(lambda t: einops.rearrange(t, "b n (heads c) -> b heads n c", heads=2), parts)  # noqa: C417
        weights = einops.einsum(query, key, "b h i c, b h j c -> b h i j").softmax(-1)
        tokens = tokens + einops.rearrange(weights @ value, "b heads n c -> b n (heads c)")[:, 1:]
        return self.head(einops.reduce(F.relu(tokens), "b n c -> b c", "mean"))


class StretchesConstants(nn.Module):
    """Tensors of its own come to the size of the batch; the middle is one of our networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
        middle = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), First(), nn.ReLU())
        self.middle = fxfeedback.add_feedback(middle, [("2", "0")], input_size=(4, 6, 6))
        self.register_buffer("scale", torch.rand(1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x) * self.scale.expand(x.shape[0], -1, -1, -1)
        shift = torch.linspace(0, 1, 4, dtype=y.dtype).repeat(x.size(0), 1)
        return self.head(self.middle(y)[-1].mean((2, 3)) + shift)


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias.expand(x.shape[0], -1, -1, -1)


@pytest.mark.parametrize(
    "make", [BranchesOnSize, WritesIntoArguments, WrittenWithEinops, StretchesConstants, Recurrent]
)
@pytest.mark.parametrize("train", [False, True])
def test_both_rewritings_equal_the_model_at_every_size(make, train):
    torch.manual_seed(0)
    model = make().double().train(train)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6))
    feedback = fxfeedback.add_feedback(model, [("head", "conv")], input_size=(2, 6, 6))
    for size in ((6, 6), (5, 8), (6, 7)):
        x = torch.randn(3, 2, *size, dtype=torch.double)
        expected = make().double().train(train)
        expected.load_state_dict(model.state_dict())
        gradients = torch.autograd.grad(expected(x).square().sum(), list(expected.parameters()))
        updates = torch.autograd.grad(butd(x).square().sum(), list(model.parameters()))
        largest = max(gradient.abs().max() for gradient in gradients)
        for update, gradient in zip(updates, gradients, strict=True):
            assert (update - gradient).abs().max() <= 1e-9 * max(gradient.abs().max(), 1e-6 * largest)
        first, second = feedback(x)
        assert torch.equal(first, expected(x)) and not torch.equal(first, second)
        assert butd(x, torch.tensor([0, 1, 1])).shape == expected(x).shape
    assert "grid" not in vars(model) or model.grid is None  # tracing leaves nothing behind


class LooksAtItsDevice(Recurrent):
    """Cannot be traced but at one size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x if x.shape[2] > 4 else x[:, :, :4])
        return y + torch.linspace(0, 1, 5, dtype=y.dtype, device=y.device) * torch.tensor(0.5).to(y)


@pytest.mark.parametrize("make", [Recurrent, LooksAtItsDevice])
def test_what_forward_makes_is_where_the_input_is(make):
    """The meta device stands for any other than the one of building."""
    model = make()
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6))
    feedback = fxfeedback.add_feedback(model, [("head", "conv")], input_size=(2, 6, 6))
    x = torch.randn(3, 2, 6, 6)
    for output in (butd(x, 1), feedback(x)[-1]):
        assert output.isfinite().all()
    x = x.to("meta")
    for output in (butd.to("meta")(x, 1), butd(x), feedback.to("meta")(x)[-1]):
        assert output.shape == (3, 5) and output.is_meta


def test_code_that_looks_at_values_cannot_be_traced():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x) if x.sum() > 0 else self.head(-x)

    for convert in (fxfeedback.to_butd, lambda model: fxfeedback.add_feedback(model, [("head", "head")])):
        with pytest.raises(TraceError, match=r"cannot trace Branches.*test_tracing_at_a_size.py:\d+: return"):
            convert(Branches())


UNKEPT = {
    "draws random numbers": [lambda x: x * torch.rand(3), lambda x: x * 2 if random.random() < 2 else x],
    "switches autocast on": [lambda x: torch.autocast("cpu", torch.bfloat16)(torch.relu)(x)],
}


@pytest.mark.parametrize("what, last", [(what, last) for what, lasts in UNKEPT.items() for last in lasts])
def test_what_a_graph_would_lose_is_an_error(what, last):
    class Loses(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return last(self.head(x))

    for convert in (fxfeedback.to_butd, lambda model: fxfeedback.add_feedback(model, [("head", "head")])):
        with pytest.raises(TraceError, match=f"cannot trace Loses: its? .*{what}"):
            convert(Loses())


def test_a_model_with_passes_inside_another_learns():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            backbone = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 5))
            self.backbone = fxfeedback.add_feedback(backbone, [("4", "0")], input_size=(2, 6, 6))
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.relu(self.backbone(x)[-1]))

    torch.manual_seed(0)
    model = Outer().double()
    x = torch.randn(3, 2, 6, 6, dtype=torch.double)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6))
    assert "backbone.1.pass2" in fxfeedback.node_names(model, input_size=(2, 6, 6))
    gradients = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    updates = torch.autograd.grad(butd(x).square().sum(), list(model.parameters()))
    for update, gradient in zip(updates, gradients, strict=True):
        assert (update - gradient).abs().max() <= 1e-9 * gradient.abs().max()
    assert "backbone.1.pass2" in butd.counter_neurons(0)
