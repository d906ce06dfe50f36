"""The published LRM models: their checkpoints in every form, bad ones refused, the hub entry points, the transforms."""

import copy
import hashlib
import inspect
import io
import json
import pickle
import re
import runpy
import sys
from email.message import Message
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import fxfeedback
from fxfeedback import models
from fxfeedback.errors import CheckpointError
from fxfeedback.storage.published import load_lrm_steering
from marks import long, one_in
from test_parity_lrm import our_name, small

ROOT = Path(__file__).parent.parent
PARITY = ROOT / "tests" / "parity"
sys.path.append(str(PARITY))

from fill import fill, fill_input  # noqa: E402

CODE = "refers to \\w+.system"


def load_case(name):
    case = json.loads((PARITY / f"{name}.json").read_text())
    return case, {tensor: torch.tensor(fill(tensor, shape)) for tensor, shape in case["tensors"].items()}


def logits_agree(model, name, case, tolerance=1e-9):
    recorded = np.load(PARITY / f"{name}.npz")
    x = torch.tensor(fill_input(name, case["input"])).to(next(model.parameters()).dtype)
    with torch.no_grad():
        outputs = model.eval()(x)
    assert len(outputs) == 2
    for p, output in enumerate(outputs):
        expected = torch.tensor(recorded[f"call0_pass{p}"])
        assert (output - expected).abs().max() <= tolerance * expected.abs().max(), p


# How a published file may spell its tensors' names, and where it may keep them.
def older(name):
    return re.sub(r"features_(\d+)", r"features\1", name.replace("feedforward.", "backbone."))


def oldest(name):
    """No separator at all between a node's name and its number."""
    head, _, tail = name.replace("feedforward.", "backbone.").partition("lrm.")
    return head + _ + re.sub(r"([a-z])_(\d+)", r"\1\2", tail)


NAMES = {
    "present": lambda name: name,
    "backbone": lambda name: name.replace("feedforward.", "backbone."),
    "module": lambda name: f"module.{name}",
    "older": older,
    "oldest": oldest,
    "module, older": lambda name: f"module.{older(name)}",
    "ours": our_name,
}
PLACES = {
    "top": lambda tensors: tensors,
    "model": lambda tensors: {"epoch": 99, "model": tensors},
    "state_dict": lambda tensors: {"arch": "alexnet", "state_dict": tensors, "optimizer": {"state": {0: 1.0}}},
    "named model": lambda tensors: {"model": "alexnet", "state_dict": tensors},
}


@pytest.fixture(scope="module")
def alexnet():
    case, tensors = load_case("lrm_alexnet3")
    backbone = torchvision.models.alexnet(weights=None).double()
    return case, tensors, fxfeedback.add_feedback(backbone, models.CONNECTIONS)


@pytest.mark.long
@pytest.mark.parametrize(
    ("place", "spelling"), [("top", "present"), long("model", "module, older"), long("state_dict", "oldest")]
)
def test_alexnet_from_a_file_gives_the_recorded_logits(alexnet, tmp_path, place, spelling):
    case, tensors, model = alexnet
    path = tmp_path / "checkpoint.pth"
    torch.save(PLACES[place]({NAMES[spelling](name): value for name, value in tensors.items()}), path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_lrm_steering(model, path if place == "top" else str(path))
    path.unlink()
    logits_agree(model, "lrm_alexnet3", case)


def small_model():
    """The parity case's small network with its connections; its state, so that a test can see that nothing changed."""
    case, tensors = load_case("lrm_small")
    connections = [tuple(connection) for connection in case["connections"]]
    return (
        fxfeedback.add_feedback(small().double(), connections, input_size=(3, *[case["img_size"]] * 2)),
        case,
        tensors,
    )


@one_in(5)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("spelling", NAMES)
@pytest.mark.parametrize("zipped", [True, long(False)])
def test_every_form(tmp_path, place, spelling, zipped):
    model, case, tensors = small_model()
    checkpoint = PLACES[place]({NAMES[spelling](name): value for name, value in tensors.items()})
    torch.save(checkpoint, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    parameters = dict(model.named_parameters())
    load_lrm_steering(model, tmp_path / "checkpoint.pth")
    assert all(torch.equal(model.state_dict()[our_name(name)], value) for name, value in tensors.items())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())  # loaded in place
    if zipped and spelling == "older":
        logits_agree(model, "lrm_small", case)


def test_buffers_nodes_in_blocks_and_other_dtypes():
    """ResNet-18: names with several numbers, batch norm's statistics, a float64 checkpoint into a float32 model."""
    case, tensors = load_case("lrm_resnet18_train")
    backbone = torchvision.models.resnet18(weights=None)
    size = (3, case["img_size"], case["img_size"])
    model = fxfeedback.add_feedback(backbone, [tuple(c) for c in case["connections"]], input_size=size)
    load_lrm_steering(model, {oldest(name): value for name, value in tensors.items()})
    for name, value in tensors.items():
        assert torch.equal(model.state_dict()[our_name(name)], value.to(model.state_dict()[our_name(name)].dtype))
    assert torch.equal(backbone.bn1.running_mean, tensors["feedforward.bn1.running_mean"].float())


def test_nodes_whose_names_differ_by_a_dot_only():
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    net = nn.Sequential(nn.Conv2d(3, 3, 1), block, *[nn.Conv2d(3, 3, 1) for _ in range(10)])
    model = fxfeedback.add_feedback(net, [("11", "0"), ("1.1", "0")], input_size=(3, 4, 4))
    tensors = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    blocks = {
        "modulations.11_to_0": "lrm.0_modulation.from_11_to_0",
        "modulations.1_1_to_0": "lrm.0_modulation.from_1_1_to_0",
    }
    checkpoint = {}
    for name, value in tensors.items():
        block = next((block for block in blocks if name.startswith(block)), "")
        new = blocks[block] + name.removeprefix(block) if block else f"feedforward.{name}"
        checkpoint[new.replace(".norm.", ".rescale.norm.")] = value
    load_lrm_steering(model, checkpoint)
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def without(*names):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def changed(**values):
    return lambda tensors: {**tensors, **{name.replace("__", "."): value for name, value in values.items()}}


SCALE = "lrm.conv3_modulation.from_relu1_to_conv3.neg_scale"
MISFITS = {
    "missing": (without("feedforward.conv1.bias", SCALE), f"missing: feedforward.conv1.bias, {SCALE}$"),
    "nothing": (lambda tensors: {}, r"missing: .* and \d+ more$"),
    "plain backbone": (
        lambda tensors: {our_name(n): v for n, v in tensors.items() if n.startswith("feedforward.")},
        "it was; missing: lrm.conv3_modulation",
    ),
    "extra": (changed(feedforward__conv9__weight=torch.ones(2)), "it was; extra: feedforward.conv9.weight$"),
    "extra, no tensor": (changed(epoch=3), "it was; extra: epoch$"),
    "twice": (changed(backbone__conv1__bias=torch.ones(8)), "it was; extra: backbone.conv1.bias$"),
    "another connection": (
        lambda tensors: {name.replace("from_relu1_", "from_relu2_"): value for name, value in tensors.items()},
        f"missing: {SCALE}.*extra: {SCALE.replace('relu1', 'relu2')}",
    ),
    "shape": (
        changed(feedforward__conv1__bias=torch.ones(9)),
        r"it was; misshapen: feedforward.conv1.bias has shape \(9,\), the model's \(8,\)$",
    ),
    "shape that would broadcast": (changed(feedforward__conv1__bias=torch.ones(1)), r"misshapen: .*\(1,\)"),
    "no tensor": (changed(feedforward__conv1__bias=[0.0] * 8), "feedforward.conv1.bias is a list, not a tensor"),
    "complex": (changed(feedforward__conv1__bias=torch.ones(8) * 1j), r"bias is torch.complex64, .*torch.float64"),
    "sparse": (changed(feedforward__conv1__bias=torch.ones(8).to_sparse()), r"bias is .*torch.sparse_coo"),
    "without data": (changed(feedforward__conv1__bias=torch.ones(8, device="meta")), "bias is .*on meta"),
    "all three": (
        lambda tensors: {**without("feedforward.fc2.bias")(tensors), "a": 1, "feedforward.fc1.bias": torch.ones(3)},
        r"missing: feedforward.fc2.bias; extra: a; misshapen: feedforward.fc1.bias has shape \(3,\)",
    ),
    "names that are no text": (lambda tensors: {0: torch.ones(2)}, "holds no state dict"),
}


@one_in(3)
@pytest.mark.parametrize("mistake", MISFITS)
def test_tensors_that_do_not_fit(mistake):
    change, message = MISFITS[mistake]
    model, _, tensors = small_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message) as caught:
        load_lrm_steering(model, change(tensors))
    assert isinstance(caught.value, fxfeedback.Error)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_published_model(alexnet):
    _, tensors, _ = alexnet
    with torch.device("meta"):
        model = models.alexnet_lrm1()
    with pytest.raises(CheckpointError, match=r"extra: lrm.features_10_modulation\.from_classifier_6.* and 8 more$"):
        load_lrm_steering(model, tensors)


class Code:
    def __reduce__(self):
        return __import__("os").system, ("exit 1",)


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


FILES = {
    "a pickle with code": (lambda tensors: pickle.dumps({"model": Code()}, protocol=2), CODE),
    "code beside the tensors": (lambda tensors: saved({"model": tensors, "args": Code()}), CODE),
    "code, not zipped": (lambda tensors: saved({**tensors, "a": Code()}, _use_new_zipfile_serialization=False), CODE),
    "a whole model": (lambda tensors: saved(nn.Linear(2, 2)), r"refers to torch.nn.*Linear: save a model's state_dict"),
    "empty": (lambda tensors: b"", "is damaged or no checkpoint: it ends too early"),
    "text": (lambda tensors: b"<html>404</html>", "not a plain file of tensors"),
    "one tensor": (lambda tensors: saved(torch.ones(3)), "holds no state dict"),
    "a list": (lambda tensors: saved({"model": [torch.ones(3)]}), "missing: .*; extra: model$"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_checkpoint(tmp_path, kind):
    make, message = FILES[kind]
    model, _, tensors = small_model()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(make(tensors))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_lrm_steering(model, path)
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's advice to switch the protection off
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@one_in(2)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_truncated_or_damaged_file(tmp_path, zipped):
    """Cut anywhere: an error. One byte turned over: an error, or tensors of the right names and shapes."""
    model, _, tensors = small_model()
    load_lrm_steering(model, tensors)
    whole = saved({name: value + 1 for name, value in tensors.items()}, _use_new_zipfile_serialization=zipped)
    path, random = tmp_path / "checkpoint.pth", np.random.default_rng(0)
    for end in [1, 10, len(whole) // 2, len(whole) - 1, *random.integers(len(whole), size=60)]:
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError):
            load_lrm_steering(model, path)
        assert all(torch.equal(model.state_dict()[our_name(name)], value) for name, value in tensors.items())
    for place in [*range(0, 120, 3), *random.integers(len(whole), size=60)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            load_lrm_steering(model, path)
            load_lrm_steering(model, tensors)
        except CheckpointError:
            assert all(torch.equal(model.state_dict()[our_name(name)], value) for name, value in tensors.items())


def test_what_is_no_file_and_no_model(tmp_path):
    model, _, tensors = small_model()
    with pytest.raises(CheckpointError, match=r"there is no file .*nowhere.pth: give a path, or a URL of"):
        load_lrm_steering(model, tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match=r"cannot be read: .*directory"):
        load_lrm_steering(model, tmp_path)
    with pytest.raises(fxfeedback.errors.OptionError, match="a path, a URL or a state dict, not a NoneType"):
        load_lrm_steering(model, None)
    with pytest.raises(fxfeedback.errors.OptionError, match="a Linear has no LRM connections"):
        load_lrm_steering(nn.Linear(2, 2), tensors)
    with pytest.raises(CheckpointError, match="there is no file DEFAULT"), torch.device("meta"):
        models.alexnet_lrm1(weights="DEFAULT")


class Network:
    """Stands in for the network: URL -> content, and which URLs were asked for."""

    def __init__(self, monkeypatch, cache):
        self.content, self.asked = {}, []
        monkeypatch.setenv("TORCH_HOME", str(cache))
        monkeypatch.setattr(torch.hub, "_hub_dir", None)
        monkeypatch.setattr(torch.hub, "urlopen", self.open)

    def open(self, request):
        self.asked.append(request.full_url)
        if request.full_url not in self.content:
            raise OSError("no route to host")
        response = io.BytesIO(self.content[request.full_url])
        response.info = Message
        return response


@pytest.fixture
def network(monkeypatch, tmp_path):
    return Network(monkeypatch, tmp_path)


def test_a_url_is_downloaded_checked_and_kept(network, tmp_path):
    model, case, tensors = small_model()
    before, content = copy.deepcopy(model.state_dict()), saved({"state_dict": tensors})
    url = f"https://example.org/small-{hashlib.sha256(content).hexdigest()[:10]}.pth"
    with pytest.raises(CheckpointError, match=r"example.org/small.* cannot be read: no route to host"):
        load_lrm_steering(model, url)
    network.content[url] = content[:-1] + b"?"
    with pytest.raises(CheckpointError, match="invalid hash value"):
        load_lrm_steering(model, url)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    network.content[url] = content
    for _ in range(2):
        load_lrm_steering(model, url)
    assert network.asked == [url] * 3  # the fourth time it lay in the cache
    logits_agree(model, "lrm_small", case)
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    kept.write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match=f"remove {re.escape(str(kept))} to download it again"):
        load_lrm_steering(model, url)


@one_in(2)
@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/small.pth",
        "https://example.org/small-.pth",
        "https://example.org/small-abc1234.pth",
        "https://example.org/small.pth?name=small-0123456789.pth",
        "file:///etc/small-0123456789.pth",
        "FILE://localhost/etc/small-0123456789.pth",
        "ftp://example.org/small-0123456789.pth",
    ],
)
def test_a_url_that_cannot_be_checked_is_not_read(url, network):
    model, _, _ = small_model()
    with pytest.raises(CheckpointError, match="is not read"):
        load_lrm_steering(model, url)
    if url == "https://example.org/small.pth":
        with pytest.raises(CheckpointError, match="is not read"):
            models.alexnet_lrm1(weights=url)
    assert not network.asked


def test_a_url_without_a_hash_is_read_where_that_is_asked_for(network):
    model, case, tensors = small_model()
    network.content["https://example.org/small.pth"] = saved({"state_dict": tensors})
    load_lrm_steering(model, "https://example.org/small.pth", unsafe_without_hash=True)
    logits_agree(model, "lrm_small", case)


def test_a_cached_file_of_the_same_name_is_not_taken_for_what_the_url_says(network, tmp_path):
    model, _, tensors = small_model()
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / "small-0123456789.pth").write_bytes(saved({"state_dict": tensors}))
    with pytest.raises(CheckpointError, match=r"remove .*small-0123456789.pth to download it again.*another file"):
        load_lrm_steering(model, "https://example.org/small-0123456789.pth")
    assert not network.asked


def test_the_published_urls():
    for name, url in models.WEIGHTS.items():
        assert hasattr(models, name)
        assert re.fullmatch(r"[0-9a-f]{10}", torch.hub.HASH_REGEX.search(Path(url).name)[1])
    assert [Path(url).stem[-10:] for url in models.WEIGHTS.values()] == ["40b29a3427", "17b4229a30", "63ab1b3b06"]


@pytest.mark.parametrize(("name", "n"), [("alexnet_lrm1", 2), ("alexnet_lrm2", 4), ("alexnet_lrm3", 5)])
def test_models(name, n):
    with torch.device("meta"):
        model = getattr(models, name)(passes=3)
    assert [(c.source, c.destination) for c in model.connections] == [
        ("classifier.6", "features.8"),
        ("features.9", "features.0"),
        ("classifier.6", "features.10"),
        ("features.12", "features.3"),
        ("classifier.2", "features.6"),
    ][:n]
    assert model.passes == 3
    assert inspect.signature(getattr(models, name)).parameters["passes"].default == 2


def hub(name, **options):
    return torch.hub.load(str(ROOT), name, source="local", **options)


def test_hub_entry_points(network):
    public = {name: entry for name, entry in runpy.run_path(str(ROOT / "hubconf.py")).items() if name[0] != "_"}
    assert set(public) == {"alexnet_lrm1", "alexnet_lrm2", "alexnet_lrm3", "LRMNet", "SteerableLRM", "dependencies"}
    assert all(public[name].__doc__ for name in models.WEIGHTS)
    for name, n in (("alexnet_lrm1", 2), ("alexnet_lrm2", 4)):
        model, transforms = hub(name, pretrained=False, steering=False)
        assert len(model.connections) == n
        assert set(transforms) == {"train_transform", "val_transform", "test_transform", "inv_transform"}
    with pytest.raises(fxfeedback.Error, match=r"63ab1b3b06.pth cannot be read: no route to host"):
        hub("alexnet_lrm3")  # pretrained, unless told otherwise
    assert network.asked == [models.WEIGHTS["alexnet_lrm3"]]
    network.content[models.WEIGHTS["alexnet_lrm3"]] = b"another file"
    with pytest.raises(fxfeedback.Error, match=r'invalid hash value \(expected "63ab1b3b06"'):
        hub("alexnet_lrm3", pretrained=True)


def test_hub_pretrained_and_steered(monkeypatch, alexnet):
    case, tensors, _ = alexnet
    seen = []

    def load_state_dict_from_url(url, map_location, check_hash, weights_only):
        seen.append((url, check_hash, weights_only))
        return {"state_dict": {f"module.{name}": value.float() for name, value in tensors.items()}}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load_state_dict_from_url)
    model, transforms = hub("alexnet_lrm3", pretrained=True, steering=True)
    assert seen == [(models.WEIGHTS["alexnet_lrm3"], True, True)]
    logits_agree(model, "lrm_alexnet3", case, 1e-4)
    x = transforms["val_transform"](picture(300, 260))[None]
    steering = [{"source": "classifier.6", "activation": torch.randn(1, 1000), "strength": 3}]
    with torch.no_grad():
        plain, steered = model(x), model(x, steering=steering)
    assert torch.equal(plain[0], steered[0])
    assert not torch.allclose(plain[1], steered[1])


def picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_transforms():
    transforms = models.transforms()
    for width, height in ((300, 260), (200, 400), (256, 256)):
        for name, side in (("train_transform", 224), ("val_transform", 224), ("test_transform", 256)):
            assert transforms[name](picture(width, height)).shape == (3, side, side)
    square = picture(256, 256)
    whole = transforms["test_transform"](square)
    expected = torch.tensor(np.asarray(square)).permute(2, 0, 1) / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(whole, (expected - mean[:, None, None]) / deviation[:, None, None], atol=1e-6)
    assert torch.equal(transforms["val_transform"](square), whole[:, 16:240, 16:240])
    pickle.dumps(transforms)  # for a data loader's workers


def test_inverse_undoes_the_normalisation():
    transforms = models.transforms()
    square = picture(256, 256)
    whole = transforms["test_transform"](square)
    for image in (whole, whole.double(), whole.clone().requires_grad_()):
        back = transforms["inv_transform"](image)
        assert back.mode == "RGB"
        assert np.array_equal(np.asarray(back), np.asarray(square))
    clipped = np.asarray(transforms["inv_transform"](torch.tensor([-100.0, 0.0, 100.0]).view(3, 1, 1)))
    assert clipped.tolist() == [[[0, 116, 255]]]
