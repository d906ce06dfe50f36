"""The learner in ONNX Runtime takes torch's steps, keeps its state whole, and says what is wrong with a call."""

import copy
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback
import train_multi_mnist
from fxfeedback.deploy import losses
from fxfeedback.errors import CheckpointError, ExportError, InputError, OptionError
from fxfeedback.graph.bottom_up import BottomUp
from marks import long, sweep
from networks import SMALL, Scaled, build

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from fxfeedback.runtime import Learner, Session, checksum  # noqa: E402

TOLERANCE = 1e-4
"""Of the step's size, in float32."""
CANCELLED = 1e-5
"""A gradient smaller than this part of the largest is rounding: that of a bias before a batch norm is nothing."""
TINY = 1e-4
"""The share of weights that may lie farther off: Adam divides the smallest gradients, which are rounding, by their
own size."""
AT_A_GATE = 0.2
"""The share of states in which a unit may lie so near its gate that rounding opens it in only one of the two."""


OTHERS = {"two_passes": lambda: fxfeedback.add_feedback(SMALL["mlp"](), [("4", "2")], input_size=(2, 6, 6))}


def network(name, size=None, **options):
    """A BU-TD network in float32, batch norms in training mode and the rest not; and the size of its input."""
    torch.manual_seed(0)
    if name == "multi_mnist":
        model, size = train_multi_mnist.build_model("convnet")
    else:
        model, x = build(name, train=False, others=OTHERS)
        size = size or tuple(x.shape[1:])
    butd = fxfeedback.to_butd(model.float(), input_size=size, **options).eval()
    for module in butd.modules():
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return butd, size


def a_batch(butd, size, loss="cross_entropy", number=6):
    """Inputs, targets and, if the network has tasks, instructions."""
    shape = BottomUp(butd.bu.graph).main_output().meta["spec"].shape[1:]
    targets = {
        "cross_entropy": lambda: torch.randint(shape[0], (number, *shape[1:])),
        "mse": lambda: torch.randn(number, *shape),
        "bce_with_logits": lambda: torch.rand(number, *shape),
    }
    task = torch.randint(butd.options.n_tasks, (number,)) if butd.options.n_tasks else None
    target = targets[loss]() if loss in targets else torch.randn(number, *shape)
    return torch.randn(number, *size), target, task


LOSSES = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


def distilling(logits, target):
    """A loss of the user's own: a teacher's logits are the target."""
    return F.kl_div((logits / 2).log_softmax(1), (target / 2).softmax(1), reduction="batchmean") * 4


class Torch:
    """The same learning in torch."""

    def __init__(self, butd, lr, loss="cross_entropy", optimizer="sgd", momentum=0.0, weight_decay=0.0):
        self.butd, self.lr, self.loss = butd, lr, LOSSES.get(loss, loss)
        self.names = {parameter: name for name, parameter in butd.named_parameters()}
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(butd.parameters(), lr, momentum, weight_decay=weight_decay)
        else:
            self.optimizer = torch.optim.Adam(butd.parameters(), lr, weight_decay=weight_decay)

    def step(self, x, target, task):
        outputs = self.butd(x, task)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        loss = sum(self.loss(output, target) for output in outputs) / len(outputs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def state(self):
        return {name: value.numpy().copy() for name, value in self.butd.state_dict().items()}

    def optimizer_state(self):
        """Under the learner's names."""
        kept = {}
        for parameter, state in self.optimizer.state.items():
            for kind, value in state.items():
                name = "optimizer.step" if kind == "step" else f"{self.names[parameter]}.{kind}"
                if value is not None:
                    kept[name] = value.numpy().copy()
        return kept

    def cancelled(self):
        """The parameters whose gradients are rounding."""
        sizes = {name: p.grad.abs().max().item() for p, name in self.names.items() if p.grad is not None}
        return tuple(name for name, size in sizes.items() if size < CANCELLED * max(sizes.values()))


MOMENTUM = {"momentum": 0.9, "weight_decay": 1e-2}
TASKS = {"n_tasks": 2, "embedding": 50}
SEPARATE = {"n_tasks": 2, "weights": "separate", "td_bias": True, "norm": "separate"}
CASES = {
    "multi_mnist-adam": (20, 1e-3, "multi_mnist", TASKS, {"optimizer": "adam"}),
    "resnet18-frozen_norms-adam": (5, 1e-4, "resnet18", {"size": (3, 32, 32)}, {"optimizer": "adam"}),
    "vit-adam": (20, 1e-3, "vit", {}, {"optimizer": "adam", "weight_decay": 1e-2}),
    "residual-mse": (5, 0.01, "residual", {"n_tasks": 3, "gating": "channel"}, {"loss": "mse"}),
    "mlp-bce": (5, 0.05, "mlp", {}, {"loss": "bce_with_logits"}),
    "two_passes-distilling": (5, 0.05, "two_passes", {"n_tasks": 2}, {"loss": distilling}),
    "residual-smooth": (5, 0.05, "residual", {}, {"loss": F.smooth_l1_loss}),
    "recurrent": (5, 0.05, "recurrent", {"n_tasks": 2}, MOMENTUM),
    "two_passes": (5, 0.01, "two_passes", {"n_tasks": 2}, MOMENTUM),
    "separate_weights": (5, 0.05, "convnet", SEPARATE, MOMENTUM),
    "heads_per_task": (5, 0.05, "convnet", {"n_tasks": 3, "heads": "per_task", "lateral": "multiply"}, MOMENTUM),
}
QUICK = ["mlp-bce"]


@pytest.mark.parametrize(
    "case", [case if case in QUICK else (sweep if "resnet18" in case else long)(case) for case in CASES]
)
def test_a_step_is_torchs(case, tmp_path):
    """From every state on torch's path: the same loss, and the same weights, statistics and optimizer state."""
    states, lr, name, options, how = CASES[case]
    butd, size = network(name, **options)
    if "frozen_norms" in case:
        butd.eval()
    modes = [module.training for module in butd.modules()]
    fxfeedback.export_learner(butd, tmp_path / "learner.onnx", **how)
    assert [module.training for module in butd.modules()] == modes
    learner, reference = Learner(tmp_path / "learner.onnx"), Torch(butd, lr, **how)
    torch.manual_seed(1)
    shares = []
    for _ in range(states):
        before, kept = reference.state(), reference.optimizer_state()
        learner.load_state_dict(before, kept or None)
        x, target, task = a_batch(butd, size, how.get("loss", "cross_entropy"))
        loss = reference.step(x, target, task)
        assert learner.step(x, target, task=task, lr=lr) == pytest.approx(loss, rel=TOLERANCE)
        ours = learner.state_dict() | learner.optimizer_state()
        far, elements = 0, 0
        for key, value in (reference.state() | reference.optimizer_state()).items():
            step = np.abs(value - (before | kept).get(key, 0)).max()
            if not key.startswith(reference.cancelled()) and step:
                rounding = 2 * np.finfo(np.float32).eps * np.abs(value).max()  # of the weight itself
                far += (np.abs(ours[key] - value) > TOLERANCE * step + rounding).sum()
                elements += value.size
        shares.append(far / elements)
    assert np.mean([share > TINY for share in shares]) <= AT_A_GATE


@pytest.mark.long
def test_both_learn_along_the_same_curve(tmp_path):
    butd, size = network("multi_mnist", **TASKS)
    fxfeedback.export_learner(butd, tmp_path / "learner.onnx", momentum=0.9)
    learner, reference = Learner(tmp_path / "learner.onnx"), Torch(butd, 0.02, momentum=0.9)
    batches = [a_batch(butd, size) for _ in range(5)] * 8
    theirs = [reference.step(*batch) for batch in batches]
    ours = [learner.step(x, target, task=task, lr=0.02) for x, target, task in batches]
    assert np.allclose(ours, theirs, rtol=1e-2)
    assert np.mean(ours[-5:]) < 0.8 * np.mean(ours[:5])
    back, _ = network("multi_mnist", **TASKS)
    back.load_state_dict(learner.state_dict())
    x, _, task = a_batch(butd, size, number=3)
    with torch.no_grad():
        logits = back.eval()(x, task).numpy()
    assert np.abs(learner.predict(x.numpy(), task=task) - logits).max() <= TOLERANCE * np.abs(logits).max()


@pytest.mark.long
def test_a_small_learner_learns_along_the_same_curve(small):
    butd, size, path = small
    butd = copy.deepcopy(butd)
    learner, reference = Learner(path, "cpu"), Torch(butd, 0.02, momentum=0.9)
    batches = [a_batch(butd, size) for _ in range(3)] * 4
    theirs = [reference.step(*batch) for batch in batches]
    ours = [learner.step(x, target, task=task, lr=0.02) for x, target, task in batches]
    assert np.allclose(ours, theirs, rtol=1e-2) and np.mean(ours[-3:]) < np.mean(ours[:3])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An instructed network with batch norms in training mode, some of its parameters frozen, and its learner."""
    butd, size = network("convnet", n_tasks=2)
    butd.get_parameter("0.weight").requires_grad_(False)
    path = tmp_path_factory.mktemp("learner") / "small.onnx"
    fxfeedback.export_learner(butd, path, momentum=0.9)
    return butd, size, path


@pytest.mark.parametrize("largest", [2**30, 0])
def test_frozen_parameters_stay_and_can_be_exchanged(small, monkeypatch, largest):
    """Also where a graph cannot hold them."""
    monkeypatch.setattr("fxfeedback.runtime.learner_sessions.LARGEST", largest)
    butd, size, path = small
    learner = Learner(path)
    x, target, task = a_batch(butd, size)
    learner.step(x, target, task=task, lr=0.1)
    before, after = butd.state_dict(), learner.state_dict()
    assert learner.metadata["weights_sha256"] == checksum(before) == checksum(Learner(path).state_dict())
    assert set(after) == set(before)
    changed = {name for name in after if not np.array_equal(after[name], before[name].numpy())}
    learning = {name for name, parameter in butd.named_parameters() if parameter.requires_grad}
    assert changed | {"0.bias"} == learning | {name for name, _ in butd.named_buffers()}  # a bias before a norm
    other, _ = network("convnet", n_tasks=2)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.2)
    learner.load_state_dict(other.state_dict())
    with torch.no_grad():
        expected = other.eval()(x, task).numpy()
    assert np.abs(learner.predict(x.numpy(), task=task) - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_weights_are_inputs_of_a_plain_graph(small):
    """Any ONNX Runtime can run the file: what is left out has its value in the file."""
    butd, _, path = small
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    initial = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert {given.name for given in model.graph.input} >= set(butd.state_dict())
    for name, value in butd.state_dict().items():
        assert np.array_equal(initial[name], value.numpy())
    names = [node.name for node in model.graph.node]
    assert {"bu/0", "td/8", "error/8", "update/8.weight", "optimizer/8.weight", "predict/8"} <= set(names)


def test_targets_of_minus_100_are_left_out(small):
    butd, size, path = small
    x, target, task = a_batch(butd, size, number=4)
    target[2:] = -100
    with torch.no_grad():
        expected = F.cross_entropy(butd(x, task), target).item()  # statistics of the whole batch
    assert Learner(path).step(x, target, task=task, lr=0.1) == pytest.approx(expected, rel=TOLERANCE)


SGD, ADAM = {"momentum": 0.9, "weight_decay": 0.1}, {"optimizer": "adam"}


def small_mlp(folder, **how):
    """A network without batch norms or tasks, and its learner's file."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    butd = fxfeedback.to_butd(net, input_size=(4,))
    fxfeedback.export_learner(butd, folder / "mlp.onnx", **how)
    return butd, folder / "mlp.onnx"


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return small_mlp(tmp_path_factory.mktemp("mlp"), **SGD)


def same_state(learner, before):
    return all(np.array_equal(value, before[name]) for name, value in learner.state_dict().items())


@pytest.mark.parametrize("how", [long(SGD), ADAM], ids=["sgd", "adam"])
def test_labels_that_are_left_out_are_as_in_torch(how, tmp_path):
    """None, some or all of a batch, in turns: what the optimizer keeps goes on moving the weights."""
    butd, path = small_mlp(tmp_path, **how)
    learner, reference = Learner(path, "cpu"), Torch(butd, 0.1, **how)
    for left_out in ([], [0, 3], [0, 1, 2, 3], [1]):
        x, target = torch.randn(4, 4), torch.randint(3, (4,))
        target[left_out] = -100
        loss = reference.step(x, target, None)
        assert learner.step(x, target, lr=0.1) == pytest.approx(loss, rel=TOLERANCE, nan_ok=True)
        assert np.isnan(loss) == (len(left_out) == 4)
        for name, value in reference.state().items():
            np.testing.assert_allclose(learner.state_dict()[name], value, rtol=1e-5, atol=1e-5)


NOT_FINITE = {
    "no rate": ({"lr": None}, "lr"),
    "NaN as the rate": ({"lr": np.nan}, "lr=nan"),
    "an infinite rate": ({"lr": np.inf}, "finite"),
    "a rate too large for float32": ({"lr": 1e300}, "finite"),
    "a negative rate": ({"lr": -0.1}, "not negative"),
    "a rate for each sample": ({"lr": np.ones(2)}, "one number"),
    "text as the rate": ({"lr": "0.1"}, "not a number"),
    "NaN in one input": ({"x": np.array([[1, 2, 3, np.nan], [1, 2, 3, 4]])}, "'input' has values that are not finite"),
    "an infinite input": ({"x": np.array([[1, 2, 3, -np.inf], [1, 2, 3, 4]])}, "'input' has values"),
    "weights that overflow": ({"x": np.full((2, 4), 1e30), "lr": 1e30}, "make new weights NaN or infinite"),
    "no target": ({"target": None}, "not a number"),
    "text as a target": ({"target": ["a", "b"]}, "not a number"),
}


@pytest.mark.parametrize("call", NOT_FINITE)
def test_what_is_not_finite_never_gets_into_the_weights(call, mlp):
    given, message = NOT_FINITE[call]
    learner = Learner(mlp[1], "cpu")
    good = {"x": np.ones((2, 4)), "target": [0, 1], "lr": 0.1}
    learner.step(np.ones((2, 4), np.float32), [0, 1], lr=0.1)
    before, kept, logits = learner.state_dict(), learner.optimizer_state(), learner.logits
    with pytest.raises(InputError, match=message):
        bad = good | given
        learner.step(bad["x"].astype(np.float32), bad["target"], lr=bad["lr"])
    assert same_state(learner, before) and learner.logits is logits
    assert all(np.array_equal(value, kept[name]) for name, value in learner.optimizer_state().items())
    assert np.isfinite(learner.step(np.ones((2, 4), np.float32), [0, 1], lr=0.1))


def test_who_wants_it_lets_the_weights_overflow(mlp):
    learner, x = Learner(mlp[1], "cpu", finite=False), np.ones((2, 4), np.float32)
    learner.step(x * np.nan, [0, 1], lr=0.1)
    assert np.isnan(learner.state_dict()["0.weight"]).any()


def test_weights_that_are_not_finite_are_not_taken_over(mlp):
    learner = Learner(mlp[1], "cpu")
    before = learner.state_dict()
    for bad in (np.full(3, np.nan, np.float32), np.full(3, 1e300), ["a"] * 3):
        with pytest.raises(CheckpointError, match=r"'2\.bias'"):
            learner.load_state_dict({**before, "2.bias": bad})
    with pytest.raises(CheckpointError, match="not a NoneType"):
        learner.load_state_dict(None)
    assert same_state(learner, before)


def test_threads_may_share_a_learner(mlp):
    """No step is lost, and every state is that between two steps: here each step moves all biases by one."""
    path = mlp[1]
    learner = Learner(path, "cpu")
    start = {name: np.zeros_like(value) for name, value in learner.state_dict().items()}
    learner.load_state_dict(start)
    torn, failed = [], []

    def step():
        for _ in range(50):
            learner.step(np.zeros((1, 4), np.float32), [0], lr=0.1)

    def look():
        for _ in range(100):
            state = learner.state_dict()
            logits = learner.predict(np.ones((1, 4), np.float32))
            torn.append(abs(state["2.bias"].sum()) > 1e-5 or abs(logits.sum()) > 1e-5)  # the error sums up to nothing

    def watched(work):
        try:
            work()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=watched, args=(work,)) for work in (step, look, step, look, step)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = Learner(path, "cpu")
    alone.load_state_dict(start)
    for _ in range(150):
        alone.step(np.zeros((1, 4), np.float32), [0], lr=0.1)
    assert not failed and not any(torn) and same_state(learner, alone.state_dict())


@pytest.mark.parametrize("again", [lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy, copy.copy])
def test_a_copy_or_pickle_brings_its_state_and_goes_its_own_way(small, again):
    butd, size, path = small
    learner = Learner(path, "cpu")
    (x, target, task), *_ = batches = [a_batch(butd, size) for _ in range(2)]
    learner.step(x, target, task=task, lr=0.1)
    other = again(learner)
    assert np.array_equal(other.logits, learner.logits)
    for x, target, task in batches:  # the same weights, momentum and statistics
        assert other.step(x, target, task=task, lr=0.1) == learner.step(x, target, task=task, lr=0.1)
    before = learner.state_dict()
    other.step(x, target, task=task, lr=0.1)
    assert same_state(learner, before) and not same_state(other, before)


def test_a_worker_process_gets_a_learner(mlp, monkeypatch):
    """In another directory, too."""
    monkeypatch.chdir(mlp[1].parent)
    learner = Learner(mlp[1].name, "cpu")
    learner.step(np.ones((2, 4), np.float32), [0, 1], lr=0.1)
    code = """
import pickle, sys, numpy as np
learner = pickle.load(sys.stdin.buffer)
sys.stdout.write(repr(learner.step(np.ones((2, 4), np.float32), [0, 1], lr=0.1)))
"""
    run = [sys.executable, "-c", code]
    given = subprocess.run(run, input=pickle.dumps(learner), capture_output=True, check=True, cwd="/")
    assert float(given.stdout) == learner.step(np.ones((2, 4), np.float32), [0, 1], lr=0.1)


def test_saved_state_goes_on_where_it_was(small, tmp_path):
    butd, size, path = small
    one, other = Learner(path), Learner(path)
    batches = [a_batch(butd, size) for _ in range(4)]
    for x, target, task in batches[:2]:
        one.step(x, target, task=task, lr=0.1)
    one.save(tmp_path / "state.safetensors")
    other.load(tmp_path / "state.safetensors")
    for x, target, task in batches[2:]:
        assert one.step(x, target, task=task, lr=0.1) == other.step(x, target, task=task, lr=0.1)
    for name, value in one.state_dict().items():
        assert np.array_equal(value, other.state_dict()[name])


def test_a_full_disk_leaves_the_old_file(small, tmp_path, monkeypatch):
    butd, size, path = small
    learner = Learner(path)
    file = tmp_path / "state.safetensors"
    learner.save(file)
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        learner.save(file)
    assert file.read_bytes() == before
    assert [left.name for left in tmp_path.iterdir()] == ["state.safetensors"]
    x, target, task = a_batch(butd, size)
    assert np.isfinite(learner.step(x, target, task=task, lr=0.1))


def bad_calls(x, target, task):
    """name -> (call, part of its message)"""
    return {
        "another size": (lambda s: s(x[:, :, 1:], target, task=task, lr=0.1), r"takes a shape of \(6, 2, 6, 6\)"),
        "float64": (lambda s: s(x.double(), target, task=task, lr=0.1), "takes float32, not float64"),
        "no target": (lambda s: s(x, task=task, lr=0.1), "takes 1 inputs"),
        "float targets": (lambda s: s(x, target.float(), task=task, lr=0.1), "of int64, not float32"),
        "a class too many": (lambda s: s(x, target + 5, task=task, lr=0.1), "between 0 and 4"),
        "other batches": (lambda s: s(x, target[1:], task=task, lr=0.1), r"'target' takes a shape of \(6\)"),
        "no instruction": (lambda s: s(x, target, lr=0.1), "takes an instruction"),
        "task out of range": (lambda s: s(x, target, task=task + 2, lr=0.1), "between 0 and 1"),
    }


@pytest.mark.parametrize("call", bad_calls(*3 * [torch.zeros(1)]))
def test_a_wrong_call_is_an_error_and_nothing_is_learned(call, small):
    butd, size, path = small
    batch = a_batch(butd, size)
    learner = Learner(path)
    before = learner.state_dict()
    wrong, message = bad_calls(*batch)[call]
    with pytest.raises(InputError, match=message):
        wrong(learner.step)
    for name, value in learner.state_dict().items():
        assert np.array_equal(value, before[name])
    assert np.isfinite(learner.step(*batch[:2], task=batch[2], lr=0.1))


def test_wrong_files_are_errors(small, tmp_path):
    butd, _, path = small
    learner = Learner(path)
    before = learner.state_dict()
    with pytest.raises(CheckpointError, match="there is no file"):
        Learner(tmp_path / "nothing.onnx")
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        Learner(tmp_path / "cut.onnx")
    fxfeedback.export(butd, tmp_path / "network.onnx")
    with pytest.raises(CheckpointError, match=r"not written by fxfeedback\.export_learner"):
        Learner(tmp_path / "network.onnx")
    with pytest.raises(CheckpointError, match=r"open it with fxfeedback\.runtime\.Learner"):
        Session(path)
    with pytest.raises(CheckpointError, match=r"'0\.weight' is missing"):
        learner.load_state_dict({})
    with pytest.raises(CheckpointError, match="has shape"):
        learner.load_state_dict({**before, "0.bias": np.zeros(3, np.float32)})
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    with pytest.raises(CheckpointError, match="cannot be read"):
        learner.load(tmp_path / "cut.safetensors")
    for name, value in learner.state_dict().items():
        assert np.array_equal(value, before[name])


def test_wrong_options_are_errors(tmp_path):
    butd, _ = network("mlp")
    path = tmp_path / "learner.onnx"
    with pytest.raises(OptionError, match="has a learner"):
        fxfeedback.export_learner(nn.Linear(2, 2), path)
    for options, message in [
        ({"loss": "hinge"}, "choose one of 'cross_entropy'"),
        ({"optimizer": "lion"}, "choose one of 'sgd'"),
        ({"optimizer": "adam", "momentum": 0.9}, "belongs to sgd"),
        ({"loss": ["mse"]}, "choose one of 'cross_entropy'"),
        ({"loss": lambda logits, target: (logits - target).abs().mean(1)}, "has to return one number"),
        ({"loss": lambda logits, target: 1.0}, "has to return one number"),
        ({"momentum": "x"}, "momentum='x': give a number"),
        ({"momentum": True}, "momentum=True: give a number"),
        ({"weight_decay": None}, "weight_decay=None: give a number"),
        ({"weight_decay": -0.1}, "finite and not negative"),
        ({"optimizer": "adam", "eps": float("nan")}, "eps=nan: give a number"),
        ({"optimizer": "adam", "betas": 0.9}, "betas=0.9: give two numbers"),
        ({"optimizer": "adam", "betas": (0.9, 1)}, "at least 0 and less than 1"),
    ]:
        with pytest.raises(OptionError, match=message):
            fxfeedback.export_learner(butd, path, **options)
    noisy, _ = network("mlp", update_noise=0.1)
    with pytest.raises(OptionError, match="draws no noise"):
        fxfeedback.export_learner(noisy, path)
    nn.utils.parametrizations.weight_norm(butd.get_submodule("1"))
    with pytest.raises(OptionError, match="remove_parametrizations"):
        fxfeedback.export_learner(butd, path)
    assert not path.exists()


class Two(nn.Module):
    """Two outputs, neither of which is called the main one."""

    def __init__(self):
        super().__init__()
        self.body, self.one, self.other = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        h = torch.relu(self.body(x))
        return self.one(h), self.other(h)


def test_of_several_outputs_one_has_to_be_the_main_one(tmp_path):
    path = tmp_path / "learner.onnx"
    with pytest.raises(OptionError, match=r"several outputs, 'one', 'other'.*head="):
        fxfeedback.export_learner(fxfeedback.to_butd(Two(), input_size=(4,)), path)
    assert not path.exists()
    butd = fxfeedback.to_butd(Two(), 2, head="other", input_size=(4,))
    fxfeedback.export_learner(butd, path)
    x = torch.randn(3, 4)
    logits = Learner(path, "cpu").predict(x, task=1)
    np.testing.assert_allclose(logits, butd(x, 1)[1].detach(), rtol=1e-4, atol=1e-6)


def test_an_input_without_a_batch(tmp_path):
    torch.manual_seed(0)
    example, x, scale = (torch.randn(1, 4), torch.tensor(2.0)), torch.randn(3, 4), torch.tensor(0.5)
    butd = fxfeedback.to_butd(Scaled(), 2, example_inputs=example)
    fxfeedback.export_learner(butd, tmp_path / "learner.onnx")
    logits = Learner(tmp_path / "learner.onnx", "cpu").predict(x, scale, task=1)
    np.testing.assert_allclose(logits, butd(x, scale, task=1).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_learner_that_does_not_learn_as_torch_is_not_written(optimizer, tmp_path, monkeypatch):
    right = losses.LOSSES["cross_entropy"]

    def wrong(z, target):
        loss, error = right(z, target)
        return loss, error * (z.detach() > 0)

    monkeypatch.setitem(losses.LOSSES, "cross_entropy", wrong)
    with pytest.raises(ExportError, match=r"after a step of batch 3, '.*' is off by .*check=False"):
        small_mlp(tmp_path, optimizer=optimizer)
    assert not list(tmp_path.iterdir())
    small_mlp(tmp_path, optimizer=optimizer, check=False)


WRITES = """
torch.manual_seed(0)
butd = fxfeedback.to_butd(build("{}", train=False)[0].float(), n_tasks=2, input_size=(2, 6, 6))
fxfeedback.export_learner(butd, path, optimizer="adam", check=False)
"""


@pytest.mark.long
@pytest.mark.parametrize("network", ["convnet"])
def test_every_process_writes_the_same_file(network, tmp_path):
    """Whatever order Python's hashes give to sets of names: so that a file's checksum says what it is made of."""
    code, here, there = WRITES.format(network), tmp_path / "here", tmp_path / "there"
    folder = str(Path(__file__).parent)
    start = f"import sys; sys.path.insert(0, {folder!r})\nimport torch, fxfeedback\nfrom networks import build\n"
    start += f"path = {str(there)!r}\n"
    around = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    subprocess.run([sys.executable, "-c", start + code], check=True, env=around)
    exec(code, {"torch": torch, "fxfeedback": fxfeedback, "build": build, "path": here})
    assert here.read_bytes() == there.read_bytes()


def test_the_process_that_learns_needs_no_torch(small):
    _, size, path = small
    code = f"""
import sys, numpy as np
import fxfeedback
learner = fxfeedback.runtime.Learner({str(path)!r})
x, target = np.random.randn(4, *{size}).astype("f"), np.array([0, 1, 2, 3])
losses = [learner.step(x, target, task=[0, 1, 0, 1], lr=0.1) for _ in range(20)]
assert losses[-1] < losses[0] and learner.predict(x, task=1).shape == (4, 5)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
