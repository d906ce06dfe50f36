"""What happens on other devices than the CPU, tried on tensors of a GPU that is not there (`other_device.py`)."""

import contextlib
import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves

import fxfeedback
from fxfeedback.counter_hebb_pass import Learning, key_of, learner
from fxfeedback.errors import NodeNameError, TraceError
from fxfeedback.feedback import Connection
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.instructed.check_rule import Call
from fxfeedback.instructed.kept_graphs import graphs_of
from fxfeedback.rules import RULES
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.open_operators import open_operators
from fxfeedback.tracing.trace import trace
from marks import long, long_but, one_in, sweep
from networks import LARGE, SMALL, TRANSFORMERS, build
from other_device import Gpu, Watch

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from generate_operators import OPENED

ONLY_THERE = {"ctc_loss"}
"""Rules that nothing but a real GPU can try: torch asks its driver."""
CALLS = [(r, example) for r in dict.fromkeys(RULES.values()) if r.name not in ONLY_THERE for example in r.examples]
BY_VALUES = {"getitem", "index", "index_put"}
"""Rules with examples in which torch looks at values, which these tensors do not have."""


def learners(module, x):
    """The learner of an example, and the one with fused kernels where its rule has some."""
    bu = open_modules(trace(module), example_inputs=(x,))
    annotate_shapes(bu, (x,))
    unpack_tuples(bu)
    open_operators(bu, (x,), module)
    buffers = dict(module.named_buffers())
    nodes = [n for n in bu.graph.nodes if n.op in ("placeholder", "get_attr") and n.target not in buffers]
    wanted = frozenset(map(key_of, nodes))
    fused = any(n.target in RULES and RULES[n.target].fused for n in bu.graph.nodes)
    return [learner(bu, module, Learning(wanted, {}, {}, fused=how)) for how in (False, True)[: 1 + fused]]


def is_floating(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@one_in(13)
@pytest.mark.parametrize("there", [False, True], ids=["moved", "made there"])
@pytest.mark.parametrize("rule, example", CALLS, ids=lambda one: getattr(one, "name", ""))
def test_every_rule_stays_on_the_device(rule, example, there):
    """Made on the CPU and moved, or made there, no op of BU pass, error pass and updates takes a tensor of the CPU."""
    module, gpu = Call(example), Gpu()
    x, module.x = module.x, None
    with torch.no_grad():
        errors = [y for y in tree_leaves(module(x)) if is_floating(y)]
    try:
        with gpu(), torch.device("cuda" if there else "cpu"):
            made = learners(gpu.move(module) if there else module, x)
        for one in made:
            with gpu(), torch.no_grad():
                results = gpu.move(one)(gpu.tensor(x), *map(gpu.tensor, errors))
            assert {y.device.type for y in tree_leaves(results) if is_floating(y)} == {"cuda"}
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        if rule.name not in BY_VALUES:
            raise
        pytest.skip(f"torch looks at values: {error}")


IN_PLACE = {
    "F.dropout": lambda x: F.dropout(x + x, 0.3, inplace=True),
    "nn.Dropout": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3, inplace=True)),
    "torch.dropout_": lambda x: torch.dropout_(x + x, 0.3, True),
    "F.alpha_dropout": lambda x: F.alpha_dropout(x + x, 0.3, True, True),
    "F.feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x.unsqueeze(2) + 1, 0.3, True, True),
    "F.dropout1d": lambda x: F.dropout1d(x.unsqueeze(2) + 1, 0.3, True, True),
    "F.rrelu": lambda x: F.rrelu(x + x, 0.1, 0.3, True, True),
}
PLAIN = {
    "dropout of all": lambda x: F.dropout(x, 1.0) + x,
    "dropout of all in place": lambda x: F.dropout(x + x, 1.0, inplace=True) + x,
    "alpha dropout of all": lambda x: F.alpha_dropout(x, 1.0, True) + x,
    "nothing dropped": lambda x: F.dropout(x, 0.0) + F.alpha_dropout(x, 0.0, True),
    "noise": lambda x: x + torch.randn_like(x) * torch.bernoulli(x.sigmoid()),
}
DRAWING = {f"{getattr(f, '__name__', f)}": example for f, example in OPENED.items()}
DRAWING |= {f"{name}, in place": (f, (2,)) for name, f in IN_PLACE.items()} | {n: (f, (2,)) for n, f in PLAIN.items()}
NOT_BY_EXPORT = {"RNNBase", "fractional_max_pool3d", "fractional_max_pool3d_with_indices", "linalg_norm"}
"""What torch.export refuses: state between calls, and code that branches on the batch size."""
OF_CUDNN = {"RNNBase"}
"""What draws by other means on a GPU: cuDNN keeps its own state."""


class Then(nn.Module):
    """A function or module, and a draw after it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y, torch.rand_like(x)


@one_in(5)
@pytest.mark.parametrize("door", ["fx", long("export")])
@pytest.mark.parametrize("name", DRAWING)
def test_openings_draw_what_the_model_draws_on_a_gpu(name, door):
    """The same ops, in the same order, for tensors of the same dtype and layout; and the same numbers on the CPU."""
    inner, size = DRAWING[name]
    model = Then(copy.deepcopy(inner)).double().train()
    x = torch.randn(3, *size, dtype=torch.double)
    if door == "export" and name in NOT_BY_EXPORT:
        with pytest.raises(TraceError):
            fxfeedback.to_butd(model, input_size=size, door=door)
        return
    butd = fxfeedback.to_butd(model, input_size=size, door=door)
    results = []
    for network in (model, butd):
        torch.manual_seed(0)
        results.append(network(x))
    for theirs, ours in zip(*map(tree_leaves, results), strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
    if name not in OF_CUDNN:
        theirs, ours = (draws_of(network, x) for network in (model, butd))
        assert ours == theirs and {draw.device for draw in theirs} == {"cuda"}


def draws_of(network, *inputs):
    """What a call draws on a GPU, whose graph is there."""
    gpu = Gpu()
    gpu.move(network)
    inputs = [gpu.tensor(x) for x in inputs]
    with torch.no_grad():
        for _ in range(2):
            with gpu() as watch:
                results = network(*inputs)
    assert {y.device.type for y in tree_leaves(results) if is_floating(y)} == {"cuda"}
    return watch.draws


ASKED = {
    "own weights": {"n_tasks": 2, "embedding": (7, 5), "weights": "separate", "td_bias": True, "norm": "separate"},
    "copies": {"n_tasks": 2, "weights": "separate", "td_init": "symmetric", "td_noise": 0.1, "heads": "per_task"},
    "connections": None,
}
"""What the wrappers add to a network."""


def wrapped(model, options, verify=False):
    if options is None:
        return fxfeedback.add_feedback(
            model, [("head", "conv"), ("mean", "relu_1")], verify=False, input_size=(2, 6, 6)
        )
    return fxfeedback.to_butd(model, input_size=(2, 6, 6), verify=verify, **options)


@pytest.mark.parametrize("asked", long_but(["own weights", "connections"], ASKED))
def test_a_seed_gives_the_same_network_on_every_device(asked):
    """What is added is drawn by the CPU's generator, in one order, and lies where the model is."""
    model, options, gpu = SMALL["residual"](), ASKED[asked], Gpu()
    made = []
    for network in (model, copy.deepcopy(model).to(memory_format=torch.channels_last)):
        torch.manual_seed(0)
        with Watch() as watch, torch.device("meta"):  # a default of the user's, which does not count
            made.append((wrapped(network, options).state_dict(), watch.draws))
    there = gpu.move(copy.deepcopy(model))
    with gpu() as watch:
        moved = wrapped(there, options).state_dict()
    assert watch.draws == made[0][1] and {draw.device for draw in watch.draws} == {"cpu"}
    assert {x.device.type for x in moved.values()} == {"cuda"} and moved.keys() == made[0][0].keys()
    assert all(torch.equal(x, made[1][0][name]) for name, x in made[0][0].items())
    with Watch() as watch:
        without_data = wrapped(model.to("meta"), options).state_dict()
    assert not watch.draws and all(x.is_meta for x in without_data.values())


@pytest.mark.parametrize("asked", long_but(["own weights"], ASKED))
def test_building_leaves_the_generators_of_other_devices_alone(asked, monkeypatch):
    """torch.manual_seed would seed every GPU, and those that are set up later."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds every GPU"))
    options = ASKED[asked]
    wrapped(SMALL["residual"](), options, verify=True)


FAMILIES = (
    "googlenet",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "shufflenet_v2_x0_5",
    "regnet_y_400mf",
    "squeezenet1_1",
)
BIG = {*LARGE, *FAMILIES}
NETWORKS = [n for n in (*SMALL, *TRANSFORMERS, *LARGE, *FAMILIES) if n not in ("feedback", "recurrent", "mvit")]
"""Not what has connections already, what cuDNN runs, and what itself indexes by tensors of the CPU."""


MODES = [(name, training) for name in NETWORKS for training in (True, False) if training or name not in BIG]


@pytest.mark.parametrize(
    "name, training",
    [one if one[0] == "residual" else (sweep if one[0] in LARGE else long)(*one) for one in MODES],
)
def test_networks_stay_on_the_device(name, training):
    """Made on the CPU and moved: calls, which draw what the model draws, instructed ones, the learner, two passes."""
    model, x = build(name, training)
    task, size = torch.tensor([0, 1, 1, 0]), tuple(x.shape[1:])
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=size, verify=False)
    feedback = connected(model, size)
    plain = copy.deepcopy(model)
    assert draws_of(plain, x) == draws_of(butd, x, task)
    draws_of(feedback, x)
    gpu = Gpu()
    with gpu(), torch.no_grad():
        graphs = graphs_of(gpu.move(butd))
        errors = [y for y in tree_leaves(butd(gpu.tensor(x))) if is_floating(y)]
        results = graphs.learner(False, graphs.learning_parameters())(gpu.tensor(x), *errors)
    assert {y.device.type for y in tree_leaves(results) if is_floating(y)} == {"cuda"}
    without_data = fxfeedback.to_butd(build(name, training)[0], n_tasks=2, input_size=size, verify=False).to("meta")
    assert all(y.is_meta for y in tree_leaves(without_data(x.to("meta"), task.to("meta"))))


def connected(model, size):
    """The model with a connection from its last value to one of its first."""
    names = [n for n, info in fxfeedback.node_names(model, input_size=size).items() if len(info.shape or ()) > 1]
    for name in names[len(names) // 4 :]:
        with contextlib.suppress(NodeNameError):  # a parameter, for example
            return fxfeedback.add_feedback(model, [Connection(names[-1], name)], input_size=size, verify=False)
    raise AssertionError("no value can be modulated")
