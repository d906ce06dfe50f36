"""Prototypes: exact means and deviations of any node, mergeable, on disk as ours and as published, and steering."""

import hashlib
import io
import json
import pickle
import subprocess
import sys
from email.message import Message
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxfeedback
from fxfeedback import Prototypes
from fxfeedback.errors import CheckpointError, InputError, NodeNameError, OptionError
from fxfeedback.prototypes.moments import Moments
from fxfeedback.prototypes.prototype_files import PUBLISHED
from marks import one_in

ROOT = Path(__file__).parents[1]


class Tokens(nn.Module):
    """Patches as tokens (B, 9, 8) through attention, and a head."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(nn.functional.gelu(self.hidden(x)).mean(1))


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def data(count=120, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 12, 12, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.arange(count) % classes)


def two_passes(values, labels):
    """Means and deviations per class, in float64, the sums first."""
    classes = [values[labels == k].double() for k in labels.unique()]
    return [x.mean(0) for x in classes], [(x - x.mean(0)).square().mean(0).sqrt() for x in classes]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def feedback():
    return fxfeedback.add_feedback(convnet(), [("5", "2"), ("4", "2")], passes=3, input_size=(2, 12, 12)).double()


MODELS = {
    "plain": (convnet, ["5"], lambda model, x: {"5": model(x)}),
    "feedback": (feedback, ["5", "4"], lambda model, x: {"5": model(x)[-1]}),
    "instructed": (
        lambda: fxfeedback.to_butd(convnet(), input_size=(2, 12, 12)),
        ["5"],
        lambda model, x: {"5": model(x)},
    ),
    "instructed feedback": (lambda: fxfeedback.to_butd(feedback()), ["5", "4"], lambda model, x: {"5": model(x)[-1]}),
    "tokens": (Tokens, ["head"], lambda model, x: {"head": model(x)}),
}


@one_in(19)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [120, 50, 7, 1])
def test_they_equal_two_passes_in_float64(name, batch):
    make, sources, expected = MODELS[name]
    torch.manual_seed(1)
    model = make().double().train()
    dataset = data(120 if batch > 1 else 12)
    prototypes = Prototypes.compute(model, DataLoader(dataset, batch, shuffle=True))
    assert model.training and prototypes.sources == sources and prototypes.labels == [0, 1, 2, 3, 4]
    with torch.no_grad():
        values = expected(model.eval(), dataset.tensors[0])
    for source, value in values.items():
        for k, (mean, deviation) in enumerate(zip(*two_passes(value, dataset.tensors[1]), strict=True)):
            close(prototypes.mean(k, source), mean)
            close(prototypes.deviation(k, source), deviation)
            assert prototypes.count(k) == (dataset.tensors[1] == k).sum()


@pytest.mark.parametrize("offset", [0, 1e6])
def test_a_large_mean_does_not_swallow_the_deviation(offset):
    x = torch.randn(1000, 4, dtype=torch.float64) + offset
    parts = [Moments.of({"a": part}) for part in x.split([1, 3, 500, 96, 400])]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    torch.testing.assert_close(whole.mean["a"], x.mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(whole.deviation("a"), x.std(0, correction=0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("sources", ["2", ["0", "4"], ["patches"], ["norm", "head"]])
def test_any_node_has_prototypes(sources):
    model = (Tokens() if max(sources) > "a" else convnet()).double()
    dataset = data(20)
    prototypes = Prototypes.compute(model, DataLoader(dataset, 6), sources)
    seen = []
    hook = model.get_submodule(prototypes.sources[-1]).register_forward_hook(lambda module, x, y: seen.append(y))
    model.eval()(dataset.tensors[0])
    hook.remove()
    mean = two_passes(seen[0].detach(), dataset.tensors[1])[0][3]
    close(prototypes.mean(3, prototypes.sources[-1]), mean)
    assert prototypes.shape(prototypes.sources[-1]) == tuple(mean.shape)


def test_labels_are_numbers_or_strings_and_inputs_of_any_kind():
    x = torch.randn(6, 2, 12, 12)
    as_numbers = Prototypes.compute(convnet(), [(x, torch.arange(6) % 2, "anything else")])
    close(Prototypes.compute(convnet(), [([x], np.arange(6) % 2)]).mean(1), as_numbers.mean(np.int64(1)))
    as_names = Prototypes.compute(convnet(), [({"input": x}, ["cat", "dog"] * 3)])
    close(as_names.mean("dog"), as_numbers.mean(1))
    with pytest.raises(InputError, match="no prototype of 'dot'; did you mean 'dog'"):
        as_names.steering("dot")


SHARE = """
import sys, torch
sys.path[:0] = ["tests"]
from test_prototypes import *
x, y = data().tensors
part = TensorDataset(x[int(sys.argv[1])::2], y[int(sys.argv[1])::2])
Prototypes.compute(feedback(), DataLoader(part, 7), ["5", "2"]).save(sys.argv[2])
"""


@pytest.mark.long
def test_two_processes_share_the_work(tmp_path):
    files = [tmp_path / f"{part}.safetensors" for part in range(2)]
    jobs = [
        subprocess.Popen([sys.executable, "-c", SHARE, str(i), str(file)], cwd=ROOT) for i, file in enumerate(files)
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    first, second = map(Prototypes.load, files)
    both, whole = first + second, Prototypes.compute(feedback(), DataLoader(data(), 32), ["5", "2"])
    assert both.labels == whole.labels and both.sources == whole.sources
    for label in whole.labels:
        assert both.count(label) == whole.count(label)
        for source in whole.sources:
            close(both.mean(label, source), whole.mean(label, source))
            close(both.deviation(label, source), whole.deviation(label, source))


# --- steering


@pytest.fixture(scope="module")
def prototypes():
    return Prototypes.compute(convnet(), DataLoader(data(40), 8))


def test_what_one_steers_to(prototypes):
    steering = prototypes.steering(3)
    assert (steering.source, steering.strength, steering.alpha) == ("5", 3.0, 1.0)
    close(steering.activation, prototypes.mean(3)[None])
    means = torch.stack([prototypes.mean(k) for k in range(5)])
    close(prototypes.steering([1, 4], 2.0, 0.5).activation, means[[1, 4]].mean(0, keepdim=True))
    close(prototypes.steering(torch.tensor([1, 4, 1])).activation, means[[1, 4, 1]])
    close(prototypes.steering(torch.tensor(2)).activation, means[[2]])
    apart = prototypes.steering(torch.tensor([0, 1]), contrast=[2, 3]).activation
    raw = means[:2] - means[2:4].mean(0)
    close(apart.norm(dim=1), means[:2].norm(dim=1))
    close(nn.functional.cosine_similarity(apart, raw), torch.ones(2).double())


@pytest.mark.parametrize("make", [convnet, Tokens])
def test_networks_are_steered_and_instructed(make):
    torch.manual_seed(0)
    net, dataset = make(), data(10)
    x, labels = dataset.tensors[0].float(), dataset.tensors[1]
    ends = ("5", "2") if make is convnet else ("norm", "patches")
    model = fxfeedback.add_feedback(net, [ends], input_size=(2, 12, 12)).eval()
    prototypes = Prototypes.compute(model, DataLoader(dataset, 4))
    each = model(x, steering=prototypes.steering(labels))[-1]
    one_by_one = [model(x[i : i + 1], steering=prototypes.steering(int(k)))[-1] for i, k in enumerate(labels)]
    torch.testing.assert_close(each, torch.cat(one_by_one))
    assert not torch.allclose(each, model(x)[-1])
    butd = fxfeedback.to_butd(net, input_size=(2, 12, 12)).eval()
    of_outputs = Prototypes.compute(butd, DataLoader(dataset, 4))
    instruction = of_outputs.instruction(labels)
    assert instruction.shape == (10, 5) and butd(x, instruction).shape == (10, 5)
    torch.testing.assert_close(butd(x, of_outputs.instruction(2)), butd(x, of_outputs.mean(2).expand(10, -1)))
    one_by_one = [butd(x[i : i + 1], instruction[i : i + 1]) for i in range(10)]
    torch.testing.assert_close(butd(x, instruction), torch.cat(one_by_one))
    with pytest.raises(InputError, match="an instruction is a vector"):
        Prototypes.compute(net, DataLoader(dataset, 4), ends[1]).instruction(2)


# --- what cannot be


ONE = [(torch.zeros(2, 2, 12, 12), torch.tensor([0, 1]))]
WRONG = {
    "no batches": (lambda: Prototypes.compute(convnet(), []), InputError, "the loader gives no samples"),
    "no labels": (
        lambda: Prototypes.compute(convnet(), [ONE[0][0]]),
        InputError,
        r"a labelled loader gives \(inputs, l",
    ),
    "soft labels": (
        lambda: Prototypes.compute(convnet(), [(ONE[0][0], torch.eye(2))]),
        InputError,
        r"labels are whole numbers \(B,\), not torch.float32 of shape \(2, 2\)",
    ),
    "other labels": (
        lambda: Prototypes.compute(convnet(), [(ONE[0][0], [0.5, 1])]),
        InputError,
        "whole number or a st",
    ),
    "one label too few": (
        lambda: Prototypes.compute(convnet(), [(ONE[0][0], torch.tensor([0]))]),
        InputError,
        r"'5' has shape \(2, 5\) for 1 labels",
    ),
    "NaN": (
        lambda: Prototypes.compute(convnet(), [(torch.full((2, 2, 12, 12), torch.nan), torch.tensor([7, 8]))], "2"),
        InputError,
        "'2' is not finite .* for a sample of class 7",
    ),
    "no node": (lambda: Prototypes.compute(convnet(), ONE, "22"), NodeNameError, "no node is called '22'"),
    "unknown label": (lambda: small().steering(9), InputError, r"no prototype of 9; labels: 0, 1$"),
    "a bool": (lambda: small().steering(True), InputError, "a whole number or a string, not True"),
    "no label": (lambda: small().steering([]), InputError, "no label is given"),
    "with itself": (lambda: small().steering(1, contrast=1), InputError, "does not differ from that of 1"),
    "another node": (lambda: small().steering(1, source="2"), NodeNameError, "no prototypes of '2'; there are of 5$"),
    "which node": (
        lambda: Prototypes.compute(convnet(), ONE, ["5", "2"]).steering(1),
        NodeNameError,
        "prototypes of 5, 2: say which",
    ),
    "no source of the model": (
        lambda: feedback()(
            torch.zeros(1, 2, 12, 12).double(), steering=Prototypes.compute(convnet(), ONE, "2").steering(1)
        ),
        NodeNameError,
        "the steering has '2', which is not a source",
    ),
    "empty class": (
        lambda: Prototypes({0: Moments(0, {"5": torch.zeros(5)}, {"5": torch.zeros(5)})}).steering(0),
        InputError,
        "class 0 has no samples",
    ),
    "other nodes": (
        lambda: small() + Prototypes.compute(convnet(), ONE, "2"),
        OptionError,
        r"prototypes of \['5'\] and of \['2'\] have no sum",
    ),
    "other shapes": (
        lambda: small() + Prototypes.compute(nn.Sequential(*convnet()[:5], nn.Linear(6, 4)), ONE),
        OptionError,
        r"'5' has shape \(5,\) here and \(4,\) there",
    ),
    "no published ones": (lambda: Prototypes.published("alexnet_lrm4"), OptionError, "did you mean 'alexnet_lrm"),
}


def small():
    return Prototypes.compute(convnet(), ONE)


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_told(mistake):
    make, error, message = WRONG[mistake]
    with pytest.raises(error, match=message) as caught:
        make()
    assert isinstance(caught.value, fxfeedback.Error)


# --- files


def test_they_come_back_from_a_file(prototypes, tmp_path):
    both = Prototypes.compute(convnet(), DataLoader(data(40), 8), ["2", "5"])
    for whole in (prototypes, both):
        whole.save(tmp_path / "p.safetensors")
        back = Prototypes.load(tmp_path / "p.safetensors")
        assert repr(back) == repr(whole) and back.labels == whole.labels
        for source in whole.sources:
            for label in whole.labels:
                assert torch.equal(back.mean(label, source), whole.mean(label, source))
                assert torch.equal(back.deviation(label, source), whole.deviation(label, source))
    with pytest.raises(OptionError, match=r"room for one node, not for 2, 5"):
        both.save(tmp_path / "p.pth")
    with pytest.raises(OptionError, match=r"written to a \.safetensors file"):
        both.save(tmp_path / "p.npz")
    with pytest.raises(OptionError, match="says itself which nodes"):
        Prototypes.load(tmp_path / "p.safetensors", "5")


def as_published(values, labels):
    """What the published code keeps: running sums in the dtype of the activations."""
    content = {}
    for label in labels.unique().tolist():
        x = values[labels == label]
        total, squares, n = x.sum(0), x.square().sum(0), len(x)
        deviation = (squares / n - (total / n).square()).sqrt().nan_to_num(nan=0)
        content[label] = {"count": n, "sum": total, "sumsq": squares, "mean": total / n, "std": deviation}
    return content


def test_the_published_format_comes_and_goes(tmp_path):
    dataset = data(60)
    values = convnet().eval()(dataset.tensors[0].float()).detach()
    content = as_published(values, dataset.tensors[1])
    torch.save(content, tmp_path / "published.pth")
    read = Prototypes.load(tmp_path / "published.pth", source="5")
    assert read.sources == ["5"] and read.count(0) == 12
    own = Prototypes.compute(convnet(), DataLoader(dataset, 60))
    for k in range(5):
        assert torch.equal(read.mean(k), content[k]["mean"].double())
        torch.testing.assert_close(read.deviation(k), own.deviation(k), rtol=1e-3, atol=1e-4)
    read.save(tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    for k, kept in content.items():
        assert again[k]["count"] == kept["count"] and again[k].keys() == kept.keys()
        assert all(torch.equal(again[k][name], kept[name]) for name in ("mean", "std"))
        assert all(torch.allclose(again[k][name], kept[name], rtol=1e-5, atol=1e-6) for name in ("sum", "sumsq"))
    with pytest.raises(OptionError, match="does not say which node"):
        Prototypes.load(tmp_path / "published.pth")


class Code:
    def __reduce__(self):
        return __import__("os").system, ("exit 1",)


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


GOOD = {"count": 2, "mean": torch.ones(3), "std": torch.ones(3)}
FILES = {
    "code": (saved({0: {**GOOD, "note": Code()}}), "was not loaded: .*refers to"),
    "a pickle": (pickle.dumps({0: Code()}, protocol=2), "was not loaded: .*refers to"),
    "a whole model": (saved(nn.Linear(2, 2)), "refers to torch.nn"),
    "text": (b"<html>404</html>", "not a plain file of tensors"),
    "empty": (b"", "ends too early"),
    "a state dict": (saved({"conv.weight": torch.ones(3)}), "class 'conv.weight' is no prototype"),
    "a list": (saved([GOOD]), "holds no prototypes"),
    "no classes": (saved({}), "holds no prototypes"),
    "no count": (saved({0: {"mean": torch.ones(3), "std": torch.ones(3)}}), "it has no count"),
    "a negative count": (saved({0: {**GOOD, "count": -1}}), "it has no count"),
    "no deviation": (saved({0: {"count": 1, "mean": torch.ones(3)}}), "it has no mean or std"),
    "a view of one number": (saved({0: {**GOOD, "mean": torch.ones(1).expand(2**40)}}), "it has no mean or std"),
    "a sparse mean": (saved({0: {**GOOD, "mean": torch.ones(3).to_sparse()}}), "it has no mean or std"),
    "NaN": (saved({0: {**GOOD, "mean": torch.full((3,), torch.nan)}}), "not finite"),
    "other shapes": (saved({0: GOOD, 1: {**GOOD, "mean": torch.ones(4)}}), "class 1 has another shape"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_hold_no_prototypes(kind, tmp_path):
    content, message = FILES[kind]
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Prototypes.load(tmp_path / "bad.pth", "5")
    assert str(tmp_path) in str(caught.value) and "weights_only" not in str(caught.value)


def test_damaged_files_of_ours(prototypes, tmp_path):
    path = tmp_path / "p.safetensors"
    with pytest.raises(CheckpointError, match="there is no file"):
        Prototypes.load(path)
    prototypes.save(path)
    whole, tensors = path.read_bytes(), safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["fxfeedback_prototypes"])
    for end in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="damaged"):
            Prototypes.load(path)
    broken = [
        (tensors, None, "was not written by"),
        (tensors, {**about, "format": 2}, "a later version is needed"),
        (tensors, {**about, "labels": [0, 0, 1, 2, 3]}, "its labels and sources"),
        (tensors, {**about, "labels": [[0], 1, 2, 3, 4]}, "its labels and sources"),
        (tensors, {**about, "sources": []}, "its labels and sources"),
        (tensors, {**about, "labels": [0, 1]}, "its tensors are not"),
        ({**tensors, "0.mean": tensors["0.mean"].float()}, about, "its tensors are not"),
        ({**tensors, "0.mean": tensors["0.mean"] / 0}, about, "not finite"),
        ({**tensors, "count": -tensors["count"]}, about, "negative number"),
        ({"count": tensors["count"]}, about, "its tensors are not"),
    ]
    for changed, told, message in broken:
        safetensors.torch.save_file(changed, path, told and {"fxfeedback_prototypes": json.dumps(told)})
        with pytest.raises(CheckpointError, match=message):
            Prototypes.load(path)


class Network:
    """Stands in for the network: every URL has this content."""

    def __init__(self, monkeypatch, cache, content):
        self.asked = []
        monkeypatch.setenv("TORCH_HOME", str(cache))
        monkeypatch.setattr(torch.hub, "_hub_dir", None)

        def urlopen(request):
            self.asked.append(request.full_url)
            response = io.BytesIO(content)
            response.info = Message
            return response

        monkeypatch.setattr(torch.hub, "urlopen", urlopen)


@pytest.mark.parametrize(("model", "made_from"), PUBLISHED)
def test_the_published_ones_are_downloaded_checked_and_kept(model, made_from, monkeypatch, tmp_path):
    url = PUBLISHED[model, made_from]
    assert torch.hub.HASH_REGEX.search(url.split("/")[-1])[1] == url[-12:-4] and model in url
    content = saved(as_published(torch.randn(20, 1000), torch.arange(20) % 10))
    network = Network(monkeypatch, tmp_path / "a", content)
    with pytest.raises(CheckpointError, match="invalid hash value"):
        Prototypes.published(model, made_from)
    ours = url.replace(url[-12:-4], hashlib.sha256(content).hexdigest()[:8])  # as if it were the published file
    monkeypatch.setitem(PUBLISHED, (model, made_from), ours)
    for _ in range(2):
        prototypes = Prototypes.published(model, made_from)
        assert prototypes.sources == ["classifier.6"] and prototypes.steering(7).activation.shape == (1, 1000)
    assert network.asked == [url, ours]
    with torch.device("meta"):
        assert "classifier.6" in {c.source for c in getattr(fxfeedback.models, model)().connections}


def test_a_published_model_takes_published_prototypes(monkeypatch, tmp_path):
    model = fxfeedback.add_feedback(
        torchvision.models.alexnet(), [("classifier.6", "features.9")], input_size=(3, 64, 64)
    ).eval()
    x = torch.rand(2, 3, 64, 64)
    torch.save(as_published(model(x)[0].detach(), torch.tensor([0, 1])), tmp_path / "a.pth")
    steering = Prototypes.load(tmp_path / "a.pth", "classifier.6").steering(1)
    assert not torch.equal(model(x, steering=steering)[-1], model(x)[-1])
