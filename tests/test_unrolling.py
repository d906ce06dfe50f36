"""The unrolled graph: it agrees with a plain loop over passes and nodes, and it computes nothing twice."""

import copy
from functools import partial

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
from torchvision.ops import StochasticDepth, stochastic_depth

import fxfeedback
from fxfeedback import Connection, Steering
from fxfeedback.trace import share, trace

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
            run.env[node] = signals[name] = activation(y + y * sum(ms)) if ms else y
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

    def forward(self, x):
        values = [x]
        for module, (layer, places) in zip(self.layers, self.program, strict=True):
            a = [values[place] for place in places]
            if module is not None:
                y, overwrites = module(*a), isinstance(module, nn.ReLU) and layer.inplace
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
    names = [n for n, info in fxfeedback.node_names(net, example_inputs=(x,)).items() if info.shape and n != "x"]
    pairs = draw(st.lists(st.tuples(*[st.sampled_from(names)] * 2), min_size=1, max_size=4, unique=True))
    activations = {destination: draw(st.sampled_from(["auto", "auto", "none"])) for _, destination in pairs}
    connections = [
        Connection(
            *pair,
            order=draw(st.sampled_from(["norm-squash-resize"] * 3 + ["resize-norm-squash"])),
            norm=draw(st.sampled_from(["layer", "layer", "channel"])),
            resize=draw(st.sampled_from(["bilinear", "bilinear", "area"])),
            activation=activations[pair[1]],
        )
        for pair in pairs
    ]
    model = fxfeedback.add_feedback(net, connections, example_inputs=(x,))
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


@settings(
    deadline=None,
    max_examples=200,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(st.data())
def test_random_graphs_agree_with_the_reference(data):
    net, model, x = data.draw(connected())
    plain, state, expected_state = net.out_of_place(), None, None
    for _ in range(data.draw(st.integers(1, 2))):
        call = data.draw(calls(model, x))
        hypothesis.note(f"{[m for m in net.program]} {model.connections} {call}")
        with torch.no_grad():
            expected, expected_state = reference(plain, names_of(net), model, x, state=expected_state, **call)
            outputs, state = model.unroll(x, state=state, **call)
        assert len(outputs) == len(expected) == call["passes"]
        assert all(close(a, b) for a, b in zip(outputs, expected, strict=True))
        assert state.keys() == expected_state.keys()
        assert all(close(state[name], expected_state[name]) for name in state)
        for (name, a), b in zip(net.named_buffers(), plain.buffers(), strict=True):
            assert close(a.double(), b.double()), name
