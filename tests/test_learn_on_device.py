"""A network learns on in ONNX Runtime, in a process without torch, and comes back into torch."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

import fxfeedback
from jobs import UserError
from marks import long
from multi_mnist import Composites, draw_composites
from small_data import random_digits
from train_multi_mnist import OWN_MODELS

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import learn_on_device
import on_device

TINY = ["--first-steps=40", "--steps=50", "--batch-size=48", "--every=25", "--train-size=1500", "--test-size=200"]
RESULTS = {"learner.onnx", "composites.npz", "learned.safetensors", "curve.json"}


def tiny():
    torch.manual_seed(0)
    layers = [nn.MaxPool2d(4), nn.Flatten(), nn.Linear(49, 16), nn.ReLU(), nn.Linear(16, 10)]
    return fxfeedback.to_butd(nn.Sequential(*layers), n_tasks=2, input_size=(1, 28, 28))


def whole():
    return fxfeedback.to_butd(OWN_MODELS["convnet"](), n_tasks=2, embedding=50, input_size=(1, 28, 28))


@pytest.fixture(scope="module", params=["small", long("the whole job")])
def done(request, tmp_path_factory):
    """The job, run once: the folder with its results, what both processes said, and a network of the kind.

    Small: with a network of two layers that has learned nothing before.
    """
    out = tmp_path_factory.mktemp("job")
    if request.param == "small":
        train, test = (draw_composites(random_digits(30), n, torch.Generator().manual_seed(n)) for n in (60, 20))
        learn_on_device.hand_over(tiny(), train, test, out)
        command, make = [sys.executable, on_device.__file__, str(out), "--provider=cpu", "--steps=4", "--every=2"], tiny
    else:
        command, make = [sys.executable, learn_on_device.__file__, *TINY, "--provider=cpu", f"--out={out}"], whole
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout, make


@pytest.fixture
def handed_over(done, tmp_path):
    """A folder with what the first process hands over."""
    for name in ("learner.onnx", "composites.npz"):
        (tmp_path / name).symlink_to(done[0] / name)
    return tmp_path


def curve(out: Path) -> list[dict]:
    return json.loads((out / "curve.json").read_text())


def test_the_new_task_is_learned_without_torch_and_comes_back(done):
    out, said, make = done
    assert {path.name for path in out.iterdir()} == RESULTS
    first, *_, last = points = curve(out)
    assert "torch was never imported" in said
    if make is whole:
        assert [point["steps"] for point in points] == [0, 25, 50]
        assert first["accuracy"]["left"] > 0.4 and first["accuracy"]["right"] < 0.25
        assert last["accuracy"]["left"] > 0.3 and last["accuracy"]["right"] > first["accuracy"]["right"] + 0.2
        assert "with the device's weights" in said
    else:
        assert [point["steps"] for point in points] == [0, 2, 4]
        butd, before = tiny(), tiny().state_dict()
        with np.load(out / "composites.npz") as arrays:
            test = Composites(*(torch.from_numpy(arrays[f"test_{part}"]) for part in ("images", "labels")))
        learn_on_device.take_back(butd, test, out)
        assert all(not torch.equal(p, before[name]) for name, p in butd.named_parameters() if p.requires_grad)


def test_ctrl_c_keeps_the_weights_so_far(handed_over, monkeypatch, capsys):
    step, calls = on_device.Run.step, []

    def interrupted(self, number):
        calls.append(number)
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(on_device.Run, "step", interrupted)
    assert on_device.main([str(handed_over), "--provider", "cpu"]) == 130
    assert calls == [1, 2, 3] and [point["steps"] for point in curve(handed_over)] == [0, 3]
    weights = safetensors.numpy.load_file(handed_over / "learned.safetensors")
    assert weights["optimizer.step"] == 3 and all(np.isfinite(array).all() for array in weights.values())
    said = capsys.readouterr()
    assert "interrupted" in said.err and f"{handed_over / 'learned.safetensors'}, of the steps so far" in said.out


def test_ctrl_c_reaches_the_other_process(handed_over):
    def interrupt():
        while not (handed_over / "curve.json").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    args = learn_on_device.parse_arguments(["--out", str(handed_over), "--steps", "100000", "--provider", "cpu"])
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert learn_on_device.learn_elsewhere(args) == 130
    assert len(curve(handed_over)) == 2 and (handed_over / "learned.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--steps", "0"], "argument --steps: 0 does not lie between"),
        (["--rehearsal", "2"], "argument --rehearsal: 2 does not lie between 0 and 1"),
        (["--model", "alexnet"], "argument --model: invalid choice"),
    ],
)
def test_wrong_flags(tmp_path, capsys, flags, expected):
    with pytest.raises(SystemExit) as refusal:
        learn_on_device.main([*TINY, "--out", str(tmp_path / "out"), *flags])
    assert refusal.value.code == 2 and expected in capsys.readouterr().err


def test_what_the_device_lacks(handed_over, tmp_path, capsys):
    assert on_device.main([str(handed_over), "--provider", "abacus"]) == 1
    assert "the provider abacus cannot be used" in capsys.readouterr().err
    (handed_over / "composites.npz").unlink()
    assert on_device.main([str(handed_over), "--provider", "cpu"]) == 1
    assert "composites.npz cannot be read, learn_on_device.py writes it" in capsys.readouterr().err
    assert on_device.main([str(tmp_path / "nowhere")]) == 1
    assert "there is no file" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_device(handed_over, monkeypatch, capsys):
    monkeypatch.setattr("fxfeedback.runtime.Learner.step", lambda *given, **more: float("nan"))
    assert on_device.main([str(handed_over), "--provider", "cpu"]) == 1
    assert "the loss became nan in step 1; a lower --lr may help" in capsys.readouterr().err


def test_weights_that_do_not_come_back_are_seen(handed_over, done):
    for name in ("learned.safetensors", "curve.json"):
        (handed_over / name).symlink_to(done[0] / name)
    butd = done[2]()
    another = Composites(torch.zeros(10, 1, 28, 28), torch.full((10, 2), -1))
    with pytest.raises(UserError, match="the device read other shares right"):
        learn_on_device.take_back(butd, another, handed_over)
