"""Every mistake has one clear message that says what to do, and leaves the model as it was."""

import re

import pytest
import torch
from torch import nn

import fxfeedback
from fxfeedback.errors import InputError, NodeNameError, OptionError, RuleError, TraceError
from networks import build


class BranchesOnValues(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, y):
        return self.fc(x) + y


class Exotic(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return torch.igamma(self.fc(x), x)


class OverwritesAView(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = self.fc(x)
        x[:, 1:].mul_(2)
        return x


class TwoEnds(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.left(x) + self.right(x)


class Masks(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x)[:, torch.tensor([True, False, True, True])]


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({"class": nn.Linear(4, 3)})

    def forward(self, x):
        return self.heads["class"](x)


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


BUILDING = {
    "untraceable": (
        lambda: BranchesOnValues(),
        {"input_size": (4,)},
        TraceError,
        r"cannot trace BranchesOnValues.*test_errors.py:\d+: return x if",
    ),
    "wrong size": (
        mlp,
        {"input_size": (5,)},
        TraceError,
        r"does not run on an input of size \(1, 5\).*at node '0'.*input_size=",
    ),
    "too few inputs": (
        TwoInputs,
        {"input_size": (4,)},
        TraceError,
        r"TwoInputs takes 2 inputs, not 1: pass example_inputs= with a tensor for each",
    ),
    "no size": (lambda: BranchesOnValues(), {}, InputError, r"cannot be guessed: pass input_size="),
    "size of nothing": (mlp, {"input_size": (0,)}, InputError, r"without its batch"),
    "no rule": (
        Exotic,
        {"input_size": (4,)},
        RuleError,
        r"no rule for torch\S*igamma \(at node 'igamma', called at .*test_errors.py:\d+: return torch.igamma.*ING.md",
    ),
    "a module that does not open": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.MaxUnpool1d(2)),
        {"input_size": (4, 4)},
        RuleError,
        r"torch.nn.MaxUnpool1d does not open into ops that have rules.*at node '1'",
    ),
    "an in-place op on a view": (
        OverwritesAView,
        {"input_size": (4,)},
        RuleError,
        r"in-place op at node 'mul_', called at .*x\[:, 1:\].mul_\(2\) overwrites memory that is read again as 'fc'",
    ),
    "a boolean mask": (
        Masks,
        {"input_size": (4,)},
        TraceError,
        r"what 'getitem' returns depends on values, called at .*True, True\]\)\], as with.*positions in __init__",
    ),
    "a name that is a keyword": (
        Keyword,
        {"input_size": (4,)},
        TraceError,
        r"'heads.class' is called like Python's own word 'class'.*rename it, for example to 'class_'",
    ),
    "unknown head": (
        mlp,
        {"input_size": (4,), "head": "layer2"},
        NodeNameError,
        r"no node is called 'layer2'.*node_names",
    ),
    "unknown head, near": (
        TwoEnds,
        {"input_size": (4,), "head": "lef"},
        NodeNameError,
        r"did you mean 'left'",
    ),
    "head is no layer": (
        mlp,
        {"input_size": (4,), "head": "1"},
        NodeNameError,
        r"'1' is not a linear layer or convolution; candidates: '0', '2'",
    ),
    "no head": (
        TwoEnds,
        {"input_size": (4,), "n_tasks": 2},
        NodeNameError,
        r"on every path.*pass head= with one of 'left', 'right'",
    ),
    "unknown site": (mlp, {"input_size": (4,), "sites": ["relu"]}, NodeNameError, r"no node is called 'relu'"),
    "site out of reach": (mlp, {"input_size": (4,), "sites": ["2"]}, NodeNameError, r"TD does not reach '2'"),
    "weights": (
        mlp,
        {"input_size": (4,), "weights": "apart"},
        OptionError,
        r"weights='apart': choose one of 'shared', 'separate'",
    ),
    "lateral": (
        mlp,
        {"input_size": (4,), "lateral": "max"},
        OptionError,
        r"lateral='max'.*'galu', 'multiply', 'add', or pass a function",
    ),
    "no tasks": (mlp, {"input_size": (4,), "n_tasks": 0}, OptionError, r"n_tasks=0"),
    "embedding of nothing": (mlp, {"input_size": (4,), "embedding": 5}, OptionError, r"pass n_tasks="),
    "heads of nothing": (mlp, {"input_size": (4,), "heads": "per_task"}, OptionError, r"needs n_tasks="),
    "embedding of the wrong size": (
        mlp,
        {"input_size": (4,), "n_tasks": 2, "embedding": nn.Linear(2, 5)},
        OptionError,
        r"makes \(5,\).*takes \(6,\)",
    ),
}


@pytest.mark.parametrize("case", BUILDING)
def test_mistakes_in_building(case):
    make, options, kind, message = BUILDING[case]
    model = make()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        fxfeedback.to_butd(model, **options)
    assert isinstance(caught.value, fxfeedback.Error)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


OPTIONS = [
    *({"n_tasks": n} for n in (0, -1, 1.5, True, "2")),
    *({"n_tasks": 2, "embedding": e} for e in (0, -3, 2.5, True, "4", [4, 0], [4, "5"], {4: 5})),
    *({"n_tasks": 2, "instruction_size": n} for n in (0, 2.0, "2")),
    *({"td_noise": n, "td_init": "symmetric", "weights": "separate"} for n in ("x", -1, float("nan"), None)),
    *({"update_noise": n} for n in ("x", -0.1, float("inf"), True)),
    *({"sites": s} for s in ("1", 1, [1])),
    {"head": 2},
    {"td_bias": "yes"},
    *({"lateral": f} for f in (None, 3)),
    *({name: "other"} for name in ("weights", "td_learning", "td_init", "norm", "gating", "heads", "learning")),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_a_wrong_kind_are_refused_by_name(options):
    (name, value), *_ = sorted(options.items(), key=lambda item: item[0] in ("n_tasks", "weights", "td_init"))
    with pytest.raises(OptionError, match=f"^{name}={re.escape(repr(value))}: "):
        fxfeedback.to_butd(mlp(), input_size=(4,), **options)


@pytest.mark.parametrize("passes", [0, -1, 1.5, True, "2", None], ids=repr)
def test_a_number_of_passes_is_a_whole_number_from_1_on(passes):
    with pytest.raises(OptionError, match=rf"^passes={passes!r}: give a whole number from 1 on"):
        fxfeedback.add_feedback(mlp(), [("2", "1")], passes=passes, input_size=(4,))


FRONTS = {
    "to_butd": fxfeedback.to_butd,
    "add_feedback": lambda model, **size: fxfeedback.add_feedback(model, [("2", "1")], **size),
    "node_names": fxfeedback.node_names,
}
ARGUMENTS = {
    "no model": ((None,), {}, OptionError, r"the model is None, not a torch.nn.Module"),
    "a class": ((nn.Linear,), {}, OptionError, r"not a torch.nn.Module: call it, and pass the module"),
    "a number as size": ((mlp(),), {"input_size": 8}, InputError, r"input_size=8: give the size of one input without"),
    "a name as size": ((mlp(),), {"input_size": "4"}, InputError, r"input_size='4': give the size"),
    "a tensor": ((mlp(),), {"example_inputs": torch.zeros(1, 4)}, InputError, r"a tuple with a tensor for each input"),
    "no batch": (
        (mlp(),),
        {"example_inputs": (torch.zeros(()),)},
        InputError,
        r"shape \(\): .*a batch dimension first",
    ),
    "a list": ((mlp(),), {"example_inputs": ([1.0],)}, InputError, r"holds a list: give a tensor for each input"),
    "both": ((mlp(),), {"input_size": (4,), "example_inputs": (torch.zeros(1, 4),)}, InputError, r"not both"),
}


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("case", ARGUMENTS)
def test_mistakes_in_what_is_converted(case, front):
    given, how, kind, message = ARGUMENTS[case]
    with pytest.raises(kind, match=message):
        FRONTS[front](*given, **how)


TAKE_A_PATH = {
    "export": lambda path: fxfeedback.export(fxfeedback.add_feedback(mlp(), [("2", "1")], input_size=(4,)), path),
    "export_learner": lambda path: fxfeedback.export_learner(fxfeedback.to_butd(mlp(), input_size=(4,)), path),
    "draw": lambda path: fxfeedback.draw(mlp(), path),
    "Session": fxfeedback.runtime.Session,
    "Learner": fxfeedback.runtime.Learner,
}


@pytest.mark.parametrize("path", [None, 3])
@pytest.mark.parametrize("name", TAKE_A_PATH)
def test_what_is_not_a_path_is_refused(name, path):
    with pytest.raises(OptionError, match=f"path={path}: give a string or a pathlib.Path"):
        TAKE_A_PATH[name](path)


CALLS = {
    "id too large": (lambda b, x: b(x, torch.tensor([0, 1, 2, 3])), r"between 0 and 2; got 0 to 3"),
    "negative id": (lambda b, x: b(x, torch.tensor([0, 1, -1, 2])), r"between 0 and 2; got -1 to 2"),
    "one id too many": (
        lambda b, x: b(x, torch.tensor([0, 1, 2, 1, 1])),
        r"\(4,\) integer ids or \(4, 3\) floats, not torch.int64 of shape \(5,\)",
    ),
    "short vector": (lambda b, x: b(x, torch.zeros(4, 2)), r"has shape \(4, 3\), not \(4, 2\)"),
    "too few vectors": (lambda b, x: b(x, torch.zeros(3, 3)), r"has shape \(4, 3\), not \(3, 3\)"),
    "booleans": (lambda b, x: b(x, torch.ones(4, dtype=torch.bool)), r"integer ids"),
    "too many inputs": (lambda b, x: b(x, x, 1), r"takes 1 inputs and an instruction, not 3 inputs"),
    "no inputs": (lambda b, x: b(), r"not 0 inputs"),
}


@pytest.mark.parametrize("case", CALLS)
def test_mistakes_in_calls(case):
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=3, input_size=(2, 6, 6))
    call, message = CALLS[case]
    with pytest.raises(InputError, match=message):
        call(butd, x)
    assert butd(x, 1).shape == (4, 5)  # and the network is usable afterwards


def test_a_wrong_image_size_at_a_call():
    model, _ = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=3, input_size=(2, 6, 6))
    with pytest.raises(TraceError, match=r"does not run on an input of size \(1, 2, 12, 12\)"):
        butd(torch.zeros(4, 2, 12, 12, dtype=torch.double), 1)
    with pytest.raises(TraceError, match=r"does not run on an input of size \(1, 3, 6, 6\)"):
        butd(torch.zeros(4, 3, 6, 6, dtype=torch.double), 1)


def test_a_network_without_a_head_learns_but_takes_no_instruction():
    model = TwoEnds()
    butd = fxfeedback.to_butd(model, input_size=(4,))
    butd(torch.randn(3, 4)).sum().backward()
    assert model.left.weight.grad is not None
    with pytest.raises(NodeNameError, match="pass head="):
        butd(torch.randn(3, 4), 0)


def test_per_task_heads_need_a_task():
    model, x = build("mlp", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=3, input_size=(2, 6, 6), heads="per_task")
    with pytest.raises(InputError, match="one prediction head per task"):
        butd(x)


def test_a_name_that_is_taken():
    model = nn.Sequential()
    model.add_module("td_weights", nn.Linear(4, 3))
    with pytest.raises(OptionError, match=r"'td_weights'.*rename it"):
        fxfeedback.to_butd(model, input_size=(4,))


class Named(nn.Module):
    def __init__(self, kind, name):
        super().__init__()
        part = {"_modules": nn.Linear(4, 4), "_parameters": nn.Parameter(torch.ones(4)), "_buffers": torch.ones(4)}
        self.fc = nn.Linear(4, 4)
        self.inner = nn.Module()
        getattr(self.inner, kind)[name] = part[kind]
        self.kind, self.name = kind, name

    def forward(self, x):
        part = getattr(self.inner, self.kind)[self.name]
        return torch.relu(self.fc(part(x) if self.kind == "_modules" else x * part))


@pytest.mark.parametrize("kind", ["_modules", "_parameters", "_buffers"])
@pytest.mark.parametrize("name", ['a"b', 'x", 0)\ropen("MARK", "w")#', "a b", "a\nb", "é", "²", "a/b", "ﬁ", ""])
def test_a_name_that_the_code_of_a_graph_cannot_say_is_one_error(kind, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Named(kind, name)
    for make in (
        lambda: fxfeedback.node_names(model, (4,)),
        lambda: fxfeedback.to_butd(model, input_size=(4,)),
        lambda: fxfeedback.add_feedback(model, [("relu", "fc")], input_size=(4,)),
    ):
        with pytest.raises(TraceError, match=r"'inner' has .* names of modules.*rename it"):
            make()
    assert not list(tmp_path.iterdir())


class Number(float):
    def __repr__(self):
        return 'open("MARK", "w")'


class Text(str):
    def __repr__(self):
        return 'open("MARK", "w")'


class Constant(nn.Module):
    def __init__(self, slope, kind, options):
        super().__init__()
        self.fc, self.slope, self.kind, self.options = nn.Linear(4, 4), slope, kind, options

    def forward(self, x):
        x = nn.functional.gelu(nn.functional.leaky_relu(self.fc(x), self.slope), approximate=self.kind)
        return x.clamp(**self.options)


def test_a_constant_is_its_value_and_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, x = Constant(0.3, "tanh", {"min": 0.1}), torch.randn(2, 4)
    odd = Constant(Number(0.3), Text("tanh"), {"min": Number(0.1)})
    odd.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fxfeedback.to_butd(odd, input_size=(4,))(x), plain(x))
    with pytest.raises(TraceError, match="names that Python's own code can have"):
        fxfeedback.to_butd(Constant(0.3, "tanh", {'a=open("MARK", "w"), min': 0.1}), input_size=(4,))
    assert not list(tmp_path.iterdir())


class Alike(nn.Module):
    """Names that differ only in what a Python name cannot have."""

    def __init__(self):
        super().__init__()
        self.a_b = nn.Linear(4, 4)
        self.a = nn.Module()
        self.a.b_weight = nn.Parameter(torch.ones(4))
        self.parts = nn.ModuleDict({"x-y": nn.Linear(4, 4), "x_y": nn.Linear(4, 4)})

    def forward(self, x):
        return self.parts["x_y"](torch.relu(self.parts["x-y"](self.a_b(x) * self.a.b_weight)))


def test_names_that_are_one_in_python_stay_two():
    model, x = Alike().double(), torch.randn(2, 4, dtype=torch.double)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    butd = fxfeedback.to_butd(model, input_size=(4,))
    butd(x).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9)
    lrm = fxfeedback.add_feedback(model, [("parts.x-y", "a_b"), ("parts.x_y", "a_b")], input_size=(4,))
    outputs, state = lrm.unroll(x)
    lrm.unroll(x, state=state)
    torch.testing.assert_close(outputs[0], model(x))
