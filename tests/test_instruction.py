"""The instruction pass, against autograd run backwards through a network whose ops are replaced by their TD roles."""

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

import fxfeedback
from fxfeedback.errors import NodeNameError
from marks import long, one_in
from networks import Auxiliary, build


class Site(torch.autograd.Function):
    """Forward: nothing. Backward: what a gating site does to a counter neuron, which is noted down."""

    @staticmethod
    def forward(ctx, x, notes, by_channel):
        ctx.notes, ctx.by_channel, ctx.index = notes, by_channel, len(notes)
        notes.append(None)
        return x.clone()

    @staticmethod
    def backward(ctx, t):
        positions = (1, 2) if t.shape[-1] == 12 else (2, 3)  # `residual` ends with channels last
        on = (t.mean(positions, keepdim=True) > 0) if ctx.by_channel and t.ndim == 4 else 1
        ctx.notes[ctx.index] = t.relu() * on
        return ctx.notes[ctx.index], None, None


class Scaled(torch.autograd.Function):
    """A squeeze-excitation's product: the instruction goes to x as it is, to the scale averaged over its positions."""

    @staticmethod
    def forward(ctx, x, s):
        return x * s

    @staticmethod
    def backward(ctx, t):
        return t, t.mean((2, 3), keepdim=True)


class Instructed(TorchFunctionMode):
    """Run a network so that its backward pass is the instruction pass."""

    SITES = (F.relu, torch.relu, F.hardtanh, F.gelu, F.silu, F.hardswish)

    def __init__(self, by_channel=False):
        super().__init__()
        self.notes, self.by_channel = [], by_channel

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args else None
        if function in self.SITES:
            return Site.apply(x, self.notes, self.by_channel)
        if function is F.batch_norm:
            return x * (kwargs["weight"] / (args[2] + kwargs["eps"]).sqrt()).view(-1, 1, 1)
        if function is F.group_norm:
            return x * kwargs["weight"].view(-1, 1, 1)
        if function is F.layer_norm:
            return x * kwargs["weight"]
        if function is F.max_pool2d:
            return F.avg_pool2d(x, args[1], kwargs["stride"], kwargs["padding"], kwargs["ceil_mode"])
        if function in (torch.sigmoid, torch.tanh, F.dropout, torch.Tensor.tanh):
            return x
        if function is torch.Tensor.mul and all(isinstance(a, torch.Tensor) and not a.is_leaf for a in args):
            return Scaled.apply(*args)
        return function(*args, **kwargs)


def last_linear(model):
    return [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def reference_counters(model, x, instruction, through_head, by_channel=False):
    """Counter neurons at the sites, from the bottom up. instruction: at the head's output, or at its input."""
    seen = {}
    handle = last_linear(model).register_forward_hook(lambda module, args, y: seen.update(input=args[0], output=y))
    x = x.clone().requires_grad_()
    with Instructed(by_channel) as mode:
        model(x)
    handle.remove()
    start = seen["output" if through_head else "input"]
    shape = instruction.shape + (1,) * (start.ndim - 2)
    with_gradient = [x, *(p for p in model.parameters())]
    torch.autograd.grad(start, with_gradient, instruction.view(shape).expand_as(start), allow_unused=True)
    return [t for t in mode.notes if t is not None]  # none above the head


def corners():
    """A head of tasks or the model's own, gates by unit or by channel: all four for small networks, two for large."""
    for name in ("mlp", "convnet", "residual", "squeezenet1_1", "resnet18", "mobilenet_v2", "densenet121"):
        large = name in ("resnet18", "mobilenet_v2", "densenet121")
        for through_head, by_channel in itertools.product([False, True], repeat=2):
            if not large or through_head != by_channel:
                marks = pytest.mark.long if large else ()
                words = name, "classes" if through_head else "tasks", "channel" if by_channel else "unit"
                yield pytest.param(name, through_head, by_channel, marks=marks, id="-".join(words))


@one_in(3)
@pytest.mark.parametrize("name, through_head, by_channel", corners())
def test_counter_neurons(name, through_head, by_channel):
    model, x = build(name, train=False)
    options = {} if through_head else {"n_tasks": 3, "embedding": (7, 6)}
    butd = fxfeedback.to_butd(model, example_inputs=(x,), gating="channel" if by_channel else "unit", **options)
    instruction = torch.eye(3 if not through_head else len(model(x)[0]), dtype=torch.double)[[0, 2, 1, 1]]
    counters = list(butd.counter_neurons(instruction).values())
    start = instruction if through_head else butd.instruction_head(instruction)
    expected = reference_counters(model, x, start, through_head, by_channel)
    assert len(counters) == len(expected) > 1
    for ours, theirs in zip(counters, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
        assert 0 < (ours > 0).double().mean() < 1


def test_ids_vectors_and_one_id_for_all_agree():
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=3, input_size=(2, 6, 6))
    ids = torch.tensor([2, 0, 2, 1])
    logits = butd(x, ids)
    assert torch.equal(logits, butd(x, F.one_hot(ids, 3).double()))
    assert torch.equal(logits, butd(x, task=[2, 0, 2, 1]))
    assert torch.equal(logits[:1], butd(x, 2)[:1]) and torch.equal(butd(x, 2), butd(x, torch.tensor(2)))
    assert not torch.allclose(logits, butd(x))


@pytest.mark.parametrize("lateral", ["multiply", "add", lambda v, c: torch.where(c > 0, v, 0.5 * v)])
def test_laterals_work_in_both_directions(lateral):
    """By hand, for one hidden layer: v = lateral(relu(z), c) on the way up, e = lateral(e, v) on the way down."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(4,), lateral=lateral)
    function = {"multiply": lambda v, c: v * c, "add": lambda v, c: v + c}.get(lateral, lateral)
    x, task = torch.randn(5, 4, dtype=torch.double), torch.tensor([0, 1, 1, 0, 1])
    for given in (task, None):
        value = model[1](model[0](x))
        if given is not None:
            value = function(value, butd.counter_neurons(given)["1"])
        logits = butd(x, task=given)
        assert torch.allclose(logits, model[2](value), rtol=1e-12)
        error = torch.randn(5, 3, dtype=torch.double)
        update, head_update = torch.autograd.grad(logits, [model[0].weight, model[2].weight], error)
        assert torch.allclose(update, function(error @ model[2].weight, value).T @ x, rtol=1e-12)
        assert torch.allclose(head_update, error.T @ value, rtol=1e-12)


def test_td_biases_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    ).double()
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 5, 5), td_bias=True)
    assert all(layer.bias is not None for layer in butd.instruction_head[::2])
    t = butd.instruction_head(torch.eye(2, dtype=torch.double)).view(2, 4, 2, 2).relu()
    low = F.conv_transpose2d(t, model[2].weight, butd.td_biases["2"]).relu()
    counters = butd.counter_neurons([0, 1])
    assert torch.allclose(counters["3"], t) and torch.allclose(counters["1"], low)
    x = torch.randn(6, 2, 5, 5, dtype=torch.double)
    butd(x).sum().backward()
    hidden = model[1](model[0](x))
    assert torch.allclose(butd.td_biases["2"].grad, hidden.sum((2, 3)).mean(0))
    assert torch.allclose(butd.td_biases["0"].grad, x.sum((2, 3)).mean(0))
    features = model[:5](x)
    assert torch.allclose(butd.td_biases["5"].grad, features.mean(0))
    assert all(p.grad is None for p in butd.instruction_head.parameters())


@pytest.mark.parametrize("name", ["mlp", long("squeezenet1_1")])
def test_heads_per_task(name):
    model, x = build(name, train=False)
    butd = fxfeedback.to_butd(model, n_tasks=3, example_inputs=(x,), heads="per_task")
    shared = fxfeedback.to_butd(model, n_tasks=3, example_inputs=(x,))
    shared.instruction_head.load_state_dict(butd.instruction_head.state_dict())
    task = torch.tensor([0, 2, 1, 2])
    assert torch.allclose(butd(x, task), shared(x, task), rtol=1e-9)  # every head starts as the model's own
    outputs = len(butd.task_heads.weight) // 3
    with torch.no_grad():
        butd.task_heads.weight[outputs : 2 * outputs] *= 2
        butd.task_heads.bias[outputs : 2 * outputs] *= 2
    logits = butd(x, task)
    changed = (logits - shared(x, task)).abs().amax(1) > 1e-9
    assert changed.tolist() == [False, False, True, False]
    logits[:1].sum().backward()
    assert butd.task_heads.weight.grad[:outputs].abs().max() > 0
    assert butd.task_heads.weight.grad[outputs:].abs().max() == 0


class Outputs(nn.Module):
    """A trunk with two heads, and what `give` makes of trunk and heads."""

    def __init__(self, give):
        super().__init__()
        self.trunk, self.give = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), give
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        x = self.trunk(x)
        return self.give(x, self.left, self.right)


class Logits(NamedTuple):
    aux: torch.Tensor
    logits: torch.Tensor


SEVERAL = {
    "a dict": lambda x, left, right: {"a": left(x), "b": right(x)},
    "a tuple": lambda x, left, right: (left(x), right(x)),
    "a list": lambda x, left, right: [left(x), right(x)],
    "features, too": lambda x, left, right: {"features": x, "a": left(x).softmax(-1), "b": right(x)},
    "nested": lambda x, left, right: {"a": (left(x), x), "b": {"c": right(x)}},
}
ONE = {
    "out": (lambda x, left, right: {"aux": right(x), "out": left(x)}, "left"),
    "logits": (lambda x, left, right: Logits(right(x), left(x)), "left"),
    "two readings": (lambda x, left, right: {"a": left(x), "b": left(x).log_softmax(-1)}, "left"),
    "features": (lambda x, left, right: (x, right(x)), "right"),
    "a head used twice": (lambda x, left, right: (left(x), left(x * 2)), "left"),
    "one on the other": (lambda x, left, right: (left(x), right(x) + left(x).mean(-1, keepdim=True), right(x)), None),
    "parts": (lambda x, left, right: left(x).chunk(3, -1), "left"),
    "one": (lambda x, left, right: right(x), "right"),
}


@one_in(19)
@pytest.mark.parametrize("heads", ["shared", "per_task"])
@pytest.mark.parametrize("give", SEVERAL.values(), ids=SEVERAL)
def test_of_several_heads_the_user_chooses(give, heads):
    """The error names them; what is chosen is said, and instructions start there."""
    model = Outputs(give)
    with pytest.raises(NodeNameError, match=r"head of its own: '(left|right)', '(left|right)'; pass head="):
        fxfeedback.to_butd(model, n_tasks=2, input_size=(4,), heads=heads)
    for head, outputs in (("left", 3), ("right", 2)):
        butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(4,), heads=heads, head=head)
        assert butd.head == head
        assert heads == "shared" or len(butd.task_heads.weight) == 2 * outputs
    plain = fxfeedback.to_butd(model, input_size=(4,))
    assert plain.head is None  # it learns all the same
    with pytest.raises(NodeNameError, match="pass head="):
        plain.counter_neurons(0)


@pytest.mark.parametrize("give, head", ONE.values(), ids=ONE)
def test_the_head_that_was_found(give, head):
    model = Outputs(give)
    if head is None:
        with pytest.raises(NodeNameError, match="pass head="):
            fxfeedback.to_butd(model, n_tasks=2, input_size=(4,))
    else:
        assert fxfeedback.to_butd(model, n_tasks=2, input_size=(4,)).head == head


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["small", long("googlenet")])
def test_the_head_of_models_with_auxiliary_ones(name, train):
    small = name == "small"
    net = Auxiliary() if small else torchvision.models.googlenet(num_classes=5, init_weights=False)
    size = (2, 6, 6) if small else (3, 64, 64)
    assert fxfeedback.to_butd(net.train(train), n_tasks=2, input_size=size).head == "fc"
    passes = fxfeedback.add_feedback(build("convnet", train)[0], [("10", "5")], passes=3, input_size=(2, 6, 6))
    assert fxfeedback.to_butd(passes, n_tasks=2, input_size=(2, 6, 6)).head == "10.pass3"


def test_an_embedding_of_the_users_own_and_vectors_that_are_not_one_hot():
    model, x = build("mlp", train=False)
    embedding = nn.Sequential(nn.Linear(4, 12), nn.Tanh()).double()
    butd = fxfeedback.to_butd(model, n_tasks=2, embedding=embedding, instruction_size=4, input_size=(2, 6, 6))
    vectors = torch.randn(4, 4, dtype=torch.double)
    assert torch.equal(butd.counter_neurons(vectors)["4"], embedding(vectors).relu())
    assert butd(x, vectors).shape == (4, 5)
    with pytest.raises(fxfeedback.errors.InputError, match="float vector"):
        butd(x, torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "left", None])
def test_an_instruction_that_opens_no_gates_is_an_error(bad):
    """NaN is not above zero: every unit would be closed, and the output plausible."""
    model, x = build("mlp", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6))
    task = torch.tensor([[0.0, bad]]) if isinstance(bad, float) else [bad]
    for call in (lambda: butd(x, task), lambda: butd.counter_neurons(task), lambda: butd.select(task)):
        with pytest.raises(fxfeedback.errors.InputError, match="instruction"):
            call()


def test_sites_may_be_chosen():
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6), sites=["9", "4"])
    assert list(butd.counter_neurons(0)) == ["4", "9"]
    assert "gated__4" in butd.learner.code
    assert butd(x, torch.tensor([0, 1, 1, 0])).shape == (4, 5)


def test_a_changed_weight_changes_the_gates():
    """The gates of the tasks are kept between calls; any way of changing a weight must be noticed."""
    model, x = build("mlp", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=(2, 6, 6)).requires_grad_(False)
    task = torch.tensor([0, 1, 0, 1])
    before = butd(x, task)
    assert torch.equal(before, butd(x, task))
    state = {key: value.clone() for key, value in butd.state_dict().items()}
    butd.instruction_head[0].weight.mul_(-1)
    assert not torch.equal(before, butd(x, task))
    butd.load_state_dict(state)
    assert torch.equal(before, butd(x, task))
    butd.instruction_head[0].weight.data = -butd.instruction_head[0].weight.data
    assert not torch.equal(before, butd(x, task))
