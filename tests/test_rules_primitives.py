"""What the rules of primitive ops do with an instruction, and calls that examples cannot state."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import fxfeedback
from fxfeedback.errors import RuleError
from fxfeedback.rules import RULES, Rule, T, attention, call


class Missing:
    """A BU value in the instruction pass: a shape, and no value yet."""

    has_value = False

    def __init__(self, *shape):
        self.shape, self.ndim = shape, len(shape)


def instructed(function, operand, t, *args, **kwargs):
    """The counter neuron that an instruction t brings to an operand of function(*args)."""
    rule = RULES[function]
    return rule.table(Missing(*t.shape), *args, **kwargs)[operand].instruct(t)


def test_attention_is_instructed_through_its_values_as_if_it_were_uniform():
    q, k, v = Missing(2, 3, 5, 4), Missing(2, 3, 7, 4), torch.randn(2, 3, 7, 6, requires_grad=True)
    t = torch.randn(2, 3, 5, 6)
    (expected,) = torch.autograd.grad((torch.full((2, 3, 5, 7), 1 / 7) @ v * t).sum(), v)
    assert torch.allclose(
        instructed(F.scaled_dot_product_attention, "value", t, q, k, Missing(2, 3, 7, 6)), expected, atol=1e-6
    )
    assert instructed(F.scaled_dot_product_attention, "query", t, q, k, Missing(2, 3, 7, 6)) is None


@pytest.mark.parametrize(
    ("dtype", "has_flash", "features", "saved"),
    [
        (torch.bfloat16, True, 16, [(2, 4, 7), (2,), ()]),
        (torch.float16, False, 16, [(2, 4, 32), (), ()]),
        (torch.float32, True, 16, [(2, 4, 32), (), ()]),
        (torch.bfloat16, True, 12, [(0,)] * 3),  # a kernel loads eight of these at a time
        (torch.float64, True, 16, [(0,)] * 3),
    ],
)
def test_attention_takes_the_fused_kernels_of_a_gpu_where_they_fit(dtype, has_flash, features, saved, monkeypatch):
    """What the kernels return and take, on tensors without values, as no GPU is needed for that."""
    monkeypatch.setattr(attention, "_has_flash", lambda device: has_flash)
    with FakeTensorMode(), torch.no_grad():
        tokens = torch.empty(2, 7, 3 * 4 * features, device="cuda", dtype=dtype)
        qkv = [x.unflatten(-1, (4, features)).transpose(1, 2) for x in tokens.chunk(3, -1)]
        y, *kept = attention.attend(*qkv, False, None)
        e = y.sum().expand_as(y)
        errors = attention.attend_backward(e, y, *kept, *qkv, False, None)
        assert [tuple(x.shape) for x in kept] == saved
        assert {(x.shape, x.dtype) for x in (y, *errors)} == {(qkv[0].shape, dtype)}


@pytest.mark.parametrize("spelling", ["matmul", "einsum"])
def test_a_product_of_two_values_is_attention_over_the_second(spelling):
    t = torch.randn(4, 5, 3)
    attention, values = Missing(4, 5, 7), Missing(4, 7, 3)
    expected = (t.sum(1, keepdim=True) / 7).expand(4, 7, 3)
    if spelling == "matmul":
        assert instructed(torch.matmul, "input", t, attention, values) is None
        assert torch.allclose(instructed(torch.matmul, "other", t, attention, values), expected)
    else:
        nothing, to_values = instructed(torch.einsum, "operands", t, "bnk,bkm->bnm", attention, values)
        assert nothing is None and torch.allclose(to_values, expected)


def test_a_product_with_a_weight_is_transposed():
    t, w = torch.randn(4, 5, 3), torch.randn(5, 7)
    assert torch.allclose(instructed(torch.matmul, "other", t, w, Missing(4, 7, 3)), w.t() @ t)
    assert torch.allclose(
        instructed(torch.einsum, "operands", t, "nk,bkm->bnm", w, Missing(4, 7, 3))[1], w.t() @ t, atol=1e-6
    )


def test_the_greatest_is_instructed_as_if_it_were_the_mean():
    t = torch.randn(4, 3)
    expected = (t / 5).unsqueeze(1).expand(4, 5, 3)
    assert torch.equal(instructed(torch.amax, "input", t, Missing(4, 5, 3), 1), expected)
    maximum = RULES[torch.max].table(None, Missing(4, 5, 3), 1)["input"]
    assert torch.equal(maximum.instruct([t, None]), expected)


def test_a_choice_between_two_values_instructs_both_unless_it_is_known():
    t, condition = torch.randn(4, 3), torch.tensor([True, False, True])
    x = Missing(4, 3)
    assert torch.equal(instructed(torch.where, "input", t, Missing(4, 3), x, x), t)
    assert torch.equal(instructed(torch.where, "input", t, condition, x, x), t * condition)
    assert torch.equal(instructed(torch.where, "other", t, condition, x, x), t * ~condition)


def test_positions_that_are_not_known_are_instructed_evenly():
    t = torch.randn(4, 2)
    expected = (t.sum(1, keepdim=True) / 5).expand(4, 5)
    assert torch.equal(instructed(torch.gather, "input", t, Missing(4, 5), 1, Missing(4, 2)), expected)
    assert torch.equal(instructed(torch.index_select, "input", t, Missing(4, 5), -1, Missing(2)), expected)


class Windows(nn.Module):
    """Swin's way: shifted windows of a map, attention with a table of relative positions, tokens with a class token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(2, 8, 2, 2)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(9, 2))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("index", torch.randint(9, (16,)))
        self.mlp, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)  # (B, 4, 4, 8)
        height, width = x.shape[1], x.shape[2]
        x = torch.roll(F.pad(x, (0, 0, 0, -width % 3, 0, -height % 3)), (-1, -1), (1, 2))[:, :height, :width]
        windows = x.reshape(-1, 2, 2, 2, 2, 8).transpose(2, 3).reshape(-1, 4, 8)
        q, k, v = self.qkv(windows).reshape(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index].view(4, 4, 2).permute(2, 0, 1).unsqueeze(0)
        y = F.scaled_dot_product_attention(F.normalize(q, dim=-1), k, v, attn_mask=bias, scale=3.0)
        x = windows + self.out(y.transpose(1, 2).flatten(2))
        x = x.reshape(-1, 16, 8)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        attention = (x @ x.transpose(1, 2) / math.sqrt(8)).softmax(-1)
        return self.head(F.gelu(self.mlp((attention @ x)[:, 0] + x[:, 1::2].amax(1))))


def test_a_network_of_primitive_ops():
    torch.manual_seed(0)
    model, x = Windows().double(), torch.randn(3, 2, 8, 8, dtype=torch.double, requires_grad=True)
    butd = fxfeedback.to_butd(model, n_tasks=2, embedding=4, input_size=(2, 8, 8))
    tensors = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), tensors)
    updates = torch.autograd.grad(butd(x).square().sum(), tensors)
    for update, gradient in zip(updates, expected, strict=True):
        assert (update - gradient).abs().max() <= 1e-9 * gradient.abs().max()
    assert set(butd.counter_neurons(torch.tensor([0, 1, 1]))) == {"gelu"}


@pytest.mark.parametrize("hard", [False, True])
def test_a_sample_of_categories_has_the_gradient_of_the_soft_one(hard):
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(F.gumbel_softmax(self.first(x), 0.7, hard))

    torch.manual_seed(0)
    model, x = Chooses().double(), torch.randn(5, 4, dtype=torch.double)
    results = []
    for network in (model, fxfeedback.to_butd(model, input_size=(4,))):
        torch.manual_seed(1)
        y = network(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    for theirs, ours in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def test_calls_without_a_rule_say_so():
    x = torch.randn(2, 3, 3)
    for function, arguments in [
        (F.scaled_dot_product_attention, (x, x, x, None, 0.5)),
        (torch.einsum, ("bii->bi", x)),
        (F.embedding, (x.long(), x[0], None, None, 2.0, True)),
        (getattr, (x, "grad")),
    ]:
        with pytest.raises(RuleError, match="no rule for"):
            RULES[function].table(x, *arguments)


def test_the_examples_of_a_rule_may_also_be_set_afterwards():
    product = Rule("mul", RULES[torch.mul].table)
    with pytest.raises(ValueError, match=r"'mul' has no examples: write @rule\(\.\.\., examples="):
        fxfeedback.check_rule(product)
    product.examples = [call(torch.mul, T(4, 3), T(3))]
    fxfeedback.check_rule(product)


def test_a_rule_is_equal_to_itself_only():
    product = Rule("mul", RULES[torch.mul].table)
    assert len({product, Rule("mul", product.table)}) == 2
