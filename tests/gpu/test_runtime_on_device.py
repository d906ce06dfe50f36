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
from on_device import DEVICE, ON_GPU, ids, network, off
from test_passes_on_device import passes

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


def assert_only_on_the_gpu(opened):
    """Ends its profiling. On the CPU it says that everything is there: it would be seen."""
    session = opened._sessions.stepping if isinstance(opened, Learner) else opened._session
    nodes = computed_on_the_cpu(json.loads(Path(session.end_profiling()).read_text()))
    assert (not nodes) == ON_GPU, sorted(nodes)[:5]
    assert opened.providers[0] == ("CUDAExecutionProvider" if ON_GPU else "CPUExecutionProvider")


@pytest.mark.long
@pytest.mark.parametrize("name", ["convnet", "vit", "resnet18", "alexnet_lrm3"])
def test_passes(name, tmp_path):
    """Plain and steered, with another batch, too."""
    model, x, source = passes(name)
    model, x = model.float(), x.float()
    seen = model.readout(x[:1], [source])[0][source].value.detach()
    fxfeedback.export(model, tmp_path / "passes.onnx", steerable=True)
    session = Session(tmp_path / "passes.onnx", PROVIDER, profiling(tmp_path))
    there = model.to(DEVICE)
    for images, steering in ((x, ()), (x, {"source": source, "activation": seen, "strength": 3.0}), (x[:3], ())):
        on_it = {**steering, "activation": seen.to(DEVICE)} if steering else ()
        for ours, theirs in zip(
            session(images, steering=steering), there(images.to(DEVICE), steering=on_it), strict=True
        ):
            assert off(torch.as_tensor(ours), theirs) <= 2e-4
    assert_only_on_the_gpu(session)


@pytest.mark.parametrize("product", ["instructed", "one task"])
@pytest.mark.parametrize(
    "name, gating",
    [long("convnet", "channel"), long("published", "unit"), long("resnet18", "channel"), long("vit", "unit")],
)
def test_instructions(name, gating, product, tmp_path):
    model, x = network(name, False, torch.float32)
    torch.manual_seed(1)
    butd = fxfeedback.to_butd(model, n_tasks=4, embedding=16, gating=gating, input_size=x.shape[1:]).eval()
    fxfeedback.export(butd, tmp_path / "one.onnx", task=1 if product == "one task" else None)
    session = Session(tmp_path / "one.onnx", PROVIDER, profiling(tmp_path))
    task = {} if product == "one task" else {"task": ids(x, 4).cpu().numpy()}
    ours = session(x.cpu(), **task)
    with torch.no_grad():
        assert off(torch.as_tensor(ours), butd(x, task.get("task", 1))) <= 1e-3  # a unit may lie at its gate's zero
    assert_only_on_the_gpu(session)


CASES = {
    "convnet-sgd": ("convnet", True, "sgd", {}),
    "published-adam": ("published", True, "adam", {}),
    "vit-sgd": ("vit", False, "sgd", {}),
    "resnet18-sgd": ("resnet18", True, "sgd", {}),
    "resnet18-channels": ("resnet18", False, "sgd", {"gating": "channel"}),
    "mobilenet_v2-sgd": ("mobilenet_v2", True, "sgd", {}),
}


@pytest.mark.parametrize("case", ["convnet-sgd", *map(long, list(CASES)[1:])])
def test_a_learner(case, tmp_path):
    """A step is torch's in float64; its weights go to another learner, and into torch and back."""
    name, train, kind, options = CASES[case]
    model, x = network(name, train, torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(1)
    butd = fxfeedback.to_butd(model, n_tasks=4, embedding=16, input_size=x.shape[1:], **options)
    lr = 0.01 if kind == "sgd" else 1e-3
    momentum = {"momentum": 0.9} if kind == "sgd" else {}
    fxfeedback.export_learner(butd, tmp_path / "learner.onnx", optimizer=kind, **momentum)
    learner = Learner(tmp_path / "learner.onnx", PROVIDER, profiling(tmp_path))
    target, task = ids(x, 5), ids(x, 4)
    exact, images = copy.deepcopy(butd).double(), x.cpu()
    learned = [p for p in exact.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr, 0.9) if kind == "sgd" else torch.optim.Adam(learned, lr)
    start, given = learner.state_dict(), {"task": task.cpu(), "lr": lr}
    loss = learner.step(images, target.cpu(), **given)
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

    other = Learner(tmp_path / "learner.onnx", "cpu")
    other.load_state_dict(learner.state_dict(), learner.optimizer_state())
    for _ in range(2):
        ours, theirs = (float(one.step(images, target.cpu(), **given)) for one in (learner, other))
        assert ours == pytest.approx(theirs, rel=0.02, abs=2e-3)  # two runs in float32 drift apart
    learner.save(tmp_path / "learner.safetensors")
    other.load(tmp_path / "learner.safetensors")
    mine = torch.as_tensor(learner.predict(images, task=given["task"]))
    assert off(torch.as_tensor(other.predict(images, task=given["task"])), mine) <= 1e-2
    butd.load_state_dict(learner.state_dict())
    with torch.no_grad():
        assert off(butd.eval()(x, task), mine) <= 1e-2
    learner.load_state_dict(butd.state_dict())
    assert off(torch.as_tensor(learner.predict(images, task=given["task"])), mine) <= 1e-5
    assert_only_on_the_gpu(learner)


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
