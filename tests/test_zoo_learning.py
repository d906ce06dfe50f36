"""What `make zoo` checks of every model, here of a small one of each kind; and that the checks see a broken rule."""

import copy
import functools
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback
from fxfeedback.rules import RULES, roles
from fxfeedback.tracing.openings import OPENINGS
from marks import long, sweep

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
zoo = importlib.import_module("learning")

KINDS = dict(zoo.every_model())
TIMM = importlib.util.find_spec("timm") is not None


@pytest.fixture(autouse=True)
def in_double():
    with zoo.in_double():
        yield


@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1",
        sweep("googlenet"),
        sweep("lraspp_mobilenet_v3_large"),
        sweep("mc3_18"),
        long("shufflenet_v2_x0_5"),
        sweep("swin_t"),
    ],
)
def test_a_model_of_torchvision(name):
    row = zoo.check(name, KINDS[name])
    assert max(row.errors) <= 1e-9
    assert row.tasks.sites == row.classes.sites > 1


@pytest.mark.skipif(not TIMM, reason="timm is not installed")
@pytest.mark.parametrize(
    "name",
    [
        long("timm/resnet10t"),
        sweep("timm/mobilevit_xxs"),
        sweep("timm/xcit_nano_12_p16_224"),
    ],
)
def test_a_model_of_timm(name):
    row = zoo.check(name, "timm")
    assert max(row.errors) <= 1e-9
    assert row.tasks.sites == row.classes.sites > 1


@pytest.mark.long  # parts of models in the small: tests/test_feedback_parts.py
def test_the_backbone_of_a_detection_model():
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    row = zoo.check(name, KINDS[name])
    assert max(row.errors) <= 1e-9 and row.tasks is row.classes is None


def test_the_zoo_has_every_model_but_the_quantized():
    assert {"alexnet", "maskrcnn_resnet50_fpn", "raft_large", "swin3d_t", "odd/recurrent"} <= set(KINDS)
    assert not any(name.startswith("quantized_") for name in KINDS)


def test_the_table(capsys, monkeypatch, tmp_path):
    shares = zoo.Shares(7, (0.25, "a"), (0.75, "b"))

    def check(name, kind):
        if name == "alexnet":
            return zoo.Row((1e-15, 2e-15), shares, shares)
        raise zoo.Problem("evaluation: the update of x is off by 1.0e-03 (1 of 9 are)")

    monkeypatch.setattr(zoo, "check", check)
    file = tmp_path / "learning.csv"
    file.write_text("model,seconds,eval,train,sites,remarks,torch\nvgg11,1,,,,ok,2.0\nvgg13,2,,,,ok,2.0\n")
    assert zoo.main(["vgg11", "alexnet"], file) == 1
    *_, vgg11, alexnet, _, summary, largest = capsys.readouterr().out.splitlines()
    assert alexnet.split()[0] == "alexnet"
    assert alexnet.endswith("1.0e-15   2.0e-15      7  ok     25 % a, 75 % b | 25 % a, 75 % b")
    assert vgg11.split()[0] == "vgg11"
    assert vgg11.endswith("NOT OK evaluation: the update of x is off by 1.0e-03 (1 of 9 are)")
    assert summary.startswith("1 of 2 models ok, 1 not, in ") and largest == "the largest error 2.0e-15"
    kept = [line.split(",") for line in file.read_text().splitlines()[1:]]
    assert [line[0] for line in kept] == ["alexnet", "vgg11", "vgg13"], "the zoo's order"
    assert kept[0][2:5] == ["1.0e-15", "2.0e-15", "7"] and kept[1][5].startswith("NOT OK") and kept[2][1] == "2"
    with pytest.raises(SystemExit, match="the zoo has no model alexnot"):
        zoo.main(["alexnot"])


# -- the checks see what they are there for ----------------------------------------------------------------------------


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 6, 3), nn.GELU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 3))


@pytest.fixture
def x():
    return torch.randn(2, 2, 8, 8)


def compare(net, x, train=True, plain=None):
    model = fxfeedback.to_butd(net.train(train), input_size=(2, 8, 8))
    return zoo.compare((plain or net).train(train), model, x, lambda model: model(x))


@pytest.mark.parametrize("train", [False, True])
def test_a_sound_network_passes_and_keeps_its_state(net, x, train):
    before = copy.deepcopy(net.state_dict())
    assert compare(net, x, train) <= 1e-12
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_slightly_wrong_rule_is_seen(net, x, monkeypatch):
    kernel = RULES[F.gelu].fused
    right = kernel.error
    monkeypatch.setattr(kernel, "error", lambda e, *rest, **options: right(e * (1 + 1e-8), *rest, **options))
    with pytest.raises(zoo.Problem, match=r"evaluation: the update of .* is off by 1.0e-08 \(\d of 9 are\)"):
        compare(net, x, train=False)


def test_a_missing_update_is_seen(net, x, monkeypatch):
    right = RULES[F.linear].table

    def without_bias(y, input, weight, bias=None):
        return right(y, input, weight, bias) | {"bias": roles(instruct=lambda t: None, error=lambda e: None)}

    monkeypatch.setattr(RULES[F.linear], "table", without_bias)
    with pytest.raises(zoo.Problem, match=r"evaluation: 7.bias has a gradient, but no update"):
        compare(net, x, train=False)


def test_an_update_where_there_is_no_gradient_is_seen(net, x):
    plain = copy.deepcopy(net)
    plain[4].weight.requires_grad_(False)
    with pytest.raises(zoo.Problem, match=r"training: 4.weight has an update, but no gradient"):
        compare(net, x, plain=plain)


def test_other_masks_are_seen(net, x, monkeypatch):
    def reversed_dropout(input, p=0.5, training=True, inplace=False):
        return torch.native_dropout(input.flip(1), p, True)[0].flip(1) if training else input

    monkeypatch.setitem(OPENINGS, F.dropout, reversed_dropout)
    with pytest.raises(zoo.Problem, match=r"training: an output is off by"):
        compare(net, x)


def test_statistics_that_advance_otherwise_are_seen(net, x, monkeypatch):
    right = OPENINGS[nn.modules.batchnorm._BatchNorm]

    def hasty(module, input):
        module.momentum *= 1.001
        return right(module, input)

    monkeypatch.setitem(OPENINGS, nn.modules.batchnorm._BatchNorm, hasty)
    with pytest.raises(zoo.Problem, match=r"training: 1.running_mean does not advance as the plain model's does"):
        compare(net, x, plain=copy.deepcopy(net))


@pytest.mark.parametrize("sign, share", [(-1, "0 % 2, "), long(1, ", 99 % 2 for tasks")])
def test_closed_and_open_gates_are_seen(net, monkeypatch, sign, share):
    monkeypatch.setitem(zoo.zoo.ODD, "odd/net", lambda: net)
    monkeypatch.setitem(zoo.zoo.SIZES, "odd/net", (2, 8, 8))
    assert zoo.check("odd/net", "odd").tasks.sites == 2
    right = RULES[torch.conv2d].table

    @functools.wraps(right)
    def one_sided(*operands, **options):
        table = right(*operands, **options)
        way = table["input"]
        return table | {"input": roles(instruct=lambda t: sign * way.instruct(t).abs(), error=way.error)}

    monkeypatch.setattr(RULES[torch.conv2d], "table", one_sided)
    with pytest.raises(zoo.Problem, match="active shares: .*" + share):
        zoo.check("odd/net", "odd")


def test_readers_that_are_gated_may_ask_for_everything():
    torch.manual_seed(0)

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Conv2d(2, 8, 1), nn.Linear(8, 3)
            self.readers = nn.ModuleList(
                nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)) for _ in range(8)
            )

        def forward(self, x):
            x = F.relu(self.first(x))
            return self.head(sum(reader(x) for reader in self.readers).mean((2, 3)))

    x = torch.randn(2, 2, 8, 8)
    butd = fxfeedback.to_butd(Dense().eval(), input_size=(2, 8, 8))
    first, *others = butd.counter_neurons(torch.tensor([0, 1])).values()
    assert len(others) == 8 and first.gt(0).double().mean() > 0.95
    assert zoo.active_shares(butd, x).highest[0] < 0.95


def test_only_positions_count_that_the_output_uses(x):
    class FirstRow(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 5, 1), nn.Linear(4, 3)
            self.last = nn.Conv2d(5, 4, (3, 1), padding=(1, 0))

        def forward(self, x):
            return self.head(F.relu(self.last(F.gelu(self.conv(x))))[:, :, 0].mean(-1))

    butd = fxfeedback.to_butd(FirstRow(), input_size=(2, 8, 8))
    used = zoo.used_positions(butd.bu, ["relu", "gelu"], x)
    assert [used[name].sum((0, 1, 3)).gt(0).sum().item() for name in ("relu", "gelu")] == [1, 2]
    shares = zoo.active_shares(butd, x)
    assert shares.lowest[0] > 0.1  # of all positions it were at most a quarter


def test_a_model_that_is_too_large_is_tried_with_fewer_blocks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))))
    assert zoo.shorten(model, "1", 2) == "2 of 5 1: " and len(model[1]) == 2
    for name, (_, blocks) in zoo.SHORTENED.items():
        assert KINDS[name] in ("vision_transformer", "regnet") and blocks > 5
