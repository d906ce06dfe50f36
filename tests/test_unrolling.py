"""The unrolled graph: it agrees with a plain loop over passes and nodes, and it computes nothing twice."""

import copy

import hypothesis
import networkx as nx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import NodePathTracer
from torchvision.ops import stochastic_depth

import fxfeedback
from fxfeedback import Connection, Steering
from fxfeedback.tracing.share import share
from fxfeedback.tracing.trace import trace
from marks import long, long_but, one_in

BATCH = 3
LRM3 = [
    ("classifier.6", "features.8"),
    ("features.9", "features.0"),
    ("classifier.6", "features.10"),
    ("features.12", "features.3"),
    ("classifier.2", "features.6"),
]


# -- the reference: no sharing, no unrolling ---------------------------------------------------------------------------


def reference(net, names, model, x, passes, state=None, steering=(), steer_first_pass=False):
    """What `model.unroll` returns, by a plain loop: `net`, whose nodes have these names, node by node, pass by pass."""
    run = fx.Interpreter(fx.GraphModule(net, NodePathTracer().trace(net)))
    order = {name: i for i, name in enumerate(names)}
    signals, strength, outputs = dict(state or {}), {}, []

    def steer():
        for s in steering:
            old = signals.get(s.source)
            signals[s.source] = s.activation if old is None else s.alpha * s.activation + (1 - s.alpha) * old
            strength[s.source] = torch.as_tensor(s.strength, dtype=x.dtype).expand(2)

    if steer_first_pass:
        steer()
    for _ in range(passes):
        run.args_iter, run.env, previous = iter([x]), {}, dict(signals)
        for node, name in zip(run.module.graph.nodes, names, strict=True):
            y, ms = run.run_node(node), []
            for c in model.connections:
                signal = (signals if order[c.source] < order[name] else previous).get(c.source)
                if c.destination == name and signal is not None:
                    ms.append(block(model.modulation(c.source, name), c, signal, y, strength.get(c.source, (1, 1))))
                    activation = torch.relu if c.activation != "none" else torch.clone
                    gain = y if c.mode == "multiply" else 1
            run.env[node] = signals[name] = activation(y + gain * sum(ms)) if ms else y
        outputs.append(signals["output"])
        steer()
    return outputs, {c.source: signals[c.source] for c in model.connections}


def names_of(net):
    tracer = NodePathTracer()
    graph = tracer.trace(net)
    return [tracer.node_to_qualname.get(node, node.name) for node in graph.nodes]


def block(b, c, a, y, strength):
    """m of one connection, from the parameters of its block `b`."""
    size = y.shape[2:] if y.ndim == 4 else (1, 1)
    z = a if a.ndim == 4 else a[:, :, None, None]
    z = norm(b, resize(z, size, c.resize)) if c.order == "resize-norm-squash" else norm(b, z)
    z = resize(torch.tanh(z), size, c.resize)
    z = strength[0] * b.neg_scale * z.clamp(max=0) + strength[1] * b.pos_scale * z.clamp(min=0)
    m = F.conv2d(z, b.modulation.weight, b.modulation.bias)
    return m if y.ndim == 4 else m[:, :, 0, 0]


def resize(z, size, mode):
    if tuple(z.shape[2:]) == tuple(size) or mode == "area":
        return F.adaptive_avg_pool2d(z, size)
    return F.interpolate(z, size, mode=mode, align_corners=True)


def norm(b, z):
    weight, bias = b.norm.weight, b.norm.bias
    if weight.ndim == 1:  # over the channels of each position
        z = (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        return z * weight[:, None, None] + bias[:, None, None]
    weight, bias = (resize(p[None], z.shape[2:], "bilinear") for p in (weight, bias))
    z = (z - z.mean((1, 2, 3), keepdim=True)) / (z.var((1, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    return z * weight + bias


# -- random nets, connections and calls --------------------------------------------------------------------------------


class Net(nn.Module):
    """A program of (layer, places of its operands); every value that nothing reads goes into the output.

    With in_place=False no op is in place, and who reads an overwritten value reads the new one all the same.
    """

    def __init__(self, program, unread, in_place=True):
        super().__init__()
        self.layers = nn.ModuleList(layer if isinstance(layer, nn.Module) else None for layer, _ in program)
        self.heads = nn.ModuleList(nn.Linear(channels, 4) for _, channels in unread)
        self.program, self.unread, self.in_place = program, unread, in_place
        self.overwriting = {i for i, layer in enumerate(self.layers) if getattr(layer, "inplace", False)}

    def forward(self, x):
        values = [x]
        for place, (module, (layer, places)) in enumerate(zip(self.layers, self.program, strict=True)):
            a = [values[place] for place in places]
            if module is not None:
                y, overwrites = module(*a), place in self.overwriting
            elif layer == "add_":
                y, overwrites = a[0].add_(a[1]) if self.in_place else a[0].add(a[1]), True
            else:
                y, overwrites = FUNCTIONS[layer](*a), False
            if overwrites and not self.in_place:
                values[places[0]] = y
            values.append(y)
        vectors = [values[place].mean((2, 3)) if is_map else values[place] for place, is_map in self.read]
        return sum(head(v) for head, v in zip(self.heads, vectors, strict=True))

    @property
    def read(self):
        return [place for place, _ in self.unread]

    def out_of_place(self):
        """A copy in which no op is in place."""
        net = copy.deepcopy(self)
        net.in_place = False
        for module in net.layers:
            if isinstance(module, nn.ReLU):
                module.inplace = False
        return net


FUNCTIONS = {
    "add": torch.add,
    "cat": lambda a, b: torch.cat([a, b], 1),
    "gate": lambda a, s: a * torch.sigmoid(s)[:, :, None, None],
    "mean": lambda a: a.mean((2, 3)),
    "flatten": lambda a: torch.flatten(a, 1),
}


@st.composite
def nets(draw):
    """A small net, and the shapes of its values."""
    torch.manual_seed(draw(st.integers(0, 99)))
    shapes, program, fresh = [(2, 5, 5)], [], [False]  # fresh: made by an op that does not hand on its input's memory
    while len(program) < 2 or (len(program) < 9 and draw(st.integers(0, 4))):
        at = draw(st.sampled_from([*range(len(shapes)), *[len(shapes) - 1] * 3]))
        shape = shapes[at]
        like = [i for i, other in enumerate(shapes) if other == shape]
        beside = [i for i, other in enumerate(shapes) if other[1:] == shape[1:]]
        kinds = ["relu", "norm", "add", "cat", "dropout"] + ["relu_", "add_"] * fresh[at]
        kinds += ["conv", "conv", "stride", "pool", "mean", "flatten"] if len(shape) == 3 else ["linear", "linear"]
        kinds += ["gate"] * (len(shape) == 3 and (shape[0],) in shapes)
        kind, channels = draw(st.sampled_from(kinds)), draw(st.integers(2, 4))
        places, out, layer = [at], shape, kind
        if kind in ("relu", "relu_"):
            layer = nn.ReLU(inplace=kind == "relu_")
        elif kind == "norm":
            layer = (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0], momentum=0.3)
        elif kind == "dropout":
            layer = nn.Dropout(0.0)
        elif kind in ("add", "add_"):
            places.append(draw(st.sampled_from(like)))
        elif kind == "gate":
            places.append(shapes.index((shape[0],)))
        elif kind == "cat":
            places.append(draw(st.sampled_from(beside)))
            out = (shape[0] + shapes[places[1]][0], *shape[1:])
        elif kind == "conv":
            layer, out = nn.Conv2d(shape[0], channels, 3, padding=1), (channels, *shape[1:])
        elif kind == "stride":
            layer = nn.Conv2d(shape[0], channels, 3, stride=2, padding=1)
            out = (channels, *((n + 1) // 2 for n in shape[1:]))
        elif kind == "pool":
            layer, out = nn.MaxPool2d(2, 2, ceil_mode=True), (shape[0], *((n + 1) // 2 for n in shape[1:]))
        elif kind == "mean":
            out = shape[:1]
        elif kind == "flatten":
            out = (shape[0] * shape[1] * shape[2],)
        elif kind == "linear":
            layer, out = nn.Linear(shape[0], channels), (channels,)
        program.append((layer, places))
        shapes.append(out)
        fresh.append(kind not in ("dropout", "flatten", "relu_", "add_"))
        if kind in ("dropout", "flatten", "relu_", "add_"):
            fresh[at] = False
    read = {place for _, places in program for place in places}
    unread = [((i, len(shape) == 3), shape[0]) for i, shape in enumerate(shapes) if i not in read and i > 0]
    net = Net(program, unread).double()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.train(draw(st.booleans()))


@st.composite
def connected(draw):
    """A net, and the net with random connections."""
    net = draw(nets())
    x = torch.randn(BATCH, 2, 5, 5).double()
    names = [n for n, info in fxfeedback.node_names(net, example_inputs=(x,)).items() if info.shape]
    pairs = draw(st.lists(st.tuples(*[st.sampled_from(names)] * 2), min_size=1, max_size=4, unique=True))
    activations = {destination: draw(st.sampled_from(["auto", "auto", "none"])) for _, destination in pairs}
    modes = {destination: draw(st.sampled_from(["multiply", "multiply", "add"])) for _, destination in pairs}
    connections = [
        Connection(
            *pair,
            order=draw(st.sampled_from(["norm-squash-resize"] * 3 + ["resize-norm-squash"])),
            norm=draw(st.sampled_from(["layer", "layer", "channel"])),
            resize=draw(st.sampled_from(["bilinear", "bilinear", "area"])),
            activation=activations[pair[1]],
            mode=modes[pair[1]],
        )
        for pair in pairs
    ]
    model = fxfeedback.add_feedback(net, connections, example_inputs=(x,), checkpoint=draw(st.booleans()))
    with torch.no_grad():
        for p in model.modulations.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net, model, x


@st.composite
def calls(draw, model, x):
    """Options of one call."""
    sources = sorted({c.source for c in model.connections})
    steered = draw(st.sampled_from([[], [], *[[s] for s in sources], sources]))
    shapes = dict(zip(sources, [v.shape for v in values_of(model, sources, x)], strict=True))
    steering = [
        Steering(
            source,
            torch.randn(1 if draw(st.booleans()) else BATCH, *shapes[source][1:]).double(),
            draw(st.sampled_from([1.0, 2.5, (0.5, 3.0)])),
            draw(st.sampled_from([1.0, 0.0, 0.7])),
        )
        for source in steered
    ]
    return {"passes": draw(st.integers(1, 4)), "steering": steering, "steer_first_pass": draw(st.booleans())}


def values_of(model, names, x):
    info = fxfeedback.node_names(share(model._net), example_inputs=(x,))
    return [torch.empty(tuple(BATCH if n is None else n for n in info[name].shape), device="meta") for name in names]


def close(a, b, tolerance=1e-12):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * max(1, b.abs().max())


some = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@settings(some, max_examples=15)
@given(st.data())
def test_random_graphs_agree_with_the_reference(data):
    check(data)


@pytest.mark.long
@settings(some, max_examples=80)
@given(st.data())
def test_more_random_graphs_agree_with_the_reference(data):
    check(data)


def check(data):
    net, model, x = data.draw(connected())
    plain, names, state, expected_state, losses = net.out_of_place(), names_of(net), None, None, [0, 0]
    for _ in range(data.draw(st.integers(1, 2))):
        call = data.draw(calls(model, x))
        hypothesis.note(f"{net.program} {model.connections} {call}")
        expected, expected_state = reference(plain, names, model, x, state=expected_state, **call)
        outputs, state = model.unroll(x, state=state, keep_graph=True, **call)
        assert len(outputs) == len(expected) == call["passes"]
        assert all(close(a, b) for a, b in zip(outputs, expected, strict=True))
        assert state.keys() == expected_state.keys()
        assert all(close(state[name], expected_state[name]) for name in state)
        for (name, a), b in zip(net.named_buffers(), plain.buffers(), strict=True):
            assert close(a.double(), b.double()), name
        for i, results in enumerate((outputs, expected)):
            losses[i] = losses[i] + sum((output * (p + 1)).cos().sum() for p, output in enumerate(results))
    ours = torch.autograd.grad(losses[0], [*net.parameters(), *model.modulations.parameters()], allow_unused=True)
    theirs = torch.autograd.grad(losses[1], [*plain.parameters(), *model.modulations.parameters()], allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None or not a.any()) if b is None else close(a, b, 1e-9)


REAL = {
    "alexnet": LRM3,
    "resnet18": [
        ("layer4.1.relu_1", "layer1.1.relu_1"),
        ("layer2.1.add", "layer3.0.conv1"),
        ("fc", "layer2.1.relu_1"),
        ("layer3.0.bn1", "layer3.0.bn1"),
    ],
}


@one_in(2)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_torchvision_agrees_with_the_reference(name, train):
    net = make(name).double().train(train)
    plain = copy.deepcopy(net)
    for module in [*net.modules(), *plain.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x = torch.randn(2, 3, 64, 64, dtype=torch.double)
    model = fxfeedback.add_feedback(net, REAL[name], input_size=(3, 64, 64))
    with torch.no_grad():
        expected, _ = reference(plain, names_of(net), model, x, 3)
        outputs = model(x, passes=3)
    assert all(close(a, b) for a, b in zip(outputs, expected, strict=True))
    assert all(close(a.double(), b.double()) for a, b in zip(net.buffers(), plain.buffers(), strict=True))


def test_a_cumulative_average_counts_every_pass():
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3, momentum=None),
        nn.ReLU(),
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4, momentum=None),
    ).double()
    plain, x = copy.deepcopy(net), torch.randn(BATCH, 2, 5, 5).double()
    model = fxfeedback.add_feedback(net, [("4", "2")], input_size=(2, 5, 5))
    expected, _ = reference(plain, names_of(net), model, x, 3)
    assert all(close(a, b) for a, b in zip(model(x, passes=3), expected, strict=True))
    for (name, a), b in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert close(a.double(), b.double()), name


def test_in_training_the_statistics_do_not_depend_on_what_is_returned():
    """Heads of early passes are dropped with return_all=False; their batch norms have seen the batch all the same."""
    x, buffers = torch.randn(BATCH, 2, 5, 5), []
    for return_all in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        fxfeedback.add_feedback(net, [("1", "0")], input_size=(2, 5, 5))(x, return_all=return_all)
        buffers.append(list(net.buffers()))
    assert all(torch.allclose(a, b) for a, b in zip(*buffers, strict=True))


# -- sharing -----------------------------------------------------------------------------------------------------------


def make(name):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, num_classes=7, **options)


class Dependence:
    """What depends on what in a net: (name, "own") is a node's own value, (name, "handed on") what others read."""

    def __init__(self, net, connections):
        graph = trace(share(net)).graph
        self.names = [node.meta["name"] for node in graph.nodes if node.op not in ("output", "get_attr")]
        order = {name: i for i, name in enumerate(self.names)}
        ends = [tuple(last_inside(self.names, end) for end in pair) for pair in connections]
        self.feedback = [(s, d) for s, d in ends if order[s] >= order[d]]
        self.digraph = nx.DiGraph()
        for node in graph.nodes:
            name = node.meta["name"]
            self.digraph.add_edge((name, "own"), (name, "handed on"))
            for operand in node.all_input_nodes:
                self.digraph.add_edge((operand.meta["name"], "handed on"), (name, "own"))
        for s, d in ends:
            if order[s] < order[d]:
                self.digraph.add_edge((s, "handed on"), (d, "handed on"))
        self.random = [node.meta["name"] for node in graph.nodes if is_random(node, net)]

    def changing(self, passes):
        """Per pass the set of nodes that differ from the pass before; in the first pass, all."""
        sets = [set(self.digraph)]
        for _ in range(passes - 1):
            starts = {(d, "handed on") for s, d in self.feedback if (s, "handed on") in sets[-1]}
            starts |= {(name, "own") for name in self.random}
            sets.append(starts.union(*(nx.descendants(self.digraph, start) for start in starts)))
        return [{name for name in self.names if (name, "own") in changed} for changed in sets]


def last_inside(names, end):
    return end if end in names else [name for name in names if name.startswith(f"{end}.")][-1]


def is_random(node, net):
    if node.target is stochastic_depth:
        p, training = node.args[1], node.kwargs.get("training", node.args[-1])
        return training and p > 0
    module = net.get_submodule(node.target) if node.op == "call_module" else None
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0


SHARING = {
    "alexnet": LRM3,
    "resnet18": [("layer4", "layer2"), ("layer1.1.conv1", "layer3.0.bn1")],
    "resnet50": [("layer4", "layer3.0.conv1")],
    "densenet121": [("features.denseblock4", "features.denseblock3.denselayer5.conv2")],
    "mobilenet_v2": [("features.18", "features.8.conv.0.0"), ("features.14", "features.14")],
    "efficientnet_b0": [("features.8", "features.5.0.block.0.0"), ("classifier.1", "features.6.1.block.2.fc1")],
    "googlenet": [("inception4b.branch4.1.relu", "inception4b.branch2.0.conv"), ("fc", "inception5b.branch1.relu")],
}


@one_in(4)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", long_but(["alexnet", "resnet18"], SHARING))
def test_only_what_lies_downstream_of_a_changed_modulation_is_computed_again(name, train):
    net = make(name).train(train)
    model = fxfeedback.add_feedback(net, SHARING[name], input_size=(3, 64, 64))
    expected = Dependence(net, SHARING[name]).changing(4)
    emitted = [set() for _ in expected]
    for node in model.unrolled(passes=4).graph.nodes:
        if "name" in node.meta:
            emitted[node.meta.get("pass", 1) - 1].add(node.meta["name"])
    computing = emitted[0] & expected[0]  # a closed dropout or identity computes nothing and has no node
    assert len(computing) > 0.9 * len(expected[0]) - len([m for m in net.modules() if isinstance(m, nn.Dropout)])
    assert 0 < len(expected[1] & computing) < len(computing)
    for again, should in zip(emitted[1:], expected[1:], strict=True):
        assert again & expected[0] == should & computing
    if train:
        norms = {n for n, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)} & computing
        advanced = [node for node in model.unrolled(passes=4).graph.nodes if node.name.startswith("advance_")]
        assert len(advanced) == sum(len(norms - should) for should in expected[1:])


def test_signals_that_do_not_change_are_not_applied_again():
    """A feedback source that lies beside its destination has the same value in every pass: two passes say it all."""
    net = make("googlenet").eval()
    connections = [("inception4b.branch4.1.relu", "inception4b.branch2.0.conv")]
    assert Dependence(net, connections).changing(3)[2] == set()
    model = fxfeedback.add_feedback(net, connections, input_size=(3, 64, 64))
    outputs = model.unrolled(passes=4).graph.output_node().args[0][0]
    assert len(outputs) == 4 and len(set(outputs)) == 2
    assert len([node for node in model.unrolled(passes=4).graph.nodes if node.op == "call_module"]) == 1


# -- what it costs -----------------------------------------------------------------------------------------------------


def flops_per_layer(net, x):
    """Name -> FLOPs of every layer of torch.nn, by running it; only these have FLOPs."""
    flops, counter = {}, FlopCounterMode(display=False)
    hooks = []
    for name, module in net.named_modules():
        if not list(module.children()):
            hooks += count(counter, module, flops, name)
    with counter:
        net(x)
    for hook in hooks:
        hook.remove()
    assert sum(flops.values()) == counter.get_total_flops()
    return flops


def count(counter, module, flops, name):
    def before(*_):
        flops[name] = flops.get(name, 0) - counter.get_total_flops()

    def after(*_):
        flops[name] += counter.get_total_flops()

    return module.register_forward_pre_hook(before), module.register_forward_hook(after)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("name", ["alexnet", long("resnet50")])
def test_flops_are_those_of_the_nodes_computed_again(name, passes):
    net, x = make(name).eval(), torch.randn(2, 3, 64, 64)
    layers = flops_per_layer(net, x)
    model = fxfeedback.add_feedback(net, SHARING[name], input_size=(3, 64, 64))
    blocks, counter = {}, FlopCounterMode(display=False)
    for pair in SHARING[name]:
        count(counter, model.modulation(*pair), blocks, "blocks")
    graph = model.unrolled(passes=passes)  # in which blocks are whole
    with counter:
        graph(x)
    sets = Dependence(net, SHARING[name]).changing(passes)
    expected = sum(layers.get(node, 0) for nodes in sets for node in nodes)
    assert counter.get_total_flops() - blocks.get("blocks", 0) == expected
    assert (blocks.get("blocks", 0) > 0) == (passes > 1)


def test_heads_of_early_passes_cost_nothing_when_only_the_last_is_returned():
    net, x = make("alexnet").eval(), torch.randn(2, 3, 64, 64)
    layers = flops_per_layer(net, x)
    connections = [("features.9", "features.6")]
    model = fxfeedback.add_feedback(net, connections, input_size=(3, 64, 64))
    counted = []
    for return_all in (True, False):
        blocks, counter = {}, FlopCounterMode(display=False)
        hooks = count(counter, model.modulation(*connections[0]), blocks, "blocks")
        model(x, passes=3, return_all=return_all)  # makes the graph
        with counter:
            outputs = model(x, passes=3, return_all=return_all)
        counted.append(counter.get_total_flops() - blocks["blocks"])
        for hook in hooks:
            hook.remove()
    head = sum(n for name, n in layers.items() if name.startswith("classifier") or name == "features.10")
    assert counted == [sum(layers.values()) + 2 * (layers["features.8"] + head), counted[0] - 2 * head]
    assert torch.equal(outputs, model(x, passes=3)[-1])
