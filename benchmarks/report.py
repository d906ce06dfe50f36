"""All benchmarks: a table, benchmarks/figures.json, and docs/benchmarks.md, which is made from it.

    make bench        run all and record them
    make bench-check  run all and report what is worse than recorded by more than 10 %

OMP_WAIT_POLICY=passive python benchmarks/report.py [--check] [--threads 2] [BENCHMARK ...]
"""

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from timing import Figure, Ratio, show

BENCHMARKS = (
    "lrm_inference",
    "lrm_inference compiled",
    "lrm_training",
    "growth",
    "counter_hebb_step",
    "counter_hebb_step compiled",
    "instructed_inference",
    "selected_task",
    "onnx_runtime",
    "building",
)
RECORDED = Path(__file__).with_name("figures.json")
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
WORSE = 1.1
COMMANDS = ("OMP_WAIT_POLICY", "python")


def the(benchmark: str) -> tuple[ModuleType, bool]:
    """Its module, and whether everything is compiled."""
    name, _, compiled = benchmark.partition(" ")
    return importlib.import_module(name), bool(compiled)


def machine() -> dict[str, str]:
    """What the figures hold for."""
    cpu = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return {"cpu": cpu, "threads": f"{torch.get_num_threads()} threads", "torch": f"torch {torch.__version__}"}


def record(name: str, figures: Sequence[Figure], path: Path = RECORDED) -> None:
    """Put a benchmark's figures in the place of its old ones."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {"machine": machine(), "figures": [figure._asdict() for figure in figures]}
    path.write_text(json.dumps(known, indent=1) + "\n")


def recorded(name: str, path: Path = RECORDED) -> list[Figure]:
    """A benchmark's figures as they were last recorded."""
    known = json.loads(path.read_text()) if path.exists() else {}
    return [Figure(**{**one, "ratio": Ratio(*one["ratio"])}) for one in known.get(name, {"figures": ()})["figures"]]


def worse(now: Sequence[Figure], before: Sequence[Figure]) -> Iterator[str]:
    """What got worse by more than 10 %, or is no longer there."""
    found = {(figure.network, figure.what): figure.ratio.ratio for figure in now}
    for old in before:
        new, was = found.get((old.network, old.what)), old.ratio.ratio
        if new is None:
            yield f"{old.network}: {old.what}: was {was:.2f}, is no longer measured"
        elif (was / new if old.more_is_better else new / was) > WORSE:
            yield f"{old.network}: {old.what}: was {was:.2f}, is {new:.2f}"


INTRODUCTION = """# Benchmarks

Every figure is a ratio of medians, with the quartiles of the ratios of single pairs of runs. What is compared ran in
turns, in one process, on one machine. `make bench` runs all benchmarks and writes this page; `make bench-check` reports
what is worse than here by more than 10 %.
"""


def page(path: Path = RECORDED) -> str:
    """docs/benchmarks.md."""
    known, lines = json.loads(path.read_text()), [INTRODUCTION]
    for name in (name for name in BENCHMARKS if name in known):
        module, compiled = the(name)
        about = (module.__doc__ or "").split("\n\n")
        title = " ".join(about[0].split()).rstrip(".")
        command = f"`python benchmarks/{name.split()[0]}.py{' --compile' if compiled else ''}`"
        where = ", ".join(known[name]["machine"].values())
        lines += [f"## {title}{' (compiled)' if compiled else ''}", "", f"{command} on {where}.", ""]
        lines += [part.strip() + "\n" for part in about[1:] if not part.lstrip().startswith(COMMANDS)]
        lines += ["| network | what | ratio (quartiles) | |", "| --- | --- | --- | --- |"]
        for one in known[name]["figures"]:
            lines.append(f"| {one['network']} | {one['what']} | {Ratio(*one['ratio'])} | {one['note']} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Run the benchmarks; returns how many figures got worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the recorded figures instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("benchmarks", nargs="*", default=BENCHMARKS, metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    complaints = []
    for name in arguments.benchmarks:
        print(f"\n{name}", flush=True)
        module, compiled = the(name)
        figures = show(module.figures(compiled=True) if compiled else module.figures())
        if arguments.check:
            complaints += worse(figures, recorded(name))
        else:
            record(name, figures)
            PAGE.write_text(page())
    print("\n".join(["", *complaints]) if complaints else "")
    return len(complaints)


if __name__ == "__main__":
    sys.exit(main())
