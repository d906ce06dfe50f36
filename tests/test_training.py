"""The training room: what is random follows from numbers, a run goes on exactly, and nothing that was saved is lost."""

import argparse
import copy
import csv
import functools
import io
import json
import operator
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import multi_mnist
import studies
import train_celeba
import train_lrm
import train_multi_mnist
import train_uninstructed
from jobs import UserError
from marks import long, long_but, one_in
from small_data import write_celeba, write_cifar10, write_mnist, write_pictures
from training import checkpoints
from training.data import Steps
from training.flags import CONFIGS, parse
from training.results import interval
from training.schedules import SCHEDULES

EXAMPLES = Path(__file__).parents[1] / "examples"
DIGITS = ["--train-size", "48", "--test-size", "20", "--batch-size", "8"]
LRM = ["--model", "squeezenet1_1", "--connect", "features.12:features.3.squeeze", "--min-size", "32", "--ramp-end", "2"]
CASES = {
    "multi_mnist": (train_multi_mnist, ["--model", "published", *DIGITS]),
    "multi_mnist separate": (train_multi_mnist, ["--model", "published", "--weights", "separate", *DIGITS]),
    "multi_mnist per task": (
        train_multi_mnist,
        ["--model", "published", "--heads", "per-task", "--all-tasks", "--accumulate", "2", "--loss", "mse", *DIGITS],
    ),
    "neighbours": (train_multi_mnist, ["--task", "neighbour", *DIGITS]),
    "mnist": (train_uninstructed, ["--config", "mnist", "--data-root", "DATA", "--batch-size", "8"]),
    "fashion-mnist": (
        train_uninstructed,
        ["--config", "fashion_mnist", "--data-root", "DATA", "--loss", "bce", "--batch-size", "8"],
    ),
    "cifar10": (train_uninstructed, ["--config", "cifar10", "--data-root", "DATA", "--hidden", "50"]),
    "celeba": (
        train_celeba,
        ["--model", "squeezenet1_1", "--data-root", "DATA", "--image-size", "32", "--batch-size", "6"],
    ),
    "lrm": (
        train_lrm,
        ["DATA/pictures", *LRM, "--image-size", "64", "--batch-size", "5", "--blur-pool", "--flip-test"],
    ),
}
"""Every experiment on little data, some of it random in training (dropout, augmentation, tasks)."""

PARSED_ONCE = functools.cache(multi_mnist.mnist_data)  # a second and a half each time


@pytest.fixture(autouse=True)
def quick_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_mnist, "mnist_data", PARSED_ONCE)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small one of every data set."""
    root = tmp_path / "data"
    write_mnist(root)
    write_mnist(root, "FashionMNIST")
    write_cifar10(root, monkeypatch)
    write_celeba(root, monkeypatch)
    write_pictures(root / "pictures")
    return root


def job(case: str, data: Path, out: Path, *flags: str) -> int:
    """Run an experiment for three epochs; returns its exit code."""
    script, own = CASES[case]
    own = [word.replace("DATA", str(data)) for word in own]
    return script.main([*own, "--epochs", "3", "--workers", "0", "--device", "cpu", "--out", str(out), *flags])


def checkpoint(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / checkpoints.FILE)


def log(out: Path) -> list[dict[str, str]]:
    """Without the seconds."""
    with (out / "log.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


# -- learning


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_a_terminal_shows_a_bar(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log gets a line an epoch instead."""
    assert job("mnist", data, tmp_path / "log") == 0
    printed, errors = capsys.readouterr()
    assert [line.split()[:2] for line in printed.splitlines()[:3]] == [["epoch", f"{i}:"] for i in (1, 2, 3)]
    assert "step" not in errors and "\r" not in errors
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", Terminal())
        assert job("mnist", data, tmp_path / "terminal") == 0
        assert "epoch 3/3" in sys.stderr.getvalue()


@one_in(9)
@pytest.mark.parametrize("case", long_but(["multi_mnist", "mnist"], CASES))
def test_learning_lowers_the_loss(case: str, data: Path, tmp_path: Path) -> None:
    steps = "200" if case == "mnist" else "60"
    flags = ["--batch-size", "4", "--epochs", "200", "--stop-after", steps, "--lr", "2e-3", "--schedule", "constant"]
    assert job(case, data, tmp_path, *flags) == 130
    losses = [float(row["loss"]) for row in log(tmp_path)]
    assert min(losses[len(losses) // 2 :]) < losses[0]


@pytest.mark.long
def test_one_task_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("multi_mnist", data, tmp_path / "right", "--only", "right", "--epochs", "1") == 0
    assert [name for name in log(tmp_path / "right")[0] if name.startswith("accuracy")] == ["accuracy_right"]
    assert job("celeba", data, tmp_path / "face", "--only", "attribute_3", "--epochs", "1") == 0
    assert "attribute_3" in (printed := capsys.readouterr().out) and "attribute_4" not in printed
    assert job("celeba", data, tmp_path / "none", "--only", "smile") == 1
    assert "--only smile: the tasks are attribute_0, attribute_1" in capsys.readouterr().err


# -- going on


@one_in(9)
@pytest.mark.parametrize("case", long_but(["multi_mnist separate", "mnist"], CASES))
def test_an_interrupted_run_goes_on_bit_for_bit(
    case: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job(case, data, tmp_path / "whole") == 0
    assert job(case, data, tmp_path / "parts", "--stop-after", "2") == 130
    assert "interrupted after step 2; --resume goes on from there" in capsys.readouterr().err
    torch.manual_seed(123)
    assert job(case, data, tmp_path / "parts", "--resume", "--stop-after", "5") == 130
    assert job(case, data, tmp_path / "parts", "--resume") == 0
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    assert log(tmp_path / "whole") == log(tmp_path / "parts") and len(log(tmp_path / "whole")) == 3


@pytest.mark.parametrize("case", ["cifar10", long("celeba"), long("lrm")])
def test_the_workers_change_nothing(case: str, data: Path, tmp_path: Path) -> None:
    assert job(case, data, tmp_path / "none") == job(case, data, tmp_path / "two", "--workers", "2") == 0
    assert_same(checkpoint(tmp_path / "none"), checkpoint(tmp_path / "two"))


def test_ctrl_c_finishes_the_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job("mnist", data, tmp_path / "whole") == 0
    step = torch.optim.Adam.step

    def pressed(self: torch.optim.Adam, closure: None = None) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", pressed)
    assert job("mnist", data, tmp_path / "parts") == 130
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    assert job("mnist", data, tmp_path / "parts", "--resume") == 0
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))


@pytest.mark.long
@pytest.mark.parametrize("times", [20])
def test_killed_at_random_moments(tmp_path: Path, times: int) -> None:
    command = [sys.executable, str(Path(__file__).with_name("kill_at_random.py")), str(tmp_path), str(times)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{times} times killed, all checkpoints whole, the same weights in the end" in done.stdout


def test_a_run_that_starts_anew_keeps_the_old_checkpoint(data: Path, tmp_path: Path) -> None:
    assert job("mnist", data, tmp_path) == 0
    before = checkpoint(tmp_path)
    assert job("mnist", data, tmp_path, "--seed", "1") == 0
    assert_same(safetensors.torch.load_file(tmp_path / checkpoints.BEFORE), before)


def test_only_the_same_run_goes_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("mnist", data, tmp_path) == 0
    before = checkpoint(tmp_path)
    assert job("mnist", data, tmp_path, "--resume", "--lr", "0.1") == 1
    assert "was made with lr 0.0001, not 0.1: --resume needs the same" in capsys.readouterr().err
    assert_same(checkpoint(tmp_path), before)
    assert job("mnist", data, tmp_path, "--resume", "--epochs", "4") == 0, "its schedule knows no end"
    assert len(log(tmp_path)) == 4


@pytest.mark.parametrize("content", [b"", b"not safetensors", safetensors.torch.save({"a": torch.zeros(1)})])
def test_a_damaged_checkpoint(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (tmp_path / checkpoints.FILE).write_bytes(content)
    assert job("mnist", data, tmp_path, "--resume") == 1
    assert "is no checkpoint of this program" in capsys.readouterr().err


ODD = [None, True, -1, 10**30, 10**400, 1.5, float("nan"), "x", [], {}, [[1]], {"epoch": 1}]
FIELDS = [("position",), ("log",), ("settings",), ("position", "epoch"), ("position", "step"), ("position", "loss")]
FIELDS += [("log", 0), ("log", 0, "epoch"), ("log", 0, "loss")]


@pytest.fixture
def begun(data: Path, tmp_path: Path) -> Path:
    """A run that was interrupted in its second epoch."""
    assert job("mnist", data, tmp_path / "begun", "--stop-after", "7") == 130
    return tmp_path / "begun" / checkpoints.FILE


def test_every_field_of_a_checkpoint_is_checked(
    begun: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about, tensors = checkpoints.load(begun)
    assert about["position"]["epoch"] == len(about["log"]) == 1
    steps = about["position"]["step"] + 1
    checkpoints.check(begun, about, steps)
    for *path, last in FIELDS:
        for value in [*ODD, "missing"]:
            if (last == "loss" and value in (-1, 1.5, 10**30)) or (last == "settings" and isinstance(value, dict)):
                continue  # it may be one, or is compared with this run's
            spoiled = copy.deepcopy(about)
            owner = functools.reduce(operator.getitem, path, spoiled)
            if value == "missing":
                del owner[last]
            else:
                owner[last] = value
            with pytest.raises(UserError, match="is no checkpoint of this program"):
                checkpoints.check(begun, spoiled, steps)
    del about["position"]["step"]
    text = {key: json.dumps(value) for key, value in about.items()}
    safetensors.torch.save_file(tensors, tmp_path / checkpoints.FILE, text)
    assert job("mnist", data, tmp_path, "--resume") == 1
    assert "the position's step is not a whole number from 0" in capsys.readouterr().err
    safetensors.torch.save_file(tensors, tmp_path / checkpoints.FILE, {"log": "[" * 100_000})
    assert job("mnist", data, tmp_path, "--resume") == 1


@pytest.mark.long
def test_every_tensor_of_a_checkpoint_is_checked(
    begun: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about, tensors = checkpoints.load(begun)
    first = {kind: next(name for name in tensors if name.startswith(kind)) for kind in ("model", "optimizer.exp_avg.")}
    step = next(name for name in tensors if name.startswith("optimizer.step"))
    for name in (*first.values(), step):
        odd = [tensors[name][None], tensors[name].double(), None]
        for value in odd:
            spoiled = {key: tensor for key, tensor in tensors.items() if key != name or value is not None}
            spoiled |= {} if value is None else {name: value}
            checkpoint = {key: json.dumps(said) for key, said in about.items()}
            safetensors.torch.save_file(spoiled, tmp_path / checkpoints.FILE, checkpoint)
            assert job("mnist", data, tmp_path, "--resume") == 1, (name, value)
            assert "does not fit this model" in capsys.readouterr().err
    for name in ("other", "model.other", "optimizer.exp_avg.other", f"optimizer.other.{step.partition('step.')[2]}"):
        checkpoint = {key: json.dumps(said) for key, said in about.items()}
        safetensors.torch.save_file(tensors | {name: torch.zeros(1)}, tmp_path / checkpoints.FILE, checkpoint)
        assert job("mnist", data, tmp_path, "--resume") == 1, name


# -- many processes


@pytest.mark.long  # the same of a step: tests/test_distributed.py
@pytest.mark.parametrize("flags", [["--batch-size", "8"], ["--batch-size", "7", "--accumulate", "2"]])
def test_two_processes_are_one(tmp_path: Path, flags: list[str]) -> None:
    """Also with a last batch that cannot be divided: 40 = 5 x 7 + 5 samples, and 5 in four parts."""
    write_mnist(tmp_path, sizes=(40, 13))
    own = ["--data", "mnist", "--data-root", str(tmp_path), "--epochs", "2", "--device", "cpu"]
    own += ["--optimizer", "sgd", "--lr", "0.1", *flags]  # adam would divide by gradients that are rounding
    assert train_uninstructed.main([*own, "--out", str(tmp_path / "one")]) == 0
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / checkpoints.FILE).write_text("of an earlier run")  # starting anew, they put it aside
    done = processes(2, "train_uninstructed.py", *own, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-6000:]
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        if name.startswith("model."):
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)
    assert [row["accuracy"] for row in log(tmp_path / "one")] == [row["accuracy"] for row in log(tmp_path / "two")]


@pytest.mark.long
def test_a_process_that_dies_ends_the_group(tmp_path: Path) -> None:
    write_mnist(tmp_path, sizes=(400, 13))
    own = ["--data", "mnist", "--data-root", str(tmp_path), "--epochs", "10000", "--device", "cpu", "--batch-size", "8"]
    dying = {"DIE_AFTER": "30"}  # see one_dies.py
    done = processes(
        2, "../tests/one_dies.py", *own, "--checkpoint-steps", "10", "--out", str(tmp_path / "out"), **dying
    )
    assert done.returncode != 0
    assert "this process lost the others of its group" in done.stderr and "--resume" in done.stderr
    about, _ = checkpoints.load(tmp_path / "out" / checkpoints.FILE)
    assert about["position"]["step"] >= 20


def processes(number: int, script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with torchrun, as a user would."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number)]
    command = [*start, "--standalone", str(EXAMPLES / script), *flags]
    here = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path])}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=here | environment)


# -- what goes wrong


def test_a_full_disk_leaves_the_last_checkpoint(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("mnist", data, tmp_path, "--stop-after", "2") == 130
    before = checkpoint(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes a file may have
    try:
        assert job("mnist", data, tmp_path, "--resume") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(r"cannot write .*what was saved before is still there", capsys.readouterr().err)
    assert_same(checkpoint(tmp_path), before)


@pytest.mark.long
@pytest.mark.parametrize("workers", [long("0"), "2"])
def test_a_picture_cut_short_while_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    assert job("lrm", data, tmp_path, "--stop-after", "2") == 130
    broken = sorted((data / "pictures/train/disc").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:40])
    assert job("lrm", data, tmp_path, "--resume", "--workers", workers) == 1
    printed = capsys.readouterr().err
    assert f"error: cannot read the picture {broken}" in printed and "Traceback" not in printed
    at = checkpoints.load(tmp_path / checkpoints.FILE)[0]["position"]
    assert (at["epoch"], at["step"]) >= (0, 2)


def test_a_worker_that_dies(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parent, load = os.getpid(), train_lrm.Pictures.item

    def dying(self: train_lrm.Pictures, index: int, epoch: int) -> object:
        if os.getpid() != parent and epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, index, epoch)

    monkeypatch.setattr(train_lrm.Pictures, "item", dying)
    assert job("lrm", data, tmp_path, "--workers", "1") == 1
    assert "a process that reads data ended" in capsys.readouterr().err
    assert checkpoints.load(tmp_path / checkpoints.FILE)[0]["position"]["epoch"] == 1


def test_a_diverging_loss_keeps_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, steps = train_uninstructed.Classify.losses, iter(range(5))

    def diverging(self: train_uninstructed.Classify, model: torch.nn.Module, batch: object) -> torch.Tensor:
        return losses(self, model, batch) * (1.0 if next(steps, None) is not None else torch.nan)

    monkeypatch.setattr(train_uninstructed.Classify, "losses", diverging)
    assert job("mnist", data, tmp_path) == 1
    assert "the loss became nan in epoch 2; a lower --lr may help" in capsys.readouterr().err
    assert len(log(tmp_path)) == 1 and all(tensor.isfinite().all() for tensor in checkpoint(tmp_path).values())


# -- numbers


def test_every_sample_is_seen_once_an_epoch_by_one_part() -> None:
    for parts in (1, 3):
        steps = Steps(size=22, batch=5, seed=7, parts=parts)
        for epoch in (0, 1):
            all_parts = [part for step in steps.of(epoch) for part in step]
            seen = [index for part in all_parts if part.weight for index in part.indices]
            assert sorted(seen) == list(range(22)) and seen != sorted(seen)
            weights = [sum(part.weight * len(part.indices) for part in step) for step in steps.of(epoch)]
            assert weights == pytest.approx([1.0] * len(steps))
            assert list(steps.of(epoch))[2:] == list(steps.of(epoch, start=2))
        assert list(steps.of(0)) != list(steps.of(1))


def test_schedules_are_the_published_ones() -> None:
    args = argparse.Namespace(epochs=30, lr_decay=0.95, warm_up=2.0, lr_step=88)
    assert [SCHEDULES["decay"](done, args) for done in (0, 0.99, 1, 2.5)] == pytest.approx([1, 1, 0.95, 0.95**2])
    assert [SCHEDULES["cyclic"](done, args) for done in (0, 1, 2, 16, 30)] == pytest.approx([1e-4, 0.50005, 1, 0.5, 0])
    plateau = [SCHEDULES["cyclic-plateau"](done, args) for done in (2, 45, 88, 100)]
    assert plateau == pytest.approx([1, 0.50002, 4e-5, 4e-5])
    args.lr_step, args.lr_decay = 10, 0.1
    assert [SCHEDULES["step"](done, args) for done in (0, 9.9, 10, 25)] == pytest.approx([1, 1, 0.1, 0.01])
    assert [SCHEDULES["cosine"](done, args) for done in (0, 1, 2, 16, 30)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_a_confidence_interval() -> None:
    assert interval([2.0, 4.0, 6.0]) == pytest.approx((4.0, 4.303 * 2 / 3**0.5), rel=1e-3)  # t of 2 degrees: 4.303
    assert str(interval([0.5])) == "0.5000"


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.toml")))
def test_published_settings_are_flags_of_a_script(name: str) -> None:
    scripts = {"celeba": train_celeba, "lrm": train_lrm, "multi_mnist": train_multi_mnist}
    parser = scripts.get(name, train_uninstructed).flags
    assert parse(parser(), ["--config", name, "--lr", "0.25"]).lr == 0.25
    assert parse(parser(), ["--config", name]).lr in (1e-4, 5e-4, 0.5)


def test_an_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text("epochz = 3\n")
    with pytest.raises(SystemExit):
        train_uninstructed.main(["--config", str(tmp_path / "mine.toml")])
    assert "unknown key 'epochz'; did you mean 'epochs'?" in capsys.readouterr().err


@pytest.mark.long
def test_a_study(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["alignment", "--seeds", "2", "--out", str(tmp_path), "--", "--data", "mnist", "--data-root", str(data)]
    flags += ["--epochs", "2", "--device", "cpu"]
    assert studies.main(flags) == 0
    table = capsys.readouterr().out.split("confidence interval\n\n")[1].splitlines()
    assert table[0].split() == ["angle", "accuracy"] and len(table[1].split(" ± ")) == 3
    with (tmp_path / "alignment/curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2 * 2 and all(45 < float(row["angle"]) < 135 for row in rows)
    assert (tmp_path / "alignment/curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_word_a_study_is_a_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(studies, "run", lambda name, study, args: asked.append((name, args.seeds, args.flags)))
    assert studies.main([]) == 0
    [(name, seeds, flags)] = asked
    assert (name, seeds) == ("feedback", 2) and parse(train_uninstructed.flags(), flags).epochs == 3


@pytest.mark.long
def test_traits_of_digits_where_there_are_no_faces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--out", str(tmp_path), "--epochs", "1", "--batch-size", "1000", "--lr", "1e-2"]
    assert train_celeba.main(flags) == 0
    [row] = log(tmp_path)
    # In the first split of the digits; what says always no is right where a trait is rare.
    assert float(row["accuracy_a 3"]) > 0.8 and float(row["accuracy_even"]) < 0.8
    assert "with a loop" in capsys.readouterr().out


def test_several_seeds_give_a_table(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("mnist", data, tmp_path, "--repeat", "3") == 0
    printed = capsys.readouterr().out.split("3 runs, mean ± half of the 95 % confidence interval:\n")[1]
    assert re.search(r"^accuracy\s+0\.\d{4} ± \d\.\d{4}$", printed, re.M)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "1", "2"] and len({row["loss"] for row in rows}) == 3
    assert job("mnist", data, tmp_path / "second", "--seed", "1") == 0
    assert log(tmp_path / "second")[-1]["loss"] == rows[1]["loss"], "a seed's run is the same alone"
