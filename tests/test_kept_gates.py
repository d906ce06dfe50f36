"""Files that take gates: a session computes those of an id once, and then the BU pass alone."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import fxfeedback
from fxfeedback.errors import CheckpointError, OptionError
from fxfeedback.runtime import Session
from fxfeedback.runtime import session as sessions
from marks import long
from networks import build

OPTIONS = {
    "unit": {},
    "channel": {"gating": "channel"},
    "lateral": {"lateral": "add", "counter_scale": "unit"},
    "heads": {"heads": [2, 5, 3]},
}


def exported(path, name="convnet", half=False, **options):
    torch.manual_seed(0)
    model, x = build(name, train=False)
    model, x = model.float(), x.float()
    butd = fxfeedback.to_butd(model, n_tasks=3, example_inputs=(x,), **options).eval()
    fxfeedback.export(butd, path, keep_gates=True, dtype="float16" if half else None)
    return butd, x


def near(found, wanted, tolerance=1e-5):
    wanted = wanted.detach().numpy()
    there = np.isfinite(wanted)
    assert np.abs(found - wanted)[there].max() <= tolerance * np.abs(wanted[there]).max()
    assert np.array_equal(np.isfinite(found), there)


@pytest.mark.parametrize("half", [False, long(True)], ids=["float32", "float16"])
@pytest.mark.parametrize("how", ["unit", long("channel"), long("lateral"), long("heads")])
def test_gates_that_are_kept_are_those_that_are_computed(how, half, tmp_path):
    butd, x = exported(tmp_path / "net.onnx", half=half, **OPTIONS[how])
    if half:
        with torch.no_grad():
            for parameter in butd.parameters():
                parameter.copy_(parameter.half())
    session, tolerance = Session(tmp_path / "net.onnx", "cpu"), 5e-3 if half else 1e-5
    for task in (1, 1, 0, [1, 1, 1, 1], [0, 1, 2, 1], 1):
        near(session(x.numpy(), task=task), butd(x, torch.tensor(task)), tolerance)
    near(session(x[:1].numpy(), task=1), butd(x[:1], 1), tolerance)
    assert list(session._gates) == [0, 1]
    vectors = torch.rand(4, 3)
    near(session(x.numpy(), task=vectors.numpy()), butd(x, vectors), 50 * tolerance)


def test_with_gates_the_instruction_pass_is_not_computed(tmp_path):
    butd, x = exported(tmp_path / "net.onnx")
    file = onnx.load(tmp_path / "net.onnx")
    kinds = [node.op_type for node in file.graph.node]
    assert kinds.count("If") == 1 and "ConvTranspose" not in kinds
    weights = [tensor.name for tensor in file.graph.initializer]
    assert len(weights) == len(set(weights)) and {key for key, _ in butd.named_parameters()} <= {*weights}

    session = Session(tmp_path / "net.onnx", "cpu")
    session(x.numpy(), task=2)
    raw = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    gates = {name: value.numpy() for name, value in session._gates[2].items()}
    feeds = {"input": x.numpy(), "instruction": np.full((1, 3), np.nan, "f"), "gates.given": np.array(True)}
    near(raw.run(["output"], feeds | gates)[0], butd(x, 2))


@pytest.mark.long
def test_the_ids_that_were_used_last_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "KEPT", 2)
    butd, x = exported(tmp_path / "net.onnx")
    session = Session(tmp_path / "net.onnx", "cpu")
    for task in (0, 1, 0, 2):
        near(session(x.numpy(), task=task), butd(x, task))
    assert list(session._gates) == [0, 2]


def test_what_does_not_go_together(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    butd = fxfeedback.to_butd(net, n_tasks=2, input_size=(3,))
    lrm = fxfeedback.add_feedback(net, [("2", "1")], input_size=(3,))
    for model, options in ((butd, {"task": 0}), (lrm, {})):
        with pytest.raises(OptionError, match="keep_gates= belongs to an instructed network"):
            fxfeedback.export(model, tmp_path / "no.onnx", keep_gates=True, **options)
    fxfeedback.export(butd, tmp_path / "net.onnx", keep_gates=True)
    file = onnx.load(tmp_path / "net.onnx")
    del file.graph.output[1:]
    onnx.save(file, tmp_path / "net.onnx")
    with pytest.raises(CheckpointError, match="lacks the gate of '1', of which its metadata speaks"):
        Session(tmp_path / "net.onnx", "cpu")
