"""What users of torch expect of learning: hooks, optimizers, autograd's functions, threads, rules of their own."""

import ast
import contextlib
import copy
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fxfeedback
from fxfeedback.errors import GradientError, OptionError, RuleError
from fxfeedback.rules import RULES, rule
from marks import long, one_in
from networks import build

ROOT = Path(__file__).parents[1]
SIZE = (2, 6, 6)


@pytest.fixture
def convnet():
    """(model, its converted module, an input)"""
    model, x = build("convnet", train=False)
    return model, fxfeedback.to_butd(model, n_tasks=2, input_size=SIZE), x


def mlp(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), nn.Linear(6, 3)).double()


def learning(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-9 * b.abs().max())


# -- no gradient is taken ----------------------------------------------------------------------------------------------


RULE_FILES = sorted(set((ROOT / "fxfeedback/rules").glob("*.py")) - {ROOT / "fxfeedback/rules/ops.py"})
"""Without ops.py, which has no rules: autograd runs its ops as it does torch's, in a plain network."""


@pytest.mark.parametrize("file", RULE_FILES, ids=lambda file: file.stem)
def test_no_rule_uses_autograd(file):
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
        for name in names:
            taken = re.search(r"\b(autograd|func|functorch|grad|vjp|jvp|backward|requires_grad)(\.|$)", name)
            assert not taken, f"{file.name}:{node.lineno} uses {name}"


def test_the_error_pass_runs_without_autograd(convnet, monkeypatch):
    """Nothing in backward records a graph."""
    model, butd, x = convnet
    loss = butd(x, 1).square().sum()
    recorded = []
    graph_of = torch.Tensor.__mul__
    monkeypatch.setattr(torch.Tensor, "__mul__", lambda *a: recorded.append(torch.is_grad_enabled()) or graph_of(*a))
    loss.backward()
    assert model[0].weight.grad is not None and not any(recorded)


# -- which parameters get something ------------------------------------------------------------------------------------


class Auxiliary(nn.Module):
    """Two outputs, of which a loss may use one, and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.main, self.aux, self.unused = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        x = torch.relu(self.trunk(x))
        return self.main(x), self.aux(x)


def without_gradient(outputs, parameters) -> list[str]:
    outputs.square().sum().backward()
    names = [name for name, parameter in parameters if parameter.grad is None]
    for _, parameter in parameters:
        parameter.grad = None
    return names


def test_unused_parameters_get_none():
    model = Auxiliary().double()
    butd, x = fxfeedback.to_butd(model, input_size=(4,)), torch.randn(3, 4, dtype=torch.double)
    outputs = torch.cat(butd(x))
    assert without_gradient(outputs, list(butd.named_parameters())) == ["unused.weight", "unused.bias"]


def test_parameters_of_an_unused_output_get_none():
    model = Auxiliary().double()
    butd, x = fxfeedback.to_butd(model, input_size=(4,)), torch.randn(3, 4, dtype=torch.double)
    for i in range(2):
        expected = without_gradient(model(x)[i], list(model.named_parameters()))
        assert without_gradient(butd(x)[i], list(butd.named_parameters())) == expected


def test_an_unused_output_changes_nothing_for_the_others():
    model = Auxiliary().double()
    butd, x = fxfeedback.to_butd(model, input_size=(4,)), torch.randn(3, 4, dtype=torch.double)
    for network in (model, butd):
        network(x)[0].square().sum().backward()
        if network is model:
            expected = model.trunk.weight.grad.clone()
            model.zero_grad()
    assert near(model.trunk.weight.grad, expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_parts_stay(when):
    model, x = build("convnet", train=False)
    if when == "before":
        model[:5].requires_grad_(False)
    butd = fxfeedback.to_butd(model, input_size=SIZE)
    if when == "after":
        butd.get_submodule("0").requires_grad_(False), butd.get_submodule("4").requires_grad_(False)
    before = {name: p.clone() for name, p in butd.named_parameters()}
    optimizer = torch.optim.SGD(butd.parameters(), 0.1, weight_decay=0.1)
    butd(x).square().sum().backward()
    optimizer.step()
    for name, p in butd.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name


def test_freezing_the_converted_module_freezes_the_model():
    """They have the same parameters."""
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, input_size=SIZE).requires_grad_(False)
    assert butd(x).grad_fn is None and not any(p.requires_grad for p in model.parameters())


# -- parametrizations --------------------------------------------------------------------------------------------------


def test_spectral_norm():
    model = mlp(parametrizations.spectral_norm(nn.Linear(4, 6))).eval()
    butd, x = fxfeedback.to_butd(model, input_size=(4,)), torch.randn(5, 4, dtype=torch.double)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    updates = torch.autograd.grad(butd(x).square().sum(), parameters)
    assert all(map(near, updates, expected))


def test_spectral_norm_in_training_mode():
    """Each call is one power iteration, as in the model, and building is none."""
    model = mlp(parametrizations.spectral_norm(nn.Linear(4, 6), n_power_iterations=1))
    twin, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.double)
    butd = fxfeedback.to_butd(model, input_size=(4,))
    for _ in range(3):
        expected = torch.autograd.grad(twin(x).square().sum(), list(twin.parameters()))
        updates = torch.autograd.grad(butd(x).square().sum(), list(butd.parameters()))
        assert all(map(near, updates, expected))
        assert all(map(torch.equal, model.buffers(), twin.buffers()))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: torch.nn.utils.weight_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: torch.nn.utils.spectral_norm(layer),
    ],
    ids=["weight_norm", "prune", "spectral_norm"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_computes_weights_in_a_hook_is_refused(change):
    """torch.nn.utils' old ways; torch.nn.utils.parametrizations are the new ones."""
    model = nn.Sequential(change(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(fxfeedback.Error):
        fxfeedback.to_butd(model, input_size=(4,))


# -- hooks -------------------------------------------------------------------------------------------------------------


def test_hooks_on_parameters_run(convnet):
    model, butd, x = convnet
    seen = []
    weight = model[0].weight
    weight.register_hook(lambda gradient: seen.append("gradient") or 2 * gradient)
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    (expected,) = torch.autograd.grad(model(x).square().sum(), [model[0].bias])
    butd(x).square().sum().backward()
    assert seen == ["gradient", "accumulated"] and near(model[0].bias.grad, expected)
    once = weight.grad.clone()
    weight.grad = None
    model(x).square().sum().backward()
    assert near(once, weight.grad)


def test_hooks_on_outputs_and_inputs_run(convnet):
    _, butd, x = convnet
    x.requires_grad_()
    y = butd(x)
    y.register_hook(lambda error: 3 * error)
    seen = []
    x.register_hook(seen.append)
    y.sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], x.grad)
    x.grad = None
    butd(x).sum().backward()
    assert near(seen[0], 3 * x.grad)


def test_hooks_on_the_converted_module_run(convnet):
    _, butd, x = convnet
    seen = []
    x.requires_grad_()
    butd.register_forward_pre_hook(lambda module, inputs: seen.append("before") or (2 * inputs[0],))
    butd.register_forward_hook(lambda module, inputs, output: seen.append("after") or 2 * output)
    butd.register_full_backward_hook(lambda module, errors_down, errors: seen.append("backward"))
    expected = 2 * butd.forward(2 * x)
    y = butd(x)
    y.sum().backward()
    assert seen == ["before", "after", "backward"] and torch.equal(y, expected)


def test_hooks_on_the_instruction_head_run(convnet):
    _, butd, x = convnet
    seen = []
    butd.instruction_head.register_forward_hook(lambda *_: seen.append("run"))
    butd(x, 1)
    assert seen


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_inner_modules_are_refused_at_the_call(convnet, kind):
    _, butd, x = convnet
    butd(x)
    handle = getattr(butd.get_submodule("4"), f"register_{kind}")(lambda *_: None)
    with pytest.raises(OptionError, match=r"module '4' has a .*hook"):
        butd(x)
    handle.remove()
    butd(x)


@pytest.mark.parametrize("path", ["", "4"])
@pytest.mark.parametrize("convert", [fxfeedback.to_butd, lambda m, **o: fxfeedback.add_feedback(m, [("8", "4")], **o)])
def test_hooks_on_the_users_model_are_refused_in_building(convert, path):
    model, _ = build("convnet", train=False)
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    with pytest.raises(OptionError, match=r"module .* has a forward hook"):
        convert(model, input_size=SIZE)


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_optimizers_with_groups_of_named_parameters(convnet):
    model, butd, x = convnet
    twin = copy.deepcopy(model)

    def optimizer(network):
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        decayed = [(name, p) for name, p in named if name.endswith("weight")]
        others = [(name, p) for name, p in named if not name.endswith("weight")]
        return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.01}])

    ours, theirs = optimizer(butd), optimizer(twin)
    assert ours.param_groups[0]["param_names"] == theirs.param_groups[0]["param_names"]
    for _ in range(3):
        norms = []
        for network, its in ((butd, ours), (twin, theirs)):
            network.zero_grad()
            network(x).square().sum().backward()
            norms.append(nn.utils.clip_grad_norm_(learning(network), 0.1))
            its.step()
        assert near(*norms)
    # A bias before a batch norm learns from rounding alone.
    assert all(
        near(a, b) for (n, a), b in zip(model.named_parameters(), twin.parameters(), strict=True) if n != "0.bias"
    )
    theirs.load_state_dict(ours.state_dict())


def test_clipping_by_value_and_zero_grad(convnet):
    _, butd, x = convnet
    butd(x).square().sum().backward()
    nn.utils.clip_grad_value_(learning(butd), 1e-3)
    assert max(p.grad.abs().max() for p in learning(butd)) == 1e-3
    butd.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in learning(butd))
    butd.zero_grad()
    assert all(p.grad is None for p in butd.parameters())


def test_gradients_accumulate_over_parts_of_a_batch(convnet):
    model, butd, x = convnet
    butd(x, torch.tensor([0, 1, 1, 0])).square().sum().backward()
    whole = model[4].weight.grad.clone()
    butd.zero_grad()
    for part, task in ((x[:1], [0]), (x[1:], [1, 1, 0])):
        butd(part, torch.tensor(task)).square().sum().backward()
    assert near(model[4].weight.grad, whole)


def test_grad_scaler_under_autocast(convnet):
    model, butd, x = convnet
    butd.float()
    x, scaler = x.float(), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = torch.optim.SGD(learning(butd), 0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(butd(x, 1).float(), torch.tensor([0, 1, 2, 3]))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert nn.utils.clip_grad_norm_(learning(butd), 1.0) < 100
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and scaler.get_scale() == 1024 * 2**5
    scale = scaler.get_scale()  # a step that overflows is left out
    before = model[0].weight.clone()
    optimizer.zero_grad()
    scaler.scale(butd(x).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model[0].weight, before) and scaler.get_scale() == scale / 2


# -- autograd's functions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instructed", [False, True])
def test_functional_call(convnet, instructed):
    _, butd, x = convnet
    task = (1,) if instructed else ()
    others = {name: (1.1 * p.detach()).requires_grad_(p.requires_grad) for name, p in butd.named_parameters()}
    asked = [p for p in others.values() if p.requires_grad]
    before = butd(x, *task).detach()
    y = torch.func.functional_call(butd, others, (x, *task))
    updates = torch.autograd.grad(y.square().sum(), asked)
    assert torch.equal(butd(x, *task), before) and all(p.grad is None for p in butd.parameters())
    with torch.no_grad():
        for p in butd.parameters():
            p.mul_(1.1)
    again = butd(x, *task)
    assert torch.allclose(y, again, rtol=1e-12)
    expected = torch.autograd.grad(again.square().sum(), learning(butd))
    assert all(map(near, updates, expected))


def test_a_subset_of_gradients(convnet):
    model, butd, x = convnet
    expected = torch.autograd.grad(model(x).square().sum(), [model[8].weight, model[4].bias])
    assert all(map(near, torch.autograd.grad(butd(x).square().sum(), [model[8].weight, model[4].bias]), expected))
    assert model[0].weight.grad is None
    butd(x).square().sum().backward(inputs=[model[8].weight, model[4].bias])
    assert all(map(near, (model[8].weight.grad, model[4].bias.grad), expected))
    assert [name for name, p in butd.named_parameters() if p.grad is not None] == ["4.bias", "8.weight"]


def test_calls_without_gradients(convnet):
    _, butd, x = convnet
    expected = butd(x, 1).detach()
    with torch.no_grad():
        assert not butd(x, 1).requires_grad and torch.equal(butd(x, 1), expected)
    with torch.inference_mode():
        assert butd(x, 1).is_inference() and torch.equal(butd(x, 1), expected)
    butd(x, 1).sum().backward()


class Constant(nn.Module):
    """Makes a tensor in its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return torch.relu(self.fc(x)) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.double)


def test_a_graph_that_was_built_in_inference_mode_learns():
    butd, x = fxfeedback.to_butd(Constant().double(), input_size=(3,)), torch.randn(2, 3, dtype=torch.double)
    butd.eval()
    with torch.inference_mode():
        butd(x)
    butd(x).sum().backward()
    assert butd.get_parameter("fc.weight").grad is not None


def test_anomaly_mode(convnet):
    model, butd, x = convnet
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        butd(x, 1).square().sum().backward()
        assert model[0].weight.grad is not None
        model[8].weight.data[0, 0] = float("nan")
        with pytest.raises(RuntimeError, match="CounterHebbBackward' returned nan"):
            butd(x, 1).sum().backward()


@pytest.mark.parametrize(
    "transform",
    [torch.func.grad, torch.func.hessian, lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), torch.func.vmap],
)
def test_the_transforms_of_torch_func_are_refused(convnet, transform):
    model, butd, x = convnet
    with pytest.raises(GradientError, match=r"functorch transforms.* learning=\"backprop\""):
        transform(lambda x: butd(x[None] if x.ndim == 3 else x).sum())(x)
    butd = fxfeedback.to_butd(model, input_size=SIZE, learning="backprop")
    gradient = torch.func.grad(lambda x: butd(x).sum())(x)
    assert near(gradient, torch.func.grad(lambda x: model(x).sum())(x))


def test_states_are_saved_and_loaded(convnet, tmp_path):
    _, butd, x = convnet
    butd(x, 1).square().sum().backward()
    torch.save(butd.state_dict(), tmp_path / "state.pt")
    other = fxfeedback.to_butd(build("convnet", train=False, seed=1)[0], n_tasks=2, input_size=SIZE)
    assert not torch.equal(other(x, 1), butd(x, 1))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(x, 1), butd(x, 1))


# -- threads -----------------------------------------------------------------------------------------------------------


def together(*jobs) -> list[BaseException]:
    """Run the jobs at once, switching between them often; what they raise."""
    errors: list[BaseException] = []

    def run(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return errors


def test_two_threads_call_one_model(convnet):
    _, butd, x = convnet
    inputs = [x[:2], x[1:]]
    expected = [torch.autograd.grad(butd(x, i).square().sum(), learning(butd)) for i, x in enumerate(inputs)]
    results = [[], []]

    def job(i):
        for _ in range(10):
            results[i].append(torch.autograd.grad(butd(inputs[i], i).square().sum(), learning(butd)))

    assert not together(lambda: job(0), lambda: job(1))
    assert all(all(map(near, result, expected[i])) for i in range(2) for result in results[i])


def test_two_threads_make_the_first_call(convnet):
    _, butd, x = convnet

    def job(i):
        for _ in range(4):
            butd._cache.clear()
            butd(x, i).sum().backward()

    assert not together(lambda: job(0), lambda: job(1), lambda: job(0))


class Waits(nn.Module):
    """Traced, it stays in its forward until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.inside, self.go_on = nn.Linear(4, 3), threading.Event(), threading.Event()

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        self.inside.set()
        self.go_on.wait(60)
        return torch.relu(self.fc(x)) * torch.ones(3)


@contextlib.contextmanager
def building_in_another_thread():
    model = Waits()
    thread = threading.Thread(target=lambda: fxfeedback.to_butd(model, input_size=(4,)))
    thread.start()
    model.inside.wait(60)
    try:
        yield
    finally:
        model.go_on.set()
        thread.join()


def test_other_threads_run_as_always_while_one_builds():
    """Modules, functions of autograd's, tensors of a size and parametrizations."""

    def trained() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model, x = mlp(parametrizations.weight_norm(nn.Linear(4, 6))), torch.randn(5, 4, dtype=torch.double)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            y = checkpoint(model, x, use_reentrant=False) + torch.rand(5, 1) * torch.ones(1).expand(3)
            StraightThrough.apply(F.dropout(y)).sum().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    expected = trained()
    with building_in_another_thread():
        assert all(map(torch.equal, trained(), expected))


def test_a_child_that_is_forked_while_another_thread_builds_can_build():
    replaced = [(nn.Module, "__call__"), (torch, "zeros"), (torch.autograd.Function, "apply")]
    before = [getattr(owner, name) for owner, name in replaced]
    with building_in_another_thread():
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(60)  # rather than to wait for ever
                assert [getattr(owner, name) for owner, name in replaced] == before
                fxfeedback.to_butd(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), input_size=(4,))
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    assert [getattr(owner, name) for owner, name in replaced] == before


# -- passes compose ----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("passes, steps", [(2, 3), long(3, 20)])
def test_feedback_networks_learn_alike(passes, steps):
    """The losses of some steps by Counter-Hebb learning and by autograd."""
    losses = []
    for learning in ("counter_hebb", "backprop"):
        torch.manual_seed(0)
        model, _ = build("convnet", train=True)
        network = fxfeedback.add_feedback(model, [("8", "4"), ("5", "1")], passes=passes, input_size=SIZE)
        butd = fxfeedback.to_butd(network, input_size=SIZE, learning=learning)
        assert any(name.startswith("modulations.") for name, _ in butd.named_parameters())
        optimizer, history = torch.optim.Adam(butd.parameters(), 0.01), []
        for _ in range(steps):
            x = torch.randn(8, *SIZE, dtype=torch.double)
            loss = sum(F.cross_entropy(y, (x[:, 0, 0, 0] > 0).long()) for y in butd(x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(torch.tensor(history))
    ours, theirs = losses
    assert (steps < 20 or ours[-1] < ours[0]) and ((ours - theirs).abs() <= 1e-9 * theirs).all()


# -- rules of one's own ------------------------------------------------------------------------------------------------


@pytest.fixture
def same_rules():
    """The table of rules as it is, afterwards."""
    rules = dict(RULES)
    yield
    RULES.clear()
    RULES.update(rules)


def test_contributing_shows_rules_that_hold(same_rules):
    """The code of 'Adding a rule', run as it stands."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a rule")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    inside = "import torch.nn.functional as F\nfrom fxfeedback.rules import T, call, rule, sum_to, transpose, update\n"
    namespace: dict = {}
    exec(inside + "from fxfeedback.rules.core import outer\n" + blocks[0], namespace)
    exec(blocks[1], namespace)
    exec(blocks[2], {})
    own = blocks[2].split("\n\n\n")[1].strip().splitlines()
    assert own[0].startswith("@rule") and len(own) < 10
    fxfeedback.check_rule(RULES[torch.log1p])


def test_a_rule_of_ones_own_is_used_at_once(same_rules):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return torch.special.entr(self.fc(x).sigmoid())

    model, x = Own().double(), torch.randn(3, 4, dtype=torch.double)
    (expected,) = torch.autograd.grad(model(x).sum(), [model.fc.weight])
    fxfeedback.to_butd(model, input_size=(4,))(x).sum().backward()  # as PyTorch decomposes it
    assert near(model.fc.weight.grad, expected)

    @rule(torch.special.entr)
    def entr(y, input):
        """-x log x, learning twice as fast"""
        return {"input": fxfeedback.rules.roles(instruct=lambda t: t, error=lambda e: -2 * e * (torch.log(input) + 1))}

    model.fc.weight.grad = None
    fxfeedback.to_butd(model, input_size=(4,))(x).sum().backward()
    assert near(model.fc.weight.grad, 2 * expected)


class NoRule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x).igamma(x)


def test_a_method_without_a_rule_is_named():
    pattern = (
        r"no rule for torch\.igamma \(at node 'igamma', called at .*test_users_expect\.py:\d+: "
        r"return self\.fc\(x\)\.igamma\(x\)\)\. Add one with @fxfeedback\.rules\.rule\(torch\.igamma\).*CONTR"
    )
    with pytest.raises(RuleError, match=pattern):
        fxfeedback.to_butd(NoRule(), input_size=(4,))


# -- what a model's code does about gradients --------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """The sign, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, error):
        return error


class Trunk(nn.Module):
    """Two linear layers with something of the model's between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 6), nn.Linear(6, 3), between

    def forward(self, x):
        return self.last(torch.relu(self.between(self.first, x)))


def without_gradients(layer, x):
    with torch.no_grad():
        size, (left, right) = x.shape[0], layer(x).chunk(2, 1)
        left = left * 2
    return torch.cat([left, right], 1).view(size, -1)


def inferred(layer, x):
    with torch.inference_mode():
        y = layer(x) * torch.tensor(2.0)
    return y.clone()


def checkpointed(layer, x):
    return checkpoint(lambda y: y.sigmoid() * 2, layer(x), use_reentrant=True)


def gradients(network, x):
    network.zero_grad()
    output = network(x)
    (output[0] if isinstance(output, list) else output).square().sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if not name.startswith("mod")}


@one_in(4)
@pytest.mark.parametrize("ambient", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize(
    "between", [without_gradients, inferred, checkpointed, lambda layer, x: StraightThrough.apply(layer(x))]
)
def test_gradients_are_as_the_models_code_has_them(between, ambient, same_rules):
    @rule(StraightThrough)
    def straight_through(y, input):
        """sign x, and its error as it is"""
        return {"input": fxfeedback.rules.roles(instruct=lambda t: t, error=lambda e: e)}

    model, x = Trunk(between).double(), torch.randn(5, 4, dtype=torch.double)
    expected = {name: grad if grad is None else grad.clone() for name, grad in gradients(model, x).items()}
    with ambient():  # where the graphs are built makes no difference
        feedback = fxfeedback.add_feedback(model, [("last", "last")], input_size=(4,))
        butd = fxfeedback.to_butd(model, input_size=(4,))
        butd(x), feedback(x)
    for network in (feedback, butd):
        for name, found in gradients(network, x).items():
            assert found is None if expected[name] is None else near(found, expected[name])


def test_an_autograd_function_without_a_rule_is_named():
    model = Trunk(lambda layer, x: StraightThrough.apply(layer(x)))
    with pytest.raises(RuleError, match=r"no rule for test_users_expect\.StraightThrough \(at node 'straight_through'"):
        fxfeedback.to_butd(model, input_size=(4,))


def test_complex_numbers_inside_of_a_model():
    model, x = Trunk(lambda layer, x: torch.fft.irfft(torch.fft.rfft(layer(x)) * 1j)), torch.randn(2, 4)
    feedback = fxfeedback.add_feedback(model, [("last", "last")], input_size=(4,))
    torch.testing.assert_close(feedback(x)[0], model(x))
    expected = gradients(model, x)
    found = gradients(fxfeedback.to_butd(model, input_size=(4,)), x)
    torch.testing.assert_close([found[name] for name in expected], list(expected.values()))
