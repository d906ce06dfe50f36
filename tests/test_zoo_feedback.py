"""What `make zoo-lrm` checks of every torchvision model, here of a small one of each kind."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxfeedback
from fxfeedback import rewrite
from fxfeedback.graph.effects import has_effect
from marks import long, sweep

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
zoo = importlib.import_module("feedback")

KINDS = dict(zoo.models())


@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1",
        sweep("convnext_tiny"),
        long("fasterrcnn_mobilenet_v3_large_320_fpn"),
        sweep("googlenet"),
        sweep("mc3_18"),
        sweep("raft_small"),
        long("regnet_y_400mf"),
        sweep("swin_v2_t"),
        sweep("vit_b_32"),
    ],
)
def test_a_model_of_the_zoo(name):
    row = zoo.check(name, KINDS[name])
    assert 0 < row.evaluation.again < row.evaluation.total
    assert 0 < row.training.again < row.training.total


def test_the_zoo_has_every_model_but_the_quantized():
    assert len(KINDS) > 100 and {"alexnet", "maskrcnn_resnet50_fpn", "raft_large", "swin3d_t"} <= set(KINDS)
    assert not any(name.startswith("quantized_") for name in KINDS)


def test_the_table(capsys, monkeypatch):
    def check(name, kind):
        if name == "alexnet":
            return zoo.Row("a -> b", zoo.Sharing(3, 9), zoo.Sharing(4, 10))
        raise zoo.Problem("the second pass equals the first")

    monkeypatch.setattr(zoo, "check", check)
    assert zoo.main(["alexnet", "vgg11"]) == 1
    *_, alexnet, vgg11, _, summary = capsys.readouterr().out.splitlines()
    assert alexnet.split()[0] == "alexnet" and alexnet.endswith("3/9       4/10  ok     a -> b")
    assert vgg11.split()[0] == "vgg11" and vgg11.endswith("NOT OK the second pass equals the first")
    assert summary.startswith("1 of 2 models ok, 1 not, in ")
    with pytest.raises(SystemExit, match="the zoo has no model alexnot"):
        zoo.main(["alexnot"])


# -- the checks see what they are there for ----------------------------------------------------------------------------


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
    return nn.Sequential(*layers)


@pytest.fixture
def model(net):
    return fxfeedback.add_feedback(net, [("5", "3")], input_size=(2, 8, 8))


X = torch.randn(2, 2, 8, 8)


def test_a_random_draw_that_passes_share_is_seen(net, model, monkeypatch):
    monkeypatch.setattr(rewrite, "is_new_in_every_pass", has_effect)
    assert zoo.check_sharing(model.train()) == (3, 7)  # downstream of the destination, it is drawn again all the same
    model = fxfeedback.add_feedback(net, [("5", "4")], input_size=(2, 8, 8))
    assert zoo.check_sharing(model.eval()) == (1, 6)
    with pytest.raises(zoo.Problem, match="training: pass 2 computes 1 nodes, not 3"):
        zoo.check_sharing(model.train())


def test_a_pass_that_computes_too_much_is_seen(model, monkeypatch):
    monkeypatch.setattr(rewrite, "is_new_in_every_pass", lambda node: True)
    with pytest.raises(zoo.Problem, match="evaluation: pass 2 computes 6 nodes, not 2; they differ in"):
        zoo.check_sharing(model.eval())


def test_a_wrong_second_pass_is_seen(net, model, monkeypatch):
    zoo.compare(net.eval(), model.eval(), X)
    monkeypatch.setattr(rewrite.Unroller, "modulated", lambda self, y, m, activation: self.once(torch.sub, y, m))
    model = fxfeedback.add_feedback(net, [("5", "3")], input_size=(2, 8, 8))
    with pytest.raises(zoo.Problem, match="evaluation: pass 2 differs from the plain model's by"):
        zoo.compare(net, model, X)


def test_statistics_that_stand_still_are_seen(net, model, monkeypatch):
    zoo.compare(net.train(), model.train(), X)
    monkeypatch.setattr(rewrite.Unroller, "advance_statistics", lambda self, norm: None)
    model = fxfeedback.add_feedback(net, [("5", "3")], input_size=(2, 8, 8))
    with pytest.raises(zoo.Problem, match=r"the passes do not advance 1.running_mean as the plain model's do"):
        zoo.compare(net, model, X)


def test_a_parameter_without_a_gradient_is_seen(net, model):
    model.modulation("5", "3").neg_scale.requires_grad_(False)
    with pytest.raises(zoo.Problem, match=r"evaluation: no gradient reaches 5_to_3.neg_scale"):
        zoo.compare(net.eval(), model.eval(), X)
