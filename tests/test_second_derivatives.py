"""Derivatives of updates (create_graph=True) equal autograd's of the plain network (float64, 1e-9), or are refused."""

import itertools
import math
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fxfeedback
from fxfeedback.counter_hebb_pass import Learning, key_of, learner
from fxfeedback.errors import GradientError
from fxfeedback.feedback import FeedbackModel
from fxfeedback.graph.operands import rectifies
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.instructed.autograd_bridge import CounterHebb
from fxfeedback.instructed.check_rule import Call
from fxfeedback.instructed.halves import cut
from fxfeedback.rules import RULES, roles, rule
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.trace import trace
from marks import OLD_TORCH, long_but, one_in
from networks import SMALL, build
from test_law import ALL_RULES, Gated

SIZE = (2, 6, 6)


def by_segment(data, reduce, *, lengths=None, offsets=None, axis=0, initial=None):
    """torch.segment_reduce of matrices whose runs are along dimension 0, or that have lengths for each of two rows."""
    if axis == 1:
        return torch.stack([by_segment(row, reduce, lengths=n) for row, n in zip(data, lengths, strict=True)])
    parts = data.split((offsets.diff() if lengths is None else lengths).tolist())
    combined = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "prod": torch.prod}[reduce]
    of_none = torch.zeros_like(data[0]) if reduce == "sum" else torch.ones_like(data[0])
    return torch.stack([combined(part, 0) if len(part) else of_none for part in parts]) * (initial or 1)


def by_bag(input, weight, offsets, mode, per_sample_weights, padding_idx, include_last_offset, **options):
    """F.embedding_bag, as it is called with a mode."""
    weights = torch.ones_like(input, dtype=weight.dtype) if per_sample_weights is None else per_sample_weights
    if offsets is None:
        bags = list(zip(input, weights, strict=True))
    else:
        starts = offsets.tolist() if include_last_offset else [*offsets.tolist(), len(input)]
        bags = [(input[a:b], weights[a:b]) for a, b in itertools.pairwise(starts)]
    combined = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}[mode]
    padding = None if padding_idx is None else padding_idx % len(weight)
    made = []
    for ids, factors in bags:
        rows = (weight[ids] * factors.unsqueeze(-1))[torch.ones_like(ids) > 0 if padding is None else ids != padding]
        made.append(combined(rows, 0) if len(rows) else torch.zeros_like(weight[0]))
    return torch.stack(made)


def by_pair(x, p=2.0):
    """F.pdist."""
    return torch.stack([torch.linalg.vector_norm(a - b, p) for a, b in itertools.combinations(x, 2)])


TWINS = {
    F.hardsigmoid: lambda x, inplace=False: F.relu6(x + 3) / 6,
    torch.segment_reduce: by_segment,
    F.pdist: by_pair,
    F.embedding_bag: by_bag,
}
"""What torch differentiates only once, in ops that it differentiates twice."""


class WithDerivatives(TorchFunctionMode):
    """The twins in the place of what torch differentiates only once."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return TWINS.get(function, function)(*args, **(kwargs or {}))


def first_and_second(outputs, tensors, seed=5):
    """Gradients of a loss, and those of a weighted sum of them; None where there are none."""
    leaves = [y for y in (outputs if isinstance(outputs, (tuple, list)) else [outputs]) if y.is_floating_point()]
    loss = sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sin().sum() for y in leaves)
    first = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    generator = torch.Generator().manual_seed(seed)
    product = sum((f * torch.randn(f.shape, generator=generator, dtype=f.dtype)).sum() for f in first if f is not None)
    linear = not product.requires_grad
    return first, [None] * len(tensors) if linear else torch.autograd.grad(product, tensors, allow_unused=True)


def torchs(outputs, tensors):
    """What torch's own should be; older ones do not have all."""
    try:
        return first_and_second(outputs, tensors)
    except RuntimeError as error:
        if OLD_TORCH and "is not implemented" in str(error):
            pytest.skip(f"this torch has nothing to compare with: {error}")
        raise


def check_near(found, expected, tolerance=1e-9):
    largest = max((e.abs().max() for e in expected if e is not None and not e.isnan().any()), default=0)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        a, b = (
            torch.zeros((), dtype=torch.double) if t is None else t for t in (a, b)
        )  # not used, or used for nothing
        scale = tolerance * torch.maximum(b.nan_to_num().abs().max(), 1e-6 * torch.as_tensor(largest))
        assert ((a - b).abs() <= scale).logical_or(b.isnan()).all(), (i, (a - b).abs().max(), scale)


# -- the law -----------------------------------------------------------------------------------------------------------


@one_in(23)
@pytest.mark.parametrize("fused", [False, True], ids=["rules", "kernels"])
@pytest.mark.parametrize("rule", [rule for rule in ALL_RULES if rule.name != "ctc_loss"], ids=lambda rule: rule.name)
def test_every_rule_obeys_the_law_of_second_derivatives(rule, fused):
    for example in rule.examples:
        module = Call(example)
        bu = open_modules(trace(module), example_inputs=(module.x,))
        annotate_shapes(bu, (module.x,))
        unpack_tuples(bu)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        x, parameters = module.x.requires_grad_(), dict(module.named_parameters())
        torch.manual_seed(0)  # of dropout's masks
        with WithDerivatives(), sdpa_kernel(SDPBackend.MATH):
            _, expected = torchs(module(x), [x, *parameters.values()])
        module.load_state_dict(buffers, strict=False)
        wanted = frozenset(["input:x", *parameters])
        assert wanted == {key_of(n) for n in bu.graph.nodes if n.op in ("placeholder", "get_attr")} - buffers.keys()
        halves = cut(learner(bu, module, Learning(wanted=wanted, twins={}, td_biases={}, fused=fused)))
        tensors = [x, *(getattr(module, name) for name in halves.attributes)]
        torch.manual_seed(0)
        outputs = CounterHebb.apply(halves, ["input:x", *halves.attributes], *tensors)
        _, found = first_and_second(outputs, [x, *parameters.values()])
        check_near(found, expected, max(example.tolerance, 1e-7 if rule.name == "cast" else 0))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


NORMS = {
    "normalize": lambda x, p: F.normalize(x, p, 1, 0.1),
    "vector_norm": lambda x, p: torch.linalg.vector_norm(x, p, 1),
    "norm": lambda x, p: torch.norm(x, p, 1),
    "cdist": lambda x, p: torch.cdist(x[:, None], x.flip(1)[:, None], p),
}


def test_a_loss_without_a_second_derivative_says_so():
    x = torch.randn(6, 2, 3, dtype=torch.double, requires_grad=True)
    loss = Function(lambda x: F.ctc_loss(x, torch.ones(2, 3).long(), torch.tensor([6, 6]), torch.tensor([3, 3])))
    y = fxfeedback.to_butd(loss, example_inputs=(x,), verify=False)(x)
    with pytest.raises(GradientError, match="no second derivative of ctc_loss"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.parametrize("p", [0.5, 1, 1.5, 2, 3, 4, math.inf])
@pytest.mark.parametrize("name", NORMS)
def test_norms_have_second_derivatives_where_values_are_zero(name, p):
    x = torch.tensor([[0, 1, -2], [0, 0, 0], [0.3, -0.2, 0.9]], dtype=torch.double, requires_grad=True)
    model = Function(lambda x: NORMS[name](x, p))
    butd = fxfeedback.to_butd(model, example_inputs=(x,), verify=False)
    first, second = first_and_second(butd(x), [x])
    expected_first, expected_second = torchs(model(x), [x])
    check_near(first, expected_first)
    known = [~e.isnan() for e in expected_second if e is not None]  # torch's own may be unbounded at zero
    for here, a, b in zip(known, second, expected_second, strict=True):
        assert ((0 if a is None else a) - b)[here].abs().max() < 1e-9


@one_in(3)
@pytest.mark.parametrize("train,instructed", [(False, False), (True, True)], ids=["eval", "train-instructed"])
@pytest.mark.parametrize("name", long_but(SMALL.keys() - {"feedback"}, [*SMALL, "vit"]))
def test_networks_obey_the_law_of_second_derivatives(name, train, instructed):
    model, x = build(name, train)
    task = torch.tensor([0, 1, 2, 1]) if instructed else None
    butd = fxfeedback.to_butd(model, n_tasks=3, embedding=6, example_inputs=(x,))
    gates = {name: (t > 0).double() for name, t in butd.counter_neurons(task).items()} if instructed else {}
    activations = [gates.get(node.meta["name"]) for node in butd.bu.graph.nodes if rectifies(node)]
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    tensors, results = [x.requires_grad_(), *model.parameters()], []
    plain = model.unrolled() if isinstance(model, FeedbackModel) else model
    for network, options in ((butd, {"task": task}), (plain, {})):
        model.load_state_dict(buffers, strict=False)
        torch.manual_seed(1)
        gated = instructed and network is plain
        with Gated(activations) if gated else nullcontext(), sdpa_kernel(SDPBackend.MATH):
            outputs = network(x, **options)
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs
            random = torch.get_rng_state()
            results.append(first_and_second(outputs, tensors))
        assert torch.equal(random, torch.get_rng_state())  # a backward pass draws nothing
        results.append([buffer.clone() for buffer in model.buffers()])
    (first, second), statistics, (expected_first, expected_second), expected_statistics = results
    check_near(first, expected_first)
    check_near(second, expected_second)
    assert all(map(torch.equal, statistics, expected_statistics))


@one_in(3)
@pytest.mark.parametrize("slice_size", [1, 2**23])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_feedback_models_obey_the_law_of_second_derivatives(train, checkpointed, slice_size):
    """As they are trained, against their graph as it is; the linear layer has a sum over the passes."""
    model, x = build("convnet", train)
    connections = [("8", "4"), ("5", "1"), ("3", "8")]
    feedback = fxfeedback.add_feedback(model, connections, passes=3, input_size=SIZE, checkpoint=checkpointed)
    tensors, graph = [x.requires_grad_(), *feedback.parameters()], feedback.unrolled()
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    with mock.patch("fxfeedback.lrm.modulation.SLICE", slice_size):
        found = first_and_second(feedback(x), tensors)
    statistics = [buffer.clone() for buffer in model.buffers()]
    model.load_state_dict(buffers, strict=False)
    expected = first_and_second(graph(x)[0], tensors)
    check_near(found[0], expected[0])
    check_near(found[1], expected[1])
    assert all(map(torch.equal, statistics, model.buffers()))


# -- what it is for ----------------------------------------------------------------------------------------------------


def smooth() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 6), nn.GELU(), nn.Linear(6, 3)
    ).double()


def wgan_gp(network, x, parameters):
    y = network(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    loss = y.mean() + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
    return torch.autograd.grad(loss, parameters)


def r1(network, x, parameters):
    """The penalty alone, by backward."""
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    slope.square().sum().backward(inputs=[x, *parameters])
    return [x.grad, *(p.grad for p in parameters)]


def hessian_vector(network, x, parameters):
    first = torch.autograd.grad(network(x).square().sum(), parameters, create_graph=True)
    return torch.autograd.grad(first, parameters, [torch.ones_like(f) for f in first])


def hessian(network, x, parameters):
    return [torch.autograd.functional.hessian(lambda x: network(x).square().sum(), x[:1].detach())]


def gradient_norm(network, x, parameters):
    """Of what lies in .grad."""
    network(x).square().sum().backward(create_graph=True)
    found = torch.autograd.grad(sum(p.grad.square().sum() for p in parameters), parameters)
    for p in parameters:
        p.grad = None  # it holds the graph
    return found


def inner_step(network, x, parameters):
    """MAML: the gradient through a step of learning."""
    named = dict(network.named_parameters())
    inner = torch.func.functional_call(network, named, (x[:2],)).square().sum()
    steps = torch.autograd.grad(inner, list(named.values()), create_graph=True)
    moved = {name: p - 0.1 * step for (name, p), step in zip(named.items(), steps, strict=True)}
    return torch.autograd.grad(torch.func.functional_call(network, moved, (x[2:],)).square().sum(), parameters)


def third(network, x, parameters):
    (slope,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.square().sum(), x, create_graph=True)
    return torch.autograd.grad(bend.square().sum(), [x, *parameters])


def kept_graph(network, x, parameters):
    """Twice through one call, and once more without."""
    loss = network(x).square().sum()
    found = []
    for _ in range(2):
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        found += torch.autograd.grad(slope.square().sum(), parameters, retain_graph=True)
    return [*found, *torch.autograd.grad(loss, parameters)]


def inside_a_checkpoint(network, x, parameters):
    return wgan_gp(lambda x: checkpoint(network, x * 2, use_reentrant=False), x, parameters)


def hooked(network, x, parameters):
    return wgan_gp(lambda x: _hooked(network(x)), x, parameters)


def _hooked(y):
    y.register_hook(lambda error: 3 * error * error.abs())
    return y


USES = [wgan_gp, r1, hessian_vector, hessian, gradient_norm, inner_step, third, kept_graph, inside_a_checkpoint, hooked]


@one_in(2)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize(
    "use,train", [(use, train) for use in USES for train in (False, True) if not (use is third and train)]
)  # torch has no third derivative of batch norm's statistics
def test_every_use_of_second_derivatives(use, train):
    results = []
    for convert in (lambda model: fxfeedback.to_butd(model, input_size=SIZE), lambda model: model):
        model = smooth().train(train)
        parameters = list(model.parameters())
        x = torch.randn(4, *SIZE, dtype=torch.double, generator=torch.Generator().manual_seed(2), requires_grad=True)
        results.append(use(convert(model), x, parameters))
    check_near(*results)


def test_gradgradcheck():
    butd = fxfeedback.to_butd(smooth().eval(), n_tasks=2, input_size=SIZE)
    x, weight = torch.randn(2, *SIZE, dtype=torch.double, requires_grad=True), butd.get_parameter("4.weight")

    def call(x, weight):
        return torch.func.functional_call(butd, {"4.weight": weight}, (x, torch.tensor([1, 0])))

    assert torch.autograd.gradgradcheck(call, (x, weight))


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_several_outputs_of_which_some_are_used(used):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.main, self.aux = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x):
            h = torch.tanh(self.trunk(x))
            return {"main": self.main(h), "aux": self.aux(h).sigmoid(), "best": h.argmax(1)}

    torch.manual_seed(0)
    model, x = Two().double(), torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    tensors = [x, *model.parameters()]
    found, expected = (
        first_and_second([list(network(x).values())[i] for i in used], tensors)
        for network in (fxfeedback.to_butd(model, head="main", input_size=(4,)), model)
    )
    assert [f is None for f in found[0]] == [f is None for f in expected[0]]
    check_near(found[1], expected[1])


@one_in(2)
@pytest.mark.parametrize(
    "options", [{"heads": "per_task"}, {"gating": "channel"}, {"td_bias": True, "norm": "separate"}]
)
def test_options_for_which_the_law_holds(options):
    """Against the same network under autograd."""
    results = []
    for learning in ("counter_hebb", "backprop"):
        model, x = build("convnet", train=True)
        torch.manual_seed(3)
        butd = fxfeedback.to_butd(model, n_tasks=3, input_size=SIZE, learning=learning, **options)
        named = {name: p for name, p in butd.named_parameters() if p.requires_grad and "td_biases" not in name}
        tensors = [x.requires_grad_(), *named.values()]
        results.append(first_and_second(butd(x, torch.tensor([0, 2, 1, 2])), tensors))
    check_near(results[0][0], results[1][0])
    check_near(results[0][1], results[1][1])


def test_a_penalty_under_autocast():
    """As near to float32 as the plain network's."""
    results = []
    for convert, dtype in ((False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)):
        model = smooth().float().eval()
        network = fxfeedback.to_butd(model, input_size=SIZE) if convert else model
        x = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(2), requires_grad=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = network(x).float()
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            loss = y.mean() + (slope.flatten(1).norm(dim=1) - 1).square().mean()
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    exact, plain, found = results
    for e, p, f in zip(exact, plain, found, strict=True):
        assert f.dtype == e.dtype and (f - e).norm() <= 2 * (p - e).norm() + 1e-3 * e.norm()


# -- what was drawn ----------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws that the error pass has no use for, one of them in a part that does not learn."""

    def __init__(self):
        super().__init__()
        self.frozen, self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)
        self.drop, self.alpha = nn.Dropout(0.4), nn.AlphaDropout(0.3)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = self.drop(self.frozen(x) + 1) * torch.rand_like(x[:, :1])
        x = torch.tanh(self.first(x) + torch.randn_like(x[:, :1]))
        x = F.gumbel_softmax(self.alpha(x), hard=True) + x * torch.bernoulli(x.sigmoid())
        return self.last(x * x)


def test_the_draws_are_the_calls():
    torch.manual_seed(0)
    model = Noisy().double()
    butd = fxfeedback.to_butd(model, example_inputs=(torch.randn(1, 4, dtype=torch.double),))
    results = []
    for network, asks in itertools.product((butd, model), (False, True)):
        x = torch.ones(5, 4, dtype=torch.double).cumsum(0).requires_grad_(asks)
        torch.manual_seed(7)
        y = network(x)
        torch.manual_seed(8)  # nobody draws these again
        results.append(first_and_second(y, [p for p in (x, *model.parameters()) if p.requires_grad])[1])
    check_near(results[0], results[2])
    check_near(results[1], results[3])


@pytest.fixture
def same_rules():
    """The table of rules as it is, afterwards."""
    rules = dict(RULES)
    yield
    RULES.clear()
    RULES.update(rules)


class Jitter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x + torch.rand_like(x)

    @staticmethod
    def backward(ctx, error):
        return error


class Jittering(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(Jitter.apply(self.fc(x)))


def test_an_op_that_draws_by_itself_is_refused(same_rules):
    @rule(Jitter)
    def jitter(y, input):
        """x² and a random number; its error as it is"""
        return {"input": roles(instruct=lambda t: t, error=lambda e: e)}

    butd, x = fxfeedback.to_butd(Jittering(), input_size=(4,)), torch.randn(3, 4, requires_grad=True)
    butd(x).sum().backward()
    with pytest.raises(GradientError, match=r"'jitter'.* draws random numbers of its own"):
        torch.autograd.grad(butd(x).sum(), x, create_graph=True)


# -- what is refused ---------------------------------------------------------------------------------------------------


@one_in(3)
@pytest.mark.parametrize("reduce", [torch.Tensor.sum, lambda y: y.square().sum()], ids=["sum", "square"])
@pytest.mark.parametrize(
    "options", [{"weights": "separate"}, {"lateral": "multiply"}, {"lateral": lambda v, c: v}, {"update_noise": 0.1}]
)
def test_updates_that_are_not_gradients_have_no_derivatives(options, reduce):
    model, x = build("convnet", train=False)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=SIZE, **options)
    x.requires_grad_()
    reduce(butd(x, 1)).backward()
    with pytest.raises(GradientError, match=rf"create_graph=True: with {next(iter(options))}=.* learning=\"backprop\""):
        torch.autograd.grad(reduce(butd(x, 1)), x, create_graph=True)
    with pytest.raises(GradientError, match="create_graph=True"):
        reduce(butd(x)).backward(create_graph=True)
    butd = fxfeedback.to_butd(model, n_tasks=2, input_size=SIZE, learning="backprop", **options)
    assert torch.autograd.grad(reduce(butd(x, 1)), x, create_graph=True)[0].requires_grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reduce", [torch.Tensor.sum, lambda y: y.square().sum()], ids=["sum", "square"])
def test_what_is_compiled_refuses(reduce, backend):
    torch._dynamo.reset()
    x = torch.randn(2, *SIZE, dtype=torch.double, requires_grad=True)
    model = smooth()
    fast = torch.compile(fxfeedback.to_butd(model, input_size=SIZE), backend=backend)
    with pytest.raises((GradientError, RuntimeError), match=r"create_graph=True: under torch.compile|double backward"):
        (slope,) = torch.autograd.grad(reduce(fast(x)), x, create_graph=True)
        slope.square().sum().backward()
    reduce(fast(x)).backward(retain_graph=True)  # which is no derivative of updates
    expected = torch.autograd.grad(reduce(model(x)), list(model.parameters()))
    check_near([p.grad for p in model.parameters()], expected)


CHANGED = {
    "input": lambda model, x: x,
    "first weight": lambda model, x: model[0].weight,
    "last weight": lambda model, x: model[6].weight,
    "bias": lambda model, x: model[4].bias,
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_was_written_into_is_not_used(what):
    """A bias is needed for second derivatives only."""
    model = smooth()
    butd = fxfeedback.to_butd(model, input_size=SIZE)
    x = torch.randn(2, *SIZE, dtype=torch.double)
    loss = butd(x).square().sum()
    with torch.no_grad():
        CHANGED[what](model, x).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    if what == "bias":
        loss.backward()
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_views_of_the_input_that_are_written_into_are_not_used():
    model, x = build("mlp", train=False)  # begins with Flatten
    butd = fxfeedback.to_butd(model, input_size=SIZE)
    loss = butd(x).square().sum()
    x.mul_(2)
    with pytest.raises(GradientError, match="modified by an inplace operation"):
        loss.backward()


def test_a_call_between_changes_nothing():
    """Batch statistics and counters advance in it."""
    results = []
    for convert in (lambda model: fxfeedback.to_butd(model, input_size=SIZE), lambda model: model):
        model = smooth().train()
        model[1].momentum = None  # the mean over all batches
        network, x = convert(model), torch.ones(3, *SIZE, dtype=torch.double).cumsum(0).requires_grad_()
        real, fake = network(x).sum(), network(x * 2).sum()
        network(x * 3)
        slopes = torch.autograd.grad(real - fake, x, create_graph=True)
        results.append(torch.autograd.grad(slopes[0].square().sum(), list(model.parameters()), allow_unused=True))
    check_near(*results)
