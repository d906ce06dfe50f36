"""How long it takes to make the graphs of a deep network, against tracing it once with torch.fx; and how it grows.

python benchmarks/building.py [--plot FILE]
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torchvision
from timing import Figure, Ratio, Run, interleaved, ratio, show

import fxfeedback

CONNECTIONS = [(f"layer{k + 1}", f"layer{k}.0.conv1") for k in (1, 2, 3)] + [("layer4", "layer1.1.conv2")]
PASSES = (2, 4, 8, 16, 32)
REPEATS = 7


def figures() -> Iterator[Figure]:
    """ResNet-152: passes of a network with four connections, and the BU-TD network."""
    plain = torchvision.models.resnet152().eval()
    runs: list[Run] = [
        lambda: torch.fx.symbolic_trace(plain),
        lambda: fxfeedback.add_feedback(plain, CONNECTIONS, passes=4).unrolled(),
        lambda: fxfeedback.to_butd(plain, n_tasks=10).learner,
    ]
    once, unrolled, learner = interleaved(runs, REPEATS)
    for what, taken in (("add_feedback, 4 passes", unrolled), ("to_butd", learner)):
        note = f"{statistics.median(taken):.1f} s"
        yield Figure("resnet152", f"{what} / torch.fx.symbolic_trace", ratio(taken, once), note)
    seconds = growth(plain, PASSES)
    per_pass = [(seconds[n] - seconds[PASSES[0]]) / (n - PASSES[0]) for n in PASSES[1:]]
    note = ", ".join(f"{n} passes {seconds[n]:.2f} s" for n in PASSES)
    what = f"time per pass of {PASSES[-1]} / of {PASSES[1]} passes"
    yield Figure("resnet152", what, Ratio(*3 * [per_pass[-1] / per_pass[0]]), note)


def growth(plain: torch.nn.Module, passes: Sequence[int]) -> dict[int, float]:
    """Seconds to unroll so many passes, the model being traced: medians."""
    model = fxfeedback.add_feedback(plain, CONNECTIONS)
    taken: dict[int, list[float]] = {n: [] for n in passes}
    for _ in range(REPEATS):
        for n in passes:
            start = time.perf_counter()
            model.unrolled(n)
            taken[n].append(time.perf_counter() - start)
    return {n: statistics.median(seconds) for n, seconds in taken.items()}


def plot(path: Path) -> None:
    """A picture of the time over the number of passes."""
    from matplotlib.figure import Figure as Picture

    seconds = growth(torchvision.models.resnet152().eval(), PASSES)
    picture = Picture(figsize=(5, 3), layout="constrained")
    axes = picture.subplots()
    axes.plot(list(seconds), list(seconds.values()), "o-")
    axes.set(xlabel="passes", ylabel="s", title="Unrolling ResNet-152 with 4 connections", ylim=0, xlim=0)
    picture.savefig(path)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture, too")
    arguments = parser.parse_args()
    show(figures())
    if arguments.plot:
        plot(arguments.plot)


if __name__ == "__main__":
    main()
