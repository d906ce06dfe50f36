"""torch.compile takes whole what we return: no graph break, and the same values."""

import copy
import functools
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torchvision

import fxfeedback
from marks import long, sweep
from networks import convnet

MODELS = {
    "convnet": (convnet, ("8", "4"), (2, 8, 8)),
    "alexnet": (torchvision.models.alexnet, ("classifier.6", "features.8"), (3, 64, 64)),
    "resnet18": (torchvision.models.resnet18, ("layer4", "layer3.0.conv1"), (3, 64, 64)),
    "vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32),
        ("encoder.layers.encoder_layer_2", "encoder.layers.encoder_layer_1"),
        (3, 32, 32),
    ),
}


@pytest.fixture(params=["convnet", sweep("alexnet"), sweep("resnet18"), long("vit")])
def feedback(request):
    make, connection, size = MODELS[request.param]
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = fxfeedback.add_feedback(make().eval(), [connection], input_size=size)
    return model, connection[0], torch.randn(2, *size)


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def test_the_unrolled_graph(feedback):
    model, _, x = feedback
    graph = model.unrolled(passes=2)
    torch.testing.assert_close(compiled(graph)(x), graph(x))


def test_the_model_itself_in_every_way_of_calling_it(feedback):
    model, source, x = feedback
    steering = fxfeedback.Steering(source, model.readout(x, [source])[0][source].value.detach(), strength=2.0)
    fast = compiled(model)
    for options in ({}, {"passes": 1}, {"steering": steering, "steer_first_pass": True}, {"return_all": False}):
        torch.testing.assert_close(fast(x, **options), model(x, **options))
    for module in model.modules():
        module.training = not isinstance(module, torch.nn.Dropout)
    torch.testing.assert_close(fast(x), model(x))  # another mode, another graph
    fast(x)[1].sum().backward()
    assert all(p.grad is not None for p in model.modulations.parameters())


class Scaled(torch.nn.Module):
    """x * factors[0]"""

    def __init__(self, factor):
        super().__init__()
        self.factors = [factor]

    def forward(self, x):
        return x * self.factors[0]


CHANGES = {
    "one module's mode": lambda network: network.get_submodule("1").train(),
    "mode": lambda network: network.train(),
    "and back": lambda network: network.eval(),
    "slope": lambda network: setattr(network.get_submodule("2"), "negative_slope", 0.9),
    "dropout": lambda network: setattr(network.train().get_submodule("1"), "p", 0.0),
    "child": lambda network: network.add_module("2", torch.nn.Tanh()),
    "child of the same kind": lambda network: network.add_module("4", Scaled(3.0)),
    "in a list": lambda network: network.get_submodule("4").factors.__setitem__(0, 4.0),
}


@pytest.mark.long
@pytest.mark.parametrize("learns", [True, False], ids=["butd", "feedback"])
@torch._dynamo.config.patch(recompile_limit=16)
def test_changed_modes_and_attributes_compile_anew(learns):
    torch._dynamo.reset()
    nn = torch.nn
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.LeakyReLU(0.1), nn.Linear(8, 2), Scaled(2.0)).eval()
    feedback = {"connections": [("3", "2")], "input_size": (4,)}
    network = fxfeedback.to_butd(model, input_size=(4,)) if learns else fxfeedback.add_feedback(model, **feedback)
    fast, x = compiled(network), torch.randn(3, 4)
    for change in (lambda network: network, *CHANGES.values()):
        change(network)
        outputs = []
        for one in (fast, network):
            torch.manual_seed(0)
            outputs.append(one(x))
        torch.testing.assert_close(*outputs)


@pytest.mark.long
def test_one_compiled_function_for_several_networks():
    """Copies have graphs and weights of their own."""
    torch._dynamo.reset()
    network, x = fxfeedback.to_butd(convnet(), input_size=(2, 8, 8)), torch.randn(3, 2, 8, 8)
    networks = [network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    call = compiled(lambda network, x: network(x))
    for factor, one in enumerate([*networks, network]):
        with torch.no_grad():
            next(one.parameters()).mul_(factor)
        torch.testing.assert_close(call(one, x), one(x))


@pytest.mark.parametrize("learns", [True, False], ids=["butd", "feedback"])
def test_what_else_is_called_compiles_nothing_anew(learns):
    torch._dynamo.reset()
    convert = fxfeedback.to_butd if learns else functools.partial(fxfeedback.add_feedback, connections=[("2", "1")])
    nn, made = torch.nn, []
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network, x = convert(model.eval(), input_size=(2, 4, 4)), torch.randn(2, 2, 4, 4)
    fast = torch.compile(network, backend=lambda graph, _: made.append(graph) or graph, fullgraph=True)
    for size in (4, 5, 6):
        fast(x)
        network(torch.randn(2, 2, size, size), **({} if learns else {"passes": size}))
    assert len(made) == 1


@pytest.mark.long
def test_inductor():
    torch._dynamo.reset()
    for network in (
        fxfeedback.add_feedback(convnet(), [("8", "5")], input_size=(2, 8, 8)),
        fxfeedback.to_butd(convnet(), input_size=(2, 8, 8)),
    ):
        x, grads = torch.randn(3, 2, 8, 8), []
        for call in (network, torch.compile(network, fullgraph=True)):
            network.zero_grad()
            outputs = call(x)
            sum(y.square().sum() for y in (outputs if isinstance(outputs, list) else [outputs])).backward()
            grads.append([outputs, *(p.grad for p in network.parameters() if p.grad is not None)])
        torch.testing.assert_close(*grads)


def to_package(learns):
    """A network, its inputs, and the program that torch.export makes of it for every batch size."""
    torch.manual_seed(0)
    network = (
        fxfeedback.to_butd(convnet(), n_tasks=3, input_size=(2, 8, 8))
        if learns
        else fxfeedback.add_feedback(convnet(), [("8", "5")], input_size=(2, 8, 8))
    ).eval()
    inputs = (torch.randn(4, 2, 8, 8), *([torch.tensor([0, 1, 2, 1])] if learns else []))
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        sizes = {"inputs": tuple({0: batch} for _ in inputs)}
        return network, inputs, torch.export.export(network, inputs, dynamic_shapes=sizes, strict=False)


@pytest.mark.parametrize("learns", [True, False], ids=["butd", "feedback"])
def test_torch_export_takes_every_batch(learns):
    network, inputs, program = to_package(learns)
    for rows in (slice(0, 2), slice(0, 3)):
        given = [x[rows] for x in inputs]
        torch.testing.assert_close(program.module()(*given), network(*given))


LOADS = """
import sys, torch
inputs = torch.load(sys.argv[2])
torch.save(torch._inductor.aoti_load_package(sys.argv[1])(*inputs), sys.argv[3])
assert "fxfeedback" not in sys.modules
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("learns", [True, False], ids=["butd", "feedback"])
def test_a_package_runs_without_fxfeedback(learns, tmp_path):
    network, inputs, program = to_package(learns)
    files = [str(tmp_path / name) for name in ("network.pt2", "inputs.pt", "outputs.pt")]
    torch._inductor.aoti_compile_and_package(program, package_path=files[0])
    given = tuple(x[:3] for x in inputs)
    torch.save(given, files[1])
    subprocess.run([sys.executable, "-c", LOADS, *files], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(files[2]), network(*given))


TASKS = {"plain": None, "ids": torch.tensor([0, 2, 1, 0]), "vectors": torch.rand(4, 3)}


@pytest.mark.parametrize("train", [long(False), True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name, task", [("convnet", "ids"), long("convnet", "plain"), long("convnet", "vectors"), long("resnet18", "ids")]
)
def test_an_instructed_network_and_its_learning(name, task, train):
    """Inputs of another batch size compile once more at most."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, size = (convnet(), (2, 6, 6)) if name == "convnet" else (torchvision.models.resnet18(), (3, 32, 32))
    task, butd = TASKS[task], fxfeedback.to_butd(net, n_tasks=3, input_size=size)
    butd = butd.double().train(train)
    given = () if task is None else (task if not task.is_floating_point() else task.double(),)
    fast, state = compiled(butd), {name: value.clone() for name, value in butd.state_dict().items()}
    for batch in (4, 3):
        results = []
        for call in (butd, fast):
            butd.load_state_dict(state)
            butd.zero_grad()
            logits = call(torch.ones(batch, *size).double().cumsum(-1), *[t[:batch] for t in given])
            logits.square().sum().backward()
            updates = [p.grad for p in butd.parameters() if p.grad is not None]
            results.append([logits, *updates, *butd.buffers()])
        torch.testing.assert_close(*results, rtol=0, atol=0)
