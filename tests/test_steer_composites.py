"""The composite challenge: its composites, its results, and that steering does what it promises."""

import csv
import functools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import fxfeedback
import multi_mnist
import steer_composites
from fxfeedback import composites
from fxfeedback.composites import KINDS, TripletDataset, steerability
from fxfeedback.errors import InputError, OptionError
from fxfeedback.prototypes.moments import Moments
from small_data import write_classes

TINY = ["--steps", "3", "--batch-size", "16", "--test-size", "20", "--strengths", "0.5", "2", "--device", "cpu"]
RESULTS = {"results.csv", "results.json", "steering.png"}

PARSED_ONCE = functools.cache(multi_mnist.mnist_data)  # a second and a half each time


@pytest.fixture(autouse=True)
def quick_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_mnist, "mnist_data", PARSED_ONCE)


def job(out: Path, *flags: str) -> int:
    """Run the challenge on very little data, results into `out`; returns its exit code."""
    return steer_composites.main([*TINY, "--out", str(out), *flags])


class Plain(Dataset):
    """Twelve images (2, 6, 8) of the classes 3, 5, 7 and 11; an image is full of 100 * its class + its index."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < 12:
            raise IndexError(index)
        label = (3, 5, 7, 11)[index % 4]
        return torch.full((2, 6, 8), 100.0 * label + index), label


def class_of(pixel: float) -> int:
    return int(pixel) // 100


# --- composites


def test_an_overlay_is_the_mean() -> None:
    first, second = torch.rand(2, 3, 6, 8)
    expected = [
        [[(a + b) / 2 for a, b in zip(*rows, strict=True)] for rows in zip(*maps, strict=True)]
        for maps in zip(first.tolist(), second.tolist(), strict=True)
    ]
    torch.testing.assert_close(composites.overlay(first, second, np.random.default_rng(0)), torch.tensor(expected))


def test_side_by_side_is_left_and_right() -> None:
    first, second = torch.rand(2, 3, 6, 8)
    both = composites.side_by_side(first, second, np.random.default_rng(0))
    assert both.shape == (3, 6, 16)
    assert torch.equal(both[..., :8], first) and torch.equal(both[..., 8:], second)


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_mix_is_one_rectangle_of_half_the_area_in_the_other(seed: int) -> None:
    first, second = torch.rand(3, 28, 20), 1 + torch.rand(3, 28, 20)
    kept = first.clone()
    mixed = composites.cut_mix(first, second, np.random.default_rng(seed))
    pasted = mixed == second
    assert ((mixed == first) | pasted).all() and torch.equal(first, kept)
    rows, columns = pasted[0].any(1), pasted[0].any(0)
    assert torch.equal(pasted, (rows[:, None] & columns).expand(3, -1, -1))  # the same in every channel
    assert all((flags.diff().sum() <= 2) and flags.any() for flags in (rows, columns))  # in one piece
    assert 0.45 < pasted.float().mean() < 0.55


def test_cut_mixes_lie_in_different_places() -> None:
    random = np.random.default_rng(0)
    mixed = torch.stack([composites.cut_mix(torch.zeros(1, 28, 28), torch.ones(1, 28, 28), random) for _ in range(50)])
    assert mixed.mean(0).min() < 0.3 and len({tuple(m.flatten().tolist()) for m in mixed}) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_triplet_shows_what_it_says(kind: str) -> None:
    seen, absent_ones = set(), set()
    for image, present, absent in map(TripletDataset(Plain(), 60, kind).__getitem__, range(60)):
        assert len({*present, absent}) == 3 and {*present, absent} <= {3, 5, 7, 11}
        pixels = 2 * image if kind == "overlay" else image
        classes = [class_of(value) for value in pixels.unique().tolist()]
        assert classes == ([sum(present)] if kind == "overlay" else sorted(present))
        assert kind != "side-by-side" or class_of(image[0, 0, 0]) == present[0]
        seen.add(present)
        absent_ones.add(absent)
    assert len(seen) == 12 and absent_ones == {3, 5, 7, 11}  # every pair, in both orders


@pytest.mark.parametrize("kind", KINDS)
def test_a_triplet_depends_on_seed_and_index_alone(kind: str) -> None:
    def triplet(seed: int, index: int, size: int = 40) -> tuple:
        image, *classes = TripletDataset(Plain(), size, kind, seed)[index]
        return image.flatten().tolist(), *classes

    expected = [triplet(7, index) for index in range(40)]
    torch.manual_seed(1)
    np.random.seed(1)
    assert [triplet(7, index, size=90) for index in reversed(range(40))] == expected[::-1]
    assert [triplet(8, index) for index in range(40)] != expected
    assert len({str(each) for each in expected}) > 20


def test_every_kind_combines_the_same_images() -> None:
    for index in range(10):
        overlaid, beside, mixed = (TripletDataset(Plain(), 10, kind)[index] for kind in KINDS)
        assert overlaid[1:] == beside[1:] == mixed[1:]
        assert torch.equal((beside.image[..., :8] + beside.image[..., 8:]) / 2, overlaid.image)
        assert set(mixed.image.unique().tolist()) == set(beside.image.unique().tolist())


def test_any_labelled_data_set_will_do() -> None:
    images, labels = torch.rand(30, 1, 5, 5), torch.arange(30) % 3
    whole = TensorDataset(images, labels)
    for dataset in (whole, Subset(whole, range(9)), list(zip(images, labels.tolist(), strict=True))):
        image, present, absent = next(iter(DataLoader(TripletDataset(dataset, 8), 8)))
        assert image.shape == (8, 1, 5, 5) and [c.shape for c in (*present, absent)] == [(8,)] * 3
    told, read = TripletDataset(whole, 5, labels=labels.tolist()), TripletDataset(whole, 5)
    assert all(torch.equal(a.image, b.image) and a[1:] == b[1:] for a, b in zip(told, read, strict=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TripletDataset(Plain(), 5, "overlap"), OptionError, "choose one of 'overlay', 'side-by-side'"),
        (lambda: TripletDataset(Subset(Plain(), [0, 1, 4, 5]), 5), OptionError, "three classes, the data set has 2"),
        (lambda: TripletDataset(Plain(), 5, labels=[1, 2, 3]), OptionError, "3 labels for 12 images"),
        (lambda: TripletDataset([("picture", k) for k in range(3)], 5)[0], InputError, "not str: use a transform"),
        (lambda: TripletDataset(Plain(), 5)[5], IndexError, "index 5 of 5"),
        (
            lambda: TripletDataset([(torch.rand(1, 4 + k, 4), k) for k in range(3)], 5)[0],
            InputError,
            "images of sizes .* make no composite",
        ),
    ],
)
def test_wrong_triplets(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# --- the numbers


def test_the_interval_is_student_s() -> None:
    mean, half = steer_composites.mean_and_interval([1.0, 2.0, 6.0])
    assert mean == 3
    assert half == pytest.approx(4.302653 * math.sqrt(7) / math.sqrt(3), rel=1e-6)  # t(0.975, 2), from a printed table
    assert steer_composites.mean_and_interval([0.5]) == (0.5, None)


class Says(torch.nn.Module):
    """A network that names, steered, the class of its prototype, and 4 otherwise."""

    def __init__(self, obeys: Callable[[int, float], bool]) -> None:
        super().__init__()
        self.obeys = obeys
        self.like = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor, steering: object = ()) -> list[Tensor]:
        said = torch.full((len(images),), 4)
        if steering:
            targets = steering.activation.argmax(1)
            said = torch.where(torch.tensor([self.obeys(int(t), steering.strength) for t in targets]), targets, said)
        return [torch.zeros(len(images), 10), torch.nn.functional.one_hot(said, 10).float()]


def one_hot_prototypes(classes: int = 10) -> fxfeedback.Prototypes:
    eye = torch.eye(classes, dtype=torch.float64)
    return fxfeedback.Prototypes({k: Moments(1, {"head": eye[k]}, {"head": 0 * eye[k]}) for k in range(classes)})


def test_steerability_counts_what_is_named() -> None:
    triplets = TripletDataset(TensorDataset(torch.rand(50, 1, 4, 4), torch.arange(50) % 5), 300)
    answers = [(present, absent) for _, present, absent in triplets]
    low, high = steerability(Says(lambda target, strength: target < strength), triplets, one_hot_prototypes(), (1, 3))
    for row, strength in ((low, 1), (high, 3)):
        obeyed = [[t < strength or t == 4 for t in present] for present, _ in answers]
        places = [[1 if t < strength or t == 4 else 2 + t for t in present] for present, _ in answers]
        assert row["strength"] == strength and row["kind"] == "overlay" and row["composites"] == 300
        assert row["unsteered"] == pytest.approx(sum(4 in present for present, _ in answers) / 600)
        assert row["steered"] == pytest.approx(sum(map(sum, obeyed)) / 600)
        assert row["gain"] == pytest.approx(row["steered"] - row["unsteered"])
        assert row["absent_unsteered"] == pytest.approx(sum(absent == 4 for _, absent in answers) / 300)
        assert row["hallucinated"] == pytest.approx(
            sum(absent < strength or absent == 4 for _, absent in answers) / 300
        )
        assert row["rank_steered"] == pytest.approx(sum(map(sum, places)) / 600)
        shares = [sum(pair) / 2 for pair in obeyed]
        assert row["steered_ci"] == pytest.approx(1.959964 * statistics.stdev(shares) / math.sqrt(300), rel=1e-5)


@torch.no_grad()
def counted_by_hand(
    model: fxfeedback.FeedbackModel, digits: multi_mnist.Digits, triplets: TripletDataset, strength: float
) -> dict[str, float]:
    """A row of the table from plain means of the read-outs, in float32, and one composite after the other."""
    images = steer_composites.normalised(digits.images)
    values = model.readout(images, ["head"])[-1]["head"].value
    means = torch.stack([values[digits.labels == k].mean(0) for k in range(10)])
    plain, steered = [0, 0, 0], [0, 0, 0]
    for image, present, absent in triplets:
        unsteered = int(model(image[None])[-1].argmax())
        for i, target in enumerate((*present, absent)):
            steering = fxfeedback.Steering("head", means[target : target + 1], strength)
            plain[i] += unsteered == target
            steered[i] += int(model(image[None], steering=steering)[-1].argmax()) == target
    n = len(triplets)
    shares = {"unsteered": sum(plain[:2]) / 2 / n, "steered": sum(steered[:2]) / 2 / n}
    return {
        **shares,
        "gain": shares["steered"] - shares["unsteered"],
        "absent_unsteered": plain[2] / n,
        "hallucinated": steered[2] / n,
    }


@pytest.mark.long
def test_the_job_s_table_is_steerability_s(tmp_path: Path) -> None:
    assert job(tmp_path, "--steps", "30") == 0
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    digits, held_out = multi_mnist.embedded_digits()
    state = safetensors.torch.load_file(tmp_path / "model-0.safetensors")
    seen = state.pop("prototypes")
    model = fxfeedback.add_feedback(steer_composites.network(), [("head", "relu1")], input_size=(1, 28, 28)).eval()
    model.load_state_dict(state)
    dataset = TensorDataset(steer_composites.normalised(held_out.images), held_out.labels)
    prototypes = steer_composites.prototypes(model, digits)
    assert all(torch.equal(prototypes.mean(k).float(), seen[k]) for k in range(10))
    for row in rows[1::2]:
        triplets = TripletDataset(dataset, 20, row["kind"], multi_mnist.SPLIT_SEED)
        by_hand = counted_by_hand(model, digits, triplets, float(row["strength"]))
        by_library = steerability(model, triplets, prototypes, [float(row["strength"])])
        for name, value in by_hand.items():
            assert float(row[name]) == round(value, 6) == round(by_library[0][name], 6), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strengths": ()}, OptionError, "strengths is empty"),
        ({"prototypes": one_hot_prototypes(3)}, InputError, "there is no prototype of [34]"),
        ({"source": "relu1"}, fxfeedback.errors.NodeNameError, "no prototypes of 'relu1'"),
        ({"labels": 20}, InputError, "do not name the classes up to"),
        ({"pixels": math.nan}, InputError, "outputs are not finite"),
    ],
)
def test_wrong_challenges(change: dict, error: type[Exception], message: str) -> None:
    images = torch.full((100, 1, 28, 28), change.pop("pixels", 1.0))
    triplets = TripletDataset(TensorDataset(images, torch.arange(100) % change.pop("labels", 5)), 10)
    model = fxfeedback.add_feedback(steer_composites.network(), [("head", "relu1")], input_size=(1, 28, 28))
    arguments = {"prototypes": one_hot_prototypes(20), "strengths": (1,), **change}
    with pytest.raises(error, match=message):
        steerability(model, triplets, **arguments)


def test_mixup_blends_images_and_targets_alike() -> None:
    images, targets = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 2, 2), torch.eye(8)
    mixed, soft = steer_composites.mixed_up(images, targets, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed[:, 0, 1, 1], soft @ torch.arange(8.0))
    torch.testing.assert_close(soft.sum(1), torch.ones(8))
    assert ((soft > 0).sum(1) == 2).any()


# --- the job


def test_the_job_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job(tmp_path, "--repeat", "2", "--seed", "5", "--destinations", "relu1", "conv2") == 0
    assert {path.name for path in tmp_path.iterdir()} == RESULTS | {"model-5.safetensors", "model-6.safetensors"}
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["seed"], r["kind"], float(r["strength"])) for r in rows] == [
        (seed, kind, strength) for seed in "56" for kind in KINDS for strength in (0.5, 2)
    ]
    for row in rows:
        shares = {name: float(row[name]) for name in ("unsteered", "steered", "absent_unsteered", "hallucinated")}
        assert row["training"] == "mixup" and all(0 <= share <= 1 for share in shares.values())
        assert float(row["gain"]) == pytest.approx(shares["steered"] - shares["unsteered"])
    results = json.loads((tmp_path / "results.json").read_text())
    for line in results["summary"]:
        gains = [
            float(r["gain"]) for r in rows if (r["kind"], float(r["strength"])) == (line["kind"], line["strength"])
        ]
        assert line["seeds"] == len(gains) == 2 and line["gain"] == pytest.approx(sum(gains) / 2)
        assert line["gain_ci"] == pytest.approx(12.7062 * abs(gains[0] - gains[1]) / 2, rel=1e-4, abs=1e-9)
    assert [each["seed"] for each in results["accuracy"]] == [5, 6]
    assert results["config"]["steps"] == 3
    assert (tmp_path / "steering.png").read_bytes().startswith(b"\x89PNG")
    state = safetensors.torch.load_file(tmp_path / "model-5.safetensors")
    assert state["prototypes"].shape == (10, 10)
    assert {name.split(".")[1] for name in state if "modulations" in name} == {"head_to_relu1", "head_to_conv2"}
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("overlay", "hallucinated", " ± ", str(tmp_path)))


@pytest.mark.long
def test_a_seed_repeats_a_run(tmp_path: Path) -> None:
    assert job(tmp_path / "a", "--repeat", "2") == job(tmp_path / "b", "--seed", "1") == 0
    first, second = (safetensors.torch.load_file(tmp_path / run / "model-1.safetensors") for run in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = [(tmp_path / run / "results.csv").read_text().splitlines() for run in "ab"]
    assert lines[0][7:] == lines[1][1:] and lines[0][1:7] != lines[0][7:]


@pytest.mark.long
def test_ctrl_c_keeps_the_seeds_that_were_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = torch.optim.AdamW.step, iter(range(4))

    def interrupted(self: torch.optim.AdamW) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    assert job(tmp_path, "--repeat", "2") == 130
    assert {path.name for path in tmp_path.iterdir()} == RESULTS | {"model-0.safetensors"}
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--steps", "1"], "argument --steps: 1 does not lie between"),
        (["--strengths", "much"], "argument --strengths: 'much' is not a number"),
        (["--training", "steered"], "argument --training: invalid choice"),
        (["--device", "abacus"], "cannot use the device 'abacus'"),
        (["--destinations", "relu9"], "no node is called 'relu9'; did you mean"),
        (["--download"], "--download needs --data-root"),
        (["--data-root", "nowhere"], "--download fetches it"),
    ],
)
def test_wrong_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str) -> None:
    try:
        code = job(tmp_path / "out", *flags)
    except SystemExit as refusal:  # argparse
        code = refusal.code
    printed = capsys.readouterr().err
    assert code not in (0, None) and "Traceback" not in printed and expected in printed


def test_a_diverging_loss_stops_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job(tmp_path, "--lr", "1000", "--steps", "200") == 1
    assert "the loss became" in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- pictures


@pytest.mark.long
def test_a_folder_of_pictures_with_a_published_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_classes(tmp_path / "data", ["7", "497", "574"]), tmp_path / "out"
    asked = []

    def read(url: str, *args: object) -> dict:
        asked.append(url)
        return {k: {"count": 1, "mean": torch.randn(1000), "std": torch.zeros(1000)} for k in range(1000)}

    monkeypatch.setattr(fxfeedback.prototypes.prototype_files, "read_checkpoint", read)
    flags = ["--data", str(data), "--model", "alexnet_lrm1", "--weights", "none", "--batch-size", "2"]
    flags += ["--test-size", "2", "--strengths", "3", "--device", "cpu", "--out", str(out)]
    assert steer_composites.main([*flags, "--prototypes", "published"]) == 0
    assert len(asked) == 1 and "visual_prototypes_alexnet_lrm1" in asked[0]
    with (out / "pictures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == list(KINDS) and all(row["composites"] == "2" for row in rows)
    assert 1 <= float(rows[0]["rank_steered"]) <= 1000 and "hallucinated" in capsys.readouterr().out
    assert steer_composites.main([*flags, "--prototypes", str(data)]) == 0
    named = write_classes(tmp_path / "named", ["cat", "dog", "497"])
    assert steer_composites.main([*flags, "--data", str(named)]) == 1
    assert "give all 1000 of ImageNet, or name them by their classes' numbers" in capsys.readouterr().err
    assert steer_composites.main([*flags, "--data", str(tmp_path / "nowhere")]) == 1
    assert "no pictures in" in capsys.readouterr().err


# --- the promise


@pytest.mark.long
def test_steering_raises_the_target_on_real_digits(tmp_path: Path) -> None:
    flags = ["--steps", "150", "--batch-size", "64", "--test-size", "200", "--strengths", "1.5"]
    assert steer_composites.main([*flags, "--device", "cpu", "--out", str(tmp_path)]) == 0
    overlaid = json.loads((tmp_path / "results.json").read_text())["summary"][0]
    assert overlaid["kind"] == "overlay"
    assert overlaid["gain"] > 0.15 and overlaid["hallucinated"] < overlaid["steered"] / 2
