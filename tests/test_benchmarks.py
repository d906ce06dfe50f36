"""What is recorded of the benchmarks comes back, and what gets worse than recorded is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import report
from timing import Figure, Ratio, ratio


def figure(network, value, more_is_better=False):
    return Figure(network, "ours / theirs", Ratio(value, value - 0.1, value + 0.1), "1 and 2 ms", more_is_better)


@pytest.mark.parametrize(
    ("before", "now", "more_is_better", "expected"),
    [
        (1.0, 1.09, False, []),
        (1.0, 1.11, False, ["net: ours / theirs: was 1.00, is 1.11"]),
        (1.0, 0.5, False, []),
        (1.0, 0.9, True, ["net: ours / theirs: was 1.00, is 0.90"]),
        (1.0, 2.0, True, []),
        (1.0, None, False, ["net: ours / theirs: was 1.00, is no longer measured"]),
    ],
)
def test_what_got_worse(before, now, more_is_better, expected):
    found = [] if now is None else [figure("net", now, more_is_better)]
    assert list(report.worse(found, [figure("net", before, more_is_better)])) == expected


def test_figures_come_back_and_make_a_page(tmp_path):
    path, figures = tmp_path / "cpu.json", [figure("net", 0.5), figure("other", 0.7, more_is_better=True)]
    assert report.recorded("building", path) == []
    report.record("selected_task", [figure("net", 0.9)], path)
    report.record("selected_task", figures, path)
    report.record("building", figures[:1], path)
    assert report.recorded("selected_task", path) == figures
    page = report.page(tmp_path)
    assert page.count("| net | ours / theirs | 0.50 (0.40 to 0.60) | 1 and 2 ms |") == 2


def test_a_page_has_a_section_per_machine(tmp_path, monkeypatch):
    for card in ("", "NVIDIA Of-Tests"):
        monkeypatch.setattr(report, "device_name", lambda card=card: card)
        monkeypatch.setattr(report, "machine", lambda card=card: {"card": card} if card else {"cpu": "of tests"})
        report.record("selected_task", [figure("net", 0.5)], report.file_of(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.json", "nvidia_of-tests.json"}
    cpu, gpu = report.page(tmp_path).split("## On a")[1:]
    assert cpu.startswith(" CPU") and "`python benchmarks/selected_task.py` on of tests." in cpu
    assert gpu.startswith("n NVIDIA Of-Tests") and "`DEVICE=cuda python benchmarks/selected_task.py`" in gpu


@pytest.mark.sweep
def test_every_benchmark_runs_as_on_a_gpu(tmp_path):
    """In the smallest sizes, on the CPU."""
    root = Path(report.__file__).parent
    names = [name for name in report.BENCHMARKS if name not in report.OF_A_CPU and "compiled" not in name]
    environment = {**os.environ, "TINY": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, root / "report.py", "--out", tmp_path, *names], env=environment, check=True)
    networks = [one["network"] for known in report.read(tmp_path / "cpu.json").values() for one in known["figures"]]
    assert any("bfloat16" in name for name in networks) and any("TF32" in name for name in networks)


def test_a_ratio_is_of_medians():
    assert ratio([2.0, 4.0, 60.0], [1.0, 2.0, 3.0], factor=10).ratio == 20
