"""The command line: what its help promises, what it prints for people and machines, and what it ends with."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxfeedback
import networks
from fxfeedback.commands import doctor
from fxfeedback.commands.given import torchvision_names
from fxfeedback.commands.main import COMMANDS, FLAGS, in_shell, main, parser
from test_export_door import Decorated

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parent.parent
CONVNET = ["networks:convnet", "--input-size", "2x6x6"]
CONNECT = ["--connect", "8:4", "3:9"]


def convnet():
    """The network as the command line makes it."""
    torch.manual_seed(0)
    return networks.convnet().eval()


def run(capsys, *arguments):
    """What a command prints as JSON."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def python(*arguments, **how):
    """A process of its own, in this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **how.pop("env", {})}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, text=True, **how)


def keys_of(result, documented):
    """The keys of a result as help names them; of lists that are empty here nothing is said."""
    for key, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from (f"{key}[].{inner}" for inner in value[0])
        elif not any(name.startswith(f"{key}[].") for name in documented):
            yield key


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A saved network of each kind, and a file of each product."""
    folder = tmp_path_factory.mktemp("files")
    exports = {"instructed": [], "task": ["--task", "1"], "learner": ["--learner", "--optimizer", "adam"]}
    assert main(["feedback", *CONVNET, *CONNECT, "--save", str(folder / "lrm")]) == 0
    assert main(["butd", "networks:mlp", "--input-size", "2x6x6", "--tasks", "2", "--save", str(folder / "butd")]) == 0
    assert main(["export", str(folder / "lrm"), str(folder / "lrm.onnx"), "--steerable", "--no-check"]) == 0
    for product, flags in exports.items():
        assert main(["export", str(folder / "butd"), str(folder / f"{product}.onnx"), "--no-check", *flags]) == 0
    return folder


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_can_be_typed(name, capsys):
    command = importlib.import_module(f"fxfeedback.commands.{name}")
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    for example in command.EXAMPLES:
        assert f"  {example}\n" in shown
        words = [word for word in shlex.split(example) if "=" not in word]
        assert words[:2] == ["fxfeedback", name]
        assert parser().parse_args(words[1:]).command is command
    assert all(f"  {key} " in shown for key in command.KEYS)


def test_help_completion_and_info_do_not_wait_for_torch(files):
    script = (
        "import sys; from fxfeedback.commands.main import COMMANDS, main\n"
        "for name in ['', *COMMANDS]: assert main([name, '--help'] if name else ['--help']) == 0\n"
        "assert main(['info', sys.argv[1]]) == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    process = python("-c", script, files / "lrm.onnx", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0 and not err
    assert all(f"    {name} " in out for name in COMMANDS)


def test_words_are_completed(tmp_path):
    pytest.importorskip("argcomplete")
    assert torchvision_names() == sorted(torchvision.models.list_models())
    found = tmp_path / "found"
    line = "fxfeedback nodes resnet1"
    env = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(found), "_ARGCOMPLETE_IFS": "\n"}
    env |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    assert python("-m", "fxfeedback", env=env).wait() == 0
    assert found.read_text().split() == ["resnet101", "resnet152", "resnet18"]


def test_the_script_is_installed_under_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["fxfeedback"].partition(":")
    assert getattr(importlib.import_module(module), function) is main


# -- results ----------------------------------------------------------------------------------------------------------


def test_json_has_the_documented_keys(files, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(fxfeedback, "draw", lambda model, path: Path(path).write_text("a picture"), raising=False)
    runs = {
        "nodes": [CONVNET, [*CONVNET, "--opened"]],
        "feedback": [[*CONVNET, *CONNECT]],
        "predict": [[*CONVNET, "--at", "1", "3"]],
        "butd": [[files / "butd"]],
        "export": [[files / "lrm", tmp_path / "lrm.onnx"]],
        "draw": [[files / "lrm", tmp_path / "lrm.svg"]],
        "info": [[files / f"{product}.onnx"] for product in ("lrm", "instructed", "task", "learner")],
        "bench": [[files / "lrm", "--repeats", "2"], [files / "butd", "--repeats", "1"]],
        "doctor": [[]],
    }
    assert set(runs) == set(COMMANDS)
    for name, of_command in runs.items():
        documented = importlib.import_module(f"fxfeedback.commands.{name}").KEYS
        seen = set()
        for arguments in of_command:
            result = run(capsys, name, *arguments)
            seen |= set(keys_of(result, documented))
        assert seen == set(documented), name


class Odd(nn.Module):
    """Has nodes that no connection may use: parameters, numbers, six dimensions, a value that the output ignores."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
        self.scale, self.side = nn.Parameter(torch.ones(4, 1, 1)), nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        y = self.first(x) * self.scale
        y = y + y.reshape(y.shape[0], 4, 2, 3, 2, 3).reshape(y.shape[0], 4, 6, 6)
        self.seen.copy_(self.side(y.mean((2, 3))).mean(0))
        kept = y[:, 0].mean()
        return self.last(y.mean((2, 3))) + kept


@pytest.mark.long
def test_nodes_marks_what_add_feedback_takes(capsys, monkeypatch):
    monkeypatch.setattr(networks, "odd", Odd, raising=False)
    result = run(capsys, "nodes", "networks:odd", "--input-size", "2x6x6")
    assert [node["name"] for node in result["nodes"]] == list(fxfeedback.node_names(Odd(), (2, 6, 6)))
    marks = {(node["source"], node["destination"]) for node in result["nodes"]}
    assert len(marks) == 4
    for node in result["nodes"]:
        for end, connection in (("source", (node["name"], "last")), ("destination", ("last", node["name"]))):
            try:
                model = fxfeedback.add_feedback(Odd(), [connection], input_size=(2, 6, 6))
                model(torch.randn(2, 2, 6, 6))
                taken = True
            except fxfeedback.errors.NodeNameError:
                taken = False
            assert node[end] == taken, (node, end)


class Opens(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return torch.trapezoid(self.fc(x).relu(), dim=1)


def test_nodes_shows_what_ops_opened_into_and_their_rules(capsys, monkeypatch):
    monkeypatch.setattr(networks, "opens", Opens, raising=False)
    nodes = run(capsys, "nodes", "networks:opens", "--input-size", "4", "--opened")["nodes"]
    rules = {node["name"]: node["rule"] for node in nodes}
    assert (rules["fc"], rules["relu"], rules["fc.weight"]) == ("linear", "relu", None)
    inner = [rule for name, rule in rules.items() if name.startswith("trapezoid.")]
    assert len(inner) > 2 and all(inner)


def test_nodes_says_that_torch_export_traced_the_model(capsys, monkeypatch):
    monkeypatch.setattr(networks, "decorated", Decorated, raising=False)
    command = ["nodes", "networks:decorated", "--input-size", "6"]
    assert run(capsys, *command)["door"] == "export"
    assert main(command) == 0
    assert "input (B, 6), traced by torch.export" in capsys.readouterr().out


@pytest.mark.long
def test_nodes_of_a_model_of_which_only_parts_can_be_traced(capsys):
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    result = run(capsys, "nodes", name)
    assert result["parts"] == ["backbone"]
    assert "backbone.body.4.block.0.0" in [node["name"] for node in result["nodes"]]


@pytest.mark.long
def test_predict_says_what_steps_compute(capsys, tmp_path):
    arguments = [
        *CONVNET,
        "--at",
        "1",
        "3",
        "--steps",
        "3",
        "--scaling",
        "sample",
        "--code",
        "--save",
        tmp_path / "kept",
    ]
    result = run(capsys, "predict", *arguments)
    saved = fxfeedback.load(tmp_path / "kept")
    assert result["parameters_added"] == sum(p.numel() for p in saved.predictors.parameters())
    assert [(one["node"], one["scaling"]) for one in result["predictions"]] == [("1", "sample"), ("3", "sample")]
    assert result["predictions"][1]["target"] == "1" and result["code"] == saved.eval().unrolled().code
    first, second, last = (step["operations"] for step in result["steps"])
    assert first != second == last  # from step 1 on: what lies above the first prediction, and predictions before it
    again = run(capsys, "predict", tmp_path / "kept", "--steps", "2")
    assert len(again["steps"]) == 2 and again["predictions"] == result["predictions"]
    file = run(capsys, "export", tmp_path / "kept", tmp_path / "kept.onnx", "--no-check")
    assert file["product"] == "predictive" and len(file["outputs"]) == 3


def test_feedback_says_what_passes_share_and_cost(capsys, tmp_path):
    result = run(capsys, "feedback", *CONVNET, *CONNECT, "--passes", "3", "--code", "--save", tmp_path / "kept")
    plain = convnet()
    x = torch.randn(1, 2, 6, 6)
    with FlopCounterMode(display=False) as counter:
        plain(x)
    first, second, third = result["passes"]
    skip = [c for c in result["connections"] if c["kind"] == "skip"]
    assert [(c["source"], c["destination"]) for c in skip] == [("3", "9")]
    skip_operations = 2 * 6 * 7  # the block's product, from 6 channels to 7; the first pass has no other
    assert first["operations"] == counter.get_total_flops() + skip_operations
    assert first["shared"] == [] and second == third
    assert second["computed"] == ["5", "6", "7", "8", "9", "10"] and second["shared"] == ["0", "1", "2", "3", "4"]
    assert result["parameters"] == sum(p.numel() for p in plain.parameters())
    assert result["parameters_added"] == sum(c["parameters"] for c in result["connections"])
    saved = fxfeedback.load(tmp_path / "kept")
    assert saved.unrolled().code.strip() == result["code"].strip()
    assert {name: value.tolist() for name, value in plain.state_dict().items()} == {
        name: value.tolist() for name, value in saved.state_dict().items() if not name.startswith("modulations")
    }


def test_butd_says_what_a_task_switches_on(capsys, files):
    for gating in ("unit", "channel"):
        result = run(capsys, "butd", *CONVNET, "--tasks", "3", "--gating", gating)
        torch.manual_seed(0)
        butd = fxfeedback.to_butd(convnet(), 3, gating=gating, input_size=(2, 6, 6))
        for task in range(3):
            counters = butd.counter_neurons(task)
            if gating == "channel":
                counters = {
                    name: value.flatten(2).mean(2) if value.ndim > 2 else value for name, value in counters.items()
                }
            shares = {name: (value > 0).float().mean().item() for name, value in counters.items()}
            assert {site["name"]: site["active"][task] for site in result["sites"]} == pytest.approx(shares)
            on, units = (sum(f(value) for value in counters.values()) for f in (lambda v: (v > 0).sum(), torch.numel))
            assert result["tasks"][task] == {"task": task, "active": pytest.approx((on / units).item())}
        assert (result["head"], result["not_reached"], result["not_updated"]) == ("10", [], [])
    classes = run(capsys, "butd", *CONVNET, "--tasks", "classes")
    assert (classes["n_tasks"], classes["instruction_size"], classes["parameters_added"]) == (None, 5, 0)


FEEDBACK = {
    "signs, batch": (["--td-weights", "sign", "--td-magnitude", "batch", "--td-scale", "0.1"], {"td_scale": 0.1}),
    "own weights": (["--td-weights", "separate", "--td-decay", "0.1", "--td-clip", "1"], {"td_decay": 0.1}),
    "weight mirror": (["--td-weights", "separate", "--td-learning", "weight_mirror"], {"td_learning": "weight_mirror"}),
    "direct error": (["--td-weights", "direct", "--direct", "unit"], {"direct": "unit"}),
    "": (["--instruction-learning", "straight-through"], {"instruction_learning": "straight-through"}),
}


@pytest.mark.parametrize("kind", FEEDBACK)
def test_butd_takes_every_kind_of_feedback(capsys, tmp_path, kind):
    flags, options = FEEDBACK[kind]
    result = run(capsys, "butd", *CONVNET, "--tasks", "3", *flags, "--save", str(tmp_path / "saved"))
    saved = fxfeedback.load(tmp_path / "saved").options
    assert result["feedback"] == kind == saved.feedback[0]
    assert {name: getattr(saved, name) for name in options} == options


def test_exported_files_run_and_info_knows_them(capsys, files):
    x, session = torch.randn(3, 2, 6, 6), fxfeedback.runtime.Session
    lrm, instructed, task, learner = (
        run(capsys, "info", files / f"{name}.onnx") for name in ("lrm", "instructed", "task", "learner")
    )
    assert [len(session(files / "lrm.onnx")(x)), lrm["passes"], lrm["steerable"]] == [2, 2, ["3", "8"]]
    butd = fxfeedback.load(files / "butd").eval()
    for file, result in (
        (instructed, session(files / "instructed.onnx")(x, task=1)),
        (task, session(files / "task.onnx")(x)),
    ):
        assert torch.allclose(result, butd(x, 1), atol=1e-5)
        assert file["weights_sha256"] == fxfeedback.runtime.checksum(butd.state_dict())
    assert (instructed["task"], task["task"], instructed["tasks"]) == (None, 1, 2)
    opened = fxfeedback.runtime.Learner(files / "learner.onnx")
    opened.step(x, [0, 1, 2], task=0, lr=0.1)
    assert [given["name"] for given in learner["inputs"]] == ["input", "instruction", "target", "lr"]
    assert set(learner["state"]) == {*opened.state_dict(), *opened.optimizer_state()}
    assert learner["learns"] and learner["optimizer"] == "adam"


class ByName(nn.Module):
    """Its inputs are given by name only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, *, x, scale):
        return self.second(torch.relu(self.first(x)) * scale)


def test_inputs_that_have_names_only(capsys, tmp_path):
    example = {"x": torch.randn(1, 4), "scale": torch.ones(1, 1)}
    model = fxfeedback.add_feedback(ByName().eval(), [("second", "first")], example_inputs=example)
    fxfeedback.save(model, tmp_path / "lrm")
    fxfeedback.save(fxfeedback.to_butd(ByName().eval(), 2, example_inputs=example), tmp_path / "butd")
    for name in ("lrm", "butd"):
        assert run(capsys, "bench", tmp_path / name, "--repeats", "1", "--batch", "3")["inputs"] == [[3, 4], [3, 1]]


def test_bench_compares_what_it_says(capsys, files, monkeypatch):
    """With a clock of ours, in which the plain model takes 1 and the network 3."""
    ticks = iter(range(10**6))

    class Clock:
        now = 0

        @classmethod
        def perf_counter(cls):
            cls.now += (0, 1, 0, 3)[next(ticks) % 4]
            return cls.now

    monkeypatch.setattr("fxfeedback.commands.bench.time", Clock)
    result = run(capsys, "bench", files / "lrm", "--batch", "2", "--repeats", "4")
    assert {key: result[key] for key in ("plain_ms", "ms", "ratio", "low", "high")} == {
        "plain_ms": 1000,
        "ms": 3000,
        "ratio": 3,
        "low": 3,
        "high": 3,
    }
    assert (result["what"], result["inputs"], result["repeats"]) == ("2 passes", [[2, 2, 6, 6]], 4)
    assert run(capsys, "bench", files / "butd", "--repeats", "1")["what"] == "one instruction"


def test_draw_hands_on_the_network_and_the_file(capsys, files, monkeypatch, tmp_path):
    drawn = []

    def draw(model, path, **options):
        drawn.append((type(model).__name__, Path(path).name, options))
        Path(path).write_text("a picture")

    monkeypatch.setattr(fxfeedback, "draw", draw, raising=False)
    for model, name in ((files / "lrm", "a.svg"), (files / "butd", "b.png")):
        assert run(capsys, "draw", model, tmp_path / name)["bytes"] == 9
    run(capsys, "draw", *CONVNET, tmp_path / "c.html")
    assert drawn == [
        ("FeedbackModel", "a.svg", {}),
        ("BUTD", "b.png", {}),
        ("Sequential", "c.html", {"input_size": (2, 6, 6)}),
    ]


# -- models -----------------------------------------------------------------------------------------------------------

CODE = """
import torch
def net(): return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
made = net()
class Inner: made = made
def broken(): raise ValueError("no such thing")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with code and checkpoints."""
    (tmp_path / "here.py").write_text(CODE)
    (tmp_path / "failing.py").write_text("import here\n1 / 0\n")
    (tmp_path / "needing.py").write_text("import a_package_that_is_nowhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    good = {
        "0.weight": torch.ones(3, 4),
        "0.bias": torch.ones(3),
        "2.weight": torch.ones(2, 3),
        "2.bias": torch.ones(2),
    }
    torch.save({"state_dict": {f"module.{name}": value for name, value in good.items()}}, "good.pth")
    safetensors.torch.save_file(good, "good.safetensors")
    torch.save({**good, "2.bias": torch.ones(7)}, "other.pth")
    torch.save(nn.Linear(2, 2), "code.pth")
    Path("cut.safetensors").write_bytes(Path("good.safetensors").read_bytes()[:100])
    Path("cut.pth").write_bytes(Path("good.pth").read_bytes()[:500])
    yield tmp_path
    for name in ("here", "failing"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["here:net", "here:made", "here:Inner.made"])
@pytest.mark.parametrize("weights", ["good.pth", "good.safetensors"])
def test_models_of_ones_own_and_their_weights(folder, capsys, name, weights):
    result = run(capsys, "feedback", name, "--connect", "2:0", "--weights", weights, "--save", "kept")
    assert result["inputs"] == [[None, 4]]
    state = fxfeedback.load(folder / "kept").state_dict()
    assert all((state[name] == 1).all() for name in ("0.weight", "0.bias", "2.weight", "2.bias"))


# -- what goes wrong --------------------------------------------------------------------------------------------------

MISTAKES = {
    "no command": ([], 2, "required: COMMAND"),
    "unknown command": (["node", "resnet18"], 2, "invalid choice: 'node'"),
    "unknown flag": (["nodes", "resnet18", "--jason"], 2, "unrecognized arguments: --jason"),
    "unknown model": (["nodes", "resnet19"], 2, "torchvision has no model 'resnet19'; did you mean 'resnet18'"),
    "unknown directory": (["nodes", "./lrm"], 1, "there is no file lrm/model.safetensors"),
    "unknown module": (["nodes", "nowhere.net:make"], 2, "there is no module 'nowhere'"),
    "unknown name in a module": (["nodes", "here:nett"], 2, "here has no 'nett'; did you mean net"),
    "a name that is no model": (["nodes", "here:torch"], 2, "here:torch is a module: name a torch.nn.Module"),
    "a function that returns no model": (["nodes", "here:Inner"], 2, r"here:Inner\(\) returns a Inner"),
    "a function that fails": (["nodes", "here:broken"], 1, r"ValueError: no such thing \(.*here.py:6\)"),
    "a module that fails": (["nodes", "failing:net"], 1, r"ZeroDivisionError: .*failing.py:2\)"),
    "a module that misses another": (["nodes", "needing:net"], 1, "cannot be imported: ModuleNotFoundError"),
    "unknown weights": (["nodes", "resnet18", "--weights", "V3"], 2, "for resnet18 are IMAGENET1K_V1, DEFAULT"),
    "no file of weights": (["nodes", "resnet18", "--weights", "a.pth"], 1, "there is no file a.pth"),
    "weights of another model": (["nodes", "here:net", "--weights", "other.pth"], 1, "size mismatch for 2.bias"),
    "weights with code": (["nodes", "here:net", "--weights", "code.pth"], 1, "was not loaded: it is not a plain file"),
    "cut weights": (["nodes", "here:net", "--weights", "cut.pth"], 1, "cut.pth is damaged or no checkpoint"),
    "cut safetensors": (["nodes", "here:net", "--weights", "cut.safetensors"], 1, "is damaged or no checkpoint"),
    "no size": (["nodes", "here:net", "--input-size", "0"], 2, "'0' is not a whole number from 1 on"),
    "wrong size": (["nodes", "here:net", "--input-size", "5"], 1, "does not run on an input of size"),
    "no prediction": (["predict", "here:net"], 2, "has no predictions: give --at"),
    "a scaling of nothing": (["predict", "here:net", "--scaling", "mean"], 2, "has no predictions: give --at"),
    "no connection": (["feedback", "here:net"], 2, "is a plain model: give --connect"),
    "half a connection": (["feedback", "here:net", "--connect", "2"], 2, "give SOURCE:DESTINATION"),
    "unknown node": (["feedback", "here:net", "--connect", "2:zero"], 2, "no node is called 'zero'"),
    "no passes": (["feedback", "here:net", "--connect", "2:0", "--passes", "0"], 2, "is not a whole number from 1 on"),
    "passes of nothing": (["export", "here:net", "x.onnx", "--passes", "2"], 2, "--passes belongs to a model with"),
    "gating of nothing": (["bench", "here:net", "--gating", "unit"], 2, "--gating belongs to --tasks"),
    "no tasks": (["butd", "here:net"], 2, "is a plain model: give --tasks N"),
    "unknown head": (["butd", "here:net", "--tasks", "2", "--head", "1"], 2, "'1' is not a linear layer"),
    "a task too many": (["export", "here:net", "x.onnx", "--tasks", "2", "--task", "2"], 2, "between 0 and 1"),
    "nothing to export": (["export", "here:net", "x.onnx"], 2, "give --connect .* or --tasks N"),
    "no directory to export to": (["export", "here:net", "no/x.onnx", "--tasks", "2"], 2, "a directory that exists"),
    "a learner's flag": (
        ["export", "here:net", "x.onnx", "--tasks", "2", "--momentum", "1"],
        2,
        "belongs to --learner",
    ),
    "a flag that learners do not take": (
        ["export", "here:net", "x.onnx", "--tasks", "2", "--learner", "--steerable"],
        2,
        "does not belong to --learner",
    ),
    "nothing to compare": (["bench", "here:net"], 2, "give --connect .* or --tasks N"),
    "a file that cannot be written": (["feedback", "here:net", "--connect", "2:0", "--save", "here.py"], 1, "here.py"),
    "no file": (["info", "nowhere.onnx"], 1, "there is no file 'nowhere.onnx'"),
    "a file of another kind": (["info", "here.py"], 1, "'here.py' is damaged, or no ONNX file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_have_one_message_and_a_code(mistake, folder, capsys):
    arguments, code, message = MISTAKES[mistake]
    before = sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
    assert main([*arguments, "--json"] if arguments else []) == code
    out, err = capsys.readouterr()
    assert not out
    last = err.rstrip().splitlines()[-1]
    assert last.startswith("fxfeedback") and "error: " in last
    assert re.search(message, last), last
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before


HINTS = {
    ("nodes", "networks:convnet", "--input-size", "3x6x6"): r"as --input-size\.$",
    ("butd", *CONVNET, "--tasks", "2", "--head", "nothing"): r"`fxfeedback nodes MODEL` lists all names\.$",
    ("feedback", *CONVNET, "--connect", "8:nothing"): r"`fxfeedback nodes MODEL` lists all names\.$",
}


@pytest.mark.parametrize("arguments", HINTS, ids=" ".join)
def test_what_an_error_advises_can_be_typed(capsys, arguments):
    assert main(arguments) in (1, 2)
    said = capsys.readouterr().err.strip()
    assert re.search(HINTS[arguments], said) and not re.search(r"\w=\W", said), said


def test_every_flag_that_is_advised_exists():
    commands = parser()._subparsers._group_actions[0].choices.values()
    flags = {flag for command in commands for action in command._actions for flag in action.option_strings}
    assert set(FLAGS.values()) <= flags
    assert in_shell("pass n_tasks= or steerable=True, not weights=") == "pass --tasks or --steerable, not weights="


def test_info_refuses_foreign_and_damaged_files(files, tmp_path, capsys):
    whole = (files / "lrm.onnx").read_bytes()
    path = tmp_path / "file.onnx"
    for end in (0, 1, 10, *range(100, len(whole), len(whole) // 20), len(whole) - 1):
        path.write_bytes(whole[:end])
        assert main(["info", str(path)]) == 1, end
        assert "fxfeedback: error: " in capsys.readouterr().err
    model = onnx.load(files / "lrm.onnx")
    del model.metadata_props[:]
    onnx.save(model, path)
    assert main(["info", str(path)]) == 1
    assert "is an ONNX file, but not one that fxfeedback wrote" in capsys.readouterr().err


def test_info_knows_of_weights_in_a_second_file(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fxfeedback.deploy.writing.LARGEST", 100)
    result = run(capsys, "export", files / "butd", tmp_path / "large.onnx", "--task", "0")
    data = tmp_path / result["data"]
    assert result["data_bytes"] == data.stat().st_size > 0
    data.unlink()
    assert main(["info", str(tmp_path / "large.onnx")]) == 1
    assert "which is not beside it" in capsys.readouterr().err


def test_interrupted(capsys, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fxfeedback.commands.nodes.run", interrupt)
    assert main(["nodes", "resnet18"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("arguments", [["--help"], ["info", "lrm.onnx"]])
def test_a_reader_that_has_enough_is_no_error(files, arguments):
    process = python("-m", "fxfeedback", *arguments, cwd=files, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


def test_a_missing_package_is_named_with_its_command(capsys, monkeypatch):
    fix = "pip install 'fxfeedback[onnx]'"
    assert fix not in run(capsys, "doctor")["fixes"]
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = run(capsys, "doctor")
    assert result["ok"] and fix in result["fixes"] and result["providers"] == []
    assert main(["info", __file__]) == 1
    assert "pip install 'fxfeedback[onnx]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "networkx", None)
    assert main(["doctor", "--json"]) == 1
    assert "pip install fxfeedback" in json.loads(capsys.readouterr().out)["fixes"]


def test_the_doctor_knows_every_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    for extra in doctor.USES.keys() & extras.keys():
        for requirement in extras[extra]:
            name = re.match(r"[\w-]+", requirement)[0].removesuffix("-gpu").replace("-", "_")
            known = doctor.PACKAGES[name]
            assert any(re.match(rf"{name}\b", one.replace("-", "_")) for one in extras[known])


def test_a_provider_that_does_not_work_says_why(capsys, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider", "OwnExecutionProvider"])
    cpu, own = run(capsys, "doctor")["providers"]
    assert cpu == {"name": "CPUExecutionProvider", "works": True, "problem": ""}
    assert not own["works"] and own["problem"]


@pytest.mark.skipif(sys.platform == "win32", reason="a script stands for the command")
def test_the_doctor_says_what_a_gpu_has(capsys, monkeypatch, tmp_path):
    command = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(capsys, "doctor")["driver"] is None
    command.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    command.chmod(0o755)
    result = run(capsys, "doctor")
    assert result["driver"] == "580.65.06" and result["cuda"] == torch.version.cuda
    assert result["takes"] == "CPUExecutionProvider" or not result["not_cuda"]
