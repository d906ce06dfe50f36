"""One task's network: exactly the whole network's output, on weights that are really smaller."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.utils._pytree import tree_leaves

import fxfeedback
from fxfeedback.errors import InputError, NodeNameError, OptionError
from fxfeedback.one_task.step_table import MIXES, STEPS
from fxfeedback.rules import RULES
from marks import long, long_but, one_in, sweep
from networks import SMALL, build
from random_graphs import cases

TOLERANCE = 1e-9


class Separable(nn.Module):
    """Constants on their way: depthwise convolutions of channels that are off, with padding and without behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(2, 12, 1), nn.BatchNorm2d(12)
        self.depthwise, self.norm2 = nn.Conv2d(12, 24, 3, padding=1, groups=12), nn.BatchNorm2d(24)
        self.project, self.padded = nn.Conv2d(24, 8, 1), nn.Conv2d(24, 8, 3, padding=1)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu6(self.norm(self.one(x)))
        x = F.softplus(self.norm2(self.depthwise(x)))
        x = self.project(x) + self.padded(self.pool(torch.sigmoid(x)))
        return self.head(F.silu(x).mean((2, 3)))


class Grouped(nn.Module):
    """Groups that keep different numbers of channels, and whole groups that are off."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv2d(12, 18, 3, padding=1, groups=3), nn.BatchNorm2d(18), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(18, 12, 2, 2, groups=3), nn.PReLU(12), nn.InstanceNorm2d(12))
        self.last = nn.Sequential(nn.Conv2d(12, 8, 1, groups=2), nn.GroupNorm(2, 8), nn.PReLU())
        self.head = nn.Linear(8 * 64, 5)

    def forward(self, x):
        return self.head(self.last(self.up(self.grouped(self.first(x)))).view(x.shape[0], -1))


class Shuffled(nn.Module):
    """Channels split, shuffled, joined, flipped and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 12, 3, padding=1), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.more = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.LeakyReLU(0.2))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            a, b = x.chunk(2, 1)
            x = torch.cat([a, self.branch(b)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        y = self.more(x.flip(1).permute(0, 2, 3, 1).roll(1, 1).movedim(-1, 1))
        y = y + F.pad(F.channel_shuffle(x, 3), (0, 0, 0, 0, 1, 3))
        return self.head(F.relu(y[:, :, 1:-1]).amax((2, 3)))


class Dense(nn.Module):
    """Every layer reads all before it, through a norm and an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        widths = [4, 10, 16]
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in [*widths, 22])
        self.layers = nn.ModuleList(nn.Conv2d(width, 6, 3, padding=1) for width in widths)
        self.head = nn.Linear(22, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=False):
            features.append(layer(F.elu(norm(torch.cat(features, 1)))))
        x = F.relu(self.norms[-1](torch.cat(features, 1)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Excited(nn.Module):
    """Squeeze-excitation, a residual sum of three and of different channels, an output of several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU())
        self.layers = nn.ModuleList(nn.Conv2d(10, 10, 3, padding=1) for _ in range(3))
        self.squeeze = nn.Sequential(nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 10), nn.Hardsigmoid())
        self.classifier, self.more = nn.Conv2d(10, 3, 1), nn.Conv2d(10, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(x + self.layers[0](x))
        y = y * self.squeeze(y.mean((2, 3)))[:, :, None, None]
        z = F.relu(self.layers[1](y) - 2 * x + self.layers[2](x))
        return {"out": self.classifier(F.interpolate(z + y, scale_factor=2.0)), "more": (self.more(z), y)}


class Tokens(nn.Module):
    """Channels last: what an MLP in front of a norm hides, and a norm that cannot be cut through."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token = nn.Linear(12, 6), nn.Parameter(torch.randn(1, 1, 6))
        self.norm, self.mlp = nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))
        self.last, self.head = nn.Sequential(nn.Linear(6, 10), nn.ReLU()), nn.Linear(10, 5)

    def forward(self, x):
        x = torch.cat(
            [
                self.token.expand(x.shape[0], -1, -1),
                self.embed(x.flatten(2).transpose(1, 2).unflatten(1, (6, 6)).flatten(2)),
            ],
            1,
        )
        x = x + self.mlp(self.norm(x))
        return self.head(self.last(x)[:, 0])


OWN = {kind.__name__.lower(): kind for kind in (Separable, Grouped, Shuffled, Dense, Excited, Tokens)}
MIDDLE = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf")
LARGE = [
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "squeezenet1_1", "googlenet"),
    *("efficientnet_b0", "shufflenet_v2_x0_5", "convnext_tiny", "regnet_y_400mf"),
]


def awake(model):
    """Biases, scales and statistics away from zero and one, where errors would hide."""
    for name, parameter in model.named_parameters():
        if parameter.abs().max() < 1e-4 or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight, 1, 0.5)
    return model.eval()


def network(name):
    if name in OWN:
        torch.manual_seed(0)
        return awake(OWN[name]().double()), torch.randn(4, 2, 6, 6, dtype=torch.double)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of GoogLeNet's start
        model, x = build(name, train=False)
    return awake(model), x


def instructed(name, **options):
    model, x = network(name)
    torch.manual_seed(1)
    options = {"n_tasks": 3, "embedding": 7, "gating": "channel"} | options
    return fxfeedback.to_butd(model, example_inputs=(x,), **options).eval(), x


def assert_selects(butd, x, task, tolerance=TOLERANCE):
    """The selected network, which gives what the whole one gives."""
    selected = butd.select(task)
    with torch.no_grad():
        ours, whole = tree_leaves(selected(x)), tree_leaves(butd.eval()(x, task))
    for a, b in zip(ours, whole, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    return selected


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


# -- the law ----------------------------------------------------------------------------------------------------------


@one_in(5)
@pytest.mark.parametrize("gating", ["unit", "channel"])
@pytest.mark.parametrize("name", long_but([*OWN, *(SMALL.keys() - {"feedback"}), "vit"], [*OWN, *SMALL, "vit", "swin"]))
def test_small_networks(name, gating):
    butd, x = instructed(name, gating=gating)
    for task in (0, 2):
        selected = assert_selects(butd, x, task)
        assert size(selected) < size(butd) or name == "feedback"  # its passes may keep different channels of a weight
        assert not any(key.startswith("gate_") for key in selected.state_dict()) or gating == "unit"


@pytest.mark.parametrize(
    "name", [name if name == "squeezenet1_1" else (long if name in MIDDLE else sweep)(name) for name in LARGE]
)
def test_large_networks(name):
    butd, x = instructed(name)
    for task in (0, 1):
        selected = assert_selects(butd, x[:2], task)
        assert size(selected) < 0.6 * size(butd)


@pytest.mark.parametrize("name", ["convnet", long("mobilenet_v3_small")])
def test_unit_gates_are_constants(name):
    butd, x = instructed(name, gating="unit")
    selected = assert_selects(butd, x[:2], 1)
    gates = [tensor for key, tensor in selected.named_buffers() if key.startswith("gate_")]
    assert gates and all(((gate == 0) | (gate == 1)).all() for gate in gates)


@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(cases(headed=True, most=6))
def test_random_graphs(case):
    model, inputs = case.make()
    try:
        butd = fxfeedback.to_butd(model, example_inputs=inputs, gating="channel").eval()
        nodes = [node for node in butd.bu.graph.nodes if node.op == "call_function"]
        butd.counter_neurons(torch.ones(1, 3))
    except fxfeedback.Error:  # it has no head, or its rules refuse it
        return
    # Gates anywhere, so that channels die in all kinds of ops.
    names = [node.meta["name"] for node in nodes if len(getattr(node.meta["spec"], "shape", ())) > 1][
        case.seed % 2 :: 2
    ]
    try:
        model, inputs = case.make()
        butd = fxfeedback.to_butd(model, example_inputs=inputs, gating="channel", sites=names or None).eval()
        butd.counter_neurons(torch.ones(1, 3))
    except fxfeedback.Error:
        pass
    instruction = torch.randn(1, 3, dtype=torch.double)
    selected = butd.select(instruction)
    torch.manual_seed(1)  # what the model itself draws
    whole = tree_leaves(butd(*inputs, instruction))
    torch.manual_seed(1)
    for a, b in zip(tree_leaves(selected(*inputs)), whole, strict=True):
        assert a.shape == b.shape
        if a.is_floating_point() and a.numel():
            a, b = a[b.isfinite()], b[b.isfinite()]  # a closed gate times the logarithm of zero is NaN, or is left out
            assert not b.numel() or (a - b).abs().max() <= TOLERANCE * max(b.abs().max(), 1e-6)


@one_in(3)
@pytest.mark.parametrize(
    "options",
    [
        {"weights": "separate"},
        {"norm": "separate", "td_bias": True},
        {"heads": "per_task"},
        {"heads": "per_task", "gating": "unit"},
        {"lateral": "multiply"},
        {"lateral": "add"},
        {"lateral": lambda value, counter: value.clamp(max=3) * torch.sigmoid(counter) * (counter > 0)},
        {"n_tasks": None, "embedding": None},
        {"instruction_size": 4},
        {"learning": "backprop"},
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("name", ["convnet", "residual"])
def test_options(name, options):
    butd, x = instructed(name, **options)
    if "heads" in options:
        with torch.no_grad():
            for parameter in butd.task_heads.parameters():
                nn.init.normal_(parameter)
    tasks = (0, 1) if "instruction_size" not in options else (torch.randn(1, 4), torch.randn(1, 4))
    for task in tasks:
        selected = assert_selects(butd, x, task)
        assert size(selected) <= size(butd) + ("add" in options.values()) * size(butd)


def test_a_lateral_of_the_users_that_closes_gates_removes_channels():
    butd, x = instructed("convnet", lateral=lambda value, counter: torch.relu(value * 2) * (counter > 0))
    assert size(assert_selects(butd, x, 1)) < size(butd.select(1)) + 1 < 0.6 * size(butd)


def test_a_network_of_passes():
    torch.manual_seed(0)
    plain, x = network("residual")
    model = fxfeedback.add_feedback(plain, [("relu_1", "relu"), ("conv", "up")], passes=2, example_inputs=(x,))
    for parameter in model.modulations.parameters():
        nn.init.normal_(parameter, std=0.3)
    butd = fxfeedback.to_butd(model, n_tasks=3, example_inputs=(x,), gating="channel").eval()
    assert len(butd(x, 1)) == 2
    assert_selects(butd, x, 1)


# -- gates of the user's choice ---------------------------------------------------------------------------------------


def with_gates(butd, choose):
    """The network with a hand-made instruction pass: site -> (1, C, 1, 1) gates by `choose`."""
    graphs = butd._graphs(butd._stand_ins())
    graphs.gates = lambda counters: [choose(site) for site in graphs.sites]
    return butd


def ones_like_channels(site, value=1.0):
    shape = site.meta["spec"].shape
    return torch.full((1, shape[1], *[1] * (len(shape) - 2)), value, dtype=torch.double)


@one_in(2)
@pytest.mark.parametrize("name", [*OWN, "convnet", "residual"])
def test_everything_is_off(name):
    """Constant logits."""
    butd, x = instructed(name)

    def off(site):
        shape = list(site.meta["spec"].shape)
        return torch.zeros([1] * len(shape), dtype=torch.double).expand([1, *shape[1:]])

    selected = assert_selects(with_gates(butd, off), x, 0)
    logits = tree_leaves(selected(x))[0]
    assert torch.equal(logits[:1].expand_as(logits), logits) or name in ("residual", "excited")


@one_in(3)
@pytest.mark.parametrize("name", ["convnet", "separable", "dense", "excited", "grouped", "shuffled"])
def test_one_layer_is_off(name):
    butd, x = instructed(name)
    sites = butd._graphs(butd._stand_ins()).sites
    for dead in sites:
        butd, _ = instructed(name)
        with_gates(
            butd, lambda site, dead=dead: ones_like_channels(site, float(site.meta["name"] != dead.meta["name"]))
        )
        assert_selects(butd, x, 0)


def test_everything_is_on():
    """Then the network is the model, node for node."""
    model, x = network("convnet")
    butd = with_gates(instructed("convnet")[0], ones_like_channels)
    selected = assert_selects(butd, x, 0)
    assert torch.equal(selected(x), model(x))
    assert {n: p.shape for n, p in selected.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert [node.name for node in selected.graph.nodes if node.op.startswith("call")][1:] == [
        node.name for node in butd.bu.graph.nodes if node.op == "call_function"
    ]


def test_what_is_left_by_hand():
    """A residual block: of each layer the channels that are on at both of its ends."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.head(F.relu(x + self.two(F.relu(self.one(x)))).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Block().double(), torch.randn(3, 2, 6, 6, dtype=torch.double)
    butd = fxfeedback.to_butd(model, n_tasks=2, example_inputs=(x,), gating="channel").eval()
    on = {"relu": [0, 1, 2], "relu_1": [3], "relu_2": [1, 3]}

    def choose(site):
        gates = torch.zeros(1, 4, 1, 1, dtype=torch.double)
        gates[:, on[site.meta["name"]]] = 1
        return gates

    selected = assert_selects(with_gates(butd, choose), x, 0)
    assert torch.equal(selected.stem.weight, model.stem.weight[[0, 1, 2]])
    assert torch.equal(selected.one.weight, model.one.weight[[3]][:, [0, 1, 2]])
    assert torch.equal(selected.two.weight, model.two.weight[[1, 3]][:, [3]])
    assert torch.equal(selected.two.bias, model.two.bias[[1, 3]])
    assert torch.equal(selected.head.weight, model.head.weight[:, [1, 3]])
    assert isinstance(selected.stem.weight, nn.Parameter)


def test_every_rule_says_what_its_op_does_with_channels():
    ours = {rule for rule in RULES.values() if rule.table.__module__.startswith("fxfeedback.")}
    assert not ours - STEPS.keys() - set(MIXES), "put the rule in STEPS of one_task/step_table.py, or in MIXES"
    assert not STEPS.keys() & set(MIXES)


def test_what_nobody_reads_is_not_computed():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1, groups=6), nn.ReLU(), nn.Flatten())
    model = awake(model.append(nn.Linear(24, 5)).double())
    x = torch.randn(3, 2, 4, 4, dtype=torch.double)
    butd = fxfeedback.to_butd(model, n_tasks=2, example_inputs=(x,), gating="channel").eval()
    gates = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.double).reshape(1, 6, 1, 1)
    selected = assert_selects(with_gates(butd, lambda site: gates), x, 0)
    assert selected.get_parameter("0.weight").shape == (3, 2, 3, 3) and selected.get_buffer("1.running_mean").shape == (
        3,
    )
    assert selected.get_parameter("5.weight").shape == (5, 12)


@pytest.mark.parametrize("on", [[0, 1, 2, 3, 4, 5], [1, 4, 5, 6, 7], [3, 4], [6], [0, 5, 8, 9, 10, 11]])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_groups_that_keep_different_numbers_of_inputs(kind, on):
    model = nn.Sequential(nn.Conv2d(2, 12, 1), nn.ReLU(), kind(12, 6, 3, padding=1, groups=3), nn.Flatten())
    model = awake(model.append(nn.Linear(6 * 16, 5)).double())
    x = torch.randn(3, 2, 4, 4, dtype=torch.double)
    butd = fxfeedback.to_butd(model, n_tasks=2, example_inputs=(x,), gating="channel").eval()
    gates = torch.zeros(1, 12, 1, 1, dtype=torch.double)
    gates[:, on] = 1
    selected = assert_selects(with_gates(butd, lambda site: gates), x, 0)
    assert selected.get_parameter("0.weight").shape[0] == len(on)


# -- the module -------------------------------------------------------------------------------------------------------


@one_in(3)
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", ["swin", "excited"])
def test_any_batch(name, batch):
    butd, x = instructed(name)
    assert_selects(butd, torch.randn(batch, *x.shape[1:], dtype=torch.double), 1)


def test_another_size_has_other_gates():
    butd, x = instructed("excited", n_tasks=2)
    larger = torch.randn(2, 2, 9, 7, dtype=torch.double)
    with pytest.raises(InputError, match=r"inputs of size \(2, 6, 6\), not \(2, 9, 7\): butd.select"):
        butd.select(1)(larger)
    with torch.no_grad():
        ours, whole = butd.select(1, input_size=(2, 9, 7))(larger), butd(larger, 1)
    assert torch.allclose(ours["out"], whole["out"], rtol=1e-9)
    assert butd.select(1)(x)["out"].shape == (4, 3, 12, 12)


def test_constants_that_depend_on_the_batch_are_none():
    class Batch(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            x = self.two(F.relu(self.one(x))[:, None] + 1)
            return self.head(x[:, 0] + x.sum(0) + x.flatten(1) / x.shape[0])

    torch.manual_seed(0)
    model, x = Batch().double(), torch.randn(4, 3, dtype=torch.double)
    butd = fxfeedback.to_butd(model, n_tasks=2, example_inputs=(x,)).eval()
    off = with_gates(butd, lambda site: torch.zeros(1, 6, dtype=torch.double))
    calls = model.calls.clone()
    selected = off.select(0)
    assert torch.equal(model.calls, calls)
    for batch in (1, 3, 4):
        assert torch.allclose(selected(x[:batch]), off(x[:batch], 0), rtol=1e-9)


def test_float32():
    butd, x = instructed("separable")
    assert_selects(butd.float(), x.float(), 2, 1e-5)


def test_evaluation_mode_whatever_the_networks_mode_is():
    butd, x = instructed("convnet")
    expected = butd(x, 1)
    butd.train()
    butd.get_submodule("5").eval()
    modes = [module.training for module in butd.modules()]
    selected = butd.select(1)
    assert modes == [module.training for module in butd.modules()] and not selected.training
    assert torch.allclose(selected(x), expected, rtol=1e-9)


def test_its_tensors_are_its_own():
    butd, x = instructed("convnet")
    before = butd.select(1)
    expected = before(x)
    with torch.no_grad():
        for parameter in butd.parameters():
            parameter.mul_(-1.5)
    assert torch.equal(before(x), expected)
    assert not torch.equal(butd.select(1)(x), expected)
    before(x).sum().backward()
    assert all(parameter.grad is None for parameter in butd.parameters())
    assert all(parameter.grad is not None for parameter in before.parameters())


def test_copies_and_states(tmp_path):
    butd, x = instructed("residual")
    selected = butd.select(1)
    twin = copy.deepcopy(selected)
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.zero_()
    torch.save(selected.state_dict(), tmp_path / "state.pt")
    twin.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(twin(x), selected(x))
    torch.save(selected, tmp_path / "whole.pt")
    assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), selected(x))
    assert "conv2d" in selected.code and "conv.weight" in selected.state_dict()


def test_compile():
    butd, x = instructed("shuffled")
    selected = butd.select(1)
    compiled = torch.compile(selected, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), selected(x), rtol=1e-9)


def assert_in_onnxruntime(file, x, expected):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for ours, theirs in zip(session.run(None, {session.get_inputs()[0].name: x.numpy()}), expected, strict=True):
        assert abs(ours - theirs.numpy()).max() <= 1e-5 * theirs.abs().max()


@one_in(2)
@pytest.mark.parametrize("name", ["excited", "shuffled"])
def test_export(name, tmp_path):
    """As our product, with torch's names, and by torch's own exporter."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    butd, x = instructed(name)
    butd, x = butd.float(), x.float()
    selected, path = butd.select(1), tmp_path / "task.onnx"
    with torch.no_grad():
        whole = tree_leaves(butd(x, 1))
    if name == "excited":
        fxfeedback.export(butd, path, task=1)
        names = {tensor.name for tensor in onnx.load(path).graph.initializer}
        assert {key for key, p in selected.named_parameters() if p.numel() > 100} <= names
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(selected, (x,), path, dynamo=True, verbose=False)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert_in_onnxruntime(path, x, whole)


def test_a_tuple_of_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 8), nn.Linear(4, 8), nn.Linear(8, 5)

        def forward(self, x, y):
            return self.head(F.relu(self.a(x)) * F.relu(self.b(y)))

    inputs = (torch.randn(2, 3).double(), torch.randn(2, 4).double())
    butd = fxfeedback.to_butd(Two().double(), n_tasks=2, example_inputs=inputs).eval()
    assert torch.allclose(butd.select(1)(*inputs), butd(*inputs, 1), rtol=1e-9)
    with pytest.raises(InputError, match="one input"):
        butd.select(1, input_size=(3,))


def test_errors():
    butd, _ = instructed("convnet")
    with pytest.raises(InputError, match="between 0 and 2"):
        butd.select(3)
    with pytest.raises(InputError, match="ids"):
        butd.select([0, 1])
    with pytest.raises(InputError, match=r"\(1, 3\)"):
        butd.select(torch.ones(1, 4))
    headless = fxfeedback.to_butd(nn.Sequential(nn.ReLU()), input_size=(3,))
    with pytest.raises(NodeNameError, match="no linear layer"):
        headless.select(0)
    with pytest.raises(OptionError, match="no gating site"):
        fxfeedback.to_butd(nn.Sequential(nn.Linear(3, 2)), input_size=(3,)).select(0)
