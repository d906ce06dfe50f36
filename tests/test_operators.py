"""What `make zoo-ops` checks of PyTorch's operators, here on fewer samples; and that the checks see a broken rule."""

import csv
import importlib
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from fxfeedback.rules import RULES, roles
from marks import one_in

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "zoo"))
zoo = importlib.import_module("operators")

with (ROOT / "docs" / "zoo" / "operators.csv").open(newline="") as file:
    RECORDED = {row["operator"]: row["verdict"] for row in csv.DictReader(file)}


@one_in(107)
@pytest.mark.parametrize("name", RECORDED)
def test_an_operator_is_exact_or_refused(name):
    if name not in zoo.entries():
        pytest.skip("this version of torch does not test it, or not in float64")
    row = zoo.check(name, number=1, export=False)
    assert row.verdict in ("exact", "partly", "refused", "not tried"), row.reason
    if RECORDED[name] == "exact":
        assert row.verdict in ("exact", "not tried"), row.reason


def test_no_recorded_operator_is_raw_or_wrong():
    assert not [name for name, verdict in RECORDED.items() if verdict in ("raw", "WRONG")]
    assert set(RECORDED.values()) <= set(zoo.VERDICTS)


# -- the checks see what they are there for ----------------------------------------------------------------------------


def test_a_wrong_rule_is_seen(monkeypatch):
    monkeypatch.setattr(
        RULES[torch.sin], "table", lambda y, input: {"input": roles(instruct=lambda t: t, error=lambda e: e)}
    )
    row = zoo.check("sin", number=1, export=False)
    assert row.verdict == "WRONG" and "an update is off by" in row.reason


def test_a_raw_error_is_seen(monkeypatch):
    def fails(*args, **kwargs):
        raise ZeroDivisionError("of no class of ours")

    monkeypatch.setattr(zoo.fxfeedback, "to_butd", fails)
    row = zoo.check("sin", number=1, export=False)
    assert row.verdict == "raw" and row.reason == "parameters: ZeroDivisionError: of no class of ours"


def test_what_is_per_sample_is_tried_batch_first():
    def roles_of(name):
        op = zoo.entries()[name]
        return [{case.role for case, _ in zoo.cases(op, sample)} for sample in zoo.samples_of(op, 3)]

    assert all("batch" in found for found in roles_of("sin"))
    assert all("batch" in found for found in roles_of("nn.functional.conv2d"))
    assert any("whole" in found for found in roles_of("sum")), "a sum of everything has no batch"


def test_the_table(capsys, monkeypatch, tmp_path):
    rows = {
        "sin": zoo.Row("exact", 4, 4, "no", "export: no such op in ONNX"),
        "cos": zoo.Row("partly", 4, 3, "yes", "no rule for this, that"),
        "tan": None,
    }
    monkeypatch.setattr(zoo, "in_workers", lambda work, names, *_: [(n, rows[n], "it died") for n in names])
    file = tmp_path / "operators.csv"
    file.write_text("operator,verdict,tried,exact,exported,reason,torch\nsin,refused,1,0,-,of old,2.0\n")
    assert zoo.main(["tan", "sin", "cos"], file) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "3 operators: 1 exact, 1 partly, 0 refused, 1 raw, 0 WRONG, 0 not tried; 1 exported, 1 not"
    )
    assert file.read_text().splitlines()[1:] == [
        f'cos,partly,4,3,yes,"no rule for this, that",{torch.__version__}',
        f"sin,exact,4,4,no,export: no such op in ONNX,{torch.__version__}",
        f"tan,raw,0,0,-,it died,{torch.__version__}",
    ]
    with pytest.raises(SystemExit, match="no differentiable operator sinus"):
        zoo.main(["sinus"])


@pytest.mark.long
def test_the_table_by_processes(tmp_path):
    file = tmp_path / "operators.csv"
    assert zoo.main(["sin", "cos"], file) == 0
    with file.open(newline="") as rows:
        found = [(row["operator"], row["verdict"], row["exported"]) for row in csv.DictReader(rows)]
    assert found == [("cos", "exact", "yes"), ("sin", "exact", "yes")]


@pytest.mark.long
def test_a_process_that_hangs_or_dies_takes_nothing_with_it():
    workers = importlib.import_module("workers")
    slept = list(workers.in_workers(time.sleep, [0, 1000, 0.1], 1, 10.0))
    assert slept == [(0, None, ""), (1000, None, "not done after 10 s"), (0.1, None, "")]
    ended = list(workers.in_workers(os._exit, [3], 2, 60.0))
    assert ended == [(3, None, "the process ended with exit code 3")]
