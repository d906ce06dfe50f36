"""`save` and `load`: connections, options and weights in one file, whole or not at all, and no code from a file."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

import fxfeedback
from fxfeedback import storage
from fxfeedback.errors import CheckpointError, OptionError


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


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "vit_b_32"])
def test_torchvision_models_need_nothing_but_the_file(name, tmp_path):
    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, weights=None).double()
    names = [name for name, info in fxfeedback.node_names(plain).items() if info.op in ("Conv2d", "Linear", "GELU")]
    model = fxfeedback.add_feedback(plain, [(names[-1], names[1])]).eval()
    fxfeedback.save(model, tmp_path)
    x = torch.randn(1, 3, 224, 224, dtype=torch.double)
    torch.testing.assert_close(fxfeedback.load(tmp_path)(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_detection_model_with_feedback_in_its_backbone_comes_back(tmp_path):
    torch.manual_seed(0)
    make = torchvision.models.detection.ssdlite320_mobilenet_v3_large
    plain = make(weights=None, weights_backbone=None)
    model = fxfeedback.add_feedback(plain, [("backbone.features.1.3", "backbone.features.0.3")]).eval()
    fxfeedback.save(model, tmp_path)
    again = fxfeedback.load(tmp_path)
    images = [torch.rand(3, 64, 64)]
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


def test_another_process_loads_what_this_one_saved(tmp_path):
    model = fxfeedback.models.alexnet_lrm1().eval()
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


EVIL = ["os:system", "torch:load", "torch.hub:load", "torch.nn.functional:importlib.import_module", "subprocess:Popen"]


@pytest.mark.parametrize("name", EVIL)
def test_a_file_cannot_name_what_does_more_than_compute(name, tmp_path):
    model = lrm()
    fxfeedback.save(model, tmp_path)
    _edit(tmp_path, lambda about: about["net"]["attributes"].update(activation={"name": name}))
    with pytest.raises(CheckpointError, match=name):
        fxfeedback.load(tmp_path)


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
    fxfeedback.save(lrm(), tmp_path)
    spoil(tmp_path / storage.FILE)
    with pytest.raises(CheckpointError, match=says):
        fxfeedback.load(tmp_path)


def test_a_plain_model_that_does_not_fit_stays_as_it_was(tmp_path):
    fxfeedback.save(lrm(), tmp_path)
    other = Small().double()
    other.head = nn.Linear(4, 5).double()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"head\.weight: \(3, 4\) saved, \(5, 4\) here"):
        fxfeedback.load(tmp_path, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


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
