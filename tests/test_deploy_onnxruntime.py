"""Every product in ONNX Runtime computes what torch computes, and the table says so."""

import importlib
import re

import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import deploy_onnxruntime
from fxfeedback.errors import ExportError

TINY = ["--model", "published", "--batch", "3", "--repeats", "1", "--provider", "cpu", "--threads", "1"]


def job(out, *flags):
    return deploy_onnxruntime.main([*TINY, "--out", str(out), *flags])


def rows(text):
    """Product -> (difference, milliseconds of torch, of ONNX Runtime)."""
    found = re.findall(r"^(.{12}) +[\d.]+ MB +(\S+) +([\d.]+) ms +([\d.]+) ms +[\d.]+   CPUExecution", text, re.M)
    return {name.strip(): tuple(map(float, numbers)) for name, *numbers in found}


@pytest.mark.long  # one of them: below
def test_the_products_of_a_network(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert job(tmp_path, "--only", "instructed", "one-task", "learner") == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ["instructed", "one task", "learner"]
    assert all(difference < 1e-4 and here > 0 and there > 0 for difference, here, there in table.values())
    assert {path.name for path in tmp_path.iterdir()} == {"instructed.onnx", "one_task.onnx", "learner.onnx"}
    assert torch.get_num_threads() == threads


@pytest.mark.long  # passes in the small: tests/test_export.py
def test_the_passes(tmp_path, capsys):
    assert job(tmp_path, "--only", "passes", "--batch", "1") == 0
    ((name, (difference, *_)),) = rows(capsys.readouterr().out).items()
    assert name == "passes" and difference < 1e-4


def test_numbers_that_differ_are_seen(tmp_path, capsys, monkeypatch):
    run = deploy_onnxruntime.Session.__call__
    monkeypatch.setattr(
        importlib.import_module("fxfeedback.export"), "check_file", lambda *given: None
    )  # which sees it, too
    monkeypatch.setattr(deploy_onnxruntime.Session, "__call__", lambda *given, **more: run(*given, **more) * 1.01)
    assert job(tmp_path, "--only", "instructed") == 1
    assert "NOT OK: the numbers differ" in capsys.readouterr().out


def test_a_product_that_cannot_be_exported_is_a_row(tmp_path, capsys, monkeypatch):
    def refuse(*given, **more):
        raise ExportError("no ONNX form at 'conv1'")

    monkeypatch.setattr(deploy_onnxruntime.fxfeedback, "export", refuse)
    assert job(tmp_path, "--only", "one-task") == 1
    assert "one task    NOT OK: no ONNX form at 'conv1'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model", "resnet81"], "unknown model 'resnet81'"),
        (["--provider", "abacus", "--only", "instructed"], "the provider abacus cannot be used"),
        (["--batch", "0"], "argument --batch: 0 does not lie between"),
        (["--threads", "two"], "argument --threads: 'two' is not a whole number"),
        (["--only", "all"], "argument --only: invalid choice"),
        (["--model", "resnet18", "--batch", "1", "--size", "32"], "a larger --batch or --size may help"),
    ],
)
def test_wrong_flags(tmp_path, capsys, flags, expected):
    try:
        code = job(tmp_path / "out", *flags)
    except SystemExit as refusal:  # argparse
        code = refusal.code
    printed = capsys.readouterr().err
    assert code not in (0, None) and "Traceback" not in printed and expected in printed
