"""The main job: its data, its results, and its messages when something is wrong."""

import functools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import jobs
import multi_mnist
import train_multi_mnist
from multi_mnist import DataError, Digits
from small_data import random_digits, write_idx, write_mnist

TINY = ["--train-size", "64", "--test-size", "20", "--batch-size", "16", "--epochs", "2", "--device", "cpu"]
PLOTS = {"learning_curves.png", "active_share.png", "overlap.png"}
RESULTS = {"metrics.json", "model.safetensors", "checkpoint.safetensors", "log.csv", "tensorboard", *PLOTS}


def job(out: Path, *flags: str) -> int:
    """Run the main job on very little data, results into `out`; returns its exit code."""
    return train_multi_mnist.main([*TINY, "--out", str(out), *flags])


PARSED_ONCE = functools.cache(multi_mnist.mnist_data)  # a second and a half each time


@pytest.fixture(autouse=True)
def quick_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_mnist, "mnist_data", PARSED_ONCE)


@pytest.fixture
def mnist_root(tmp_path: Path) -> Path:
    """A folder with a small MNIST."""
    write_mnist(tmp_path / "data")
    return tmp_path / "data"


# --- data


def test_a_composite_is_the_pixelwise_maximum_resized_and_normalised() -> None:
    left, right = random_digits(3, seed=1).images, random_digits(3, seed=2).images
    for composite, a, b in zip(multi_mnist.compose(left, right), left.numpy(), right.numpy(), strict=True):
        canvas = np.zeros((36, 36), np.uint8)
        for row in range(28):
            for column in range(28):
                canvas[row, column] = max(canvas[row, column], a[row, column])
                canvas[row + 6, column + 6] = max(canvas[row + 6, column + 6], b[row, column])
        resized = np.asarray(Image.fromarray(canvas).resize((28, 28), Image.Resampling.NEAREST))
        expected = torch.from_numpy((resized / 255 - 0.1307) / 0.3081).float()
        torch.testing.assert_close(composite, expected.unsqueeze(0))


def test_labels_say_left_then_right() -> None:
    images = torch.arange(10.0).view(10, 1, 1).expand(10, 28, 28)  # the digit k is an image full of k
    composites = multi_mnist.draw_composites(Digits(images, torch.arange(10)), 50, torch.Generator().manual_seed(0))
    pixels = (composites.images.squeeze(1) * 0.3081 + 0.1307) * 255
    left, right = pixels[:, 0, 0].round().long(), pixels[:, 25, 25].round().long()
    torch.testing.assert_close(composites.labels, torch.stack([left, right], 1))
    assert composites.labels.shape == (50, 2) and (left != right).any()


def test_a_question_about_a_row_has_the_neighbour_as_its_answer() -> None:
    images = torch.arange(10.0).view(10, 1, 1).expand(10, 28, 28)  # the digit k is an image full of k
    rows = train_multi_mnist.Rows(Digits(images, torch.arange(10)), 300, 4, (1, 28, 70), seed=0, augment=False)
    pictures, instructions, answers = rows.batch(range(300), epoch=0)
    labels = rows.composites.labels.tolist()
    pixels = ((pictures * 0.3081 + 0.1307) * 255).round()[:, 0, 0].long()
    for row, line, instruction, answer in zip(labels, pixels, instructions, answers.tolist(), strict=True):
        seen = [
            max(row[max(0, i - 1) : i + 1]) for i in range(5)
        ]  # each lies half over the one before; the larger wins
        assert line[7::14].tolist() == seen and len(set(row)) == 4
        to_the_right, asked = bool(instruction[1]), instruction[2:].argmax().item()
        assert answer == row[row.index(asked) + (1 if to_the_right else -1)] and row.index(answer) >= 0


def test_the_embedded_digits_are_split_once_and_for_all() -> None:
    train, test = multi_mnist.embedded_digits()
    assert train.images.shape == (4000, 28, 28) and test.images.shape == (1000, 28, 28)
    assert train.images.max() == 255 and set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    rows = {image.numpy().tobytes() for image in train.images}
    assert not rows & {image.numpy().tobytes() for image in test.images}
    torch.manual_seed(123)
    again, _ = multi_mnist.embedded_digits()
    assert torch.equal(train.images, again.images) and torch.equal(train.labels, again.labels)


def test_draws_repeat_with_the_seed_and_jitter_stays_small() -> None:
    digits = multi_mnist.embedded_digits()[1]
    still, same, moved = (
        multi_mnist.draw_composites(digits, 200, torch.Generator().manual_seed(5), jitter)
        for jitter in (False, False, True)
    )
    assert torch.equal(still.images, same.images) and torch.equal(still.labels, same.labels)
    assert torch.equal(still.labels, moved.labels)
    alike = torch.nn.functional.cosine_similarity(still.images.flatten(1), moved.images.flatten(1))
    assert 0.6 < alike.mean() < 0.99


def test_mnist_files_are_read(mnist_root: Path) -> None:
    train, test = multi_mnist.mnist_digits(mnist_root)
    for read, written in ((train, random_digits(30)), (test, random_digits(12))):
        assert torch.equal(read.images, written.images) and torch.equal(read.labels, written.labels)


# --- results


def test_the_job_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job(tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == RESULTS
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["accuracy"]) == {"left", "right"}
    assert all(0 <= share <= 1 for share in metrics["accuracy"].values())
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [1, 2]
    assert all(metrics["epochs"][-1][f"accuracy_{task}"] == share for task, share in metrics["accuracy"].items())
    assert all({"loss", "lr", "seconds"} <= set(epoch) for epoch in metrics["epochs"])
    assert metrics["config"]["model"] == "convnet" and metrics["config"]["train_size"] == 64
    for task in ("left", "right"):
        assert set(metrics["active_share"][task]) == set(metrics["overlap"])
        assert 0 < metrics["active_share_total"][task] < 1
    printed = capsys.readouterr().out
    assert "accuracy:     left " in printed and "active units: left " in printed and str(tmp_path) in printed
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in RESULTS if name.endswith(".png"))


def test_the_model_is_written_with_its_own_names(tmp_path: Path) -> None:
    assert job(tmp_path, "--model", "published", "--epochs", "1") == 0
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    train_multi_mnist.published().load_state_dict(state, strict=False)
    assert set(train_multi_mnist.published().state_dict()) <= set(state)


def test_a_seed_repeats_a_run(tmp_path: Path) -> None:
    flags = ["--model", "published", "--epochs", "1", "--seed", "7"]
    assert job(tmp_path / "a", *flags) == job(tmp_path / "b", *flags) == 0
    first, second = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in "ab")
    assert first["epochs"][0]["loss"] == second["epochs"][0]["loss"]


def test_separate_weights_report_the_angle_to_their_twins(tmp_path: Path) -> None:
    assert job(tmp_path, "--weights", "separate", "--model", "published") == 0
    assert {path.name for path in tmp_path.iterdir()} == RESULTS | {"angles.png"}
    first, second = json.loads((tmp_path / "metrics.json").read_text())["epochs"]
    assert 45 < second["angle"] < first["angle"] < 120
    assert "angle_conv1.weight" in first


@pytest.mark.long
def test_backprop_and_a_torchvision_classifier(tmp_path: Path) -> None:
    flags = ["--learning", "backprop", "--model", "squeezenet1_1", "--train-size", "16", "--epochs", "1"]
    assert job(tmp_path, *flags) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["config"]["learning"] == "backprop"


def test_mnist_files_can_be_trained_on(tmp_path: Path, mnist_root: Path) -> None:
    assert job(tmp_path / "out", "--data-root", str(mnist_root)) == 0


# --- files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    (tmp_path / "metrics.json").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        jobs.write_whole(tmp_path / "metrics.json", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_text() == "old"


# --- bad input: one message, no traceback


def message(capsys: pytest.CaptureFixture[str], out: Path, *flags: str) -> str:
    """What the job says on stderr when it refuses `flags`, having trained nothing."""
    try:
        code = job(out, *flags)
    except SystemExit as refusal:  # argparse
        code = refusal.code
    printed = capsys.readouterr().err
    assert code not in (0, None) and "Traceback" not in printed and "error:" in printed
    assert not (out.is_dir() and list(out.iterdir()))
    return printed


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--epochs", "-1"], "argument --epochs: -1 does not lie between"),
        (["--train-size", "0"], "argument --train-size: 0"),
        (["--test-size", "many"], "argument --test-size: 'many' is not a whole number"),
        (["--batch-size", "-8"], "argument --batch-size"),
        (["--lr", "nan"], "nan does not lie between 0 and 1000"),
        (["--lr-decay", "1.5"], "argument --lr-decay"),
        (["--learning", "hebb"], "argument --learning: invalid choice"),
        (["--model", "resnet81"], "did you mean resnet18"),
        (["--model", "zzzz"], "unknown model 'zzzz'"),
        (["--model", "fcn_resnet50"], "unknown model 'fcn_resnet50'"),
        (["--device", "abacus"], "cannot use the device 'abacus'"),
        (["--device", "meta"], "cannot use the device 'meta'"),
        (["--download"], "--download needs --data-root"),
    ],
)
def test_wrong_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str) -> None:
    assert expected in message(capsys, tmp_path / "out", *flags)


def test_an_unwritable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write results to" in message(capsys, tmp_path / "file" / "out")


def test_missing_mnist_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = message(capsys, tmp_path / "out", "--data-root", str(tmp_path / "nowhere"))
    assert "no MNIST file" in printed and "--download" in printed


@pytest.mark.parametrize(
    "content", [b"", b"\0\0", b"not an idx file", struct.pack(">HBB3I", 0, 8, 3, 30, 28, 28) + b"\1"]
)
def test_damaged_mnist_files(
    tmp_path: Path, mnist_root: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (mnist_root / "MNIST/raw/train-images-idx3-ubyte").write_bytes(content)
    assert "train-images-idx3-ubyte is not a whole IDX file" in message(
        capsys, tmp_path / "out", "--data-root", str(mnist_root)
    )


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("train-images-idx3-ubyte", np.full((30, 28, 28), np.nan, np.float32), "image 0 holds NaN"),
        ("t10k-images-idx3-ubyte", np.full((12, 28, 28), 256.0), "pixels must lie in 0..255"),
        ("train-images-idx3-ubyte", np.zeros((29, 28, 28), np.uint8), "do not make digits"),
        ("train-images-idx3-ubyte", np.zeros((30, 32, 32), np.uint8), "do not make digits"),
        ("train-labels-idx1-ubyte", np.full(30, 10, np.uint8), "labels must lie in 0..9, one is 10"),
    ],
)
def test_wrong_mnist_files(
    tmp_path: Path, mnist_root: Path, capsys: pytest.CaptureFixture[str], name: str, array: np.ndarray, expected: str
) -> None:
    write_idx(mnist_root / "MNIST/raw" / name, array)
    assert expected in message(capsys, tmp_path / "out", "--data-root", str(mnist_root))


def test_a_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def offline(root: Path, download: bool) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(multi_mnist, "MNIST", offline)
    printed = message(capsys, tmp_path / "out", "--data-root", str(tmp_path / "data"), "--download")
    assert "Error downloading train-images-idx3-ubyte.gz" in printed


def test_nan_in_the_embedded_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((5000, 784))
    images[3, 5] = np.nan
    monkeypatch.setattr(multi_mnist, "mnist_data", lambda: (images, np.zeros(5000, np.int64)))
    with pytest.raises(DataError, match="image 3 holds NaN"):
        multi_mnist.embedded_digits()


class Untraceable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(train_multi_mnist.OWN_MODELS, "convnet", lambda width: Untraceable())
    message(capsys, tmp_path)
