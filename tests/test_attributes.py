"""Attributes that forward changes: each call of a layer has those of its time, and state kept on self is refused."""

import copy
import itertools
from collections import deque
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fxfeedback
from fxfeedback.errors import TraceError
from marks import long, one_in


def model_of(init, forward):
    """A model with `f` (6 to 6), `conv` (1 to 2 channels) and `norm` (6), and what `init` adds."""

    class Changing(nn.Module):
        total, seen = 0, []

        def __init__(self):
            super().__init__()
            self.f, self.conv, self.norm = nn.Linear(6, 6), nn.Conv1d(1, 2, 3, padding=1), nn.BatchNorm1d(6)
            self.drop, self.act, self.table = nn.Dropout(0.3), nn.Hardtanh(), None
            init(self)

        def forward(self, x):
            return forward(self, x)

    torch.manual_seed(0)
    return Changing().double()


def nothing(m):
    pass


def setting(**attributes):
    def init(m):
        for name, value in attributes.items():
            setattr(m, name, copy.deepcopy(value))

    return init


def results(network, own, x, calls=2):
    """Outputs, gradients and buffers of several calls."""
    made = []
    for _ in range(calls):
        torch.manual_seed(1)
        y = network(x)
        made += [y, *torch.autograd.grad(y.square().sum(), [x, *own.parameters()], allow_unused=True)]
    return [*made, *own.buffers()]


def same(ours, theirs):
    return all(
        (a is None) == (b is None) and (a is None or bool(((a - b).abs() <= 1e-9 * (1 + b.abs().max())).all()))
        for a, b in zip(ours, theirs, strict=True)
    )


# -- each call has its own values --------------------------------------------------------------------------------------


def convolved(m, x):
    return m.conv(x[:, None]).mean(1)


def dilated(m, x):
    for k in (1, 2):
        m.conv.dilation, m.conv.padding = (k,), (k,)
        x = torch.relu(convolved(m, x))
    return x


def dropped(m, x):
    for p in (0.1, 0.6):
        m.drop.p = p
        x = m.drop(m.f(x))
    return x


def frozen_for_once(m, x):
    m.norm.eval()
    x = m.norm(m.f(x))
    m.norm.train(m.training)
    return m.norm(x)


def momenta(m, x):
    for momentum in (0.1, 0.7):
        m.norm.momentum = momentum
        x = m.norm(m.f(x))
    return x


def in_place(m, x):
    m.relu.inplace = False
    y = m.f(x)
    z = m.relu(y) + y
    m.relu.inplace = True
    return m.relu(z * 1) + z


def clipped(m, x):
    m.act.max_val = 0.5
    x = m.act(m.f(x))
    m.act.max_val = 0.1
    return m.act(m.f(x))


def sized(m, x):
    m.pool.output_size = 3
    y = m.pool(x[:, None])[:, 0]
    m.pool.output_size = x.shape[-1]
    return m.f(m.pool(x[:, None])[:, 0]) + y[:, :1]


def inside_a_leaf(m, x):
    m.block.dropout1.p, m.block.norm_first = 0.5, False
    x = m.block(x[:, None])
    m.block.dropout1.p, m.block.norm_first = 0.1, True
    return m.block(x)[:, 0]


def parametrized(m, x):
    m.conv.padding_mode = "circular"
    m.conv._reversed_padding_repeated_twice = [1, 1]
    x = convolved(m, x)
    m.conv.padding_mode = "zeros"
    return convolved(m, x)


def set_with_setattr(m, x):
    for module, k in itertools.product((m.conv,), (1, 2)):
        vars(module).update(dilation=(k,), padding=(k,))
        x = convolved(m, x)
    return x


def chosen(m, x):
    for act in (torch.relu, torch.tanh):
        m.activation = act
        x = m.activation(m.f(x))
    return x


ENCODER = nn.TransformerEncoderLayer(6, 2, 8, 0.2, batch_first=True)
CHANGES = {
    "dilation": (nothing, dilated),
    "vars": (nothing, set_with_setattr),
    "dropout": (nothing, dropped),
    "mode": (nothing, frozen_for_once),
    "momentum": (nothing, momenta),
    "inplace": (setting(relu=nn.ReLU()), in_place),
    "a number": (nothing, clipped),
    "output size": (setting(pool=nn.AdaptiveAvgPool1d(4)), sized),
    "inside of torch's module": (
        setting(block=nn.TransformerEncoderLayer(6, 2, 8, 0.2, batch_first=True)),
        inside_a_leaf,
    ),
    "parametrized": (lambda m: parametrizations.weight_norm(m.conv), parametrized),
    "a function": (nothing, chosen),
}


@one_in(3)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CHANGES)
def test_each_call_of_a_layer_has_the_attributes_of_its_time(name, train):
    model = model_of(*CHANGES[name]).train(train)
    twin, x = copy.deepcopy(model), torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    attributes = [dict(vars(module)) for module in model.modules()]
    expected = results(twin, twin, x)
    assert same(results(fxfeedback.to_butd(model, input_size=(6,)), model, x), expected)
    assert [dict(vars(module)) for module in model.modules()] == attributes  # the user's model is as it was


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "inside of torch's module"])
def test_pass_1_has_the_attributes_of_each_call(name):
    model = model_of(*CHANGES[name]).eval()
    twin, x = copy.deepcopy(model), torch.randn(3, 6, dtype=torch.double)
    nodes = fxfeedback.node_names(model, (6,))
    first = next(node for node in nodes if node.startswith(("f", "conv")) and "." not in node)
    feedback = fxfeedback.add_feedback(model, [(first, first)], passes=2, input_size=(6,))
    assert torch.equal(feedback(x)[0], twin(x))
    names = [str(node.target) for node in feedback.unrolled().graph.nodes if node.op == "get_attr"]
    assert all(isinstance(feedback._fetch(name), torch.Tensor) for name in names)  # no copy has weights of its own


class Block(nn.Module):
    """CORnet-S's: one set of convolutions for all times, norms of their own for each, a stride at the first only."""

    def __init__(self, inputs, outputs, times):
        super().__init__()
        self.times = times
        self.conv_input = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.skip = nn.Conv2d(outputs, outputs, 1, stride=2, bias=False)
        self.norm_skip = nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(outputs, 2 * outputs, 1, bias=False)
        self.nonlin1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * outputs, 2 * outputs, 3, stride=2, padding=1, bias=False)
        self.nonlin2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(2 * outputs, outputs, 1, bias=False)
        self.nonlin3 = nn.ReLU(inplace=True)
        self.output = nn.Identity()
        for t in range(times):
            setattr(self, f"norm1_{t}", nn.BatchNorm2d(2 * outputs))
            setattr(self, f"norm2_{t}", nn.BatchNorm2d(2 * outputs))
            setattr(self, f"norm3_{t}", nn.BatchNorm2d(outputs))

    def forward(self, inp):
        x = self.conv_input(inp)
        for t in range(self.times):
            if t == 0:
                skip = self.norm_skip(self.skip(x))
                self.conv2.stride = (2, 2)
            else:
                skip = x
                self.conv2.stride = (1, 1)
            x = self.nonlin1(getattr(self, f"norm1_{t}")(self.conv1(x)))
            x = self.nonlin2(getattr(self, f"norm2_{t}")(self.conv2(x)))
            x = getattr(self, f"norm3_{t}")(self.conv3(x))
            x += skip
            output = self.output(self.nonlin3(x))
        return output


def cornet():
    torch.manual_seed(0)
    v1 = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    decoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    return nn.Sequential(v1, Block(4, 6, 2), Block(6, 6, 3), decoder).double()


@pytest.mark.parametrize("train", [long(False), True], ids=["eval", "train"])
def test_cornet_s_learns_and_runs_in_passes(train, tmp_path):
    model = cornet().train(train)
    twin, x = copy.deepcopy(model), torch.randn(3, 3, 16, 16, dtype=torch.double, requires_grad=True)
    plain = copy.deepcopy(model)
    assert same(results(fxfeedback.to_butd(model, input_size=(3, 16, 16)), model, x), results(twin, twin, x))
    model = copy.deepcopy(plain)
    feedback = fxfeedback.add_feedback(model, [("2.nonlin3_2", "1.conv2_1")], passes=2, input_size=(3, 16, 16))
    assert torch.equal(feedback(x)[0], plain(x))
    assert feedback.readout(x, ["1.conv2", "1.conv2_1"])[0]["1.conv2_1"].value.shape[-1] == 4


@pytest.mark.long
def test_cornet_s_instructed_as_a_file(tmp_path):
    pytest.importorskip("onnxruntime")
    butd = fxfeedback.to_butd(cornet().float().eval(), n_tasks=2, input_size=(3, 16, 16)).eval()
    fxfeedback.export(butd, tmp_path / "cornet.onnx")
    x = torch.randn(3, 3, 16, 16)
    session = fxfeedback.runtime.Session(tmp_path / "cornet.onnx")
    task = torch.tensor([0, 1, 1])
    assert torch.allclose(session(x, task=task), butd(x, task), atol=1e-4)
    assert (butd.select(1)(x[1:]) - butd(x[1:], 1)).abs().max() < 1e-5


# -- state -------------------------------------------------------------------------------------------------------------


def hidden(m, x):
    z = torch.relu(m.f(x)) + (0 if m.h is None else m.h)
    m.h = z.detach()
    return z


def counted(m, x):
    m.n += 1
    return m.f(x) * m.n


def counted_idly(m, x):
    m.n += 1
    return m.f(x)


def counted_for_later(m, x):
    m.n += 1
    return m.f(x) * (2 if m.n > 5 else 1)


def counted_by_iterator(m, x):
    return m.f(x) * next(m.c)


def counted_in_an_object(m, x):
    m.o.n += 1
    return m.f(x) * m.o.n


def counted_in_a_part(m, x):
    m.f.k = getattr(m.f, "k", 0) + 1
    return m.f(x) * m.f.k


def counted_in_the_class(m, x):
    type(m).total += 1
    return m.f(x) * m.total


def listed(m, x):
    m.values.append(m.f(x))
    return sum(m.values)


def listed_idly(m, x):
    m.values.append(m.f(x).mean())
    return m.f(x)


def listed_in_the_class(m, x):
    m.seen.append(1)
    return m.f(x) * len(m.seen)


def in_a_dict(m, x):
    m.d["h"] = m.d.get("h", 0) * 0.5 + m.f(x)
    return m.d["h"]


def other_at_first(m, x):
    y = m.f(x) if m.first else m.f(m.f(x))
    m.first = False
    return y


def attribute_set_afterwards(m, x):
    x = convolved(m, x)
    m.conv.dilation, m.conv.padding = (2,), (2,)
    return x


def mode_set_afterwards(m, x):
    x = m.norm(m.f(x))
    m.norm.eval()
    return x


def swapped(m, x):
    m.f, m.g = m.g, m.f
    return m.f(x)


def plain_tensor_written(m, x):
    m.k.mul_(0.9)
    return m.f(x) * m.k


def buffer_replaced(m, x):
    m.b = m.b * 0.9
    return m.f(x) * m.b


def averaged_weights(m, x):
    m.table = m.f.weight * 1 if m.table is None else 0.9 * m.table + 0.1 * m.f.weight
    return F.linear(x, m.table)


def grown_weights(m, x):
    if m.table is None:
        m.table = m.f.weight * 2
    m.table.add_(1)
    return F.linear(x, m.table)


STATE = {
    "an average of weights": (nothing, averaged_weights, "'table'"),
    "a cache that grows": (nothing, grown_weights, "'table'"),
    "a hidden state": (setting(h=None), hidden, "'h', set at .*test_attributes.py:.* m.h = z.detach"),
    "a counter": (setting(n=0), counted, "'n', called at .*test_attributes.py:.* return m.f"),
    "a counter that nobody reads": (setting(n=0), counted_idly, r"'n', set at .* m.n \+= 1"),
    "a counter that matters later": (setting(n=0), counted_for_later, "'n'"),
    "an iterator": (setting(c=itertools.count(1)), counted_by_iterator, "'c'"),
    "an object's attribute": (setting(o=SimpleNamespace(n=0)), counted_in_an_object, "'o'"),
    "a part's attribute": (nothing, counted_in_a_part, "'f.k'"),
    "a class's attribute": (nothing, counted_in_the_class, "'Changing.total'"),
    "a list": (setting(values=[]), listed, "'values'"),
    "a list that nobody reads": (setting(values=[]), listed_idly, "'values'"),
    "a deque": (setting(values=deque(maxlen=2)), listed, "'values'"),
    "a class's list": (nothing, listed_in_the_class, "'Changing.seen'"),
    "a dict": (setting(d={}), in_a_dict, "'d'"),
    "a flag": (setting(first=True), other_at_first, "'first', called at"),
    "a layer's attribute": (nothing, attribute_set_afterwards, "'conv.padding' or 'conv.dilation'"),
    "a layer's mode": (nothing, mode_set_afterwards, "'norm.training'"),
    "a swap": (setting(g=nn.Linear(6, 6)), swapped, "'f' or 'g'"),
    "a plain tensor": (setting(k=torch.ones(6).double()), plain_tensor_written, "'k'"),
    "a buffer": (lambda m: m.register_buffer("b", torch.ones(6)), buffer_replaced, "'b'"),
}


@one_in(3)
@pytest.mark.parametrize("convert", ["to_butd", "add_feedback"])
@pytest.mark.parametrize("name", STATE)
def test_state_on_self_is_refused(name, convert):
    init, forward, message = STATE[name]
    model = model_of(init, forward).train()
    before, total = copy.deepcopy(model.__dict__), (type(model).total, list(type(model).seen))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(TraceError, match=f"keeps state from call to call, in {message}"):
        if convert == "to_butd":
            fxfeedback.to_butd(model, input_size=(6,))
        else:
            fxfeedback.add_feedback(model, [("f", "f")], input_size=(6,))
    assert (type(model).total, list(type(model).seen)) == total
    assert all(map(torch.equal, model.state_dict().values(), state.values()))
    assert {k: str(v) for k, v in vars(model).items()} == {k: str(v) for k, v in before.items()}


def kept_table(m, x):
    if m.table is None:
        m.table = torch.arange(6.0).double()
    return m.f(x) + m.table


def kept_by_size(m, x):
    if x.shape[-1] not in m.tables:
        m.tables[x.shape[-1]] = torch.arange(6.0).double()
    return m.f(x) + m.tables[x.shape[-1]]


def kept_by_shape(m, x):
    key = (x.shape, "table")
    if key not in m.tables:
        m.tables[key] = torch.arange(6.0).double()
    return m.f(x) + m.tables[key]


def made_anew(m, x):
    m.table, m.size = torch.arange(6.0).double(), x.shape
    return m.f(x) + m.table


def for_this_call(m, x):
    m.values = []
    for _ in range(2):
        m.values.append(m.f(x if not m.values else m.values[-1]))
    return sum(m.values)


def for_somebody_to_see(m, x):
    m.seen_last = torch.relu(m.f(x))
    m.f.output = m.seen_last
    return 2 * m.seen_last


def counting_buffer(m, x):
    m.count.add_(1)
    return m.f(x) * m.count


NO_STATE = {
    "a table": (nothing, kept_table),
    "tables by size": (setting(tables={}), kept_by_size),
    "tables by shape": (setting(tables={}), kept_by_shape),
    "a table made anew": (nothing, made_anew),
    "a list of this call": (nothing, for_this_call),
    "a value that nobody reads": (setting(seen_last=None), for_somebody_to_see),
    "a buffer that counts": (lambda m: m.register_buffer("count", torch.tensor(0)), counting_buffer),
}


@pytest.mark.parametrize("name", NO_STATE)
def test_what_the_next_call_computes_all_the_same_is_no_state(name):
    model = model_of(*NO_STATE[name])
    twin, x = copy.deepcopy(model), torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    butd = fxfeedback.to_butd(model, input_size=(6,))
    assert same(results(butd, model, x, 3), results(twin, twin, x, 3))


def cached(m, x):
    if "weight" not in m.tables:
        m.tables["weight"] = F.normalize(m.f.weight, dim=0).t()
    return torch.relu(m.f(x)) @ m.tables["weight"]


def cached_in_a_place(m, x):
    if m.table is None:
        m.table = (torch.tanh(m.f.weight), [m.f.bias * 2])
    return F.linear(x, m.table[0], m.table[1][0])


@pytest.mark.parametrize("forward", [cached, cached_in_a_place])
def test_a_cache_of_what_parameters_alone_decide_is_computed_in_every_call(forward):
    """As timm's LeViT keeps its tables of biases; of a plain model the cache would go stale."""
    model = model_of(setting(tables={}), forward)
    x = torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    butd = fxfeedback.to_butd(model, input_size=(6,))
    for factor in (1, 1.5, 1.5):
        with torch.no_grad():
            model.f.weight.mul_(factor)
        fresh = copy.deepcopy(model)
        assert same(results(butd, model, x, 1), results(fresh, fresh, x, 1))
    assert not model.tables and model.table is None


def test_a_value_left_on_self_is_not_there_rather_than_old():
    butd = fxfeedback.to_butd(model_of(*NO_STATE["a value that nobody reads"]), input_size=(6,))
    butd(torch.randn(2, 6).double())
    for owner, name in ((butd, "seen_last"), (butd.f, "output")):
        with pytest.raises(AttributeError):
            getattr(owner, name)


# -- what else forward may do to modules -------------------------------------------------------------------------------


def frozen_and_thawed(m, x):
    m.f.requires_grad_(False)
    y = m.f(x)
    m.f.requires_grad_(True)
    return m.norm(y)


def frozen(m, x):
    for parameter in m.f.parameters():
        parameter.requires_grad = False
    return m.norm(m.f(x))


def registers(m, x):
    if not hasattr(m, "late"):
        m.register_buffer("late", torch.ones(6).double())
    return m.f(x) * m.late


def writes(m, x):
    m.norm.running_mean.mul_(0.9)
    return m.norm(m.f(x))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (frozen_and_thawed, r"changes requires_grad of 'f.weight'"),
        (frozen, r"changes requires_grad of 'f.weight'"),
        (registers, r"makes 'late' in its first call: call the model once"),
        (writes, r"writes into the buffer 'norm.running_mean'"),
    ],
)
def test_a_refused_model_is_as_it_was(forward, message):
    model = model_of(nothing, forward)
    state = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(TraceError, match=message):
        fxfeedback.to_butd(model, input_size=(6,))
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, state[name][0]) and tensor.requires_grad == state[name][1]
    assert F.linear(torch.ones(6).double(), model.f.weight).shape == (6,)
