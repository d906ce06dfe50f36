"""All benchmarks: a table, a file of figures per machine, and docs/benchmarks.md, which is made from those.

    make bench              run all and record them: benchmarks/figures/cpu.json
    make bench DEVICE=cuda  the same on a GPU, in a file with the card's name
    make bench-check        run all and report what is worse than recorded by more than 10 %

OMP_WAIT_POLICY=passive python benchmarks/report.py [--check | --page] [--out FOLDER] [--threads 2] [BENCHMARK ...]
"""

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from timing import ON_GPU, Figure, Ratio, device_name, machine, ready, show

BENCHMARKS = (
    "lrm_inference",
    "lrm_inference compiled",
    "lrm_training",
    "prediction",
    "growth",
    "counter_hebb_step",
    "counter_hebb_step compiled",
    "instructed_inference",
    "selected_task",
    "onnx_runtime",
    "building",
    "first_call",
)
OF_A_CPU = {"growth", "building", "first_call"}
"""What a GPU says nothing new of."""
RECORDED = Path(__file__).with_name("figures")
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
WORSE = 1.1
COMMANDS = ("OMP_WAIT_POLICY", "python")


def the(benchmark: str) -> tuple[ModuleType, bool]:
    """Its module, and whether everything is compiled."""
    name, _, compiled = benchmark.partition(" ")
    return importlib.import_module(name), bool(compiled)


def file_of(folder: Path = RECORDED) -> Path:
    """Where the figures of this machine are."""
    return folder / f"{(device_name() or 'cpu').lower().replace(' ', '_')}.json"


def read(path: Path) -> dict[str, Any]:
    """What a file of figures says: benchmark -> machine and figures."""
    return json.loads(path.read_text()) if path.exists() else {}


def record(name: str, figures: Sequence[Figure], path: Path) -> None:
    """Put a benchmark's figures in the place of its old ones."""
    known = read(path)
    known[name] = {"machine": machine(), "figures": [figure._asdict() for figure in figures]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")


def recorded(name: str, path: Path) -> list[Figure]:
    """A benchmark's figures as they were last recorded."""
    return [
        Figure(**{**one, "ratio": Ratio(*one["ratio"])}) for one in read(path).get(name, {"figures": ()})["figures"]
    ]


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
turns, in one process, on one machine. `make bench` runs all benchmarks and writes this page, `make bench DEVICE=cuda` a
GPU's; `make bench-check` reports what is worse than here by more than 10 %.
"""


ON_A_GPU = (
    """Times are those of the GPU's own clock, launching included. Where CUDA graphs are replayed, the table says so."""
)


def page(folder: Path = RECORDED) -> str:
    """docs/benchmarks.md: a section per machine, the CPU first."""
    lines = [INTRODUCTION]
    for path in sorted(folder.glob("*.json"), key=lambda path: (path.stem != "cpu", path.stem)):
        known = read(path)
        card = next(iter(known.values()))["machine"].get("card")
        lines += [f"## On an {card}\n\n{ON_A_GPU}\n" if card else "## On a CPU\n"]
        for name in (name for name in BENCHMARKS if name in known):
            lines += section(name, known[name], "DEVICE=cuda " if card else "")
    return "\n".join(lines)


def section(name: str, known: dict[str, Any], device: str) -> Iterator[str]:
    """A benchmark's table."""
    module, compiled = the(name)
    about = (module.__doc__ or "").split("\n\n")
    title = " ".join(about[0].split()).rstrip(".")
    command = f"`{device}python benchmarks/{name.split()[0]}.py{' --compile' if compiled else ''}`"
    where = ", ".join(known["machine"].values())
    yield from [f"### {title}{' (compiled)' if compiled else ''}", "", f"{command} on {where}.", ""]
    yield from (part.strip() + "\n" for part in about[1:] if not part.lstrip().startswith(COMMANDS))
    yield from ["| network | what | ratio (quartiles) | |", "| --- | --- | --- | --- |"]
    for one in known["figures"]:
        yield f"| {one['network']} | {one['what']} | {Ratio(*one['ratio'])} | {one['note']} |"
    yield ""


def main() -> int:
    """Run the benchmarks; returns how many figures got worse, or benchmarks failed."""
    names = [name for name in BENCHMARKS if not (ON_GPU and name in OF_A_CPU)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the recorded figures instead")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page")
    parser.add_argument(
        "--out", type=Path, default=RECORDED, help="folder of the figures; the page is of the usual one"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("benchmarks", nargs="*", default=names, metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    arguments = parser.parse_args()
    ready(arguments.threads)
    path, complaints = file_of(arguments.out), []
    for name in () if arguments.page else arguments.benchmarks:
        print(f"\n{name}", flush=True)
        figures: list[Figure] = []
        try:
            module, compiled = the(name)
            for figure in module.figures(compiled=True) if compiled else module.figures():
                figures += show([figure])
        except Exception as error:  # the others go on
            traceback.print_exc()
            complaints.append(f"{name} failed: {error}")
        if arguments.check:
            complaints += worse(figures, recorded(name, path))
        else:
            record(name, figures, path)
    if not arguments.check and arguments.out == RECORDED:
        PAGE.write_text(page())
    print("\n".join(["", *complaints]) if complaints else "")
    return len(complaints)


if __name__ == "__main__":
    sys.exit(main())
