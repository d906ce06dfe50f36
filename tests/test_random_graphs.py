"""Random models from all ops that have rules: they learn as autograd does, take instructions, and unroll."""

import contextlib
import copy
import itertools
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, currently_in_test_context, event, given, settings
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import fxfeedback
from fxfeedback.butd import BUTD
from fxfeedback.counter_hebb_pass import Learning, learner
from fxfeedback.errors import NodeNameError, OptionError
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.specs import EXAMPLE_BATCH
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.instructed.autograd_bridge import CounterHebb
from fxfeedback.instructed.halves import cut
from fxfeedback.rules import RULES
from fxfeedback.tracing.share import share
from fxfeedback.tracing.trace import trace
from marks import one_in
from random_graphs import COVERED, Case, cases
from test_unrolling import close, names_of, reference

TOLERANCE = 1e-9
SMALLEST = 1e-3
"""Smaller gradients are judged by this one: their terms, which behind a norm of equal values are some hundreds, may
cancel but for their rounding."""
EXCEPTIONS = {
    "grid_sampler": "the same as grid_sample, with numbers for its modes",
    "upsample_smoothly": "the same as interpolate with antialias=True",
    "trilinear": "F.bilinear, as the dispatcher calls it",
    **dict.fromkeys(
        ("segment_reduce", "pdist", "embedding_bag", "ctc_loss"),
        "PyTorch differentiates it only once, and the graphs are tried twice",
    ),
    "cut_off": "tracing puts it behind torch.no_grad(): test_users_expect.py",
    "galu": "fxfeedback itself puts it into the BU graph: every instructed pass has it",
    "synced": "with one process it is batch norm; with two, in test_distributed.py",
}


def floating(output: Any) -> list[torch.Tensor]:
    return [y for y in tree_leaves(output) if isinstance(y, torch.Tensor) and y.is_floating_point()]


def learning(model: nn.Module, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What asks for a gradient, by name."""
    named = {f"input {i}": x for i, x in enumerate(inputs)} | dict(model.named_parameters())
    return {name: tensor for name, tensor in named.items() if tensor.requires_grad}


def gradients(
    outputs: list[torch.Tensor], tensors: dict[str, torch.Tensor], create_graph: bool = False
) -> dict[str, torch.Tensor | None]:
    """Of a loss that weighs every value of the outputs differently."""
    generator = torch.Generator().manual_seed(0)
    errors = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    pairs = [(y, e) for y, e in zip(outputs, errors, strict=True) if y.requires_grad]
    if not pairs or not tensors:
        return dict.fromkeys(tensors)
    ys, errors = zip(*pairs, strict=True)
    results = torch.autograd.grad(ys, list(tensors.values()), errors, create_graph=create_graph, allow_unused=True)
    return dict(zip(tensors, results, strict=True))


def plain_gradients(case: Case, nudge: float = 0.0) -> tuple[list[torch.Tensor], Any, list[torch.Tensor]]:
    """Outputs, gradients and buffers of the model itself; with a nudge, of one whose numbers are a little larger."""
    model, inputs = case.make()
    with torch.no_grad():
        for tensor in [*model.parameters(), *inputs]:
            if tensor.is_floating_point():
                tensor.mul_(1 + nudge * torch.rand_like(tensor))
    torch.manual_seed(1)  # of dropout's masks
    with laid_out_for_batch_norm():
        outputs = floating(model(*inputs))
        return outputs, gradients(outputs, learning(model, inputs)), list(model.buffers())


@contextlib.contextmanager
def laid_out_for_batch_norm() -> Iterator[None]:
    """PyTorch's backward of batch norm, on the CPU, misreads an error whose layout is not x's, where sizes of 1 leave
    the layout open: here both lie in memory as they are indexed."""
    batch_norm = F.batch_norm

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(x.shape, dtype=x.dtype).copy_(x)

    def with_layout(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = batch_norm(laid_out(input), *args, **kwargs)
        if y.requires_grad:
            y.register_hook(laid_out)
        return y

    F.batch_norm = with_layout
    try:
        yield
    finally:
        F.batch_norm = batch_norm


def learned(case: Case) -> Iterator[tuple[bool, list[torch.Tensor], Any, list[torch.Tensor]]]:
    """The same by Counter-Hebb learning, with fused kernels (True) and with the rules in their place (False)."""
    model, inputs = case.make()
    buffers = [buffer.clone() for buffer in model.buffers()]
    size = {"input_size": case.inputs[0].size} if len(inputs) == 1 else {"example_inputs": inputs}
    butd = fxfeedback.to_butd(model, **size)
    assert list(dict(butd.named_parameters())) == list(dict(model.named_parameters()))
    for fused in (True, False):
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        torch.manual_seed(1)
        outputs = floating(butd(*inputs) if fused else by_rules(butd, inputs))
        yield fused, outputs, gradients(outputs, learning(model, inputs)), list(model.buffers())


def by_rules(butd: BUTD, inputs: list[torch.Tensor]) -> Any:
    """A call of `butd` that learns without fused kernels."""
    graphs = butd._graphs(inputs)
    tensors = dict(zip(graphs.call(False, False).inputs, inputs, strict=True))
    tensors |= {name: butd._fetch(name) for name in graphs.attributes}
    wanted = frozenset(name for name, tensor in tensors.items() if tensor.requires_grad)
    halves = cut(learner(graphs.bu, butd._root, Learning(wanted=wanted, twins={}, td_biases={}, fused=False)))
    names = [*graphs.call(False, False).inputs, *halves.attributes]
    return halves.structure(None, *CounterHebb.apply(halves, names, *(tensors[name] for name in names)))


def difference(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    pairs = [t for t in (a, b) if t is not None and t.numel()]
    if not pairs:
        return 0.0
    return (pairs[0] - pairs[1]).abs().max().item() if len(pairs) == 2 else pairs[0].abs().max().item()


def size(t: torch.Tensor | None) -> float:
    return difference(t, None)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-11) -> bool:
    """To rounding; the statistics that an instance norm draws from no samples are NaN in torch, too."""
    scale = max(1.0, size(b.nan_to_num()))
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


def tell(what: str) -> None:
    """Let hypothesis count how often something happens."""
    if currently_in_test_context():
        event(what)


def check_law(case: Case) -> None:
    """Outputs, updates and statistics are the model's own."""
    outputs, expected, buffers = plain_gradients(case)
    largest = max(map(size, expected.values()), default=0.0)
    nudged = None
    tolerance = 1e-7 if "hardsigmoid" in case.source.lower() else TOLERANCE  # PyTorch multiplies by 1/6 in float32
    for fused, made, updates, statistics in learned(case):
        assert len(made) == len(outputs)
        for a, b in zip([*made, *statistics], [*outputs, *buffers], strict=True):
            assert same(a.double(), b.double())
        for name, gradient in expected.items():
            update, kernels = updates[name], f"(fused kernels: {fused})"
            # Where autograd has zeros behind a step such as floor, there may be no update; of no samples it may have
            # none where the rules have zeros.
            assert gradient is not None or update is None or not case.batch, f"{name} has only an update {kernels}"
            assert update is None or gradient is None or update.shape == gradient.shape, f"{name}: {update.shape}"
            off, allowed = difference(update, gradient), tolerance * max(size(gradient), 1e-6 * largest, SMALLEST)
            if off > allowed:
                # Gradients that cancel, as behind a norm of few values: what rounding does to them is the scale.
                tell("ill-conditioned")
                nudged = nudged or [plain_gradients(case, nudge)[1] for nudge in (4e-16, -4e-16)]
                allowed += 1e3 * max(difference(gradient, other[name]) for other in nudged)
            assert off <= allowed, f"the update of {name} is off by {off:.1e} of {size(gradient):.1e} {kernels}"


def second(outputs: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Gradients of the gradients, of a loss that is curved."""
    first = gradients([y.sin() for y in floating(outputs)], tensors, create_graph=True)
    return gradients([e for e in first.values() if e is not None], tensors)


def plain_second(case: Case, nudge: float = 0.0) -> dict[str, torch.Tensor | None]:
    model, inputs = case.make()
    with torch.no_grad():
        for tensor in [*model.parameters(), *inputs]:
            if tensor.is_floating_point():
                tensor.mul_(1 + nudge * torch.rand_like(tensor))
    torch.manual_seed(1)
    with laid_out_for_batch_norm(), sdpa_kernel(SDPBackend.MATH):
        return second(model(*inputs), learning(model, inputs))


def check_second(case: Case) -> None:
    """Derivatives of updates are autograd's second derivatives, where these are finite."""
    expected = plain_second(case)
    largest = max([size(e) for e in expected.values() if e is not None and e.isfinite().all()], default=0.0)
    nudged = None
    model, inputs = case.make()
    butd = fxfeedback.to_butd(model, example_inputs=inputs, verify=False)
    for call in (butd, lambda *inputs: by_rules(butd, list(inputs))):
        torch.manual_seed(1)
        found = second(call(*inputs), learning(model, inputs))
        for name, e in expected.items():
            if e is not None and not e.isfinite().all():
                continue
            off, allowed = difference(found[name], e), TOLERANCE * max(size(e), 1e-6 * largest, SMALLEST)
            if off > allowed:
                nudged = nudged or [plain_second(case, nudge) for nudge in (4e-16, -4e-16)]
                allowed += 1e3 * max(difference(e, other[name]) for other in nudged)
            assert off <= allowed, f"the second derivative by {name} is off by {off:.1e} of {size(e):.1e}"


def check_instruction(case: Case) -> None:
    """Counter neurons are shaped like their sites, and the instructed network learns as autograd says."""
    results = []
    for how in ("counter_hebb", "backprop"):
        model, inputs = case.make()
        butd = fxfeedback.to_butd(model, example_inputs=inputs, learning=how)
        instruction = torch.randn(case.batch, 3, dtype=torch.double)
        counters = butd.counter_neurons(instruction)
        assert "head.1" in counters
        torch.manual_seed(1)
        outputs = floating(butd(*inputs, instruction))
        results.append((outputs, gradients(outputs, learning(model, inputs))))
        torch.manual_seed(1)
        with torch.no_grad():
            sites = values_at(butd, inputs, set(counters))
        assert {name: t.shape for name, t in counters.items()} == {name: y.shape for name, y in sites.items()}
    (outputs, updates), (expected, references) = results
    largest = max(map(size, references.values()), default=0.0)
    for a, b in zip(outputs, expected, strict=True):
        assert not a.numel() or close(a, b)
    for name, gradient in references.items():
        allowed = TOLERANCE * max(size(gradient), 1e-4 * largest)
        assert difference(updates[name], gradient) <= allowed, f"instructed, the update of {name} is off"


def check_no_head(case: Case) -> None:
    """A model whose head sees nothing of the input's values takes no instructions, and says so."""
    model, inputs = case.make()
    with pytest.raises((NodeNameError, OptionError), match=r"no linear layer|no gating site"):
        fxfeedback.to_butd(model, example_inputs=inputs).counter_neurons(torch.randn(case.batch, 3))


def values_at(butd: BUTD, inputs: list[torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    """The values of the BU nodes with these names."""
    found = {}

    class Run(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.meta.get("name") in names and n.op == "call_function":
                found[n.meta["name"]] = value
            return value

    Run(copy.deepcopy(butd).bu).run(*inputs)
    return found


def check_feedback(case: Case) -> None:
    """The unrolled graph computes what a plain loop over passes computes; the first pass is the model."""
    model, inputs = case.make()
    plain, _ = case.out_of_place().make()
    if case.random and case.train:
        model.eval(), plain.eval()  # masks are drawn in another order
    connections = legal(model, inputs, case.links)
    if not connections:
        tell("no connection")
        return
    unrolled = fxfeedback.add_feedback(model, connections, example_inputs=inputs).double()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in unrolled.modulations.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        first = floating(copy.deepcopy(plain)(*inputs))
        try:
            expected, _ = reference(plain, names_of(model), unrolled, inputs[0], case.passes)
        except torch.linalg.LinAlgError as error:  # a modulation made a base negative, say
            tell(str(error))
            return
        outputs = unrolled(*inputs, passes=case.passes)
    if not any(is_skip(model, c) for c in connections):
        assert all(map(torch.equal, floating(outputs[0]), first)), "pass 1 is not the model"
    if not all(y.isfinite().all() for y in floating(expected)):
        tell("not finite")  # a modulation made a base negative, say
        return
    scale = max([1.0, *map(size, tree_leaves(expected))])
    for number, (one, other) in enumerate(zip(outputs, expected, strict=True), 1):
        for a, b in zip(floating(one), floating(other), strict=True):
            assert a.shape == b.shape and difference(a, b) <= 1e-9 * scale, f"pass {number} is off: {difference(a, b)}"
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert same(a.double(), b.double(), 1e-9)


def is_skip(model: nn.Module, connection: fxfeedback.Connection) -> bool:
    order = names_of(model)
    return order.index(connection.source) < order.index(connection.destination)


def legal(model: nn.Module, inputs: list[torch.Tensor], links: Any) -> list[fxfeedback.Connection]:
    """The case's connections: between vectors and maps of two dimensions, which the reference knows."""
    graph = trace(share(model), len(inputs))
    annotate_shapes(graph, inputs)
    unpack_tuples(graph)
    names = []
    for node in graph.graph.nodes:
        per_sample = getattr(node.meta.get("spec"), "per_sample", ())
        fits = len(per_sample) in (2, 4) and per_sample[0] == 1 and not any(per_sample[1:])
        if (
            fits
            and node.meta["spec"].shape[0] == EXAMPLE_BATCH
            and node.meta["spec"].dtype.is_floating_point
            and node.op != "output"
        ):
            names.append(node.meta["name"])
    found: dict[tuple[str, str], fxfeedback.Connection] = {}
    agreed: dict[str, dict[str, str]] = {}
    for source, destination, options in links if names else ():
        source, destination = names[source % len(names)], names[destination % len(names)]
        own = {name: options[name] for name in ("activation", "mode") if name in options}
        defaults = {"activation": "auto", "mode": "multiply"}
        connection = fxfeedback.Connection(
            source, destination, **{**options, **agreed.setdefault(destination, defaults | own)}
        )
        try:
            made = fxfeedback.add_feedback(model, [connection], example_inputs=inputs)
        except NodeNameError:  # the output does not depend on the destination
            continue
        block = made.modulation(source, destination)
        if {block.source.kind, block.destination.kind} <= {"vector", "map"}:
            found[source, destination] = connection
    return list(found.values())


def has_head(case: Case) -> bool:
    """Whether the output depends on an input's values, other than ids: it may only measure or compare them."""
    # torch itself has no gradient of pixel_shuffle, and others, for an empty batch.
    model, inputs = (case if case.batch else replace(case, batch=2)).make()
    read = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    total = sum(y.sum() for y in floating(model(*inputs)))
    return total.requires_grad and any(e is not None for e in torch.autograd.grad(total, read, allow_unused=True))


def check(case: Case) -> None:
    """All that is asked of one random model."""
    try:
        plain_gradients(case)
    except RuntimeError as error:
        if case.batch > 1:
            raise
        tell(f"autograd refuses the batch: {error}")
        return
    check_law(case)
    if case.batch and "hardsigmoid" not in case.source.lower():  # of which PyTorch has no second derivative
        check_second(case)
    if case.headed and has_head(case):
        check_instruction(case)
    elif case.headed and not any(i.layout == "ids" for i in case.inputs):
        tell("no head")
        check_no_head(case)
    # The reference's tracer enters stochastic depth, and knows a module as its last call had it.
    # And fractional pooling draws in evaluation mode also, in another order.
    if len(case.inputs) == 1 and not any(
        word in case.source for word in ("stochastic_depth", "changed(", "fractional")
    ):
        check_feedback(case)


# -- tests ------------------------------------------------------------------------------------------------------------

some = settings(
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of degrees of freedom
@settings(some, max_examples=10)
@given(cases(most=6))
def test_random_graphs(case):
    check(case)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(some, max_examples=50)
@given(cases(most=6))
def test_more_random_graphs(case):
    check(case)


def test_a_log_of_many_graphs_has_a_line_a_hundred(monkeypatch, capsys):
    import fuzz  # which imports this file

    monkeypatch.setattr(sys, "argv", ["fuzz.py", "102"])
    monkeypatch.setattr(fuzz, "check", lambda case: None)
    with warnings.catch_warnings():
        fuzz.main()
    lines = [f"{done} of 102 graphs, the last from seed {seed}" for seed, done in enumerate([100, 102])]
    assert capsys.readouterr().err.splitlines() == lines


def test_every_rule_is_tried():
    advice = "put an op of the rule into OPS of tests/random_graphs.py, or a reason into EXCEPTIONS"
    assert COVERED | set(EXCEPTIONS) == {rule.name for rule in RULES.values()}, advice


# -- failures that random graphs found --------------------------------------------------------------------------------


class Unread(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x):
        self.norm(x)
        return self.linear(x)


@pytest.mark.parametrize("kind", ["butd", "feedback"])
def test_a_batch_norm_that_nothing_reads_sees_the_batch(kind):
    net, x = Unread().double(), torch.randn(4, 3, dtype=torch.double)
    plain = copy.deepcopy(net)
    plain(x)
    if kind == "butd":
        fxfeedback.to_butd(net, input_size=(3,))(x)
    else:
        fxfeedback.add_feedback(net, [("linear", "linear")], passes=1, input_size=(3,))(x)
    assert torch.allclose(net.norm.running_mean, plain.norm.running_mean)


def test_a_batch_norm_takes_an_empty_batch():
    net, x = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).double(), torch.randn(0, 2, 4, 4, dtype=torch.double)
    butd = fxfeedback.to_butd(net, input_size=(2, 4, 4))
    assert butd(x).shape == net(x).shape


@one_in(5)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_a_batch_norm_learns_in_any_layout(order, train):
    net = nn.BatchNorm2d(2, track_running_stats=not train).double()
    size = (1, 2, 1, 3)
    x, e = torch.randn(2, *size, dtype=torch.double)
    x = torch.empty([size[i] for i in order], dtype=torch.double).permute(*(order.index(i) for i in range(4))).copy_(x)
    parameters = [x.requires_grad_(), *net.parameters()]
    with laid_out_for_batch_norm():
        expected = torch.autograd.grad(net(x), parameters, e)
    updates = torch.autograd.grad(fxfeedback.to_butd(net, input_size=size[1:])(x), parameters, e)
    assert all(close(a, b) for a, b in zip(updates, expected, strict=True))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm2d(2, track_running_stats=True)
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.conv(self.norm(x))


def test_a_shared_instance_norm_sees_the_batch_in_every_pass():
    net, x = Twice().double(), torch.randn(3, 2, 4, 4, dtype=torch.double)
    plain = copy.deepcopy(net)
    fxfeedback.add_feedback(net, [("conv", "conv")], passes=2, input_size=(2, 4, 4))(x)
    for _ in range(2):
        plain(x)
    assert torch.allclose(net.norm.running_mean, plain.norm.running_mean)


class Compares(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(torch.where(x > 0, x, 0.5))


def test_a_comparison_is_no_source():
    with pytest.raises(NodeNameError):
        fxfeedback.add_feedback(Compares(), [("gt", "linear")], input_size=(3,))


class Bare(nn.Module):
    def forward(self, x):
        return torch.relu(torch.sin(x))


def test_a_model_without_parameters_has_the_dtype_of_its_example():
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    assert fxfeedback.add_feedback(Bare(), [("relu", "sin")], example_inputs=(x,))(x)[0].dtype == torch.double


def test_a_batch_norm_with_a_cumulative_average_has_names():
    assert "0" in fxfeedback.node_names(nn.Sequential(nn.BatchNorm2d(2, momentum=None)), input_size=(2, 4, 4))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        return self.head(x * nn.functional.softplus(x.sum()))


def test_a_site_may_be_one_number():
    assert fxfeedback.to_butd(Scaled(), n_tasks=2, input_size=(3,))(torch.randn(4, 3), 1).shape == (4, 2)


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, 2, groups=2)])
def test_an_empty_batch_updates_a_convolution_with_zeros(conv):
    butd, x = fxfeedback.to_butd(conv.double(), input_size=(4, 5, 5)), torch.randn(0, 4, 5, 5, dtype=torch.double)
    by_rules(butd, [x]).sum().backward()
    assert conv.weight.grad.shape == conv.weight.shape and not conv.weight.grad.any()


def test_an_empty_batch_may_be_the_last_dimension():
    class Similarities(nn.Module):
        def forward(self, x):
            x = torch.relu(x)
            return nn.functional.linear(x, x) + x @ x.transpose(-1, -2)

    x = torch.zeros(0, 2, requires_grad=True)
    y = by_rules(fxfeedback.to_butd(Similarities(), input_size=(2,)), [x])
    y.sum().backward()
    assert y.shape == (0, 0)
    assert x.grad.shape == x.shape


class MoreKeys(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)

    def forward(self, x):
        later = torch.triu(torch.ones(5, 5), 1).bool()
        return self.attention(x, x, x, key_padding_mask=x[..., 0] > 1, attn_mask=later)


def test_attention_with_a_learned_key_and_a_key_of_zeros():
    model, x = MoreKeys().double(), torch.randn(3, 5, 6, dtype=torch.double, requires_grad=True)
    butd = fxfeedback.to_butd(model, input_size=(5, 6))
    for made, y in zip(butd(x), model(x), strict=True):
        assert same(made, y)
    tensors = learning(model, [x])
    expected = gradients(list(model(x)), tensors)
    for outputs in (butd(x), by_rules(butd, [x])):
        for name, update in gradients(list(outputs), tensors).items():
            assert same(update, expected[name], 1e-9), name
