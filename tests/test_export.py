"""Exported files compute what torch computes, hold every weight once, and say what they are."""

import copy
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fxfeedback
from fxfeedback.deploy import exporting, finishing, writing
from fxfeedback.errors import CheckpointError, Error, ExportError, InputError, OptionError
from fxfeedback.export import export
from marks import long, one_in
from networks import TRANSFORMERS, Scaled, build, convnet

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from fxfeedback.runtime import Session, checksum  # noqa: E402

# Float32 keeps 7 digits; kernels that sum in another order lose one or two, a deep network one more.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def seeded():
    """In float32 a unit that sits at zero may fall on either side of its gate: no draws that change from run to run."""
    torch.manual_seed(3)


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a), b.detach().numpy()
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= TOLERANCE * np.abs(b).max()


def network(name):
    """A network of tests/networks.py in float32 and eval mode, the size of its input."""
    model, x = build("convnet" if name == "passes" else name, train=False)
    size = tuple(x.shape[1:])
    if name == "passes":
        model = fxfeedback.add_feedback(model, [("8", "4")], input_size=size).eval()
    return model.float(), size


def tiny():
    """The smallest network with a connection; its input is (B, 8)."""
    net = nn.Sequential(nn.Linear(8, 60), nn.ReLU(), nn.Linear(60, 3)).eval()
    return fxfeedback.add_feedback(net, [("2", "0")], input_size=(8,)).eval()


def lrm(name, connections, passes=2):
    model, size = network(name)
    model = fxfeedback.add_feedback(model, connections, passes, input_size=size)
    torch.manual_seed(1)
    for parameter in model.modulations.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval(), size


def instructed(name, **options):
    model, size = network(name)
    torch.manual_seed(2)
    return fxfeedback.to_butd(model, **{"n_tasks": 3, "embedding": 7} | options, input_size=size).eval(), size


@pytest.fixture(scope="module")
def convnet_lrm():
    return lrm("convnet", [("8", "4"), ("5", "1"), ("3", "9")], passes=3)[0]


@pytest.fixture(scope="module")
def steerable(convnet_lrm, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "steerable.onnx"
    export(convnet_lrm, path, steerable=True)
    return path


@pytest.fixture(scope="module")
def convnet_butd(tmp_path_factory):
    butd, _ = instructed("convnet")
    path = tmp_path_factory.mktemp("onnx") / "butd.onnx"
    export(butd, path)
    return butd, path


def names_and_size(path):
    model = onnx.load(path)
    return [node.name for node in model.graph.node], sum(len(i.raw_data) for i in model.graph.initializer)


# -- numbers ----------------------------------------------------------------------------------------------------------


@one_in(3)
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_passes_of_any_batch_are_torchs(convnet_lrm, steerable, batch):
    x = torch.randn(batch, 2, 6, 6)
    assert_close(Session(steerable, "cpu")(x), convnet_lrm(x))


@pytest.mark.parametrize("batch, given", [(1, 1), (5, 1), (5, 5)])
def test_steered_passes_are_torchs(convnet_lrm, steerable, batch, given):
    session, x = Session(steerable, "cpu"), torch.randn(batch, 2, 6, 6)
    one = {"source": "5", "activation": torch.randn(given, 8, 3, 3), "strength": (1.5, 3.0), "alpha": 0.7}
    two = fxfeedback.Steering("8", torch.randn(given, 7), 2.0)
    skip = {"source": "3", "activation": torch.zeros(1, 6, 3, 3), "strength": 0.5}
    for steering in (one, [one, two], [two, skip]):
        ours = session(x, steering=steering)
        assert_close(ours, convnet_lrm(x, steering=steering))
        assert not np.allclose(ours[1], session(x)[1])


@pytest.mark.parametrize(
    "name, connections",
    [
        ("vit", [("encoder.layers.encoder_layer_1",) * 2]),
        long("resnet18", [("layer4", "layer1.0.relu"), ("fc", "layer2")]),
    ],
)
def test_a_model_with_connections(name, connections, tmp_path):
    model, size = lrm(name, connections)
    export(model, tmp_path / "model.onnx", steerable=True)
    session = Session(tmp_path / "model.onnx", "cpu")
    source = connections[0][0]
    for batch in (1, 7):
        x = torch.randn(batch, *size)
        assert_close(session(x), model(x))
        activation = model.readout(x, [source])[0][source].value[:1]
        steering = {"source": source, "activation": activation, "strength": 2.0}
        assert_close(session(x, steering=steering), model(x, steering=steering))
    blocks = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    shapes = 4 * sum(np.prod(shape[1:]) for name, shape in session.optional.items() if name.endswith("activation"))
    assert names_and_size(tmp_path / "model.onnx")[1] <= 1.01 * (blocks + shapes) + 4096


@pytest.mark.parametrize("batch, given", [(1, 1), (7, 7), (7, 1)])
def test_instructed_logits_are_torchs(convnet_butd, batch, given):
    butd, path = convnet_butd
    session, x = Session(path, "cpu"), torch.randn(batch, 2, 6, 6)
    assert_close([session(x, task=torch.arange(batch) % 3)], [butd(x, torch.arange(batch) % 3)])
    vectors = torch.randn(given, 3)
    assert_close([session(x, task=vectors)], [butd(x, vectors)])
    assert_close([session(x, task=2)], [butd(x, 2)])


@one_in(20)
@pytest.mark.parametrize(
    "name, options",
    [
        ("convnet", {"gating": "channel"}),
        ("convnet", {"n_tasks": None, "embedding": None}),
        ("convnet", {"norm": "separate", "td_bias": True, "weights": "separate", "lateral": "add"}),
        ("convnet", {"heads": "per_task"}),
        ("passes", {}),
        long("resnet18", {"gating": "channel"}),
        long("swin", {}),
        long("vit", {}),
    ],
    ids=lambda given: given if isinstance(given, str) else " ".join(given),
)
def test_an_instructed_network_and_one_tasks(name, options, tmp_path):
    butd, size = instructed(name, **options)
    export(butd, tmp_path / "whole.onnx")
    whole, one = Session(tmp_path / "whole.onnx", "cpu"), None
    if name not in TRANSFORMERS:
        export(butd, tmp_path / "task.onnx", task=1)
        one = Session(tmp_path / "task.onnx", "cpu")
        assert list(one.inputs) == list(whole.inputs)[:-1]
        assert not any(node.startswith("td/") for node in names_and_size(tmp_path / "task.onnx")[0])
    for batch in (1, 5):
        x = torch.randn(batch, *size)
        ids = torch.arange(batch) % 3
        listed = list if name == "passes" else lambda y: [y]
        assert_close(listed(whole(x, task=ids)), listed(butd(x, ids)))
        if one:
            assert_close(listed(one(x)), listed(butd(x, 1)))
    weights = sum(t.nbytes for t in (*butd.parameters(), *butd.buffers()))
    assert names_and_size(tmp_path / "whole.onnx")[1] <= 1.01 * weights + 4096


def test_an_output_of_several_tensors(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            net = convnet()
            self.body, self.head, self.aux = net[:9], net[9:], nn.Linear(7, 3)

        def forward(self, x):
            y = self.body(x)
            return {"out": self.head(y), "more": (self.aux(y), y)}

    model = fxfeedback.add_feedback(Two().eval(), [("body.8", "body.4")], input_size=(2, 6, 6)).eval()
    export(model, tmp_path / "two.onnx", passes=1)
    session, x = Session(tmp_path / "two.onnx", "cpu"), torch.randn(2, 2, 6, 6)
    assert list(session.outputs) == ["output_1.out", "output_1.more_1", "output_1.more_2"]
    want = model(x, passes=1)[0]
    assert_close(session(x), [want["out"], *want["more"]])


def test_a_model_may_call_its_parts_as_the_exporter_does(tmp_path):
    names = ("steps", "program", "labels", "record", "constants")
    net = nn.Sequential()
    for name in names:
        net.add_module(name, nn.Linear(4, 4))
    model = fxfeedback.add_feedback(net.eval(), [("constants", "program")], input_size=(4,)).eval()
    export(model, tmp_path / "model.onnx")
    x = torch.randn(2, 4)
    assert_close(Session(tmp_path / "model.onnx", "cpu")(x), model(x))


@torch.fx.wrap
def rolled(x, by):
    by[0] -= 1
    return x.roll(by[0], 1)


class Rolls(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(rolled(self.first(x), [3]))


def test_a_function_of_the_models_may_write_into_its_list(tmp_path):
    """As that of torchvision's video transformers does with the sizes of windows."""
    model = fxfeedback.add_feedback(Rolls(), [("second", "first")], input_size=(4,)).eval()
    export(model, tmp_path / "model.onnx")
    x = torch.randn(3, 4)
    assert_close(Session(tmp_path / "model.onnx", "cpu")(x), model(x))


class Windowed(nn.Module):
    """Attention of `dims` dimensions, with a mask as it may be broadcast to them."""

    def __init__(self, dims, masked):
        super().__init__()
        self.dims, self.mask = dims, torch.randn(6, 6) if masked else None
        self.project, self.head = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x):
        windows = (-1, 2, 2)[: self.dims - 2]
        query, key, value = self.project(x).chunk(3, -1)
        parts = (each.reshape(*windows, 6, 8) for each in (query, key, value))
        y = nn.functional.scaled_dot_product_attention(*parts, self.mask)
        return self.head(y.reshape(-1, 24, 8).mean(1))


@pytest.mark.parametrize("masked", [long(False), True])
@pytest.mark.parametrize("dims", [3, long(4), long(5)])
def test_attention_of_any_number_of_dimensions(dims, masked, tmp_path):
    model = fxfeedback.add_feedback(Windowed(dims, masked), [("head", "project")], input_size=(24, 8)).eval()
    export(model, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", "cpu")
    for batch in (1, 3):
        x = torch.randn(batch, 24, 8)
        assert_close(session(x), model(x))


@pytest.mark.long
def test_a_video_model_in_three_dimensions(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv3d(4, 4, 3, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 2 * 3 * 4, 5),
    )  # fmt: skip
    model = fxfeedback.add_feedback(net, [("3", "0")], input_size=(2, 4, 5, 6)).eval()
    export(model, tmp_path / "video.onnx")
    x = torch.randn(3, 2, 4, 5, 6)
    with torch.no_grad():
        assert_close(Session(tmp_path / "video.onnx")(x), model(x))


def test_a_fixed_batch(convnet_lrm, tmp_path):
    export(convnet_lrm, tmp_path / "one.onnx", steerable=True, passes=2, dynamic_batch=False)
    session = Session(tmp_path / "one.onnx", "cpu")
    assert session.inputs == {"input": [1, 2, 6, 6]}
    x = torch.randn(1, 2, 6, 6)
    steering = {"source": "8", "activation": torch.randn(1, 7)}
    assert_close(session(x, steering=steering), convnet_lrm(x, passes=2, steering=steering))


# -- what the file says -----------------------------------------------------------------------------------------------


def test_the_file_is_standard_and_tells_nothing_of_its_maker(steerable, convnet_butd):
    for path in (steerable, convnet_butd[1]):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert [opset.domain for opset in model.opset_import] == [""] and not model.functions
        for secret in (b"site-packages", b".py", str(Path.cwd()).encode()):
            assert secret not in path.read_bytes()


def test_inputs_outputs_and_metadata_have_names(convnet_lrm, steerable, convnet_butd):
    session = Session(steerable, "cpu")
    assert session.inputs == {"input": ["batch", 2, 6, 6]}
    assert list(session.optional)[:3] == ["3.activation", "3.alpha", "3.strength"]
    assert session.optional["5.activation"] == ["5.batch", 8, 3, 3]
    assert session.outputs == {f"output_{n}": ["batch", 5] for n in (1, 2, 3)}
    about = session.metadata
    assert about["fxfeedback"] == fxfeedback.__version__ and about["passes"] == 3
    assert [(c["source"], c["destination"]) for c in about["connections"]] == [("8", "4"), ("5", "1"), ("3", "9")]
    assert about["weights_sha256"] == checksum(convnet_lrm.state_dict())

    butd, path = convnet_butd
    session = Session(path, "cpu")
    assert session.inputs == {"input": ["batch", 2, 6, 6], "instruction": ["instructions", 3]}
    assert session.outputs == {"output": ["batch", 5]}
    assert session.metadata["tasks"] == 3 and session.metadata["sites"] == list(butd.counter_neurons(0))


def test_nodes_are_named_after_pass_and_node(steerable, convnet_butd):
    names, _ = names_and_size(steerable)
    assert len(set(names)) == len(names) and all(names)
    assert {"pass1/0", "pass2/4", "pass3/4", "pass2/4.modulated", "pass2/modulations.8_to_4"} <= set(names)
    assert "pass2/0" not in names  # nothing above it is modulated: computed once
    names, _ = names_and_size(convnet_butd[1])
    assert {"bu/0", "bu/2.gated", "td/4", "gate/5"} <= set(names)
    assert any(re.match("td/instruction_head", name) for name in names)


def test_every_weight_is_stored_once_under_torchs_name(convnet_lrm, steerable, convnet_butd):
    for model, path in ((convnet_lrm, steerable), convnet_butd):
        stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
        for name, parameter in model.named_parameters():
            if parameter.numel() > finishing.FOLDED:
                assert np.array_equal(stored[name], parameter.detach().numpy())
        large = [np.sort(array, axis=None).tobytes() for array in stored.values() if array.size > 40]
        assert len(set(large)) == len(large)  # nor is there a transpose of one


@pytest.mark.long
def test_more_passes_cost_no_more_weights(tmp_path):
    model, sizes = tiny(), []
    for passes in (1, 4):
        export(model, tmp_path / "model.onnx", passes=passes)
        sizes.append(names_and_size(tmp_path / "model.onnx")[1])
    assert sizes[1] <= sizes[0] + sum(p.nbytes for p in model.modulations.parameters()) + 64


# -- the model, the file ----------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("passes", [2, 4])
def test_the_published_network_is_steered(passes, tmp_path):
    torch.manual_seed(0)
    model = fxfeedback.models.alexnet_lrm3(passes=passes).eval()
    for name, parameter in model.modulations.named_parameters():
        nn.init.normal_(parameter, std=0.01 if "modulation.weight" in name else 0.3)
    export(model, tmp_path / "lrm3.onnx", steerable=True)
    session = Session(tmp_path / "lrm3.onnx")
    steering = [
        {"source": "classifier.6", "activation": torch.randn(1, 1000), "strength": (0.5, 3.0), "alpha": 0.7},
        {"source": "features.12", "activation": torch.randn(1, 256, 6, 6), "strength": 2.0},
    ]
    for batch in (1, 7):
        x = torch.randn(batch, 3, 224, 224)
        with torch.no_grad():
            assert_close(session(x), model(x))
            assert_close(session(x, steering=steering), model(x, steering=steering))


@pytest.mark.long
def test_a_small_file_takes_pictures_of_any_size(tmp_path):
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model = fxfeedback.add_feedback(nn.Sequential(*layers).eval(), [("2", "0")], input_size=(2, 16, 12)).eval()
    export(model, tmp_path / "any.onnx", dynamic_size=True, check=False)
    session = Session(tmp_path / "any.onnx", "cpu")
    assert session.inputs == {"input": ["batch", 2, "height", "width"]}
    for batch, size in enumerate(SIZES[2], 1):
        x = torch.randn(batch, 2, *size)
        assert_close(session(x), model(x))


@pytest.mark.long
def test_one_file_takes_pictures_of_any_size(tmp_path):
    torch.manual_seed(0)
    connections = [("layer4", "layer2.0.conv2"), ("layer1", "layer3.0.conv1")]
    model = fxfeedback.add_feedback(build("resnet18", train=False)[0].float(), connections).eval()
    for modulation in model.modulations.parameters():
        nn.init.normal_(modulation, std=0.1)
    export(model, tmp_path / "any.onnx", passes=3, dynamic_size=True)
    session = Session(tmp_path / "any.onnx")
    assert session.inputs == {"x": ["batch", 3, "height", "width"]}
    for batch, height, width in [(1, 224, 224), (3, 64, 96), (2, 97, 71)]:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            assert_close(session(x), model(x, passes=3))


class Pools(nn.Module):
    """Adaptive pooling of every kind, in so many dimensions, and a map resized to another's size."""

    def __init__(self, dims):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        average, largest = (getattr(nn, f"Adaptive{kind}Pool{dims}d") for kind in ("Avg", "Max"))
        self.first, self.second, self.last = conv(2, 4, 3), conv(4, 5, 3, stride=2, padding=1), conv(9, 3, 1)
        mixed = (None, 2, 1)[-dims:]
        self.pools = nn.ModuleList([average(1), average(3), average(mixed), largest(1), largest(2)])
        self.mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]

    def forward(self, x):
        low = torch.relu(self.first(x))
        high = torch.tanh(self.second(low))
        size = low.shape[2:]
        pooled = sum(nn.functional.interpolate(pool(high), size, mode=self.mode) for pool in self.pools)
        return self.last(torch.cat([low, pooled], 1))


RESIZED = [
    {"order": "norm-squash-resize"},
    {"order": "resize-norm-squash", "resize": "area"},
    {"norm": "channel", "resize": "bicubic"},
]
SIZES = {1: [(9,), (16,), (37,)], 2: [(9, 22), (16, 12), (37, 14)], 3: [(5, 9, 12), (8, 10, 6), (13, 7, 9)]}


@pytest.mark.long  # in the small: test_a_small_file_takes_pictures_of_any_size
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_free_sizes_are_free_for_pooling_and_connections(dims, tmp_path):
    """Smaller and larger than the example, and not square."""
    torch.manual_seed(0)
    ends = [("last", "first"), ("second", "first"), ("first", "second")]
    how = RESIZED if dims == 2 else RESIZED[:1] * 3
    connections = [{"source": s, "destination": d, **one} for (s, d), one in zip(ends, how, strict=True)]
    example = SIZES[dims][1]
    model = fxfeedback.add_feedback(Pools(dims).eval(), connections, input_size=(2, *example)).eval()
    for parameter in model.modulations.parameters():
        nn.init.normal_(parameter, std=0.3)
    export(model, tmp_path / "free.onnx", dynamic_size=True)
    session = Session(tmp_path / "free.onnx", "cpu")
    for batch, size in enumerate(SIZES[dims], 1):
        x = torch.randn(batch, 2, *size)
        assert_close(session(x), model(x))


@pytest.mark.long  # in the small: test_a_wrong_file_is_not_written
def test_a_file_that_is_right_at_the_examples_size_only_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "FREE_SIZES", {})
    net = Pools(2).eval()
    net.pools = nn.ModuleList([nn.AdaptiveAvgPool2d(3)])
    model = fxfeedback.add_feedback(net, [("last", "first")], input_size=(2, 16, 12)).eval()
    with pytest.raises(ExportError, match=r"batch 1, inputs of \(2, 12, 6\): .*dynamic_size=False"):
        export(model, tmp_path / "free.onnx", dynamic_size=True)
    assert not list(tmp_path.iterdir())
    export(model, tmp_path / "free.onnx", dynamic_size=True, check=False)


def test_a_model_that_runs_at_one_size_has_no_file_with_others(tmp_path):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)).eval()
    model = fxfeedback.add_feedback(net, [("3", "0")], input_size=(2, 6, 6)).eval()
    with pytest.raises(ExportError, match="dynamic_size"):
        export(model, tmp_path / "free.onnx", dynamic_size=True)
    assert not list(tmp_path.iterdir())


def planted(kind):
    """What torch's exporter does, and then one number of its file is another."""
    made = finishing.finish

    def finish(model, *rest):
        made(model, *rest)
        import onnx_ir as ir

        value = model.graph.initializers[kind]
        changed = value.const_value.numpy().copy()
        changed += 0.5
        value.const_value = ir.tensor(changed, name=kind)

    return finish


@one_in(4)
@pytest.mark.parametrize(
    "what, tensor, message",
    [
        ("passes", "10.weight", "'output_1' is off by"),
        ("steered", "modulations.8_to_4.pos_scale", "'output_2' is off by"),
        ("instructed", "instruction_head.2.weight", "with task=: 'output' is off by"),
        ("task", "0.weight", "'output' is off by"),
    ],
)
def test_a_wrong_file_is_not_written(what, tensor, message, tmp_path, monkeypatch):
    """The old one stays."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    options = {"steered": {"steerable": True}, "task": {"task": 1}}.get(what, {})
    passes = what in ("passes", "steered")
    model = lrm("convnet", [("8", "4")])[0] if passes else instructed("convnet")[0]
    if passes:
        nn.init.ones_(model.modulations["8_to_4"].pos_scale)
    monkeypatch.setattr(writing, "finish", planted(tensor))
    with pytest.raises(ExportError, match=f"batch 3, inputs of .*{message}.*check=False"):
        export(model, path, **options)
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    export(model, path, check=False, **options)
    assert path.read_bytes() != b"old"


def test_units_at_their_gates_are_no_fault(tmp_path):
    """Their counter neurons are rounding: torch and ONNX Runtime open others of them, and both are right."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 512), nn.ReLU(), nn.Linear(512, 3)).eval()
    butd = fxfeedback.to_butd(net, n_tasks=4, input_size=(6,)).eval()
    with torch.no_grad():
        one, other = torch.randperm(512).chunk(2)
        head = butd.instruction_head[0].weight.abs_()
        head[other] = head[one]
        net[2].weight[other, 25:] = -net[2].weight[one, 25:]  # half of the units' counter neurons cancel out
    path = tmp_path / "model.onnx"
    with pytest.warns(UserWarning, match="magnifies rounding"):
        export(butd, path)
    assert path.exists()  # whether these units open in one and not in the other depends on the processor


def test_without_a_runtime_nothing_is_unchecked_silently(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"fxfeedback\[runtime\].*check=False"):
        export(tiny(), tmp_path / "model.onnx")
    export(tiny(), tmp_path / "model.onnx", check=False)


def test_a_file_that_cannot_be_run_here_is_written_only_unchecked(tmp_path):
    model = fxfeedback.add_feedback(network("convnet")[0], [("8", "4")], input_size=(2, 6, 6)).eval().double()
    with pytest.raises(ExportError, match=r"cannot be checked.*\.float\(\).*check=False"):
        export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    export(model, tmp_path / "model.onnx", check=False)


def test_a_dtype_that_onnx_has_no_convolution_of(tmp_path):
    model = fxfeedback.add_feedback(network("convnet")[0], [("8", "4")], input_size=(2, 6, 6)).eval().bfloat16()
    with pytest.raises(ExportError, match="bfloat16"):
        export(model, tmp_path / "model.onnx")


def test_sizes_that_cannot_be_free_are_errors(tmp_path):
    path = tmp_path / "any.onnx"
    with pytest.raises(OptionError, match="gates have a size"):
        export(instructed("convnet")[0], path, dynamic_size=True)
    maps, size = network("convnet")
    maps = fxfeedback.add_feedback(maps, [("5", "1")], input_size=size)
    with pytest.raises(OptionError, match="'5' would be given as a map of the example's size"):
        export(maps, path, steerable=True, dynamic_size=True)
    assert not path.exists()


def test_a_model_in_training_is_exported_in_eval_mode_and_left_as_it_was(tmp_path):
    model, _ = build("convnet", train=True)
    model[5].eval()
    butd = fxfeedback.to_butd(model.float(), n_tasks=2, input_size=(2, 6, 6))
    state = {name: tensor.clone() for name, tensor in butd.state_dict().items()}
    modes = [module.training for module in (*butd.modules(), *model.modules())]
    attributes = [set(vars(module)) for module in model.modules()]
    export(butd, tmp_path / "model.onnx")
    assert modes == [module.training for module in (*butd.modules(), *model.modules())]
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert all(torch.equal(state[name], tensor) for name, tensor in butd.state_dict().items())
    assert all(parameter.grad is None for parameter in butd.parameters())
    x = torch.randn(3, 2, 6, 6)
    assert_close([Session(tmp_path / "model.onnx", "cpu")(x, task=1)], [butd.eval()(x, 1)])


def test_a_float64_model_is_exported_as_it_is(tmp_path):
    model = tiny().double()
    export(model, tmp_path / "model.onnx")
    made = onnx.load(tmp_path / "model.onnx")
    x = torch.randn(2, 8, dtype=torch.double)
    reference = onnx.reference.ReferenceEvaluator(made).run(None, {made.graph.input[0].name: x.numpy()})
    for ours, theirs in zip(reference, model(x), strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-9, atol=1e-12)


def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    model, path, x = tiny(), tmp_path / "model.onnx", torch.randn(2, 8)
    monkeypatch.setattr(writing, "LARGEST", 1000)
    for _ in range(2):  # the second replaces the first, and its weights
        export(model, path, check=False)
        assert_close(Session(path, "cpu")(x), model(x))
    files = sorted(file.name for file in tmp_path.iterdir())
    assert len(files) == 2 and re.fullmatch(r"model\.onnx\..*\.data", files[1])
    monkeypatch.undo()
    export(model, path, check=False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("largest", [long(1000), 2**30])
def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch, largest):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "LARGEST", largest)
    monkeypatch.setattr(writing, "sync", full)
    with pytest.raises(OSError, match="No space"):
        export(tiny(), path)
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@one_in(2)
@pytest.mark.parametrize("kind", ["lrm", long("instructed"), "task"])
def test_an_input_without_a_batch(kind, tmp_path):
    example = torch.randn(1, 4), torch.tensor(2.0)
    x, scale, path = torch.randn(3, 4), torch.tensor(0.5), tmp_path / "model.onnx"
    if kind == "lrm":
        model = fxfeedback.add_feedback(Scaled().eval(), [("second", "first")], example_inputs=example)
        export(model, path, steerable=True)
        assert_close(Session(path, "cpu")(x, scale), model(x, scale))
    else:
        butd = fxfeedback.to_butd(Scaled().eval(), 2, example_inputs=example)
        export(butd, path, task=1 if kind == "task" else None)
        ours = Session(path, "cpu")(x, scale, **{} if kind == "task" else {"task": 1})
        assert_close([ours], [butd(x, scale, task=1)])


# -- errors -----------------------------------------------------------------------------------------------------------


def test_options_that_do_not_belong_to_the_model(convnet_lrm, convnet_butd, tmp_path):
    butd, path = convnet_butd[0], tmp_path / "model.onnx"
    for model, options, message in [
        (convnet_lrm, {"task": 1}, "no tasks"),
        (convnet_lrm, {"passes": 0}, "passes=0"),
        (butd, {"steerable": True}, "steerable="),
        (butd, {"passes": 2}, "passes="),
        (butd, {"task": 3}, "between 0 and 2"),
        (butd, {"task": torch.ones(1, 5)}, r"\(1, 3\)"),
        (convnet(), {}, "not made by add_feedback"),
        (nn.Sequential(convnet_lrm), {}, "its part '0'"),
        (None, {}, "NoneType"),
    ]:
        with pytest.raises(OptionError, match=message):
            export(model, path, **options)
    with pytest.raises(OptionError, match="in a directory that exists"):
        export(convnet_lrm, tmp_path / "nowhere" / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_network_that_takes_no_instruction(tmp_path):
    butd = fxfeedback.to_butd(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).eval(), input_size=(8,))
    with pytest.raises(Error, match="no gating site"):
        export(butd, tmp_path / "model.onnx")


def test_an_op_without_an_onnx_form_is_named_with_its_node(tmp_path):
    class Inverse(nn.Sequential):
        def forward(self, x):
            return self[1](torch.linalg.inv(self[0](x)))

    net = Inverse(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1)).eval()
    model = fxfeedback.add_feedback(net, [("1", "0")], input_size=(2, 6, 6))
    with pytest.raises(ExportError, match=r"at node 'pass1/linalg_inv': .*aten.linalg_inv"):
        export(model, tmp_path / "model.onnx")


NO_STEERING = [
    ({"strength": None}, "'8': strength"),
    ({"strength": "high"}, "'8': strength"),
    ({"strength": np.nan}, "'8': strength has values that are not finite"),
    ({"strength": (1.0, np.inf)}, "'8': strength has values that are not finite"),
    ({"alpha": None}, "'8': alpha"),
    ({"alpha": np.nan}, "'8': alpha has values that are not finite"),
    ({"alpha": (0.5, 0.5)}, "alpha is one"),
    ({"activation": None}, "'8': activation"),
    ({"activation": np.full((1, 7), np.nan, np.float32)}, "'8': activation has values that are not finite"),
]


@pytest.mark.parametrize("given, message", NO_STEERING)
def test_a_steering_that_is_no_number_is_the_same_error_in_torch(convnet_lrm, given, message):
    steering = {"source": "8", "activation": torch.zeros(1, 7)} | given
    with pytest.raises(InputError, match=message):
        convnet_lrm(torch.zeros(2, 2, 6, 6), steering=steering)


# -- sessions ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_clear_error_and_the_session_goes_on(convnet_lrm, steerable, convnet_butd):
    lrm_session, session = Session(steerable, "cpu"), Session(convnet_butd[1], "cpu")
    x = np.zeros((2, 2, 6, 6), np.float32)
    activation = np.zeros((1, 7), np.float32)
    for call, message in [
        (lambda: session(x), "takes an instruction"),
        (lambda: session(x, task=3), "between 0 and 2; got 3"),
        (lambda: session(x, task=[0]), r"\(2,\) integer ids"),
        (lambda: session(x, task=[[0.5, 1.0]]), r"\(2, 3\)"),
        (lambda: session(x, task="left"), "integer ids"),
        (lambda: session(x[:, :1], task=0), r"\(2, 2, 6, 6\), not \(2, 1, 6, 6\)"),
        (lambda: session(x[0], task=0), "takes a shape"),
        (lambda: session(x[:0], task=0), "takes a shape"),
        (lambda: session(x.astype(np.float64), task=0), "takes float32, not float64"),
        (lambda: session(x, x, task=0), "takes 1 inputs"),
        (lambda: session(x, task=0, steering={"source": "5", "activation": activation}), "cannot be steered"),
        (lambda: lrm_session(x, task=0), "takes no instruction"),
        (lambda: lrm_session(x, steering={"source": "6", "activation": activation}), "sources: 8, 5, 3"),
        (lambda: lrm_session(x, steering={"source": "8", "activation": activation[:, :5]}), "8.activation"),
        (lambda: lrm_session(x, steering={"source": "8", "activation": np.zeros((3, 7))}), "batch 1 or 2"),
        (lambda: lrm_session(x, steering={"source": "8"}), "has source, activation"),
        (lambda: lrm_session(x, steering={"source": "8", "activation": activation, "strength": [1, 2, 3]}), "strength"),
        (lambda: lrm_session(x, steering=[{"source": "8", "activation": activation}] * 2), "twice"),
        (lambda: session([["a"]], task=0), "not a number"),
        (lambda: session(None, task=0), "not a number"),
        (lambda: session(torch.zeros(2, 2, 6, 6, dtype=torch.bfloat16), task=0), "takes float32, not bfloat16"),
        (lambda: session(x, task=[[0.0, np.nan, 1.0]]), "instruction has values that are not finite"),
        (lambda: session(x, task=[[0.0, 1e300, 1.0]]), "instruction has values that are not finite"),
        *(
            (lambda given=given: lrm_session(x, steering={"source": "8", "activation": activation} | given), message)
            for given, message in NO_STEERING
        ),
    ]:
        with pytest.raises(Error, match=message):
            call()
    assert_close(lrm_session(x), convnet_lrm(torch.from_numpy(x)))


def test_a_damaged_or_foreign_file(steerable, tmp_path):
    path = tmp_path / "model.onnx"
    for content in (steerable.read_bytes()[:-1000], b"no model", b""):
        path.write_bytes(content)
        with pytest.raises(fxfeedback.errors.CheckpointError, match=r"cannot be loaded|not written by"):
            Session(path, "cpu")
    foreign = onnx.load(steerable)
    del foreign.metadata_props[:]
    onnx.save(foreign, path)
    with pytest.raises(fxfeedback.errors.CheckpointError, match="not written by fxfeedback"):
        Session(path)
    with pytest.raises(fxfeedback.errors.CheckpointError, match="there is no file"):
        Session(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("again", [lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy])
def test_a_session_is_pickled_and_copied_as_its_file(again, convnet_lrm, steerable):
    session, x = again(Session(steerable, "cpu")), torch.randn(2, 2, 6, 6)
    assert_close(session(x), convnet_lrm(x))
    assert session.providers == ["CPUExecutionProvider"]


def test_a_pickle_whose_file_is_another_now_is_an_error(steerable, tmp_path):
    import onnxruntime

    path = tmp_path / "model.onnx"
    path.write_bytes(steerable.read_bytes())
    session = Session(path, "cpu")
    pickled = pickle.dumps(session)
    for model, message in ((tiny(), "not the file any more"), (None, "there is no file")):
        path.unlink() if model is None else export(model, path)
        with pytest.raises(CheckpointError, match=message):
            pickle.loads(pickled)
        with pytest.raises(CheckpointError, match="is gone or has changed"):
            pickle.dumps(session)
    with pytest.raises(OptionError, match="options="):
        copy.deepcopy(Session(steerable, "cpu", onnxruntime.SessionOptions()))


def test_providers(steerable):
    assert Session(steerable, ["CPUExecutionProvider"]).providers == ["CPUExecutionProvider"]
    session = Session(steerable)
    assert session.providers[-1] == "CPUExecutionProvider"
    assert ("CUDAExecutionProvider" in session.providers) == (not session.note)
    with pytest.raises(OptionError, match="NoSuchProvider cannot be used: this onnxruntime has"):
        Session(steerable, "NoSuchProvider")
    if session.note:
        with pytest.raises(OptionError, match="CUDAExecutionProvider cannot be used: "):
            Session(steerable, "cuda")


def test_the_runtime_itself_needs_no_torch():
    import fxfeedback.runtime

    source = Path(fxfeedback.runtime.__file__).read_text()
    assert not re.search(r"^\s*(import|from) torch", source, re.MULTILINE)
