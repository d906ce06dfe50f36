"""Models whose code looks at sizes: traced at the inputs' size, by both rewritings, and again at another size."""

import contextlib
import random
import threading
from random import random as a_random_number

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxfeedback
from fxfeedback.errors import RuleError, TraceError
from marks import long, one_in
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


@one_in(9)
@pytest.mark.parametrize(
    "make", [BranchesOnSize, WritesIntoArguments, WrittenWithEinops, StretchesConstants, long(Recurrent)]
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


@pytest.mark.long
@pytest.mark.parametrize("make", [long(Recurrent), LooksAtItsDevice])
def test_what_forward_makes_is_where_the_input_is(make):
    """The meta device stands for any other than the one of building."""
    model = make()
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 3, 3))
    feedback = fxfeedback.add_feedback(model, [("head", "conv")], input_size=(2, 3, 3))
    x = torch.randn(3, 2, 3, 3)
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


class Asks(nn.Module):
    """A linear layer whose input goes through code that asks what a tensor is."""

    def __init__(self, ask) -> None:
        super().__init__()
        self.first, self.head, self.ask = nn.Linear(6, 6), nn.Linear(6, 3), ask
        self.register_buffer("scale", torch.rand(6))

    def forward(self, x):
        x = self.ask(self, x)
        return self.head(torch.relu(self.ask(self, self.first(x))))


def checked(model, x):
    if not isinstance(x, torch.Tensor) or isinstance(x, (list, str)) or not torch.is_tensor(x) or x.numel() == 0:
        raise TypeError("a tensor, please")
    return x * 2


def cast(model, x):
    return x.to(torch.float32) if x.dtype not in (model.scale.dtype, torch.float16) else x * model.scale


def of_kind(model, x):
    if x.is_floating_point() and torch.is_floating_point(x) and not x.is_complex() and x.is_signed():
        x = x * torch.finfo(x.dtype).bits
    return x + len(x.shape) + x.element_size() + x.itemsize


def made_alike(model, x):
    own = torch.full((x.shape[-1],), 2.0, dtype=x.dtype, device=x.device) * x.new_tensor([0.5])
    return x * own + torch.tensor(1.5, dtype=x.dtype).to(device=x.device, dtype=x.dtype)


def made_dense(model, x):
    x = x.masked_fill(x != x, torch.nan)
    return (x if x.is_contiguous() else x.contiguous()).view(-1, 6) if x.layout is torch.strided else x.to_dense()


def cheaper(model, x):
    layer = nn.ReLU()  # a module made on the way
    return checkpoint(layer, x, use_reentrant=True) * 2 if x.requires_grad else layer(x) * 2


def another_way(model, x):
    return torch.where(x > 0, x, -x) if x.requires_grad else x.abs()


def of_parts(model, x):
    if hasattr(x, "tensors") or isinstance(x, tuple) or not isinstance(model.first.weight, nn.Parameter):
        x = x.tensors
    size = x.shape[1]
    return x / size if isinstance(size, int) and x.device.type != "cuda" and not x.is_cuda else x


def in_part(model, x):
    y = x * 2
    part = y[:, 1]
    part += 1
    y[:, 2:4] *= 3
    return y


def in_groups(model, x):
    batch = x.shape[0]
    if batch < 1 or x.size(0) != batch or (2 * x).shape != x.shape:
        raise ValueError
    return x.repeat(2, 1).view(batch, -1, 6)[:, x.repeat(2, 1).shape[0] // batch - 1]


def by_shape(model, x):
    if x.shape == (3, 7) or x.shape == (6,) or x.shape == (1, 3, 6) or x.shape != x.sin().shape or x.shape == [3, 6]:
        raise ValueError
    return x * (2 if x.shape != (7,) and x.repeat(1, 2).shape[1:] == (12,) else 1)


ASKS = [checked, cast, of_kind, made_alike, made_dense, cheaper, another_way, of_parts, in_part, in_groups, by_shape]


@one_in(3)
@pytest.mark.parametrize("ask", ASKS)
def test_code_may_ask_what_a_tensor_is(ask):
    torch.manual_seed(0)
    model, x = Asks(ask).double(), torch.randn(4, 6, dtype=torch.double)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(6,))
    feedback = fxfeedback.add_feedback(model, [("head", "head")], input_size=(6,))
    for rows in (4, 1):
        x = x[:rows]
        gradients, updates = learned(model, model(x)), learned(model, butd(x))
        for update, gradient in zip(updates, gradients, strict=True):
            assert (update - gradient).abs().max() <= 1e-9 * gradient.abs().max()
        assert torch.equal(feedback(x)[0], model(x))


def learned(model, output):
    model.zero_grad()
    output.square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_a_graph_that_knows_dtypes_is_one_for_these_dtypes():
    def cast_and_double(model, x):
        return x if x.dtype == model.scale.dtype else x.to(model.scale.dtype) * 2

    model = Asks(cast_and_double)
    butd = fxfeedback.to_butd(model, input_size=(6,))
    feedback = fxfeedback.add_feedback(model, [("head", "head")], input_size=(6,))
    for dtype in (torch.float32, torch.float64, torch.int64, torch.float32):
        x = (5 * torch.randn(2, 6)).to(dtype)
        for output in (butd(x), feedback(x)[0]):
            torch.testing.assert_close(output, model(x))


UNASKED = {
    "requires_grad or x.is_contiguous": [
        lambda model, x: x * 2 if x.requires_grad else x,
        lambda model, x: x * 2 if x.is_contiguous() else x,
    ],
    "control flow": [lambda model, x: x * 2 if x.stride(0) == 6 else x, lambda model, x: x if x.grad_fn else -x],
    "branches on the batch size": [
        lambda model, x: x * 2 if x.shape[0] > 2 else x,
        lambda model, x: x * 2 if x.shape[0] // 4 == 0 else x,
        lambda model, x: x * 2 if x.numel() > 12 else x,
        lambda model, x: x * 2 if x.shape == (3, 6) else x,
    ],
    "Linear that is not one of its modules": [lambda model, x: layers[0](x)],
}
layers = [nn.Linear(6, 6)]


@pytest.mark.parametrize("message, ask", [(message, ask) for message, asks in UNASKED.items() for ask in asks])
def test_what_may_change_from_call_to_call_is_not_answered(message, ask):
    with pytest.raises(TraceError, match=f"Asks.*{message}"):
        fxfeedback.to_butd(Asks(ask), input_size=(6,))


class KeepsTable(nn.Module):
    """Makes a table of positions where the one that it has is of another size, as ConViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def forward(self, x):
        if self.table.shape[1] != x.shape[1]:
            table = torch.arange(x.shape[1], dtype=torch.float32)[None].repeat(1, 1)
            self.table = table.to(device=self.first.weight.device, dtype=self.first.weight.dtype)
        return self.head(torch.relu(self.first(x) + self.table.expand(x.shape[0], -1)))


def test_what_forward_puts_into_a_buffer_is_what_later_code_reads():
    torch.manual_seed(0)
    model, x = KeepsTable().double(), torch.randn(4, 6, dtype=torch.double)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(6,))
    feedback = fxfeedback.add_feedback(model, [("head", "head")], input_size=(6,))
    assert model.table.shape == (1, 1)
    expected = KeepsTable().double()
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(butd(x), expected(x), rtol=1e-12, atol=0)
    assert torch.equal(feedback(x)[0], expected(x))


def test_a_counter_counts_the_calls():
    class Counts(nn.Linear):
        def __init__(self):
            super().__init__(6, 5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = nn.Sequential(Counts())
    butd, x = fxfeedback.to_butd(model, input_size=(6,)), torch.randn(2, 6)
    assert model[0].calls == 0 and torch.equal(butd(x), butd(x))
    butd(x).sum().backward()
    assert model[0].calls == 3 and type(model[0].calls) is torch.Tensor


def test_a_proxy_among_the_values_ends_the_tracing():
    """Else it makes nodes without end, each in one more device mode, until the interpreter dies."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.register_buffer("kept", torch.ones(1, 4))

        def forward(self, x):
            if x.shape[1] > 2 and isinstance(x, torch.fx.Proxy):
                for run in (x.tracer.shapes.small, x.tracer.shapes.large):
                    run.values[x.node] = torch.fx.proxy.Attribute(x, "node")
            return self.head(x if x.nbytes else -x)

    with pytest.raises(TraceError, match="cannot trace Keeps"):
        fxfeedback.to_butd(Keeps(), input_size=(4,))


UNKEPT = {
    "draws random numbers": [
        lambda x: x * torch.rand(3),
        lambda x: x * 2 if random.random() < 2 else x,
        lambda x: x * 2 if a_random_number() < 2 else x,
        lambda x: x * np.random.rand(),
        lambda x: x * np.random.default_rng().normal(),
        lambda x: x * torch.manual_seed(torch.initial_seed() + 1).initial_seed(),
        lambda x: x * torch.bernoulli(torch.ones(3)),
    ],
    "switches autocast on": [lambda x: torch.autocast("cpu", torch.bfloat16)(torch.relu)(x)],
}


@one_in(7)
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("what, last", [(what, last) for what, lasts in UNKEPT.items() for last in lasts])
def test_what_a_graph_would_lose_is_an_error(what, last, beside):
    class Loses(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return last(self.head(x))

    model = Loses()
    with drawing() if beside else contextlib.nullcontext():
        for convert in (fxfeedback.to_butd, lambda model: fxfeedback.add_feedback(model, [("head", "head")])):
            with pytest.raises(TraceError, match=f"cannot trace Loses: its? .*{what}"):
                convert(model)


@contextlib.contextmanager
def drawing():
    """While other threads draw random numbers of all kinds."""
    draws = [a_random_number, lambda: random.randint(0, 9), lambda: torch.rand(1), lambda: np.random.rand()]
    done = threading.Event()

    def run(draw):
        while not done.wait(1e-4):
            draw()

    threads = [threading.Thread(target=run, args=(draw,)) for draw in draws]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.mark.long
@pytest.mark.parametrize("ask", [long(lambda model, x: x), cast])
def test_others_may_draw_random_numbers(ask):
    with drawing():
        for _ in range(3):
            fxfeedback.to_butd(Asks(ask), input_size=(6,))
            fxfeedback.add_feedback(Asks(ask), [("head", "head")], input_size=(6,))


def test_tracing_draws_no_random_numbers():
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    for ask in (cast, lambda model, x: x * torch.rand(6)):
        model, before = Asks(ask), states()
        with contextlib.suppress(TraceError):
            fxfeedback.to_butd(model, input_size=(6,))
        assert states() == before


class Translates(nn.Module):
    """torch's transformers, whole: a causal mask, and padding that depends on values."""

    def __init__(self, first: bool, norm_first: bool, causal: bool | None) -> None:
        super().__init__()
        self.first, self.causal = first, causal
        how = {"dropout": 0.0, "batch_first": first, "norm_first": norm_first}
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, **how), 2, nn.LayerNorm(8))
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, **how), 1)
        self.whole = nn.Transformer(8, 2, 1, 1, 12, **how)
        self.query = nn.Parameter(torch.randn(1, 4, 8))

    def forward(self, x):
        padding = x[..., 0] > 1
        x, query = self.embed(x), self.query.expand(x.shape[0], -1, -1)
        causal, float_causal = (torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1) for n in (5, 4))
        float_causal = torch.zeros_like(float_causal, dtype=x.dtype).masked_fill(float_causal, -torch.inf)
        if not self.first:
            x, query = x.transpose(0, 1), query.transpose(0, 1)
        memory = self.encoder(x, causal, padding, **({} if self.causal is None else {"is_causal": self.causal}))
        paddings = {"memory_key_padding_mask": padding}
        y = self.decoder(query, memory, float_causal, tgt_is_causal=self.causal, **paddings)
        y = y + self.whole(x, query, tgt_mask=float_causal, src_key_padding_mask=padding, **paddings)
        return self.head(y.mean(1 if self.first else 0))


@one_in(4)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("first, norm_first, causal", [(True, False, None), (False, True, True)])
def test_torchs_transformers_open(first, norm_first, causal, train):
    torch.manual_seed(0)
    model, x = Translates(first, norm_first, causal).double().train(train), torch.randn(3, 5, 6, dtype=torch.double)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(5, 6))
    feedback = fxfeedback.add_feedback(model, [("head", "embed")], input_size=(5, 6))
    gradients, updates = learned(model, model(x)), learned(model, butd(x))
    largest = max(gradient.abs().max() for gradient in gradients)
    for update, gradient in zip(updates, gradients, strict=True):
        assert (update - gradient).abs().max() <= 1e-9 * max(gradient.abs().max(), 1e-4 * largest)
    torch.testing.assert_close(feedback(x)[0], model(x), rtol=1e-9, atol=0)
    assert butd(x, torch.tensor([0, 1, 1])).shape == (3, 3)


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


class OfNumbersOrTensors(nn.Module):
    """Functions of torch's that take numbers or tensors: its C code asks each argument what it is."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.looks, self.fc, self.head = looks, nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        if self.looks and x.shape[1] > 100:
            return x
        x, mean = self.fc(x), x.mean()
        y = torch.where(x > 0, x, 0.5) + torch.where(x > 0, 0.5, x) + torch.where(x > mean, mean, x)
        y = y + torch.pow(2.0, x) + torch.pow(x, 2) + torch.clamp(x, min=-1.0) + torch.add(x, mean, alpha=2)
        y = y + torch.lerp(x, y, 0.3) + torch.masked_fill(x, x > 0, 1.5) + torch.full_like(x, 2.0)
        return self.head(torch.addcmul(y, x, x, value=0.5) + torch.mul(2.0, x) + torch.maximum(x, y))


@pytest.mark.parametrize("looks", [False, True])
def test_stand_ins_are_no_tensors_to_torchs_own_code(looks):
    torch.manual_seed(0)
    model, x = OfNumbersOrTensors(looks).double(), torch.randn(3, 6, dtype=torch.double)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(6,))
    for update, gradient in zip(learned(model, butd(x)), learned(model, model(x)), strict=True):
        assert (update - gradient).abs().max() <= 1e-9 * gradient.abs().max()
    feedback = fxfeedback.add_feedback(model, [("head", "fc")], input_size=(6,))
    torch.testing.assert_close(feedback(x)[0], model(x), rtol=1e-12, atol=0)


# -- values that have several names ------------------------------------------------------------------------------------


class Writes(nn.Module):
    """Between two layers, code that writes into what the first has made; where it looks, at one size only."""

    def __init__(self, write, looks: bool) -> None:
        super().__init__()
        self.first, self.head, self.write, self.looks = nn.Linear(4, 4), nn.Linear(4, 2), write, looks

    def forward(self, x):
        if self.looks and x.shape[1] > 100:
            return x
        return self.head(self.write(self.first(x).sin()).tanh())


def add_one(y):
    y += 1


def halve(y, z):
    F.leaky_relu(y, inplace=True)
    z.copy_(z / 2)


def as_rows(y):
    return y.view(-1, 4)


def twice_by_another_name(y):
    z = y
    z *= 2
    return y + 1


def by_a_view_inside(y):
    rows = y.view(-1, 4)
    y += 1
    return rows * 2


for name in ("add_one", "halve", "as_rows", "twice_by_another_name", "by_a_view_inside"):
    torch.fx.wrap(name)


def lines(code):
    """A function of y that runs these statements and returns the expression after the last semicolon."""
    *statements, last = code.split("; ")
    source = "\n    ".join(["def write(y):", *statements, f"return {last}"])
    space = dict(globals())
    exec(compile(source, code, "exec"), space)
    return space["write"]


RIGHT = [
    "z = y; z += 1; y * 2",
    "z = y; z -= y.detach().cos(); y * z",
    "z = y; z **= 2; z /= 3; y + z",
    "z = w = y; z *= 2; w += 1; y + z + w",
    "mask = m = y > 0; m &= y < 0.5; y * mask",
    "both = [y, 2 * y]; both[0] += 1; both[1] *= 3; y * both[1]",
    "named = {'a': y}; named['a'] += 1; y * 2",
    "z = y; z.copy_(y * 3); y * 2",
    "z = y * 2; w = z; torch.sigmoid_(z); w * 2",
    "z = y; F.relu(z, inplace=True); y * 2",
    "z = y.__iadd__(1); y * z",
    "add_one(y); y * 2",
    "z = 2 * y; w = z; halve(y, z); y * w",
    "twice_by_another_name(y) * y",
    "rows = y.view(-1, 4); rows += 1; rows *= 2; rows",
    "m = n = y.shape[0]; m *= 2; y * n + m",
]
AT_ONE_SIZE = [
    "part = y[:, 1:]; y += 1; y[:, 2] = 0; torch.cat([part, y[:, :1]], 1)",
    "one, other = y[:, 1:], y[:, :3]; one += 1; other *= 2; y + one.sum(1, keepdim=True)",
    "part = y[:, 1:]; part += 1; y *= 5; torch.cat([part, part[:, :1]], 1)",
    "q, k = y[0], y[1]; q *= 3; (q * k)[None] + y",
]
OVERWRITTEN = [
    *(f"z = y.{view}; z += 1; y * 2" for view in ("view(-1, 4)", "T", "mT", "data", "detach()", "swapaxes(0, 1)")),
    *(f"z = y.{view}; z += 1; y * 2" for view in ("double()", "to(y)", "diagonal()", "unfold(1, 2, 2)", "ravel()")),
    "rows = y.view(-1, 4); y += 1; rows * 2",
    "rows = y.view(-1, 4); y[:, 1] = 0; rows * 2",
    "rows = y.view(-1, 4); add_one(y); rows * 2",
    "rows = as_rows(y); rows += 1; y * 2",
    "by_a_view_inside(y) * 2",
    "a, b = torch.broadcast_tensors(y, y.sum()); a += 1; y * b",
    "a, b = y.tensor_split(2, 1); a.mul_(2); y * 2",
    "z = F.dropout(y, 0.5, False); z += 1; y * 2",
]
KEPT_BY_NO_GRAPH = {
    "under torch.no_grad": ["scale(y); y * 2"],
    "gives an op out=": ["z = torch.empty_like(y); torch.add(y.detach(), 1, out=z); z * y"],
    "puts torch.float64 into a tensor of torch.float32: write": ["z = y.float(); z += y; z.double()"],
    "puts torch.bool into a tensor": ["z = y * 2; z.gt_(0.1); z * y"],
}


def scale(y):
    with torch.no_grad():
        y *= 2


@one_in(19)
@pytest.mark.parametrize(
    "code, looks",
    [*((code, looks) for code in RIGHT for looks in (False, True)), *((code, True) for code in AT_ONE_SIZE)],
)
def test_what_is_written_under_one_name_is_read_under_the_others(code, looks):
    torch.manual_seed(0)
    model, x = Writes(lines(code), looks).double(), torch.randn(4, 4, dtype=torch.double)
    butd = fxfeedback.to_butd(model, example_inputs=(x,), verify=False)
    feedback = fxfeedback.add_feedback(model, [("head", "first")], example_inputs=(x,), verify=False)
    for update, gradient in zip(learned(model, butd(x)), learned(model, model(x)), strict=True):
        assert (update - gradient).abs().max() <= 1e-9 * gradient.abs().max()
    assert torch.equal(butd(x), model(x)) and torch.equal(feedback(x)[0], model(x))


@one_in(3)
@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("code", OVERWRITTEN)
def test_memory_with_two_names_is_not_written_out_of_place(code, looks):
    model, x = Writes(lines(code), looks).double(), torch.randn(4, 4, dtype=torch.double)
    for convert in (
        fxfeedback.to_butd,
        lambda model, **how: fxfeedback.add_feedback(model, [("head", "first")], **how),
    ):
        with pytest.raises(RuleError, match=r"in-place op at node .* overwrites memory that is read again as"):
            convert(model, example_inputs=(x,), verify=False)


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize(
    "message, code", [(message, code) for message, codes in KEPT_BY_NO_GRAPH.items() for code in codes]
)
def test_writing_that_a_graph_cannot_hold_is_refused(message, code, looks):
    model, x = Writes(lines(code), looks).double(), torch.randn(4, 4, dtype=torch.double)
    for convert in (
        fxfeedback.to_butd,
        lambda model, **how: fxfeedback.add_feedback(model, [("head", "first")], **how),
    ):
        with pytest.raises(TraceError, match=message):
            convert(model, example_inputs=(x,), verify=False)
