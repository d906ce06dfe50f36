"""What users change on a converted network acts in the next call, as it does on a plain model."""

import copy
import gc
import linecache
import sys
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fxfeedback
from marks import one_in


class Base(nn.Module):
    """Has an attribute for which its objects have no own."""

    level = 1.0


class Net(Base):
    """Layers with settings, and settings of its own: flags, numbers, lists, an object with a dict, a tensor."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.1)
        self.layer_norm, self.drop = nn.LayerNorm([4, 6, 6]), nn.Dropout(0.5)
        self.seq, self.fc = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Linear(4, 3)
        self.flag, self.factors, self.mask = False, [1.0, 2.0], torch.ones(4)
        self.config = SimpleNamespace(k=1.0, more={"a": [1.0]})

    def forward(self, x):
        x = self.drop(self.layer_norm(self.act(self.norm(self.conv(x)))))
        x = self.seq(x) * self.config.k * self.config.more["a"][0] * self.level
        for factor in self.factors:
            x = x * factor
        if self.flag or getattr(self, "later", False):
            x = x * 3
        return self.fc(x.mean((2, 3)) * self.mask)

    def switch(self):
        self.flag = True

    def renew(self):
        self.fc = nn.Linear(4, 5)


def forget_statistics(m):
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(m.norm, name, None)


def enlarge(conv):
    conv.padding, conv.kernel_size = (2, 2), (5, 5)
    conv.weight = nn.Parameter(torch.randn(4, 2, 5, 5))


def tie(m):
    m.seq[0].bias = m.norm.bias


CHANGES = {
    "dropout": lambda m: setattr(m.get_submodule("drop"), "p", 0.0),
    "momentum": lambda m: setattr(m.norm, "momentum", 0.5),
    "cumulative momentum": lambda m: setattr(m.norm, "momentum", None),
    "eps": lambda m: setattr(m.norm, "eps", 0.5),
    "no tracking": lambda m: setattr(m.norm, "track_running_stats", False),
    "no statistics": forget_statistics,
    "eps of a layer norm": lambda m: setattr(m.layer_norm, "eps", 0.7),
    "padding and size": lambda m: enlarge(m.conv),
    "stride": lambda m: [setattr(m.conv, "stride", (2, 2)), setattr(m, "layer_norm", nn.Identity())],
    "dilation": lambda m: [setattr(m.conv, "padding", 2), setattr(m.conv, "dilation", (2, 2))],
    "slope": lambda m: setattr(m.act, "negative_slope", 0.7),
    "in place": lambda m: setattr(m.seq[1], "inplace", True),
    "a flag": lambda m: setattr(m, "flag", True),
    "a flag by a method": lambda m: m.switch(),
    "a flag that was not there": lambda m: setattr(m, "later", True),
    "a flag of the class": lambda m: setattr(m, "level", 2.0),
    "a setting": lambda m: setattr(m.config, "k", 2.0),
    "a setting deep inside": lambda m: m.config.more["a"].__setitem__(0, 5.0),
    "a list": lambda m: m.factors.append(3.0),
    "a tensor": lambda m: setattr(m, "mask", torch.full((4,), 2.0)),
    "a tensor's values": lambda m: m.mask.mul_(3),
    "a child": lambda m: setattr(m, "act", nn.Tanh()),
    "a child by add_module": lambda m: m.add_module("act", nn.Tanh()),
    "a child by a method": lambda m: m.renew(),
    "an inner child": lambda m: m.seq.__setitem__(1, nn.Tanh()),
    "one child more": lambda m: m.seq.append(nn.Tanh()),
    "one child less": lambda m: m.seq.__delitem__(1),
    "the order of children": lambda m: [m.seq._modules.update({"0": m.seq._modules.pop("0")})],
    "a class": lambda m: setattr(m.seq[1], "__class__", nn.Tanh),
    "a forward": lambda m: setattr(m.act, "forward", MethodType(lambda self, x: x * 2, m.act)),
    "no bias": lambda m: setattr(m.conv, "bias", None),
    "a weight": lambda m: setattr(m.conv, "weight", nn.Parameter(torch.randn(4, 2, 3, 3))),
    "tied": tie,
    "a parametrization": lambda m: parametrizations.weight_norm(m.conv),
    "frozen": lambda m: m.conv.requires_grad_(False),
}
CONVERTED = {
    "butd": lambda model: fxfeedback.to_butd(model, input_size=(2, 6, 6)),
    "feedback": lambda model: fxfeedback.add_feedback(model, [], input_size=(2, 6, 6), passes=1),
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float32)


def call(network, x):
    """Output, gradients by name, and buffers."""
    torch.manual_seed(3)
    y = network(x)
    y = y[0] if isinstance(network, fxfeedback.FeedbackModel) else y
    network.zero_grad(set_to_none=True)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return y, gradients, dict(network.named_buffers())


def agree(converted, plain, x):
    ours, theirs = call(converted, x), call(plain, x)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-12)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert {name for name in a if not name.startswith("_tensor_constant")} == b.keys()
        for name in b:
            torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-10)


def network(train):
    torch.manual_seed(0)
    model = Net().train(train)
    model.norm.running_mean.normal_()
    return model, torch.randn(3, 2, 6, 6)


@one_in(19)
@pytest.mark.parametrize("convert", CONVERTED.values(), ids=CONVERTED)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_acts_as_in_the_plain_model(change, train, convert):
    model, x = network(train)
    plain, converted = copy.deepcopy(model), convert(model)
    agree(converted, plain, x)
    for one in (converted, plain):
        torch.manual_seed(7)
        change(one)
    agree(converted, plain, x)
    agree(copy.deepcopy(converted), copy.deepcopy(plain), x)


@pytest.mark.parametrize("convert", CONVERTED.values(), ids=CONVERTED)
def test_a_change_of_the_class_and_one_that_is_taken_back(convert, monkeypatch):
    model, x = network(False)
    converted = convert(model)
    before = call(converted, x)[0]
    monkeypatch.setattr(Base, "level", 5.0)
    assert not torch.allclose(call(converted, x)[0], before)
    monkeypatch.undo()
    n_graphs = len(converted._cache.graphs)
    assert torch.equal(call(converted, x)[0], before) and len(converted._cache.graphs) == n_graphs


@pytest.mark.parametrize("convert", CONVERTED.values(), ids=CONVERTED)
def test_the_users_model_and_its_modules_are_their_own(convert):
    """Tensors are shared, attributes are not: what is set on the model afterwards does not reach the network."""
    model, x = network(False)
    converted = convert(model)
    before = call(converted, x)[0]
    model.act.negative_slope, model.flag = 0.9, True
    assert torch.equal(call(converted, x)[0], before)
    converted.flag, converted.factors = False, [2.0]
    assert model.flag and model.factors == [1.0, 2.0]


def test_what_a_model_has_not_is_an_attribute_like_any_other():
    model, _ = network(False)
    butd = CONVERTED["butd"](model)
    butd.note = "mine"
    assert butd.note == copy.deepcopy(butd).note == "mine"
    del butd.note
    assert not hasattr(butd, "note")


# -- gates that are kept between calls ---------------------------------------------------------------------------------


def exchange(butd):
    """As a moving average is swapped in for the weights."""
    shadow = [torch.randn_like(p) for p in butd.parameters()]
    for p, other in zip(butd.parameters(), shadow, strict=True):
        p.data, other.data = other.data, p.data


def swap(butd):
    torch.utils.swap_tensors(butd.fc.weight, nn.Parameter(torch.randn_like(butd.fc.weight)))


def permute(butd):
    """The same values in other places: sums and norms of the weights stay."""
    for p in butd.parameters():
        p.data.copy_(p.data.flip(0))


def descend(butd):
    with torch.inference_mode():
        for p in butd.parameters():
            p.grad = torch.randn_like(p)
        torch.optim.SGD(butd.parameters(), lr=1.0).step()


def prune_head(butd):
    butd.instruction_head[0].weight.data[:, 0] = 0.0


BEHIND = {
    "data": lambda butd: [p.data.copy_(torch.randn_like(p)) for p in butd.parameters()],
    "one value": lambda butd: butd.fc.weight.data.view(-1)[:1].neg_(),
    "a NumPy view": lambda butd: butd.fc.weight.detach().numpy().__imul__(-1),
    "foreach": lambda butd: torch._foreach_neg_([p.data for p in butd.parameters()]),
    "set_": lambda butd: butd.fc.weight.data.set_(torch.randn_like(butd.fc.weight)),
    "exchanged": exchange,
    "swapped": swap,
    "permuted": permute,
    "an optimizer in inference mode": descend,
    "the instruction head": prune_head,
    "another instruction head": lambda butd: butd.instruction_head.__setitem__(1, nn.Softplus()),
    "a buffer": lambda butd: butd.norm.running_var.data.mul_(torch.rand(4)),
    "eps": lambda butd: setattr(butd.norm, "eps", 3.0),
    "a parametrization": lambda butd: parametrize.register_parametrization(butd.fc, "weight", nn.Softsign()),
    "moved": lambda butd: butd.float().double(),
}


@one_in(13)
@pytest.mark.parametrize("learning", ["counter_hebb", "backprop"])
@pytest.mark.parametrize("change", BEHIND.values(), ids=BEHIND)
def test_gates_are_those_of_the_present_weights(change, learning):
    """Also where torch's version counter sees no change."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.conv, model.norm, model.act = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    model.pool, model.flat, model.fc = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    butd, x = fxfeedback.to_butd(model, 2, input_size=(2, 6, 6), learning=learning).eval(), torch.randn(3, 2, 6, 6)
    with torch.no_grad():
        butd(x, 1)
        change(butd)
        for task in (1, torch.tensor([0, 1, 1])):
            fresh = copy.deepcopy(butd)  # keeps nothing
            torch.testing.assert_close(butd(x, task), fresh(x, task), rtol=0, atol=0)
            change(butd)
            torch.testing.assert_close(butd(x, task), copy.deepcopy(butd)(x, task), rtol=0, atol=0)


def test_an_embedding_that_draws_is_asked_in_every_call():
    class Noisy(nn.Module):
        def forward(self, instruction):
            return torch.rand(len(instruction), 8) - 0.5

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    butd, x = fxfeedback.to_butd(model, 2, embedding=Noisy(), input_size=(4,)).eval(), torch.randn(3, 4)
    assert not torch.equal(butd(x, 1), butd(x, 1))


def test_kept_gates_follow_autocast():
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).float()
    butd, x = (
        fxfeedback.to_butd(model, 2, input_size=(40,), lateral="multiply").float().eval(),
        torch.randn(3, 40).float(),
    )
    with torch.no_grad():
        expected = butd(x, 1)
        with torch.autocast("cpu", torch.bfloat16):
            low = butd(x, 1)
            torch.testing.assert_close(low, copy.deepcopy(butd)(x, 1), rtol=0, atol=0)
        assert torch.equal(butd(x, 1), expected)


# -- how many graphs are kept ------------------------------------------------------------------------------------------


def by_size():
    """A network whose code looks at sizes."""

    class Folding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x):
            x = torch.relu(self.conv(x))
            return self.last(x.mean((2, 3)) if x.shape[-1] % 2 else x.amax((2, 3)))

    return Folding()


def instructed(model):
    butd = fxfeedback.to_butd(model, 2, input_size=(1, 8, 8)).eval()
    return butd, lambda x: butd(x, 1)


def fed_back(model):
    feedback = fxfeedback.add_feedback(model, [("last", "relu")], input_size=(1, 8, 8)).eval()
    return feedback, lambda x: feedback(x)[-1]


SAYS_IT_IS_PYTHONS = """
import torch
from torch import nn

class Config:
    scale = 2.0

class Net(nn.Module):
    bias = 0.5

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.last, self.config, self.shifts = nn.Conv2d(3, 2, 1), Config(), False
        self.config.scale = 2.5

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)) * self.config.scale + self.bias)
        return self.last(x + 1 if self.shifts else x)
"""


@pytest.mark.parametrize("module", [None, "test", "code"])
def test_classes_that_say_they_are_pythons_are_the_users(module, monkeypatch, tmp_path):
    """Code that is run without a module's name, or in a file that is called as one of Python's modules."""
    names = {} if module is None else {"__name__": module}
    if module is not None:
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(__file__=str(tmp_path / f"{module}.py")))
    exec(SAYS_IT_IS_PYTHONS, names)
    torch.manual_seed(0)
    model, x = names["Net"](), torch.randn(2, 1, 8, 8)
    feedback = fxfeedback.add_feedback(model, [("last", "relu")], input_size=(1, 8, 8))
    butd = fxfeedback.to_butd(model, input_size=(1, 8, 8))
    for change in ("m.eval()", "m.shifts = True", "m.config.scale = 3.0", "Net.bias = 1.5"):
        for m in (model, feedback, butd):
            exec(change, {"m": m, "Net": names["Net"]})
        torch.testing.assert_close(feedback(x)[0], model(x))
        torch.testing.assert_close(butd(x), model(x))


@pytest.mark.parametrize("convert", [instructed, fed_back])
def test_the_least_recently_used_graphs_go(convert):
    """All that they hold goes with them, and a size that comes back is right."""
    model = by_size()
    network, call = convert(model)
    sizes = [torch.randn(2, 1, 8 + i % 5, 8 + i) for i in range(7)]
    expected = [call(x) for x in sizes]
    assert len(network._cache.graphs) > 3
    network.max_graphs = 3
    sources = n_sources()
    for _ in range(2):
        for x, y in zip(sizes, expected, strict=True):
            torch.testing.assert_close(call(x), y)
            assert len(network._cache.graphs) <= 3
    assert n_sources() <= sources
    builds = []
    network._build = lambda key: builds.append(key)
    for _ in range(3):
        call(sizes[-1]), call(sizes[-2])
    assert not builds


def n_sources():
    gc.collect()
    return len([name for name in linecache.cache if name.startswith("<eval_with_key>")])
