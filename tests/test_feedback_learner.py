"""Feedback weights in the learner's file: nodes, inputs and steps, against torch."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fxfeedback
from fxfeedback.errors import InputError
from fxfeedback.runtime import Learner, Session
from marks import long_but, one_in
from networks import build

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

KINDS = {
    "uniform": {"weights": "sign"},
    "batch": {"weights": "sign", "td_magnitude": "batch"},
    "fixed": {"weights": "sign", "td_magnitude": "fixed", "td_clip": 0.05},
    "decay": {"weights": "separate", "td_decay": 0.1},
    "mirror": {"weights": "separate", "td_learning": "weight_mirror"},
    "direct": {"weights": "direct"},
    "unit": {"weights": "direct", "direct": "unit"},
}
TASK = np.array([0, 1, 1, 0])
TARGET = np.array([3, 0, 1, 2])


def network(kind, n_tasks=2):
    model, x = build("convnet", train=True)
    model[1].eval()
    return fxfeedback.to_butd(model.float(), n_tasks, input_size=x.shape[1:], **KINDS[kind]), x.float()


def file_of(butd, path):
    fxfeedback.export_learner(butd, path, check=False)
    return onnx.load(path)


@one_in(4)
@pytest.mark.parametrize("kind", long_but(["batch", "decay"], KINDS))
def test_a_step_is_torchs(kind, tmp_path):
    """Also as export_learner itself compares it, with magnitudes of its own."""
    butd, x = network(kind)
    fxfeedback.export_learner(butd, tmp_path / "learner.onnx")
    learner, magnitudes = Learner(tmp_path / "learner.onnx", "cpu"), {}
    if kind == "batch":
        butd(x, TASK)
        magnitudes = butd.magnitudes = {name: m.clone() for name, m in butd.magnitudes.items()}
    optimizer = torch.optim.SGD([p for p in butd.parameters() if p.requires_grad], lr=0.5)
    before = {name: value.clone() for name, value in butd.state_dict().items()}
    loss = F.cross_entropy(butd(x, TASK), torch.tensor(TARGET))
    loss.backward()
    optimizer.step()
    assert learner.step(x, TARGET, task=TASK, lr=0.5, magnitudes=magnitudes) == pytest.approx(loss.item(), rel=1e-5)
    after = learner.state_dict()
    for name, value in butd.state_dict().items():
        step = (value - before[name]).abs().max().item()
        assert np.abs(after[name] - value.numpy()).max() <= 1e-4 * step + 1e-6, name
    with torch.no_grad():
        logits = butd.eval()(x, TASK).numpy()
    assert np.abs(learner.predict(x.numpy(), task=TASK) - logits).max() <= 1e-4 * np.abs(logits).max()


@pytest.mark.long
def test_a_weights_sign_is_one_node_for_both_passes(tmp_path):
    for kind, n_passes in (("uniform", 1), ("batch", 2)):  # the prediction's magnitudes are others
        butd, _ = network(kind)
        model = file_of(butd, tmp_path / f"{kind}.onnx")
        signs = [node.name for node in model.graph.node if node.op_type == "Sign"]
        assert len(signs) == len(set(signs)) <= len(butd.magnitudes) * n_passes and signs
        inputs = {given.name for given in model.graph.input}
        drawn = {f"{name}.magnitude" for name in butd.magnitudes} if kind == "batch" else set()
        assert {name for name in inputs if name.endswith(".magnitude")} == drawn
        assert not any("Random" in node.op_type for node in model.graph.node)
    learner = Learner(tmp_path / "uniform.onnx", "cpu")
    with pytest.raises(InputError, match="the file takes no magnitudes"):
        learner.step(torch.zeros(4, 2, 6, 6), TARGET, lr=0.1, task=TASK, magnitudes={"0.weight": np.ones(3)})


def test_magnitudes_are_drawn_by_a_seed(tmp_path):
    butd, x = network("batch", None)
    file_of(butd, tmp_path / "learner.onnx")

    def losses(learner):
        return [learner.step(x, TARGET, lr=0.5) for _ in range(4)]

    a, b, c, d = (Learner(tmp_path / "learner.onnx", "cpu", seed=seed) for seed in (1, 1, 2, None))
    first = losses(a)
    assert first == losses(b) and first != losses(c) and first != losses(d)
    again = losses(copy.deepcopy(a))  # it goes on where the learner is
    assert again == losses(pickle.loads(pickle.dumps(a))) == losses(a)
    seen = [a.magnitudes(None, np.random.default_rng(i))["0.weight.magnitude"] for i in range(200)]
    b = (6 / (2 * 9 + 6 * 9)) ** 0.5
    assert (
        0 <= np.min(seen) < 0.01 * b
        and 0.99 * b < np.max(seen) <= b
        and np.mean(seen) == pytest.approx(b / 2, rel=0.02)
    )


@pytest.mark.long
def test_magnitudes_are_checked(tmp_path):
    butd, x = network("batch", None)
    file_of(butd, tmp_path / "learner.onnx")
    learner = Learner(tmp_path / "learner.onnx", "cpu")
    with pytest.raises(InputError, match=r"magnitudes of .x.: the file takes magnitudes of .0\.weight., "):
        learner.step(x, TARGET, lr=0.1, magnitudes={"x": np.ones(3)})
    with pytest.raises(InputError, match=r"'0\.weight\.magnitude' takes a shape of"):
        learner.step(x, TARGET, lr=0.1, magnitudes={"0.weight": np.ones(3, np.float32)})


@pytest.mark.parametrize("kind", long_but(["batch"], ["uniform", "batch", "fixed", "direct"]))
def test_instructed_networks_are_exported(kind, tmp_path):
    butd, x = network(kind)
    butd.eval()
    fxfeedback.export(butd, tmp_path / "network.onnx")
    fxfeedback.export(butd, tmp_path / "task.onnx", task=1)
    with torch.no_grad():
        expected = butd(x, TASK).numpy(), butd(x, 1).numpy()
    found = (
        Session(tmp_path / "network.onnx", "cpu")(x.numpy(), task=TASK),
        Session(tmp_path / "task.onnx", "cpu")(x.numpy()),
    )
    for ours, theirs in zip(found, expected, strict=True):
        ours = next(iter(ours.values())) if isinstance(ours, dict) else ours
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
