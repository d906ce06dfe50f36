"""Training an LRM network on a folder of pictures: its results, where it starts, its messages."""

import csv
import os
import struct
import sys
import zlib
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import torchvision

import fxfeedback
import train_lrm
from jobs import UserError
from marks import one_in
from small_data import write_pictures
from training import checkpoints
from training.backbones import build_backbone

COLUMNS = ["epoch", "loss", "val_top1_pass_1", "val_top1_pass_2", "lr", "seconds"]
RESULTS = {"log.csv", "tensorboard", "checkpoint.safetensors", "model"}
SQUEEZENET = ["--model", "squeezenet1_1", "--connect", "features.12:features.3.squeeze"]


def one_epoch(data: Path, out: Path) -> list[str]:
    """Arguments for a short run."""
    tiny = ["--image-size", "32", "--epochs", "1", "--workers", "0", "--device", "cpu"]
    return [str(data), "--out", str(out), *tiny]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


def job(data: Path, out: Path, *flags: str) -> int:
    """Train for a short while, results into `out`; returns the exit code."""
    tiny = ["--image-size", "32", "--batch-size", "8", "--epochs", "2", "--workers", "0", "--device", "cpu"]
    return train_lrm.main([str(data), "--out", str(out), *SQUEEZENET, *tiny, *flags])


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open() as file:
        return list(csv.DictReader(file))


def checkpoint(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "checkpoint.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- results


def test_the_job_writes_its_results(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job(data, tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == RESULTS
    log = rows(tmp_path)
    assert list(log[0]) == COLUMNS and [row["epoch"] for row in log] == ["1", "2"]
    assert all(0 <= float(row[f"val_top1_pass_{i}"]) <= 1 for row in log for i in (1, 2))
    config = checkpoints.load(tmp_path / checkpoints.FILE)[0]["settings"]
    assert config["classes"] == ["disc", "square", "triangle"] and config["pictures"] == [24, 12]
    table = capsys.readouterr().out.split("pass   top-1\n")[1].split("\n")
    assert [line.split()[0] for line in table[:2]] == ["1", "2"]
    assert float(table[1].split()[1]) == pytest.approx(100 * float(log[1]["val_top1_pass_2"]), abs=0.06)

    model, state = fxfeedback.load(tmp_path / "model"), checkpoint(tmp_path)
    assert_same(model.state_dict(), {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    assert not model.training and [y.shape for y in model(torch.zeros(5, 3, 32, 32))] == [(5, 3)] * 2


@pytest.mark.long  # steps with connections: test_feedback_networks_learn_alike in tests/test_users_expect.py
def test_it_learns(data: Path, tmp_path: Path) -> None:
    model = ["--model", "resnet18", "--connect", "layer4:layer1.0.conv1"]
    rate = ["--optimizer", "adamw", "--learning-rate", "0.001"]
    args = [str(data), "--out", str(tmp_path), "--image-size", "32", "--batch-size", "8", "--epochs", "3"]
    assert train_lrm.main([*args, *model, *rate, "--workers", "0", "--device", "cpu"]) == 0
    log = rows(tmp_path)
    assert float(log[-1]["loss"]) < float(log[0]["loss"]) - 0.2
    assert float(log[-1]["val_top1_pass_1"]) > 0.8 and float(log[-1]["val_top1_pass_2"]) > 0.8


def test_bfloat16_adamw_and_more_passes(data: Path, tmp_path: Path) -> None:
    assert job(data, tmp_path, "--amp", "--optimizer", "adamw", "--passes", "3", "--epochs", "1") == 0
    assert [name for name in rows(tmp_path)[0] if "pass" in name] == [f"val_top1_pass_{i}" for i in (1, 2, 3)]
    assert any(name.startswith("optimizer.exp_avg_sq.modulations.") for name in checkpoint(tmp_path))


class PartlyTraceable(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torchvision.models.squeezenet1_1(num_classes=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x if x.sum() > 0 else -x)


def test_a_model_of_which_a_part_can_be_traced(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.models, "get_model", lambda *args, **options: PartlyTraceable())
    args = [
        str(data),
        "--out",
        str(tmp_path),
        "--model",
        "squeezenet1_1",
        "--image-size",
        "32",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    connect = ["--connect", "backbone.features.12:backbone.features.3.squeeze", "--freeze-backbone", "--epochs", "1"]
    assert train_lrm.main([*args, *connect]) == 0
    assert [name for name in rows(tmp_path)[0] if "pass" in name] == ["val_top1_pass_2"]
    learned = {name for name in checkpoint(tmp_path) if name.startswith("optimizer.")}
    assert learned and all(".modulations." in name for name in learned)


# --- where training starts, and what it leaves alone


def test_a_frozen_backbone_stays_bit_for_bit(data: Path, tmp_path: Path) -> None:
    connect = ["--model", "resnet18", "--connect", "layer4:layer1.0.conv1", "--freeze-backbone"]
    args = one_epoch(data, tmp_path)
    torch.manual_seed(0)
    before = train_lrm.ClassifyInPasses(train_lrm.flags().parse_args([*args, *connect])).model.state_dict()
    assert train_lrm.main([*args, *connect]) == 0
    state = checkpoint(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], state[f"model.{name}"])}
    blocks = {name for name in before if name.startswith("modulations.")}
    assert changed and changed <= blocks


@pytest.mark.parametrize(("n_classes", "new"), [(3, {"classifier.1.weight", "classifier.1.bias"}), (1000, set())])
def test_pretrained_weights_fill_all_but_a_new_head(
    monkeypatch: pytest.MonkeyPatch, n_classes: int, new: set[str]
) -> None:
    published = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **options: published)
    backbone = build_backbone("squeezenet1_1", n_classes, 64, pretrained=True)
    assert backbone.fresh == new
    own = backbone.net.state_dict()
    assert all(torch.equal(own[name], published[name]) for name in own.keys() - new)


def test_a_new_head_is_trained_on_a_frozen_backbone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **options: published)
    flags = [str(data), "--out", str(tmp_path), *SQUEEZENET, "--image-size", "32", "--pretrained", "--freeze-backbone"]
    model = train_lrm.ClassifyInPasses(train_lrm.flags().parse_args(flags)).model
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in learned if "modulations" not in name} == {"classifier.1.weight", "classifier.1.bias"}
    assert any("modulations" in name for name in learned)


def test_densenets_published_names_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torchvision.models.densenet121().state_dict()
    published = {name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): own[name] for name in own}
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **options: published)
    assert not build_backbone("densenet121", 1000, 64, pretrained=True).fresh


def test_the_version_of_published_weights_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    published = torchvision.models.mnasnet0_5().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **options: published)
    assert not build_backbone("mnasnet0_5", 1000, 64, pretrained=True).fresh


def test_pretrained_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    published = torchvision.models.squeezenet1_1().state_dict()
    published["features.0.weight"] = published["features.0.weight"][:, :1]
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **options: published)
    with pytest.raises(UserError, match=r"do not fit .*features\.0"):
        build_backbone("squeezenet1_1", 3, 64, pretrained=True)


def test_weights_that_cannot_be_fetched(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*args: object, **options: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    assert "cannot fetch torchvision's weights of squeezenet1_1" in message(capsys, data, tmp_path, "--pretrained")


# --- timm


def test_a_model_of_timm(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm is optional")
    args = one_epoch(data, tmp_path)
    connect = ["--model", "timm:test_resnet", "--connect", "layer4:layer1"]
    assert train_lrm.main([*args, *connect]) == 0
    assert list(rows(tmp_path)[0]) == COLUMNS
    assert len(fxfeedback.load(tmp_path / "model")(torch.zeros(1, 3, 32, 32))) == 2


def test_an_unknown_model_of_timm(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm", reason="timm is optional")
    assert "did you mean test_resnet" in message(capsys, data, tmp_path, "--model", "timm:test_resent")


def test_without_timm(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in message(capsys, data, tmp_path, "--model", "timm:resnet18")


# --- bad input: one message, no traceback, nothing written


def message(capsys: pytest.CaptureFixture[str], data: Path, out: Path, *flags: str) -> str:
    """What the job says on stderr when it refuses `flags`, having written nothing."""
    try:
        code = job(data, out / "results", *flags)
    except SystemExit as refusal:  # argparse
        code = refusal.code
    printed = capsys.readouterr().err
    assert code in (1, 2) and "Traceback" not in printed and "error:" in printed
    assert not (out / "results").exists()  # nor a folder
    return printed


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--connect", "features.3.squeze:features.0"], "did you mean 'features.3.squeeze'"),
        (["--connect", "features.3"], "'features.3' is not SOURCE:DESTINATION"),
        (["--connect", "features.12:features.3.squeeze"], "is given twice"),
        (["--model", "squeezenet11"], "did you mean squeezenet1_1"),
        (["--model", "zzzz"], "unknown model 'zzzz'"),
        (["--image-size", "8"], "does not run on an input of size"),
        (["--image-size", "33", "--model", "vit_b_16"], "cannot be built for --image-size 33"),
        (["--epochs", "0"], "argument --epochs: 0 does not lie between"),
        (["--learning-rate", "nan"], "nan does not lie between 0 and 1000"),
        (["--device", "abacus"], "cannot use the device 'abacus'"),
    ],
)
def test_wrong_flags(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    assert expected in message(capsys, data, tmp_path, *flags)


def test_nothing_to_train(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [str(data), "--out", str(tmp_path / "results"), "--model", "squeezenet1_1", "--freeze-backbone"]
    assert train_lrm.main(flags) == 1
    assert "--freeze-backbone without --connect leaves nothing to train" in capsys.readouterr().err
    assert job(data, tmp_path / "results", "--freeze-backbone", "--passes", "1") != 0
    assert "no connection acts in 1 pass" in capsys.readouterr().err


@pytest.mark.long
def test_a_small_network_learns_digits_where_there_is_no_folder(tmp_path: Path) -> None:
    flags = ["--batch-size", "4", "--workers", "0", "--device", "cpu", "--out", str(tmp_path), "--stop-after", "2"]
    assert train_lrm.main(flags) == 130
    settings = checkpoints.load(tmp_path / checkpoints.FILE)[0]["settings"]
    assert settings["classes"] == [str(digit) for digit in range(10)] and settings["model"] == "resnet18"
    assert train_lrm.main([*flags, *SQUEEZENET, "--image-size", "32"]) == 130
    settings = checkpoints.load(tmp_path / checkpoints.FILE)[0]["settings"]
    assert settings["model"] == "squeezenet1_1" and settings["connect"] == [["features.12", "features.3.squeeze"]]


def test_missing_folders(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = message(capsys, tmp_path / "nowhere", tmp_path)
    assert f"there is no folder {tmp_path / 'nowhere/train'}" in printed and "DATA/train/cat/1.jpg" in printed
    (tmp_path / "train").symlink_to(data / "train")
    assert f"there is no folder {tmp_path / 'val'}" in message(capsys, tmp_path, tmp_path)
    (tmp_path / "val" / "disc").mkdir(parents=True)
    assert "only in one: square, triangle" in message(capsys, tmp_path, tmp_path)
    (tmp_path / "val" / "square").mkdir()
    (tmp_path / "val" / "triangle").mkdir()
    assert "Found no valid file for the classes disc, square, triangle" in message(capsys, tmp_path, tmp_path)
    (tmp_path / "one/train/disc").mkdir(parents=True)
    (tmp_path / "one/val/disc").mkdir(parents=True)
    assert "has 1 classes, and two are needed" in message(capsys, tmp_path / "one", tmp_path)


def bomb(path: Path) -> None:
    """A small file of 400 million pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


DAMAGES = {"cut short": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\nhalf"), "a pipe": os.mkfifo, "a bomb": bomb}


@one_in(3)
@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, workers: str) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            DAMAGES[damage](tmp_path / split / name / "broken.png")
    assert job(tmp_path, tmp_path / "results", "--workers", workers) == 1
    printed = capsys.readouterr().err
    assert "error: cannot read the picture" in printed and "Traceback" not in printed
    assert not (tmp_path / "results" / checkpoints.FILE).exists()


def test_an_unwritable_folder(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write results to" in message(capsys, data, tmp_path / "file")


# --- names


def test_the_names_of_the_nodes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_lrm.main(["--nodes", "--model", "squeezenet1_1", "--image-size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split(maxsplit=2) == ["features.0", "Conv2d", "(B, 64, 31, 31)"]
    names = [line.split()[0] for line in lines]
    assert names == list(fxfeedback.node_names(torchvision.models.squeezenet1_1(), (3, 64, 64)))
