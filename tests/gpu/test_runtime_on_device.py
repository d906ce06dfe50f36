"""ONNX Runtime's CUDA provider: what is exported gives torch's values there, and nothing is computed on the CPU."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fxfeedback
from marks import long
from test_passes_on_device import passes
from the_device import DEVICE, ON_GPU, ids, network, off

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from fxfeedback.runtime import Learner, Session  # noqa: E402

PROVIDER = [("CUDAExecutionProvider", {"use_tf32": "0"})] if ON_GPU else "cpu"
MANY = 16
"""Shapes and single numbers have fewer values; a batch of the smallest vectors has more."""


def profiling(folder):
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    options.log_severity_level = 4
    return options


def computed_on_the_cpu(profile):
    """The nodes on the CPU provider that made more than shapes and single numbers."""
    nodes = set()
    for event in profile:
        given = event.get("args", {})
        if event.get("cat") == "Node" and given.get("provider") == "CPUExecutionProvider":
            sizes = [np.prod(shape) for made in given["output_type_shape"] for shape in made.values()]
            if max(sizes, default=0) >= MANY:
                nodes.add(f"{given['op_name']} {event['name']} {given['output_type_shape']}")
    return nodes


@pytest.fixture
def opened(monkeypatch):
    """ONNX Runtime's sessions, as they are opened."""
    sessions = []

    class Noted(onnxruntime.InferenceSession):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            sessions.append(self)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Noted)
    return sessions


def assert_only_on_the_gpu(opened):
    """By the profiles. On the CPU: that everything is there, as it would be seen."""
    profiled = [session for session in opened if session.get_session_options().enable_profiling]
    for session in profiled:
        profile = json.loads(Path(session.end_profiling()).read_text())
        nodes = computed_on_the_cpu(profile)
        assert (not nodes) == ON_GPU or not any(event.get("cat") == "Node" for event in profile), sorted(nodes)[:5]
        assert session.get_providers()[0] == ("CUDAExecutionProvider" if ON_GPU else "CPUExecutionProvider")
    assert profiled


def same_kind(found, given):
    """Tensors come back as tensors, where they lay."""
    assert isinstance(found, type(given)) and getattr(found, "device", None) == getattr(given, "device", None)
    return torch.as_tensor(found)


@pytest.mark.long
@pytest.mark.parametrize("name", ["convnet", "vit", "resnet18", "alexnet_lrm3"])
def test_passes(name, tmp_path, opened):
    """Plain and steered, with another batch, too."""
    model, x, source = passes(name)
    model, x = model.float(), x.float()
    seen = model.readout(x[:1], [source])[0][source].value.detach()
    fxfeedback.export(model, tmp_path / "passes.onnx", steerable=True)
    session = Session(tmp_path / "passes.onnx", PROVIDER, profiling(tmp_path))
    model, x, seen = model.to(DEVICE), x.to(DEVICE), seen.to(DEVICE)
    steering = {"source": source, "activation": seen, "strength": 3.0}
    for images, how in ((x, ()), (x, steering), (x[:3], ()), (x.cpu().numpy(), ())):
        with torch.no_grad():
            expected = model(torch.as_tensor(images, device=DEVICE), steering=how)
        for ours, theirs in zip(session(images, steering=how), expected, strict=True):
            assert off(same_kind(ours, images), theirs) <= 2e-4
    assert_only_on_the_gpu(opened)


@pytest.mark.parametrize("product", ["instructed", "one task"])
@pytest.mark.parametrize(
    "name, gating",
    [long("convnet", "channel"), long("published", "unit"), long("resnet18", "channel"), long("vit", "unit")],
)
def test_instructions(name, gating, product, tmp_path, opened):
    model, x = network(name, False, torch.float32)
    torch.manual_seed(1)
    butd = fxfeedback.to_butd(model, n_tasks=4, embedding=16, gating=gating, input_size=x.shape[1:]).eval()
    fxfeedback.export(butd, tmp_path / "one.onnx", task=1 if product == "one task" else None)
    session = Session(tmp_path / "one.onnx", PROVIDER, profiling(tmp_path))
    task = {} if product == "one task" else {"task": ids(x, 4)}
    with torch.no_grad():
        expected = butd(x, task.get("task", 1))
    for images in (x, x.cpu().numpy()):
        ours = same_kind(session(images, **task), images)
        assert off(ours, expected) <= 1e-3  # a unit may lie at its gate's zero
    assert_only_on_the_gpu(opened)


CASES = {
    "convnet-sgd": ("convnet", True, "sgd", {}),
    "published-adam": ("published", True, "adam", {}),
    "vit-sgd": ("vit", False, "sgd", {}),
    "resnet18-sgd": ("resnet18", True, "sgd", {}),
    "resnet18-channels": ("resnet18", False, "sgd", {"gating": "channel"}),
    "mobilenet_v2-sgd": ("mobilenet_v2", True, "sgd", {}),
}


def a_learner(case, folder):
    """A network, images, and its learner; the optimizer and its learning rate."""
    name, train, kind, options = CASES[case]
    model, x = network(name, train, torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(1)
    butd = fxfeedback.to_butd(model, n_tasks=4, embedding=16, input_size=x.shape[1:], **options)
    momentum = {"momentum": 0.9} if kind == "sgd" else {}
    fxfeedback.export_learner(butd, folder / "learner.onnx", optimizer=kind, **momentum)
    return butd, x, Learner(folder / "learner.onnx", PROVIDER, profiling(folder)), kind, 0.01 if kind == "sgd" else 1e-3


@pytest.mark.parametrize("case", list(map(long, CASES)))
def test_a_step_is_torchs(case, tmp_path, opened):
    """As in float64: the loss, the weights, and the statistics."""
    butd, x, learner, kind, lr = a_learner(case, tmp_path)
    exact, target, task = copy.deepcopy(butd).double(), ids(x, 5), ids(x, 4)
    learned = [p for p in exact.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr, 0.9) if kind == "sgd" else torch.optim.Adam(learned, lr)
    start, loss = learner.state_dict(), learner.step(x, target, task=task, lr=lr)
    expected = F.cross_entropy(exact(x.double(), task), target)
    expected.backward()
    optimizer.step()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    found, wanted = learner.state_dict(), {key: t.numpy(force=True) for key, t in exact.state_dict().items()}
    error, moved = (
        np.concatenate([(found[key] - state[key]).ravel() for key in learner.metadata["learns"]])
        for state in (wanted, start)
    )
    # A gradient near zero has any sign, and one step of Adam is the sign.
    assert np.linalg.norm(error) <= (0.02 if kind == "sgd" else 0.2) * np.linalg.norm(moved)
    for key in wanted:
        if "running" in key:
            assert off(torch.as_tensor(found[key]), torch.as_tensor(wanted[key])) <= 1e-3
    assert_only_on_the_gpu(opened)


@pytest.mark.long
@pytest.mark.parametrize("case", ["convnet-sgd", "published-adam", "resnet18-channels"])
def test_what_is_learned_goes_anywhere(case, tmp_path):
    """To a learner on the CPU, by a file or without one, and into torch and back."""
    butd, x, learner, _, lr = a_learner(case, tmp_path)
    target, task = ids(x, 5), ids(x, 4)
    learner.step(x, target, task=task, lr=lr)
    other = Learner(tmp_path / "learner.onnx", "cpu")
    other.load_state_dict(learner.state_dict(), learner.optimizer_state())
    for _ in range(2):
        ours, theirs = (float(one.step(x, target, task=task, lr=lr)) for one in (learner, other))
        assert ours == pytest.approx(theirs, rel=0.02, abs=2e-3)  # two runs in float32 drift apart
    learner.save(tmp_path / "learner.safetensors")
    other.load(tmp_path / "learner.safetensors")
    mine = same_kind(learner.predict(x, task=task), x)
    assert off(torch.as_tensor(other.predict(x.cpu().numpy(), task=task)), mine) <= 1e-2
    butd.load_state_dict({key: torch.as_tensor(value) for key, value in learner.state_dict().items()})
    with torch.no_grad():
        assert off(butd.eval()(x, task), mine) <= 1e-2
    learner.load_state_dict(butd.state_dict())
    assert off(learner.predict(x, task=task), mine) <= 1e-5


@pytest.mark.long
def test_the_provider_of_its_own_accord(tmp_path):
    """CUDA is taken where it works, and what is written from there is what is written from the CPU."""
    model, x = network("convnet", False, torch.float32)
    butd = fxfeedback.to_butd(model, n_tasks=4, embedding=16, input_size=x.shape[1:]).eval()
    results = []
    for where in (DEVICE, "cpu"):
        fxfeedback.export(butd.to(where), tmp_path / "butd.onnx")
        session = Session(tmp_path / "butd.onnx")
        assert session.providers[0] == ("CUDAExecutionProvider" if ON_GPU else "CPUExecutionProvider"), session.note
        results.append(torch.as_tensor(session(x.cpu(), task=1)))
    assert off(*results) <= 1e-6
