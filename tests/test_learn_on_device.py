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

import fxfeedback
from jobs import UserError
from multi_mnist import Composites
from train_multi_mnist import OWN_MODELS

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import learn_on_device
import on_device

TINY = ["--first-steps=40", "--steps=50", "--batch-size=48", "--every=25", "--train-size=1500", "--test-size=200"]
RESULTS = {"learner.onnx", "composites.npz", "learned.safetensors", "curve.json"}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The whole job, run once: the folder with its results, and what both processes said."""
    out = tmp_path_factory.mktemp("job")
    command = [sys.executable, learn_on_device.__file__, *TINY, "--provider=cpu", f"--out={out}"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout


@pytest.fixture
def handed_over(done, tmp_path):
    """A folder with what the first process hands over."""
    for name in ("learner.onnx", "composites.npz"):
        (tmp_path / name).symlink_to(done[0] / name)
    return tmp_path


def curve(out: Path) -> list[dict]:
    return json.loads((out / "curve.json").read_text())


@pytest.mark.long  # with a smaller learner: tests/test_learner.py
def test_the_new_task_is_learned_without_torch_and_comes_back(done):
    out, said = done
    assert {path.name for path in out.iterdir()} == RESULTS
    first, *_, last = curve(out)
    assert [point["steps"] for point in curve(out)] == [0, 25, 50]
    assert first["accuracy"]["left"] > 0.4 and first["accuracy"]["right"] < 0.25
    assert last["accuracy"]["left"] > 0.3 and last["accuracy"]["right"] > first["accuracy"]["right"] + 0.2
    assert "torch was never imported" in said and "with the device's weights" in said


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_what_the_device_lacks(handed_over, tmp_path, capsys):
    assert on_device.main([str(handed_over), "--provider", "abacus"]) == 1
    assert "the provider abacus cannot be used" in capsys.readouterr().err
    (handed_over / "composites.npz").unlink()
    assert on_device.main([str(handed_over), "--provider", "cpu"]) == 1
    assert "composites.npz cannot be read, learn_on_device.py writes it" in capsys.readouterr().err
    assert on_device.main([str(tmp_path / "nowhere")]) == 1
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.long
def test_a_loss_that_is_no_number_stops_the_device(handed_over, monkeypatch, capsys):
    monkeypatch.setattr("fxfeedback.runtime.Learner.step", lambda *given, **more: float("nan"))
    assert on_device.main([str(handed_over), "--provider", "cpu"]) == 1
    assert "the loss became nan in step 1; a lower --lr may help" in capsys.readouterr().err


@pytest.mark.long
def test_weights_that_do_not_come_back_are_seen(handed_over, done):
    for name in ("learned.safetensors", "curve.json"):
        (handed_over / name).symlink_to(done[0] / name)
    butd = fxfeedback.to_butd(OWN_MODELS["convnet"](), n_tasks=2, embedding=50, input_size=(1, 28, 28))
    another = Composites(torch.zeros(10, 1, 28, 28), torch.full((10, 2), -1))
    with pytest.raises(UserError, match="the device read other shares right"):
        learn_on_device.take_back(butd, another, handed_over)
