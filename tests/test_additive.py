"""Additive feedback, `Connection(..., mode="add")`, wherever connections go: learning, files, pictures, the shell."""

import json
import warnings

import pytest
import torch
from torch import nn

import fxfeedback
from fxfeedback import Connection
from fxfeedback.commands.main import main
from marks import long, one_in
from networks import build, convnet

PAIRS = [("8", "4"), ("5", "2"), ("10", "8")]
SIZE = (2, 6, 6)


def connected(mode, net=None, **options):
    net = build("convnet", train=False)[0] if net is None else net
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxfeedback.errors.ActivationWarning)
        model = fxfeedback.add_feedback(net, [Connection(*p, mode=mode) for p in PAIRS], input_size=SIZE, **options)
    return model.to(next(net.parameters()).dtype)


class Ones(nn.Module):
    """Hands on ones of its input's shape."""

    def forward(self, x):
        return torch.ones_like(x)


@pytest.mark.parametrize("grad", [True, False])
def test_where_the_destination_is_one_both_modes_agree(grad):
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), Ones(), nn.Conv2d(4, 5, 3, stride=2), nn.Flatten(), nn.Linear(20, 7)
    )
    net, x = net.double(), torch.randn(2, *SIZE).double()
    made = [
        fxfeedback.add_feedback(
            net, [Connection("4", "1", mode=m), Connection("2", "1", mode=m)], 3, input_size=SIZE
        ).double()
        for m in ("multiply", "add")
    ]
    made[1].load_state_dict(made[0].state_dict())
    with torch.set_grad_enabled(grad):
        for a, b in zip(*(model(x) for model in made), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not torch.equal(made[0](x)[0], made[0](x)[1])


@one_in(2)
@pytest.mark.parametrize("checkpoint", [True, False])
def test_counter_hebb_learning_of_added_feedback_is_backpropagation(checkpoint):
    model = connected("add", passes=3, checkpoint=checkpoint).double()
    x = torch.randn(4, *SIZE).double()
    butd = fxfeedback.to_butd(model, input_size=SIZE)
    losses = [sum(output.square().sum() for output in network(x)) for network in (model, butd)]
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(losses[0], parameters, allow_unused=True)
    losses[1].backward()
    own = dict(butd.named_parameters())
    for name, gradient in zip(names, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(own[name].grad, gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))


def test_a_saved_model_adds_as_it_did(tmp_path):
    model, x = connected("add").float(), torch.randn(2, *SIZE)
    fxfeedback.save(model, tmp_path / "it")
    again = fxfeedback.load(tmp_path / "it")
    assert [one.mode for one in again.connections] == ["add"] * 3
    for a, b in zip(model(x), again.eval()(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", [long("multiply"), "add"])
def test_an_exported_file_says_the_mode_and_runs(mode, tmp_path, capsys):
    model, x = connected(mode).float(), torch.randn(2, *SIZE)
    file = str(tmp_path / "it.onnx")
    fxfeedback.export(model, file, steerable=True)
    session = fxfeedback.runtime.Session(file)
    steering = {"source": "8", "activation": torch.randn(1, 7), "strength": 2.0}
    for given in ({}, {"steering": steering}):
        for a, b in zip(model(x, **given), session(x, **given), strict=True):
            torch.testing.assert_close(a, torch.as_tensor(b), rtol=1e-4, atol=1e-4)
    assert {one["mode"] for one in session.metadata["connections"]} == {mode}
    assert main(["info", file, "--json"]) == 0
    assert {one["mode"] for one in json.loads(capsys.readouterr().out)["connections"]} == {mode}
    assert main(["info", file]) == 0
    assert ("connection: 8 -> 4, added" in capsys.readouterr().out) == (mode == "add")


@pytest.mark.parametrize("mode", ["multiply", "add"])
def test_a_picture_says_what_is_added(mode, tmp_path):
    for name in ("it.svg", "it.html"):
        fxfeedback.draw(connected(mode), tmp_path / name)
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert (">+1<" in text) == ("parameters, added" in text) == ("added, and not" in text) == (mode == "add")


def test_the_command_line_adds(capsys, tmp_path):
    given = ["feedback", "networks:convnet", "--input-size", "2x6x6", "--connect", "8:4"]
    assert main([*given, "--mode", "add", "--json", "--code"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [one["mode"] for one in result["connections"]] == ["add"]
    assert "addcmul" not in result["code"] and "torch.add(" in result["code"]
    assert main([*given, "--init", "identity", "--norm", "channel", "--save", str(tmp_path / "lrm")]) == 0
    (one,) = fxfeedback.load(tmp_path / "lrm", model=convnet()).connections
    assert (one.init, one.norm) == ("identity", "channel")
    for flag, value in (("--mode", "add"), ("--init", "identity"), ("--norm", "channel")):
        assert main([*given[:-2], flag, value]) == 2
        assert f"{flag} belongs to --connect" in capsys.readouterr().err
