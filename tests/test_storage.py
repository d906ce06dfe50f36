"""`save` and `load`: connections, options and weights in one file, whole or not at all, and no code from a file."""

import contextlib
import copy
import functools
import json
import operator
import os
import re
import resource
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

import fxfeedback
import networks
from fxfeedback import files
from fxfeedback.commands.main import main
from fxfeedback.errors import CheckpointError, OptionError
from fxfeedback.storage import save_load as storage
from marks import long, one_in


class Small(nn.Module):
    """Two convolutions with a norm, a tied weight, a buffer that is not persistent, an attribute of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.third.weight = self.second.weight
        self.register_buffer("factor", torch.tensor(2.0), persistent=False)
        self.activation = torch.relu
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.activation(self.norm(self.first(x)))
        x = torch.nn.functional.gelu(self.third(self.activation(self.second(x)))) * self.factor
        return self.head(x.mean((2, 3)))


def lrm() -> fxfeedback.FeedbackModel:
    torch.manual_seed(0)
    connections = [fxfeedback.Connection("head", "first", norm="channel"), ("third", "norm")]
    return fxfeedback.add_feedback(Small().double(), connections, passes=3, input_size=(2, 8, 8))


@functools.cache
def lrm_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        fxfeedback.save(lrm(), folder)
        return Path(folder, storage.FILE).read_bytes()


def save_lrm(folder: Path) -> None:
    """Save `lrm()`, which is made once."""
    (folder / storage.FILE).write_bytes(lrm_file())


def butd(**options) -> fxfeedback.BUTD:
    torch.manual_seed(0)
    return fxfeedback.to_butd(Small().double(), n_tasks=2, input_size=(2, 8, 8), **options)


X = torch.randn(4, 2, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))
TASK = torch.tensor([0, 1, 1, 0])
CASES = {
    "connections": lambda: (lrm(), (X,)),
    "instructions": lambda: (butd(embedding=[5]), (X, TASK)),
    "an instruction head of the user's": lambda: (
        butd(embedding=nn.Sequential(nn.Linear(2, 4), nn.ReLU()).double()),
        (X, TASK),
    ),
    "separate weights": lambda: (butd(weights="separate", td_bias=True, norm="separate"), (X, TASK)),
    "heads per task": lambda: (butd(heads="per_task", gating="channel", sites=["relu"]), (X, TASK)),
}


@one_in(7)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("plain", [False, True], ids=["from the file alone", "into a plain model"])
def test_a_saved_model_comes_back_as_it_was(case, plain, tmp_path):
    model, inputs = CASES[case]()
    model(*inputs)  # statistics move
    model.norm.eval()
    model.second.weight.requires_grad_(False)
    fxfeedback.save(model, tmp_path / "model")
    again = fxfeedback.load(tmp_path / "model", Small().double() if plain else None)

    assert [(n, m.training) for n, m in again.named_modules()] == [(n, m.training) for n, m in model.named_modules()]
    frozen = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in again.named_parameters()} == frozen
    for _ in range(2):  # in both modes
        torch.testing.assert_close(again(*inputs), model(*inputs), rtol=0, atol=0)
        model.eval(), again.eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.third.weight is again.second.weight


@pytest.mark.parametrize(
    "name", ["squeezenet1_1", long("mobilenet_v3_small"), long("shufflenet_v2_x0_5"), long("vit_b_32")]
)
def test_torchvision_models_need_nothing_but_the_file(name, tmp_path):
    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, weights=None).double()
    names = [name for name, info in fxfeedback.node_names(plain).items() if info.op in ("Conv2d", "Linear", "GELU")]
    model = fxfeedback.add_feedback(plain, [(names[-1], names[1])]).eval()
    fxfeedback.save(model, tmp_path)
    x = torch.randn(1, 3, 224, 224, dtype=torch.double)
    torch.testing.assert_close(fxfeedback.load(tmp_path)(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["small", long("ssdlite320_mobilenet_v3_large")])
def test_a_detection_model_with_feedback_in_its_backbone_comes_back(name, tmp_path):
    torch.manual_seed(0)
    if name == "small":
        plain, connection = networks.detector(), ("backbone.2", "backbone.0")
    else:
        plain = torchvision.models.get_model(name, weights=None, weights_backbone=None)
        connection = ("backbone.features.1.3", "backbone.features.0.3")
    model = fxfeedback.add_feedback(plain, [connection]).eval()
    fxfeedback.save(model, tmp_path)
    again = fxfeedback.load(tmp_path)
    images = [torch.rand(3, 64, 64)]
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


@pytest.mark.long
def test_another_process_loads_what_this_one_saved(tmp_path):
    torch.manual_seed(0)  # a sum near zero would be far from itself
    plain = torchvision.models.squeezenet1_1().eval()
    model = fxfeedback.add_feedback(plain, [("features.12", "features.3.squeeze")], input_size=(3, 64, 64))
    fxfeedback.save(model, tmp_path)
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64)
    code = (
        "import sys, torch, fxfeedback; torch.manual_seed(0); x = torch.randn(1, 3, 64, 64)\n"
        "with torch.no_grad(): print(fxfeedback.load(sys.argv[1])(x)[-1].double().sum().item())"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    with torch.no_grad():
        assert float(said.stdout) == pytest.approx(model(x)[-1].double().sum().item(), rel=1e-6)


def test_a_class_that_no_name_leads_to_asks_for_the_plain_model(tmp_path):
    class Local(Small):
        pass

    model = fxfeedback.add_feedback(Local().double(), [("head", "first")], input_size=(2, 8, 8)).eval()
    with pytest.warns(UserWarning, match="Local"):
        fxfeedback.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"load\(directory, model\)"):
        fxfeedback.load(tmp_path)
    torch.testing.assert_close(fxfeedback.load(tmp_path, Local().double()).eval()(X), model(X), rtol=0, atol=0)


def test_a_class_of_a_module_that_is_not_imported_is_not_imported_for_a_file(tmp_path, monkeypatch):
    module = types.ModuleType("not_imported_later")
    module.Mine = type("Mine", (Small,), {"__module__": "not_imported_later"})
    monkeypatch.setitem(sys.modules, "not_imported_later", module)
    fxfeedback.save(fxfeedback.add_feedback(module.Mine(), [("head", "first")], input_size=(2, 8, 8)), tmp_path)
    fxfeedback.load(tmp_path)
    monkeypatch.delitem(sys.modules, "not_imported_later")
    with pytest.raises(CheckpointError, match="import not_imported_later first"):
        fxfeedback.load(tmp_path)


FORBIDDEN = [
    {"name": "os:system"},
    {"name": "torch:load"},
    {"name": "torch:from_file"},
    {"name": "torch:ones"},
    {"name": "torch:fork"},
    {"name": "torch:import_ir_module"},
    {"name": "torch.hub:load"},
    {"name": "torch.nn.functional:importlib.import_module"},
    {"name": "torchvision.ops:torch.load"},
    {"name": "subprocess:Popen"},
    {"name": "torch.fx.graph_module:GraphModule"},
    {"name": "torch.jit._script:RecursiveScriptModule"},
    {"name": "fxfeedback.butd:BUTD"},
    {"partial": [{"name": "torch:from_file"}, {"tuple": ["X", True, 4096]}, {"dict": []}]},
    {"partial": [{"name": "torch:relu"}, {"tuple": [1]}, {"dict": []}]},
    {"partial": [{"name": "torch:relu"}, {"tuple": []}, {"dict": [["a b", 1]]}]},
    {"partial": [{"name": "torch.nn.modules.linear:Linear"}, {"tuple": []}, {"dict": [["in_features", 9]]}]},
    {"partial": [{"name": "torch.nn.modules.normalization:LayerNorm"}, {"tuple": []}, {"dict": [["x", 10**9]]}]},
    {"helper": ["torch.nn.modules.linear:Linear", {"dict": []}]},
    {"helper": ["torchvision.models.detection._utils:Matcher", {"dict": [["__call__", 1]]}]},
    {"tensor": [{"dtype": "float32"}, [0.0] * 65]},
    {"dtype": "load"},
    {"device": "nowhere"},
    {"dict": [[{"module": 1}, 2]]},
    {"dict": [[[1], 2]]},
    {"dict": [1]},
    {"set": [[1]]},
    {"tuple": 1},
    {"tuple": [], "set": []},
    {"what": 1},
    {},
]


@one_in(2)
@pytest.mark.parametrize("value", FORBIDDEN, ids=lambda value: json.dumps(value)[:60])
def test_a_file_names_only_what_computes(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_lrm(tmp_path)
    _edit(tmp_path, lambda about: about["net"]["attributes"].update(activation=value))
    with pytest.raises(CheckpointError, match=r"net\.attributes\.activation"):
        fxfeedback.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [storage.FILE]


@one_in(4)
@pytest.mark.parametrize(
    "name",
    ["forward", "state_dict", "named_parameters", "__deepcopy__", "__class__", "_parameters", "_modules", "training",
     "_forward_hooks", "_is_hf\r", "_compiled_call_impl", "__dict__", "norm", "first"],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, 1, {"name": "torch:relu"}], ids=["None", "1", "a function"])
def test_a_file_hides_nothing_that_a_class_defines(name, value, tmp_path):
    save_lrm(tmp_path)
    _edit(tmp_path, lambda about: about["net"]["attributes"].update({name: value}))
    with pytest.raises(CheckpointError, match=re.escape(repr(name))):
        fxfeedback.load(tmp_path)


class Tagged(Small):
    """A class with a default that its objects replace."""

    tag = "none"

    def __init__(self) -> None:
        super().__init__()
        self.tag = "some"


def test_a_plain_default_of_a_class_may_be_replaced(tmp_path):
    fxfeedback.save(fxfeedback.add_feedback(Tagged(), [("head", "first")], input_size=(2, 8, 8)), tmp_path)
    assert fxfeedback.load(tmp_path).tag == "some"


PAYLOAD = '[", 0)\ropen("MARK","w")\rdef g(x=None):\r    pass#]'
NAMES = [
    PAYLOAD,
    "a\nb",
    "a b",
    "a.b",
    "",
    "é",
    "²",
    "ﬁ",
    "a\u2028b",
    'a"',
    "a'",
    "a)",
    "__call__",
    "forward",
    "lambda",
]


@one_in(4)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("place", ["_modules", "_parameters", "_buffers"])
def test_a_name_in_a_file_is_only_ever_a_name(name, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_lrm(tmp_path)
    tensors = {"_parameters": "norm.bias", "_buffers": "norm.running_mean"}

    def rename(about):
        norm = about["net"]["_modules"]["norm"]
        norm["class"] = "torch.nn.modules.linear:Identity"
        norm["attributes"].clear()
        if place == "_modules":
            about["net"]["_modules"][name] = about["net"]["_modules"].pop("norm")
        else:
            norm[place] = {name: tensors[place]}

    _edit(tmp_path, rename)
    with pytest.raises(CheckpointError):
        fxfeedback.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [storage.FILE]


def test_a_module_is_no_constant_of_a_graphs_code(tmp_path, monkeypatch):
    """torch.fx writes the repr of a constant into code; a module's has its attributes in it, as they are."""
    monkeypatch.chdir(tmp_path)
    save_lrm(tmp_path)
    code = '1)\ropen("MARK","w")\rdef g(x=None):\r    pass#'

    def put(about):
        linear = about["net"]["_modules"]["head"]
        evil = {**linear, "attributes": {"in_features": code, "out_features": 1}}
        about["net"]["_modules"]["first"]["attributes"]["stride"] = {"module": evil}

    _edit(tmp_path, put)
    with pytest.raises(CheckpointError):
        fxfeedback.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [storage.FILE]


def _edit(directory, change):
    path = directory / storage.FILE
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["fxfeedback"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about)
    safetensors.torch.save_file(tensors, path, {"fxfeedback": json.dumps(about)})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "there is no"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
        (lambda path: path.write_bytes(b"no model"), "damaged"),
        (lambda path: safetensors.torch.save_file({"x": torch.zeros(1)}, path), "not written by"),
        (lambda path: _edit(path.parent, lambda about: about.update(format=99)), "later version"),
        (lambda path: _edit(path.parent, lambda about: about["net"].pop("class")), "damaged"),
        (lambda path: _edit(path.parent, lambda about: about["names"].pop("head.bias")), "head.bias"),
    ],
    ids=["missing", "truncated", "something else", "other tensors", "later", "damaged", "a tensor less"],
)
def test_a_bad_file_is_a_clear_error(spoil, says, tmp_path):
    save_lrm(tmp_path)
    spoil(tmp_path / storage.FILE)
    with pytest.raises(CheckpointError, match=says):
        fxfeedback.load(tmp_path)


PLACES = [
    *((kind, (key,)) for kind in ("lrm", "butd") for key in ("wrappers", "net", "names", "frozen", "training", "reason")
      ),
    *((kind, ("wrappers", 0, i)) for kind in ("lrm", "butd") for i in range(3)),
    *(("lrm", ("wrappers", 0, 2, "dict", i)) for i in range(5)),
    *(("lrm", ("wrappers", 0, 2, "dict", i, j)) for i in range(5) for j in range(2)),
    *(("butd", ("wrappers", 0, 2, "dict", i, 1)) for i in range(17)),
    *(("lrm", ("net", key)) for key in ("class", "attributes", "_parameters", "_buffers", "_modules")),
    ("lrm", ("net", "_modules", "first")),
    ("lrm", ("net", "_modules", "first", "_parameters", "weight")),
    ("lrm", ("net", "_non_persistent_buffers_set")),
]  # fmt: skip
WRONG = [
    [],
    {},
    [[]],
    {"tuple": [1]},
    {"dict": []},
    "what",
    -1,
    10**30,
    1.5,
    True,
    float("nan"),
    {"name": "torch:relu"},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What `save` writes: kind of model -> (about, tensors)."""
    files = {}
    for kind, make in (("lrm", lrm), ("butd", butd)):
        folder = tmp_path_factory.mktemp(kind)
        fxfeedback.save(make(), folder)
        with safetensors.safe_open(folder / storage.FILE, "pt") as file:
            files[kind] = json.loads(file.metadata()["fxfeedback"]), safetensors.torch.load_file(folder / storage.FILE)
    return files


@one_in(4)
@pytest.mark.parametrize(("kind", "place"), PLACES, ids=str)
def test_every_field_is_checked_before_it_is_used(kind, place, saved, tmp_path):
    about, tensors = saved[kind]
    for value in [*WRONG, "missing"]:
        spoiled = copy.deepcopy(about)
        *path, last = place
        original, owner = (functools.reduce(operator.getitem, path, data) for data in (about, spoiled))
        if value == "missing":
            del owner[last]
        elif owner[last] == value:
            continue
        else:
            owner[last] = value
        safetensors.torch.save_file(tensors, tmp_path / storage.FILE, {"fxfeedback": json.dumps(spoiled)})
        pair = original[last] if place[-2:-1] == ("dict",) else original
        field = pair[0] if isinstance(pair, list) else last
        with contextlib.suppress(CheckpointError):
            fxfeedback.load(tmp_path)
            assert (field, value) in FITTING


FITTING = [
    ("reason", "what"), ("checkpoint", True), ("checkpoint", "missing"), ("embedding", []),
    ("sites", []), ("frozen", []), ("training", []), ("td_bias", False), ("td_noise", -1), ("td_noise", 10**30),
    ("td_noise", 1.5),
    ("update_noise", 10**30),
    ("update_noise", -1), ("update_noise", 1.5),
]  # fmt: skip
"""Of the wrong values those that are right in these fields."""


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about["wrappers"][0][2]["dict"][2].__setitem__(1, 10**9),
        lambda about: about["wrappers"][0][2]["dict"][0].__setitem__(
            1, [{"tuple": [{"tuple": [1, 2, 4096, 4096]}, D]}]
        ),
        lambda about: about["wrappers"][0][2]["dict"][0].__setitem__(1, [{"tuple": [{"tuple": [1, 2, 10**9, 9]}, D]}]),
        lambda about: about.update(wrappers=about["wrappers"] * 9),
        lambda about: about["net"]["_modules"]["first"]["attributes"].update(out_channels=10**12),
    ],
    ids=["passes", "a large example", "a larger one", "passes of passes", "a size"],
)
def test_a_file_asks_for_no_more_than_it_holds(change, saved, tmp_path):
    about, tensors = saved["lrm"]
    spoiled = copy.deepcopy(about)
    change(spoiled)
    safetensors.torch.save_file(tensors, tmp_path / storage.FILE, {"fxfeedback": json.dumps(spoiled)})
    with pytest.raises(CheckpointError):
        fxfeedback.load(tmp_path)


D = {"dtype": "float64"}


@pytest.mark.parametrize("levels", [101, 5000, 200_000])
def test_a_file_is_nested_no_deeper_than_models_are(levels, saved, tmp_path):
    about, tensors = saved["lrm"]
    text = json.dumps(about | {"net": "HERE"}).replace('"HERE"', "[" * levels + "]" * levels)
    safetensors.torch.save_file(tensors, tmp_path / storage.FILE, {"fxfeedback": text})
    with pytest.raises(CheckpointError, match="damaged"):
        fxfeedback.load(tmp_path)


def test_what_cannot_be_loaded_again_is_said_when_it_is_saved(tmp_path):
    model = Small()
    model.activation = functools.partial(torch.from_file, "X")
    wrapped = fxfeedback.add_feedback(Small(), [("head", "first")], input_size=(2, 8, 8))
    wrapped._net.activation = model.activation
    with pytest.warns(UserWarning, match="activation"):
        fxfeedback.save(wrapped, tmp_path)
    with pytest.raises(OptionError, match="lateral"):
        fxfeedback.save(butd(lateral=lambda value, counter: value), tmp_path)


def test_a_class_of_the_script_that_saved_it_asks_for_the_plain_model(saved, tmp_path):
    about, tensors = saved["lrm"]
    spoiled = copy.deepcopy(about)
    spoiled["net"]["class"] = "__main__:NotHere"
    safetensors.torch.save_file(tensors, tmp_path / storage.FILE, {"fxfeedback": json.dumps(spoiled)})
    with pytest.raises(CheckpointError, match=r"'NotHere' of the script that saved it.*model="):
        fxfeedback.load(tmp_path)
    fxfeedback.load(tmp_path, model=Small().double())


def test_a_file_of_the_first_version_still_loads():
    model = fxfeedback.load(Path(__file__).parent / "files" / "written_by_0_1_0")
    x = torch.linspace(-1, 1, 2 * 2 * 8 * 8).reshape(2, 2, 8, 8)
    with torch.no_grad():
        passes = torch.stack(model(x, torch.tensor([0, 1])))
    expected = [
        [[-0.3517002463, 0.3594877124, 0.3481455147], [-0.3696698844, 0.3375680745, 0.3430914283]],
        [[-0.3577522337, 0.3566966653, 0.3510023952], [-0.3720112251, 0.3382081389, 0.3456975520]],
        [[-0.3762270808, 0.3415454626, 0.3530993462], [-0.3828741908, 0.3367010355, 0.3545936644]],
    ]
    torch.testing.assert_close(passes, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert not model.get_parameter("0.0.weight").requires_grad
    assert not model.training


def test_a_plain_model_that_does_not_fit_stays_as_it_was(tmp_path):
    save_lrm(tmp_path)
    other = Small().double()
    other.head = nn.Linear(4, 5).double()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"head\.weight: \(3, 4\) saved, \(5, 4\) here"):
        fxfeedback.load(tmp_path, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_what_is_not_a_path_or_not_a_model_is_said(tmp_path):
    model = lrm()
    fxfeedback.save(model, tmp_path)
    for call, says in (
        (lambda: fxfeedback.save(model, None), "directory=None: give a string"),
        (lambda: fxfeedback.save(None, tmp_path), "model=None: give what add_feedback"),
        (lambda: fxfeedback.load(None), "directory=None: give a string"),
        (lambda: fxfeedback.load(tmp_path, "alexnet"), "model='alexnet': give the plain model"),
    ):
        with pytest.raises(OptionError, match=says):
            call()


def test_a_plain_model_is_not_saved(tmp_path):
    with pytest.raises(OptionError, match="state_dict"):
        fxfeedback.save(Small(), tmp_path)


def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    model = lrm()
    fxfeedback.save(model, tmp_path)
    before = (tmp_path / storage.FILE).read_bytes()

    def crash(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        fxfeedback.save(model, tmp_path)
    assert (tmp_path / storage.FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [storage.FILE]


SAVING = """
import os, signal, sys
from pathlib import Path
from fxfeedback.files import replace_whole

def write(path):
    Path(path).write_bytes(b"half" * 1000)
    print("writing", flush=True)
    sys.stdin.read()

replace_whole(Path(sys.argv[1]), write)
"""


def _saving(path):
    """A process that is writing a file, until it is told to go on."""
    command = [sys.executable, "-c", SAVING, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


def test_the_next_save_removes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path):
    killed, living = _saving(tmp_path / "a"), _saving(tmp_path / "b")
    killed.kill(), killed.wait()
    former, foreign = tmp_path / ".exporting-former", tmp_path / ".saving-foreign"
    for folder in (former, foreign):
        folder.mkdir()
    (foreign / files.LOCK).write_text("another machine")
    os.utime(former, (0, 0))
    assert len(list(tmp_path.iterdir())) == 4
    fxfeedback.save(lrm(), tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 3 and {foreign.name, storage.FILE} < set(left)
    living.communicate("")
    assert (tmp_path / "b").read_bytes() == b"half" * 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == [foreign.name, "b", storage.FILE]


def test_a_full_disk_is_an_error_that_says_so_and_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    saved = tmp_path / "saved"
    fxfeedback.save(lrm(), saved)
    before = (saved / storage.FILE).read_bytes()
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nnet = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))\n"
    )
    monkeypatch.chdir(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # bytes that a file may have
    try:
        assert main(["feedback", "mine:net", "--connect", "1:0", "--save", str(saved)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.fullmatch(r"fxfeedback: error: .*cannot be written.*", capsys.readouterr().err.splitlines()[-1])
    assert (saved / storage.FILE).read_bytes() == before
    assert [path.name for path in saved.iterdir()] == [storage.FILE]


class Scales(nn.Module):
    """Takes a number as a tensor, by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, *, x, scale):
        return self.head(torch.relu(self.first(x)) * scale)


@pytest.mark.parametrize("learns", [False, True])
def test_an_example_may_have_a_tensor_of_one_number(tmp_path, learns):
    given = {"x": torch.randn(2, 4), "scale": torch.tensor(2.0)}
    feedback = fxfeedback.add_feedback(Scales(), [("head", "first")], example_inputs=given)
    model = fxfeedback.to_butd(Scales(), example_inputs=given) if learns else feedback
    fxfeedback.save(model, tmp_path / "saved")
    again = fxfeedback.load(tmp_path / "saved", model=Scales())
    torch.testing.assert_close(again(**given), model(**given), rtol=0, atol=0)
