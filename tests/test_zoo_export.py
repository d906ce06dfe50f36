"""What `make zoo-onnx` checks of every model, here of a few small ones."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxfeedback
from marks import sweep

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
zoo = importlib.import_module("export")

KINDS = dict([*zoo.models(), *zoo.more_models()])


@pytest.mark.long  # a small network of ours is below
@pytest.mark.parametrize("name", [sweep("raft_small"), "timm/resnet10t"])
def test_a_model_of_the_zoo(name):
    row = zoo.check(name, KINDS[name])
    files = [row.passes, row.instructed, row.learner]
    assert all(isinstance(file, zoo.File) and file.size < 2.5 for file in files), row


def test_the_table(capsys, monkeypatch):
    def check(name, kind):
        if name == "alexnet":
            return zoo.Row(zoo.File(1.001, 2e-4, 1e-4), None, zoo.File(1.25, 3e-3, 2e-3), "", zoo.File(1.25, 3e-5))
        if name == "vgg13":
            raise MemoryError("of the machine")
        return zoo.Row(zoo.File(1.0, 2e-6), "numbers are off by 1.0e-02 at batch 3", "ExportError: no ONNX form")

    monkeypatch.setattr(zoo, "check", check)
    assert zoo.main(["alexnet", "vgg11", "vgg13"]) == 2
    *_, alexnet, vgg11, vgg13, _, summary = capsys.readouterr().out.splitlines()
    remark = "passes: torch itself 1.0e-04; learner: torch itself 2.0e-03; without instructions 3.0e-05"
    well = f"1.00 2.0e-04             -  1.25 3.0e-03  ok     {remark}"
    assert alexnet.split()[0] == "alexnet" and alexnet.endswith(well)
    wrong = "instructed: numbers are off by 1.0e-02 at batch 3; learner: ExportError: no ONNX form"
    assert vgg11.split()[0] == "vgg11" and vgg11.endswith(f"1.00 2.0e-06             -             -  NOT OK {wrong}")
    assert "NOT OK MemoryError: of the machine" in vgg13
    assert summary.startswith("1 of 3 models ok, 2 not, in ")
    with pytest.raises(SystemExit, match="the zoo has no model alexnot"):
        zoo.main(["alexnot"])


# -- the checks see what they are there for ----------------------------------------------------------------------------

SIZE = (2, 8, 8)


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Hardsigmoid(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(64, 5)).eval()


@pytest.fixture
def butd(net):
    return fxfeedback.to_butd(net, n_tasks=zoo.TASKS, input_size=SIZE).eval()


@pytest.mark.long
def test_a_small_network_is_well(net, butd):
    assert zoo.passes(net, torch.randn(1, *SIZE)).difference < 1e-5
    assert zoo.instructed(butd, SIZE).difference < 1e-5
    assert zoo.learner(butd, SIZE, True).difference < 1e-4


def test_a_network_without_a_head_takes_no_instruction():
    part = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    butd, instructs = zoo.butd_of(part, None, SIZE)
    assert not instructs and zoo.learner(butd, SIZE, instructs).difference < 1e-4


def test_wrong_outputs_are_seen(butd, monkeypatch):
    run = zoo.Session.__call__
    monkeypatch.setattr(zoo.Session, "__call__", lambda *given, **more: run(*given, **more) + 0.01)
    with pytest.raises(zoo.Problem, match=r"numbers are off by .* at batch 1"):
        zoo.instructed(butd, SIZE)


@pytest.mark.long
def test_a_wrong_step_of_one_small_parameter_is_seen(butd, monkeypatch):
    read = zoo.Learner.state_dict
    monkeypatch.setattr(zoo.Learner, "state_dict", lambda self: read(self) | {"1.bias": 1.1 * read(self)["1.bias"]})
    with pytest.raises(zoo.Problem, match=r"numbers are off by .* at batch 1"):
        zoo.learner(butd, SIZE, True)


def test_weights_that_are_stored_twice_are_seen(net, tmp_path):
    (tmp_path / "model.onnx").write_bytes(bytes(3_000_000))
    with pytest.raises(zoo.Problem, match=r"a file of 3\.0 MB for 0\.0 MB of weights"):
        zoo.size_over_weights(tmp_path / "model.onnx", net)


def test_a_number_that_is_none_is_seen():
    with pytest.raises(zoo.Problem, match="off by nan at batch 1"):
        zoo.least_difference(lambda x, task: (float("nan"), 0.0), SIZE, False, 1)
