"""What the benchmarks share: a command line, times taken in turns, their ratios, figures, counts of operations."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

Run = Callable[[], object]


class Ratio(NamedTuple):
    """Of medians, with the quartiles of the single pairs."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


class Figure(NamedTuple):
    """One result: of which network, what over what, and what else was seen, as the milliseconds."""

    network: str
    what: str
    ratio: Ratio
    note: str = ""
    more_is_better: bool = False


def command_line(about: str | None, networks: Iterable[str] = (), compiles: bool = False) -> argparse.Namespace:
    """What every benchmark may be told; sets torch's threads and says what it runs on.

    about: of the benchmark. networks: those that can be chosen from. compiles: whether torch.compile is a choice.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    if compiles:
        parser.add_argument("--compile", action="store_true", help="torch.compile all of them")
    if networks:
        parser.add_argument("networks", nargs="*", default=list(networks), metavar="NETWORK", help=", ".join(networks))
    given = parser.parse_args()
    unknown = [name for name in getattr(given, "networks", ()) if name not in networks]
    if unknown:
        parser.error(f"there is no network {unknown[0]!r}; choose from {', '.join(networks)}")
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads")
    return given


def show(figures: Iterable[Figure]) -> list[Figure]:
    """Print the figures as they come; returns them."""
    shown = []
    for figure in figures:
        print(f"{figure.network:<40}{figure.what:<52}{figure.ratio:>22}  {figure.note}", flush=True)
        shown.append(figure)
    return shown


def interleaved(runs: Sequence[Run], repeats: int) -> list[list[float]]:
    """Seconds per call of each, in turns; the first two are not counted."""
    seconds: list[list[float]] = [[] for _ in runs]
    for i in tqdm(range(repeats + 2), leave=False, disable=None):
        for run, taken in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if i > 1:
                taken.append(time.perf_counter() - start)
    return seconds


def milliseconds(taken: Sequence[float]) -> float:
    """The median."""
    return statistics.median(taken) * 1e3


def ratio(slow: Sequence[float], fast: Sequence[float], factor: float = 1.0) -> Ratio:
    """The ratio of the medians times `factor`, and the quartiles of the single pairs."""
    low, _, high = (factor * q for q in statistics.quantiles(a / b for a, b in zip(slow, fast, strict=True)))
    return Ratio(factor * statistics.median(slow) / statistics.median(fast), low, high)


def flops(run: Run) -> int:
    """Floating-point operations of one call; with gradients on, as the counter misses fused kernels without them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
