"""A call takes what the model's own call takes, and does what that does."""

import copy
import enum
import functools
from collections import namedtuple

import pytest
import torch
from torch import nn

import fxfeedback
from fxfeedback.errors import InputError, OptionError, TraceError
from marks import long, one_in


class Two(nn.Module):
    """The layers of all models here; `f` is ReLU's input, `g` the head."""

    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(6, 5), nn.Linear(5, 3)

    def run(self, x, mask=None, scale=1.0):
        h = torch.relu(self.f(x))
        return self.g(h if mask is None else h * mask) * scale


class Default(Two):
    def forward(self, x=None):
        return self.run(x)


class Flag(Two):
    def forward(self, x, double=False):
        return self.run(x) * (2 if double else 1)


class Keyword(Two):
    def forward(self, x, *, scale=1.0, mode="sum"):
        y = self.run(x, scale=scale)
        return y.sum(1, keepdim=True) if mode == "mean" else y


class Rest(Two):
    def forward(self, x, **rest):
        return self.run(x, rest.get("mask"), rest.get("scale", 1.0))


class OnlyRest(Two):
    def forward(self, **rest):
        return self.run(rest["x"], **{name: value for name, value in rest.items() if name != "x"})


class Several(Two):
    def forward(self, *xs, scale=1.0):
        return sum(self.run(x, scale=scale) for x in xs)


class Mask(Two):
    def forward(self, x, mask=None, scale=1.0):
        return self.run(x, mask, scale)


class Positional(Two):
    def forward(self, x, mask=None, /, scale=1.0):
        return self.run(x, mask, scale)


class Nested(Two):
    def forward(self, x, extra=(), options=None):
        for part in extra:
            x = x + part
        options = options or {}
        return self.run(x, options.get("mask"), options.get("scale", 1.0))


def popping(forward):
    @functools.wraps(forward)
    def decorated(self, *args, **kwargs):
        double = kwargs.pop("double", False)
        return forward(self, *args, **kwargs) * (2 if double else 1)

    return decorated


class Decorated(Two):
    @popping
    def forward(self, x, mask=None):
        return self.run(x, mask)


class Undressed(Two):
    def bare(function):
        return lambda *args, **kwargs: function(*args, **kwargs)

    @bare
    def forward(self, x, scale=1.0):
        return self.run(x, scale=scale)


class How(enum.Enum):
    SUM = 1
    MEAN = 2


class Kinds(Two):
    def forward(self, x, value=None, names=("a", 1, None)):
        y = self.run(x)
        if value is torch.float64 or value is How.SUM or names[0] == "b":
            return y * 3
        if type(value) is bool:
            return y * 5
        if type(value) is int:
            return y * 7
        return y * value if type(value) is float else y


class Clashing(Two):
    """The names of its inputs are Python's own words, a parameter's, and what graphs call inputs of their own."""

    def __init__(self):
        super().__init__()
        self.mask = nn.Parameter(torch.rand(5))

    def forward(self, mask, instruction=None, gate_f=None, **rest):
        x = mask
        for value in (instruction, gate_f, *rest.values()):
            x = x if value is None else x + value
        return self.g(torch.relu(self.f(x)) * self.mask)


class Sized(Two):
    """Looks at the size of its input."""

    def forward(self, x, double=False):
        n = 3 if x.shape[1] > 2 else 1
        return self.run(x).mean(1) * n * (2 if double else 1)


class Scale(Two):
    """Takes tensors of one number, before and after those with a batch."""

    def forward(self, scale, x, *, shift=None):
        return self.run(x * scale if shift is None else x * scale - shift)


Pair = namedtuple("Pair", "a b")


def tensors():
    torch.manual_seed(0)
    x, z = (torch.randn(4, 6, dtype=torch.double) for _ in range(2))
    return x, z, torch.rand(4, 5, dtype=torch.double)


X, Z, M = tensors()
S = torch.tensor(1.5, dtype=torch.double, requires_grad=True)
CALLS = {
    Default: [([X], {}), ([], {"x": X})],
    Flag: [([X], {}), ([X], {"double": True}), ([X, True], {}), ([], {"double": True, "x": X}), ([X, False], {})],
    Keyword: [([X], {"scale": 0.5}), ([X], {"scale": -1, "mode": "mean"}), ([], {"x": X, "mode": "sum"})],
    Rest: [([X], {"scale": 2.0}), ([X], {"mask": M}), ([], {"x": X, "mask": M, "scale": 3}), ([X], {"other": "a"})],
    OnlyRest: [([], {"x": X}), ([], {"mask": M, "x": X}), ([], {"x": X, "mask": M, "scale": 2.0})],
    Several: [([X], {}), ([X], {"scale": 2.0})],
    Mask: [([X], {"mask": M}), ([], {"mask": M, "x": X}), ([X], {"mask": M, "scale": 2.0}), ([X], {"scale": 0.5})],
    Positional: [([X], {}), ([X], {"scale": 2.0})],
    Nested: [
        ([X], {"extra": (Z,)}),
        ([X], {"extra": [Z, X]}),
        ([X], {"extra": Pair(Z, X)}),
        ([X], {"options": {"mask": M, "scale": 2.0}}),
        ([X], {"options": {}}),
    ],
    Decorated: [([X], {}), ([X], {"double": True}), ([], {"x": X, "mask": M, "double": True})],
    Undressed: [([X], {}), ([], {"x": X, "scale": 2.0})],
    Kinds: [([X], {"value": v}) for v in (1, 1.0, True, None, 2, torch.float64, How.SUM, How.MEAN, float("nan"), "s")]
    + [([X], {"names": ["b", 1]}), ([X], {"value": torch.device("cpu")})],
    Clashing: [([X], {}), ([X], {"gate_f": Z}), ([X], {"instruction": Z, "lambda": Z}), ([X], {"error": Z, "x_1": X})],
    Scale: [([S, X], {}), ([S, X], {"shift": S}), ([], {"shift": Z, "x": X, "scale": S})],
    Sized: [([X], {}), ([X], {"double": True})],
}


def example(kind):
    return {OnlyRest: {"x": X}, Scale: (S.detach(), X)}.get(kind, (X,))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


@one_in(19)
@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("train", [True, long(False)])
def test_a_call_is_the_models_own(kind, train):
    """Outputs and updates, of both kinds and of both on top of each other; each call twice, in between others."""
    model = kind().double().train(train)
    feedback = fxfeedback.add_feedback(model, [("g", "f")], passes=1, example_inputs=example(kind))
    butd = fxfeedback.to_butd(model, n_tasks=2, example_inputs=example(kind))
    both = fxfeedback.to_butd(feedback, n_tasks=2, example_inputs=example(kind))
    for args, named in [*CALLS[kind], *reversed(CALLS[kind])]:
        expected = model(*args, **named)
        given = [*model.parameters(), *([S] if kind is Scale else [])]
        gradients = torch.autograd.grad(expected.sum(), given)
        for network in (butd, feedback, both):
            output = network(*args, **named)
            output = output[0] if isinstance(output, list) else output
            close(output, expected)
            for update, gradient in zip(torch.autograd.grad(output.sum(), given), gradients, strict=True):
                close(update, gradient)
        with torch.no_grad():
            close(butd(*args, **named), expected)


@one_in(3)
@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.__name__)
def test_an_instruction_goes_with_every_call(kind):
    """By name, and where the example's inputs are positional after them: the gates are those of the plain call."""
    model = kind().double()
    butd = fxfeedback.to_butd(model, n_tasks=2, example_inputs=example(kind))
    (gate,) = (value[:1] > 0 for value in butd.counter_neurons(1).values())
    hook = lambda module, given: (given[0] * gate,)  # noqa: E731
    for args, named in CALLS[kind]:
        if kind is not Clashing:
            with torch.no_grad():
                handle = model.g.register_forward_pre_hook(hook)
                expected = model(*args, **named)
                handle.remove()
                close(butd(*args, **named, task=1), expected)
                if args == [X]:  # as in the example
                    close(butd(X, 1, **named), expected)


def test_one_graph_for_calls_that_mean_the_same():
    butd = fxfeedback.to_butd(Flag().double(), example_inputs=(X,))
    for args, named in (((X,), {}), ((), {"x": X}), ((X,), {"double": False}), ((X, False), {})):
        butd(*args, **named)
        assert butd._graphs([X], butd._called(args, named)[0]) is butd._graphs([X])


BAD = {
    "no input": (
        Flag,
        (),
        {},
        r"takes 1 inputs, not 0 inputs: missing a required argument: 'x'; .*forward\(x, double=False\)",
    ),
    "unknown": (Flag, (X,), {"triple": True}, r"got an unexpected keyword argument 'triple'"),
    "twice": (Flag, (X,), {"x": X}, r"multiple values for argument 'x'"),
    "not plain": (Flag, (X,), {"double": object()}, r"double: a graph takes tensors, not a object"),
    "no tensor": (Rest, (3.0,), {}, r"give the call a tensor"),
    "too many": (Mask, (X, M, 2.0), {}, r"1 inputs and an instruction, not 3 inputs: give what else it takes by name"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_model_does_not_take_is_one_error(case):
    kind, args, named, message = BAD[case]
    butd = fxfeedback.to_butd(kind().double(), example_inputs=(X,))
    with pytest.raises(InputError, match=message):
        butd(*args, **named)
    if case != "too many":
        feedback = fxfeedback.add_feedback(kind().double(), [("g", "f")], example_inputs=(X,))
        with pytest.raises(InputError, match=message):
            feedback(*args, **named)


def test_an_argument_with_the_name_of_an_option_is_refused():
    class Tasked(Two):
        def forward(self, x, task=None, passes=1):
            return self.run(x)

    with pytest.raises(OptionError, match=r"forward has an argument 'task', which is an option of the call"):
        fxfeedback.to_butd(Tasked(), input_size=(6,))
    with pytest.raises(OptionError, match=r"'passes'"):
        fxfeedback.add_feedback(Tasked(), [("g", "f")], input_size=(6,))


def test_examples_by_name(tmp_path):
    """Names, updates, select, export's inputs and the saved network are those of the example's call."""
    model = Mask().double()
    given = {"x": X, "mask": M}
    assert {"x", "mask"} <= fxfeedback.node_names(model, example_inputs=given).keys()
    butd = fxfeedback.to_butd(model, n_tasks=2, example_inputs=given)
    feedback = fxfeedback.add_feedback(model, [("g", "f")], passes=1, example_inputs=given)
    fxfeedback.save(butd, tmp_path)
    for network in (butd, copy.deepcopy(butd), fxfeedback.load(tmp_path), feedback):
        for args, named in (((X,), {"mask": M}), ((X, M), {}), ((), given), ((X,), {})):
            output = network(*args, **named)
            close(output[0] if network is feedback else output, model(*args, **named))
    close(butd.select(1)(X, M), butd.eval()(X, M, task=1))
    with pytest.raises(TraceError, match=r"by these names is not a call of Mask: missing a required argument: 'x'"):
        fxfeedback.to_butd(model, example_inputs={"z": X})


def test_options_of_passes_with_the_models_own():
    model = Mask().double()
    feedback = fxfeedback.add_feedback(model, [("g", "f")], passes=2, example_inputs=(X,))
    outputs = feedback(X, mask=M, passes=3)
    assert len(outputs) == 3
    close(outputs[0], model(X, mask=M))
    _, state = feedback.unroll(X, passes=1, mask=M)
    again, _ = feedback.unroll(X, passes=1, mask=M, state=state)
    close(again[0], outputs[1])
    read = feedback.readout(X, ["f", "g"], passes=2, mask=M)
    close(read[1]["g"].value, outputs[1])
    steering = fxfeedback.Steering("g", torch.randn(1, 3, dtype=torch.double), alpha=0.5)
    close(feedback(X, steering=steering, scale=2.0)[0], model(X, scale=2.0))


def test_a_part_with_connections_takes_its_call_in_a_model():
    """Keywords and passes that the model's own code gives it."""

    class Outer(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part, self.last = part, nn.Linear(3, 2).double()

        def forward(self, x, mask):
            return self.last(self.part(mask=mask, x=x, scale=2.0, passes=3)[-1])

    outer = Outer(fxfeedback.add_feedback(Mask().double(), [("g", "f")], example_inputs=(X,)))
    butd = fxfeedback.to_butd(outer, example_inputs=(X, M))
    expected = outer(X, M)
    close(butd(X, M), expected)
    parameters = list(outer.parameters())
    for a, b in zip(*(torch.autograd.grad(y.sum(), parameters) for y in (butd(X, M), expected)), strict=True):
        close(a, b)


def test_connections_in_a_network_that_looks_at_sizes():
    model, small = Sized().double(), torch.randn(4, 2, 6, dtype=torch.double)
    large = small.repeat(1, 2, 1)
    feedback = fxfeedback.add_feedback(model, [("g", "f")], passes=1, example_inputs=(large,))
    butd = fxfeedback.to_butd(feedback, example_inputs=(large,))
    for x in (small, large):
        close(butd(x)[0], model(x))
        close(feedback(x, double=True)[0], model(x, double=True))


def test_files_of_a_network_that_is_called_by_name(tmp_path):
    """Flags as the example has them; `export` compares the file with the network before it is written."""
    model, x = Keyword().float(), X.float()
    butd = fxfeedback.to_butd(model, n_tasks=2, example_inputs={"x": x, "scale": 2.0})
    rest = fxfeedback.add_feedback(OnlyRest(), [("g", "f")], passes=1, example_inputs={"x": x, "mask": M.float()})
    for network, given, expected in (
        (butd, (x,), lambda: butd(x, 1, scale=2.0)),
        (rest, (x, M.float()), lambda: rest(x=x, mask=M.float())[0]),
    ):
        fxfeedback.export(network, tmp_path / "net.onnx", **({"task": 1} if network is butd else {}))
        session = fxfeedback.runtime.Session(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
        found = session(*(value.numpy() for value in given))
        found = torch.from_numpy(found[0] if isinstance(found, list) else found)
        network.eval()
        torch.testing.assert_close(found, expected(), rtol=1e-5, atol=1e-6)
