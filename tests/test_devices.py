"""Tensors stay where they lie: what goes into a session or a learner is read there, and comes back as it went in."""

import copy
import functools
import pickle
import re
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import fxfeedback
from fxfeedback.errors import InputError, OptionError

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from fxfeedback.runtime import Learner, Session, arrays, devices, providers  # noqa: E402

if not hasattr(ort.OrtValue, "from_dlpack"):
    pytest.skip("this onnxruntime shares no memory by DLPack", allow_module_level=True)


def works(provider):
    """Whether tensors of torch can lie where ONNX Runtime runs."""
    return provider == "cpu" or (torch.cuda.is_available() and not providers.open_session(SMALL, None, None, "")[1])


class Two(nn.Module):
    """Two inputs of one size."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second, self.head = nn.Linear(6, 8), nn.ReLU(), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x, z):
        return self.head(self.act(self.first(x)) * self.second(z))


def small_graph():
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "small", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


SMALL = small_graph()


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if not works(request.param):
        pytest.skip("no CUDA here for both torch and ONNX Runtime: nothing was tried on it")
    return request.param


def on(device):
    """The provider; on CUDA with whole float32."""
    return [("CUDAExecutionProvider", {"use_tf32": "0"})] if device == "cuda" else device


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Passes that can be steered, an instructed network, and its learner."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    lrm = fxfeedback.add_feedback(net, [("3", "1")], input_size=(6,)).eval()
    butd = fxfeedback.to_butd(net, n_tasks=3, input_size=(6,)).eval()
    two = fxfeedback.to_butd(Two(), example_inputs=(torch.randn(2, 6), torch.randn(2, 6))).eval()
    fxfeedback.export(lrm, folder / "lrm.onnx", steerable=True, check=False)
    fxfeedback.export(butd, folder / "butd.onnx", check=False)
    fxfeedback.export(two, folder / "two.onnx", check=False)
    fxfeedback.export_learner(butd, folder / "learner.onnx", momentum=0.9, check=False)
    return folder


@pytest.fixture
def no_copies(monkeypatch):
    """Nothing may become an array of numpy, and ONNX Runtime is given no memory but that of tensors."""

    def refuse(value, what):
        raise AssertionError(f"{what} was copied")

    def stays(value, what, place=None):
        return kept(value, what, place) if place and arrays.lies(value) == place else refuse(value, what)

    kept = arrays.array
    for module in ("signature", "session", "step_inputs"):
        monkeypatch.setattr(f"fxfeedback.runtime.{module}.array", stays)
    monkeypatch.setattr("fxfeedback.runtime.devices.array", refuse)


class Seen:
    """Addresses that were bound as inputs."""

    def __init__(self, monkeypatch):
        self.inputs, bind = {}, ort.IOBinding.bind_ortvalue_input

        def watched(binding, name, value):
            self.inputs[name] = value.data_ptr()
            return bind(binding, name, value)

        monkeypatch.setattr(ort.IOBinding, "bind_ortvalue_input", watched)


def test_a_session_reads_tensors_where_they_lie(files, device, no_copies, monkeypatch):
    x, activation, seen = torch.randn(4, 6, device=device), torch.randn(1, 8, device=device), Seen(monkeypatch)
    steering = {"source": "3", "activation": activation, "strength": 2.0}
    session = Session(files / "lrm.onnx", on(device))
    monkeypatch.setattr("fxfeedback.runtime.session.array", arrays.array)  # numbers of a steering
    outputs = session(x, steering=steering)
    assert [(type(y), y.device) for y in outputs] == [(torch.Tensor, x.device)] * 2
    assert seen.inputs["input"] == x.data_ptr() and seen.inputs["3.activation"] == activation.data_ptr()
    monkeypatch.undo()
    theirs = Session(files / "lrm.onnx", "cpu")(x.cpu().numpy(), steering=steering)
    for ours, y in zip(outputs, theirs, strict=True):
        assert type(y) is np.ndarray and np.allclose(ours.cpu(), y, atol=1e-5)


def test_instruction_vectors_stay_and_ids_need_not(files, device, monkeypatch):
    x, seen, session = torch.randn(4, 6, device=device), Seen(monkeypatch), Session(files / "butd.onnx", on(device))
    ids = torch.arange(4, device=device) % 3
    vectors = torch.eye(3, device=device)[ids]
    by_vectors = session(x, task=vectors)
    assert seen.inputs["instruction"] == vectors.data_ptr()
    assert torch.equal(by_vectors, session(x, task=ids)) and by_vectors.device == x.device
    assert np.allclose(by_vectors.cpu(), session(x.cpu().numpy(), task=ids.tolist()), atol=1e-6)


def test_an_output_outlives_its_session(files, device):
    x, session = torch.randn(4, 6, device=device), Session(files / "lrm.onnx", on(device))
    first, second = session(x)
    kept = first.clone()
    session(torch.randn(4, 6, device=device))
    del session, second
    torch.randn(10_000, device=device)
    assert torch.equal(first, kept)


KINDS = {
    "tensor": lambda x: x,
    "parameter": lambda x: nn.Parameter(x),
    "with_gradient": lambda x: x.clone().requires_grad_() * 1,
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, x + 1], 2)[..., 0],
    "expanded": lambda x: x[:1].expand(4, 6),
    "negated_lazily": lambda x: torch._neg_view(-x),
    "of_inference": lambda x: torch.inference_mode()(x.clone)(),
    "of_a_subclass": lambda x: x.as_subclass(type("Own", (torch.Tensor,), {})),
}
"""Ways in which a tensor may lie in memory or carry more than numbers."""


@pytest.mark.parametrize("kind", KINDS)
def test_any_tensor_of_the_same_values_gives_the_same(files, device, kind, no_copies):
    torch.manual_seed(0)
    x, session = torch.randn(4, 6, device=device), Session(files / "lrm.onnx", on(device))
    given = KINDS[kind](x)
    outputs = session(given)
    assert all(isinstance(y, torch.Tensor) and not y.requires_grad for y in outputs)
    for ours, theirs in zip(outputs, session(given.detach().clone().contiguous()), strict=True):
        assert torch.equal(ours, theirs)


class Foreign:
    """A tensor of another library than torch: it speaks DLPack, and its library makes such tensors."""

    def __init__(self, tensor):
        self.tensor, self.dtype, self.shape = tensor, np.dtype("float32"), tuple(tensor.shape)
        self.ndim, self.device = tensor.ndim, "there"

    def __len__(self):
        return len(self.tensor)

    def __dlpack__(self, **how):
        return self.tensor.__dlpack__(**how)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class Namespaced(Foreign):
    """One by the standard of Python's arrays."""

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=lambda value: Foreign(torch.from_dlpack(value)))


@pytest.mark.parametrize("kind", [Foreign, Namespaced])
def test_other_libraries(files, device, kind, no_copies, monkeypatch):
    """By the module that defines the tensors' class, or by the namespace that the array standard asks for."""
    library = types.SimpleNamespace(from_dlpack=lambda value: Foreign(torch.from_dlpack(value)))
    monkeypatch.setitem(sys.modules, Foreign.__module__.partition(".")[0], library)
    x, session = torch.randn(4, 6, device=device), Session(files / "lrm.onnx", on(device))
    for ours, theirs in zip(session(kind(x)), session(x), strict=True):
        assert isinstance(ours, Foreign) and torch.equal(ours.tensor, theirs)


def test_a_library_without_a_way_back_gets_arrays(files, device):
    x, session = torch.randn(4, 6, device=device), Session(files / "lrm.onnx", on(device))
    for ours, theirs in zip(session(Foreign(x)), session(x), strict=True):
        assert type(ours) is np.ndarray and np.array_equal(ours, theirs.cpu())


def test_the_first_tensor_says_what_comes_back(files, device):
    x, z = np.ones((2, 6), np.float32), torch.ones(2, 6, device=device)
    session = Session(files / "two.onnx", on(device))
    for inputs, kind in (((x, x), np.ndarray), ((x, z), torch.Tensor), ((z, x), torch.Tensor), ((z, z), torch.Tensor)):
        assert type(session(*inputs, task=0)) is kind
        assert type(session(*inputs, task=torch.tensor(0))) is kind


def test_dtypes(tmp_path, device, monkeypatch):
    """ONNX Runtime takes no truth values by DLPack, and gives them away as bytes: they come back as truth values."""
    from onnx import TensorProto, helper, save

    types_ = {"f": TensorProto.FLOAT16, "b": TensorProto.BOOL, "i": TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(name, kind, ["batch"]) for name, kind in types_.items()]
    outputs = [helper.make_tensor_value_info(f"{name}_out", kind, ["batch"]) for name, kind in types_.items()]
    nodes = [helper.make_node(op, [a, a], [f"{a}_out"]) for a, op in zip("fbi", ("Add", "And", "Add"), strict=True)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    monkeypatch.setattr("fxfeedback.runtime.signature.read_metadata", lambda *of: {"product": "lrm"})
    save(model, tmp_path / "kinds.onnx")
    session = Session(tmp_path / "kinds.onnx", on(device))
    f, b, i = torch.rand(3).half(), torch.tensor([True, False, True]), torch.tensor([1, -2, 3])
    for made in (session(*(t.to(device) for t in (f, b, i))), session(f.numpy(), b.numpy(), i.numpy())):
        half, yes, whole = (torch.as_tensor(y).cpu() for y in made)
        assert torch.equal(half, f * 2) and torch.equal(yes, b) and torch.equal(whole, i * 2)
        assert (half.dtype, yes.dtype, whole.dtype) == (torch.float16, torch.bool, torch.int64)


ERRORS = {
    "float64": (lambda x: x.double(), "takes float32, not float64"),
    "float16": (lambda x: x.half(), "takes float32, not float16"),
    "bfloat16": (lambda x: x.bfloat16(), "takes float32, not bfloat16"),
    "int64": (lambda x: x.long(), "takes float32, not int64"),
    "bool": (lambda x: x > 0, "takes float32, not bool"),
    "complex": (lambda x: x + 1j, "takes float32, not complex64"),
    "nothing": (lambda x: x[:0], "takes a shape"),
    "one_dimension": (lambda x: x[0], "takes a shape"),
    "sparse": (lambda x: x.to_sparse(), "not an array of numbers"),
    "meta": (lambda x: x.to("meta"), "not an array of numbers"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_taken_is_one_error(files, device, case):
    change, message = ERRORS[case]
    session, learner = Session(files / "lrm.onnx", on(device)), Learner(files / "learner.onnx", on(device))
    x = change(torch.randn(4, 6, device=device))
    step = functools.partial(learner.step, x, [0] * 4, lr=1, task=0)
    for call in (functools.partial(session, x), functools.partial(learner.predict, x, task=0), step):
        with pytest.raises(InputError, match=message):
            call()


def test_a_tensor_that_lies_elsewhere_comes_back_there(files, device, monkeypatch):
    """Through the host; here a session stands for one on another device."""
    x, session = torch.randn(4, 6, device=device), Session(files / "lrm.onnx", "cpu")
    expected = session(x.cpu().numpy())
    monkeypatch.setattr(devices.Device, "place", (2, 7))
    session = Session(files / "lrm.onnx", "cpu")
    for ours, theirs in zip(session(x), expected, strict=True):
        assert ours.device == x.device and np.array_equal(ours.cpu(), theirs)


def test_without_dlpack_tensors_go_through_the_host(files, monkeypatch):
    x, session = torch.randn(4, 6), Session(files / "lrm.onnx", "cpu")
    expected = session(x)
    for name in ("from_dlpack", "__dlpack__", "__dlpack_device__"):
        monkeypatch.delattr(ort.OrtValue, name)
    for ours, theirs in zip(Session(files / "lrm.onnx", "cpu")(x), expected, strict=True):
        assert torch.equal(ours, theirs)


# -- learning ----------------------------------------------------------------------------------------------------------


def lessons(device, number=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        x, target = torch.randn(4, 6, generator=generator), torch.randint(5, (4,), generator=generator)
        yield x.to(device), target.to(device), torch.eye(3)[torch.randint(3, (4,), generator=generator)].to(device)


def test_a_learner_takes_the_same_steps_of_tensors_and_of_arrays(files, device, no_copies, monkeypatch):
    tensors, numpys = Learner(files / "learner.onnx", on(device)), Learner(files / "learner.onnx", on(device))
    seen = Seen(monkeypatch)
    monkeypatch.setattr("fxfeedback.runtime.step_inputs.array", wary(monkeypatch))
    losses, tolerance = [], 0 if device == "cpu" else 1e-5  # bit for bit; CUDA may add in another order
    for x, target, task in lessons(device):
        losses.append(tensors.step(x, target, task=task, lr=0.1))
        assert type(losses[-1]) is float
        assert [seen.inputs[name] for name in ("input", "target", "instruction")] == [
            given.data_ptr() for given in (x, target, task)
        ]
        assert isinstance(tensors.logits, torch.Tensor) and tensors.logits.device == x.device
        assert tensors.predict(x, task=task).device == x.device
    monkeypatch.undo()
    for loss, lesson in zip(losses, lessons("cpu"), strict=True):
        x, target, task = (given.numpy() for given in lesson)
        assert numpys.step(x, target, task=task, lr=0.1) == pytest.approx(loss, rel=tolerance, abs=0)
        assert type(numpys.logits) is type(numpys.predict(x, task=task)) is np.ndarray
    for name, value in tensors.state_dict().items():
        assert np.allclose(value, numpys.state_dict()[name], rtol=tolerance, atol=tolerance)
    assert np.allclose(tensors.logits.cpu(), numpys.logits, rtol=tolerance, atol=tolerance)


def wary(monkeypatch):
    """What makes arrays, for numbers only."""

    def number(value, what, place=None):
        assert what == "lr" or place, f"{what} was copied"
        return arrays.array(value, what, place)

    return number


def test_logits_are_fetched_when_they_are_read(files, monkeypatch):
    learner, fetched = Learner(files / "learner.onnx", "cpu"), []
    back = devices.Kind.back
    monkeypatch.setattr(devices.Kind, "back", lambda kind, value: fetched.append(kind) or back(kind, value))
    assert learner.logits is None
    for x, target, task in lessons("cpu"):
        learner.step(x.numpy(), target, task=task, lr=0.1)
    assert not fetched
    assert learner.logits is learner.logits and len(fetched) == 1


@pytest.mark.parametrize("again", [lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy])
def test_copies_have_the_logits_as_they_were(files, device, again):
    learner = Learner(files / "learner.onnx", on(device))
    for x, target, task in lessons(device, 1):
        learner.step(x, target, task=task, lr=0.1)
    assert torch.equal(again(learner).logits, learner.logits) and learner.logits.device == x.device


@pytest.mark.parametrize("of", [lambda x: x, lambda x: x.cpu().numpy()])
@pytest.mark.parametrize("what", ["input", "instruction", "target"])
def test_values_that_are_wrong_are_named_and_nothing_is_learned(files, device, of, what):
    learner = Learner(files / "learner.onnx", on(device))
    (x, target, task), (again, *_) = lessons(device, 2)
    learner.step(of(x), of(target), task=of(task), lr=0.1)
    before, logits = learner.state_dict(), learner.logits
    for wrong, number in ((torch.nan, -1), (torch.inf, 5), (-torch.inf, -101)):
        x, task, target = again.clone(), task.clone(), target.clone()
        {"input": x, "instruction": task, "target": target}[what].view(-1)[1] = number if what == "target" else wrong
        with pytest.raises(InputError, match="class ids" if what == "target" else f"{what}.* not finite"):
            learner.step(of(x), of(target), task=of(task), lr=0.1)
        x, task, target = again, torch.eye(3, device=device)[[0, 1, 2, 0]], torch.arange(4, device=device)
    assert learner.logits is logits
    for name, value in learner.state_dict().items():
        assert np.array_equal(value, before[name])


def test_targets_of_other_dtypes_are_cast(files, device):
    learner = Learner(files / "learner.onnx", on(device))
    start, losses = learner.state_dict(), set()
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.int16):
        learner.load_state_dict(start)
        ((x, target, task),) = lessons(device, 1)
        losses.add(learner.step(x, target.to(dtype), task=task.double(), lr=0.1))
    assert len(losses) == 1


# -- where a session runs ----------------------------------------------------------------------------------------------


def on_card(number):
    """A session of ONNX Runtime's, as far as its device is asked for."""
    options = {"CUDAExecutionProvider": {"device_id": str(number)}, "CPUExecutionProvider": {}}
    return types.SimpleNamespace(
        get_providers=lambda: list(options),
        get_provider_options=lambda: options,
        get_inputs=list,
        get_overridable_initializers=list,
    )


def test_a_learner_lies_where_its_session_runs(files, monkeypatch):
    """On the card of the provider's `device_id`."""
    made = []
    monkeypatch.setattr(
        ort.OrtValue, "ortvalue_from_numpy", lambda value, kind, number: made.append((kind, number)) or value
    )
    running = devices.Running(on_card(3), "a file")
    running.device.copies({"a": np.ones(2)})
    assert running.device == devices.Device("cuda", 3) and running.device.place == (2, 3) and made == [("cuda", 3)]
    learner = Learner(files / "learner.onnx", "cpu")
    assert set(made[1:]) == {("cpu", 0)} and len(made) > len(learner.metadata["learns"])


def test_outputs_are_bound_on_the_card_of_what_went_in():
    card, other = devices.Device("cuda", 3), devices.Device("cuda", 0)
    kind = devices.Kind(torch, (2, 3), torch.device("cuda", 3))
    assert kind.where(card) == card
    assert kind.where(other) == devices.NUMPY.where(card) == devices.Kind.of([torch.ones(2)]).where(card)
    assert kind.where(other) == devices.Device("cpu", 0)


def without(monkeypatch, missing, said=""):
    """A machine whose onnxruntime has CUDA, with all libraries but those in `missing`."""

    class Library:
        def __init__(self, name):
            if name in missing:
                raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print(said), raising=False)
    monkeypatch.setattr(providers.ctypes, "CDLL", Library)


CUBLAS = "Failed to load libcublas.so.13: libcublas.so.13: cannot open shared object file\nPlease follow ..."
CUDNN = "Failed to load libcudnn.so.9: libcudnn.so.9: cannot open shared object file"
MISSING = {
    "cudnn": (["libcudnn.so.9"], "", "libcudnn.so.9"),
    "cudnn, as an onnxruntime before 1.31 says": (["libcudnn.so.9"], CUDNN, "libcudnn.so.9"),
    "cublas": ([], CUBLAS, "libcublas.so.13"),
    "both": (["libcudnn.so.9"], CUBLAS, "libcublas.so.13.*libcudnn.so.9"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_missing_library_is_told_when_a_file_is_opened(files, monkeypatch, case):
    missing, said, told = MISSING[case]
    monkeypatch.setattr(sys, "platform", "linux")
    without(monkeypatch, missing, said)
    message = rf"{told}[^;]*pip install 'onnxruntime-gpu\[cuda,cudnn\]'"
    for kind, name in ((Session, "lrm.onnx"), (Learner, "learner.onnx")):
        with pytest.raises(OptionError, match=rf"CUDAExecutionProvider cannot be used: {message}"):
            kind(files / name, [("CUDAExecutionProvider", {"device_id": 1})])
        opened = kind(files / name)
        assert opened.providers == ["CPUExecutionProvider"]
        assert re.match(message, opened.note) and opened.note.count("cannot open") == 1 + (case == "both")
