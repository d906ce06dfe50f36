"""What the benchmarks share: times taken in turns, their ratios, and counts of operations."""

import statistics
import time
from collections.abc import Callable, Sequence

from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

Run = Callable[[], object]


def interleaved(runs: Sequence[Run], repeats: int) -> list[list[float]]:
    """Seconds per call of each, in turns; the first two are not counted."""
    seconds: list[list[float]] = [[] for _ in runs]
    for i in tqdm(range(repeats + 2), leave=False):
        for run, taken in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if i > 1:
                taken.append(time.perf_counter() - start)
    return seconds


def milliseconds(taken: Sequence[float]) -> float:
    """The median."""
    return statistics.median(taken) * 1e3


def ratio(slow: Sequence[float], fast: Sequence[float], factor: float = 1.0) -> str:
    """The ratio of the medians times `factor`, and the quartiles of the single pairs."""
    low, _, high = (factor * q for q in statistics.quantiles(a / b for a, b in zip(slow, fast, strict=True)))
    return f"{factor * statistics.median(slow) / statistics.median(fast):.2f} ({low:.2f} to {high:.2f})"


def flops(run: Run) -> int:
    """Floating-point operations of one call; with gradients on, as the counter misses fused kernels without them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
