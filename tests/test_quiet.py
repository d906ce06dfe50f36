"""What is said without being asked, and what pictures and the command line say of tasks."""

import ctypes
import json
import subprocess
import sys

import pytest
import torch

import fxfeedback
from fxfeedback.commands.main import main
from networks import build, convnet


def has_driver():
    try:
        return bool(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        return False


@pytest.mark.skipif(has_driver(), reason="there is a driver")
def test_without_a_gpu_a_session_says_one_line_once(tmp_path):
    net, _ = build("mlp", train=False)
    fxfeedback.export(
        fxfeedback.add_feedback(net, [("2", "1")], input_size=(2, 6, 6)).float(), tmp_path / "it.onnx", check=False
    )
    code = "from fxfeedback import runtime\nfor i in range(3): print(bool(runtime.Session('it.onnx').note))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True"] * 3
    assert len(run.stderr.splitlines()) <= 1 and "\033" not in run.stderr
    assert not run.stderr or run.stderr.startswith("fxfeedback: sessions run on the CPU, as there is no NVIDIA driver")


def test_the_doctor_sums_up(capsys, monkeypatch):
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["summary"]
    assert said.startswith("everything is installed and works; exported files run on the ")
    monkeypatch.setitem(sys.modules, "igraph", None)
    main(["doctor"])
    assert "in short: everything works but drawing; exported" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "networkx", None)
    main(["doctor"])
    assert "in short: something is missing that every use needs" in capsys.readouterr().out


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    butd = fxfeedback.to_butd(convnet(), 5, heads=[2, 2, 4, 5, 2], input_size=(2, 6, 6))
    fxfeedback.save(butd, tmp_path / "it")
    return tmp_path / "it"


def test_a_picture_says_which_tasks_it_shows_and_their_heads(saved, tmp_path, capsys):
    file = tmp_path / "it.svg"
    assert main(["draw", str(saved), str(file), "--tasks", "3,1"]) == 0
    text = " ".join(file.read_text(encoding="utf-8").split())
    for words in ("open for task 3", "open for task 1", "2 of 5 tasks", "cosine", "5 prediction heads", "Linear × 5"):
        assert words in text, words
    assert main(["draw", "networks:convnet", str(file), "--input-size", "2x6x6", "--tasks", "3,1"]) == 2
    assert "a saved network" in capsys.readouterr().err
    assert main(["draw", str(saved), str(file), "--tasks", "3,x"]) == 2


@pytest.mark.parametrize("lateral", ["galu", "multiply"])
def test_the_command_line_chooses_a_lateral(lateral, tmp_path):
    given = ["butd", "networks:convnet", "--input-size", "2x6x6", "--tasks", "2", "--lateral", lateral]
    assert main([*given, "--save", str(tmp_path / "it")]) == 0
    assert fxfeedback.load(tmp_path / "it").options.lateral == lateral


@pytest.mark.parametrize("line", [["--help"], ["info", "no.onnx"], ["nodes", "--help"], ["draw", "resnet18"]])
def test_where_no_model_is_built_torch_is_not_waited_for(line):
    code = "import sys\nfrom fxfeedback.commands.main import main\ntry: main(sys.argv[1:])\n"
    code += "finally: print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, check=False)
    assert run.stdout.split()[-1] == "False"
