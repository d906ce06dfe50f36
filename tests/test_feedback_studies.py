"""The studies of feedback: corruptions are what they say, attacks stay in their bounds, the job writes its results."""

import csv
import sys

import pytest
import torch

import feedback_studies as studies
from small_data import write_classes

TINY = ["--steps", "3", "--batch-size", "16", "--test-size", "30", "--device", "cpu"]


def test_corruptions_are_what_they_say():
    images, generator = torch.rand(4, 3, 20, 24), torch.Generator().manual_seed(0)
    noisy = studies.noise(torch.full((4, 3, 50, 50), 0.5), 0.1, generator)
    assert abs(float(noisy.std()) - 0.1) < 0.005 and 0 <= float(noisy.min()) <= float(noisy.max()) <= 1
    flat = torch.full((1, 1, 9, 9), 0.3)
    torch.testing.assert_close(studies.blur(flat, 2.0, generator), flat)
    assert studies.blur(images, 2.0, generator).std() < images.std() / 2
    torch.testing.assert_close(studies.contrast(images, 0.0, generator), images)
    gray = studies.contrast(images, 1.0, generator)
    torch.testing.assert_close(gray, images.mean((1, 2, 3), keepdim=True).expand_as(images))


@pytest.mark.long
@pytest.mark.parametrize("flags", [["--no-attacks"], pytest.param([], marks=pytest.mark.long)])
def test_the_job_writes_its_results(flags, tmp_path, capsys):
    if not flags:
        pytest.importorskip("foolbox")
    assert studies.main([*TINY, *flags, "--epsilons", "0.1", "--repeat", "2", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"accuracy.csv", "similarity.csv", "studies.png"}
    with (tmp_path / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    attacks = {row["condition"] for row in rows} & set(studies.ATTACKS)
    assert len(rows) == 2 * 2 * (10 + 2 * (not flags)) and attacks == (set() if flags else {"FGSM", "PGD"})
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    with (tmp_path / "similarity.csv").open() as file:
        likeness = list(csv.DictReader(file))
    assert {row["node"] for row in likeness} == {"conv2", "relu3", "head"}
    assert all(-1 - 1e-6 <= float(row["rsa"]) <= 1 + 1e-6 for row in likeness)
    assert "±" in capsys.readouterr().out


@pytest.mark.long
def test_a_folder_of_pictures_with_a_published_network(tmp_path):
    data = write_classes(tmp_path / "data", ["7", "497"], 1)
    flags = ["--data", str(data), "--model", "alexnet_lrm1", "--weights", "none", "--no-attacks", "--device", "cpu"]
    assert studies.main([*flags, "--batch-size", "2", "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out/accuracy.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 10


@pytest.mark.long
def test_attacks_stay_within_their_size():
    pytest.importorskip("foolbox")
    args = studies.parse_arguments([*TINY, "--epsilons", "0.1"])
    _, network, loader, _ = next(studies.networks(args))
    images, labels = next(iter(loader))
    network.eval()
    for name, size, changed in studies.conditions(network, args):
        if name in studies.ATTACKS:
            first, second = changed(images, labels)
            assert not torch.equal(first, second)
            other = torch.stack([first, second])
            assert (other - images).abs().max() <= size + 1e-6 and other.min() >= 0 and other.max() <= 1


@pytest.mark.long
def test_missing_attacks_are_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    assert studies.main([*TINY, "--out", str(tmp_path)]) == 1
    assert "pip install 'fxfeedback[attacks]', or leave them out" in capsys.readouterr().err
