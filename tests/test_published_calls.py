"""The published README's code runs as it stands, and the published classes do what their arguments say."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fxfeedback
from fxfeedback import Steering
from fxfeedback.errors import InputError
from fxfeedback.lrm_steering import LRMNet, SteerableLRM
from marks import one_in

ROOT = Path(__file__).parents[1]
README = (ROOT / "tests/files/lrm_steering_readme.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
THEIRS, OURS = "harvard-visionlab/lrm-steering", "OWNER/fxfeedback"


class Loss(nn.CrossEntropyLoss):
    """What the README's training loop calls `loss`: a criterion on which it also calls backward()."""

    def __init__(self):
        super().__init__()
        self.summed = 0.0

    def forward(self, output, target):
        value = super().forward(output, target)
        self.summed = self.summed + value
        return value

    def backward(self):
        self.summed.backward()


@pytest.fixture
def hub(monkeypatch):
    """torch.hub takes our repository's name for this folder, and a download for random tensors that fit."""
    load = torch.hub.load
    asked = []

    def from_here(repository, entry, **options):
        assert repository == OURS
        asked.append(entry)
        return load(str(ROOT), entry, source="local", **options)

    def download(url, **options):
        name = next(name for name, known in fxfeedback.models.WEIGHTS.items() if known == url)
        return getattr(fxfeedback.models, name)().state_dict()

    monkeypatch.setattr(torch.hub, "load", from_here)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    return asked


@one_in(9)
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_published_readme_runs(number, hub, capsys):
    block = BLOCKS[number].replace(THEIRS, OURS)
    names = {}
    if "dataloader" in block:  # what it takes from its reader's own script
        backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        model = LRMNet(backbone, [{"source": "1", "destination": "0"}], img_size=16)
        names = {"model": model, "device": "cpu", "loss": Loss(), "torch": torch}
        names["optimizer"] = torch.optim.SGD(model.parameters(), 0.1)
        names["dataloader"] = [(torch.rand(2, 3, 16, 16), torch.tensor([1, 4]))]
        before = copy.deepcopy(model.state_dict())
    exec(compile(block, f"README, block {number}", "exec"), names)
    if "dataloader" in block:
        assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    elif "steering_signals" in block:
        assert "output pass1: torch.Size([1, 1000])" in capsys.readouterr().out
        assert isinstance(names["model"], SteerableLRM)
    else:
        assert isinstance(names["model"], LRMNet) and len(names["model"].connections) == 5
    assert hub or "dataloader" in block


def test_every_block_is_run():
    assert len(BLOCKS) == 5 and README.count(THEIRS) >= 4


def network(cls=SteerableLRM, **options):
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    connections = [{"source": "6", "destination": "2"}, {"source": "3", "destination": "0"}]
    return cls(backbone, connections, **options).eval()


X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIGNALS = [{"source": "6", "activation": torch.ones(1, 5), "strength": 3}]


def same(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cls", [LRMNet, SteerableLRM])
@torch.no_grad()
def test_published_arguments_mean_ours(cls):
    model = network(cls, img_size=16)
    ours = model.unroll  # which has our arguments
    same(model(X), ours(X)[0])
    same(model(X, forward_passes=4), ours(X, passes=4)[0])
    steering = Steering("6", torch.ones(1, 5), 3)
    same(model(X, steering_signals=SIGNALS), ours(X, steering=steering)[0])
    same(model(X, steering_signals=SIGNALS[0]), ours(X, steering=steering)[0])
    same(
        model(X, steering_signals=SIGNALS, first_pass_steering=True),
        ours(X, steering=steering, steer_first_pass=True)[0],
    )
    assert torch.equal(model(X, return_list=False), ours(X)[0][-1])
    assert not torch.equal(model(X, steering_signals=SIGNALS)[-1], model(X, steering_signals=None)[-1])


@torch.no_grad()
def test_state_is_dropped_or_kept():
    model = network(img_size=16)
    expected = model(X, forward_passes=3)
    one_by_one = [model(X, drop_state=index == 0, forward_passes=1)[0] for index in range(3)]
    same(one_by_one, expected)
    same(model(X), expected[:2])
    with pytest.raises(InputError, match="the state of"):
        model(X[:1], drop_state=False)


def test_defaults_are_the_published_ones():
    model = network(LRMNet, forward_passes=3, img_size=(16, 20), return_list=False)
    assert model.passes == 3 and model(torch.rand(1, 3, 16, 20)).shape == (1, 5)
    assert len(model(X, return_list=True, forward_passes=2)) == 2
    assert [c.activation for c in model.connections] == ["relu", "relu"]
    with pytest.raises(InputError, match="forward_passes= and passes= are the same"):
        model(X, forward_passes=2, passes=2)


def test_they_are_networks_with_connections(tmp_path):
    model = network(img_size=16)
    labels = torch.tensor([0, 1])
    prototypes = fxfeedback.Prototypes.compute(model, [(X, labels)])
    assert prototypes.sources == ["6", "3"]
    model.train()
    sum(output.sum() for output in model(X)).backward()
    twin = copy.deepcopy(model).eval()
    fxfeedback.save(twin, tmp_path)
    loaded = fxfeedback.load(tmp_path)
    with torch.no_grad():
        same(loaded(X), twin(X))
    assert type(loaded) is fxfeedback.FeedbackModel
