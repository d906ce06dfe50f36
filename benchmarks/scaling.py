"""How learning would scale to many GPUs: a simulation of what DistributedDataParallel sends while it computes.

    python benchmarks/scaling.py [--network resnet50] [--step 0.1] [--plot FILE]

What is measured, here: when in a step each parameter's update is there. Backpropagation has them layer by layer, and
torch sends a bucket while the layers below are computed; Counter-Hebb learning hands all of them over when its pass is
done. What is given: seconds of a step on one GPU, and how fast the links are. What is computed: a ring sends each
bucket's bytes 2 (n - 1) / n times over the slowest link, after 2 log2(n) latencies, one bucket after the other; a step
ends when the last bucket has arrived. Nothing here was measured on several GPUs.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision

import fxfeedback

COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
FIRST, REST = 1 << 20, 25 << 20
"""Bytes of the first bucket and of the others, as DistributedDataParallel fills them."""


class Link(NamedTuple):
    """name: what it is. bytes: each GPU sends a second. latency: seconds of one hop."""

    name: str
    bytes: float
    latency: float


LINKS = (
    Link("NVLink, 450 GB/s", 450e9, 3e-6),
    Link("InfiniBand, 50 GB/s", 50e9, 5e-6),
    Link("Ethernet, 3 GB/s", 3e9, 3e-5),
)


class Update(NamedTuple):
    """ready: which part of the step has passed when it is there. bytes: it has."""

    ready: float
    bytes: int


def updates(name: str, learning: str, size: int) -> list[Update]:
    """Those of a step of two images on this machine, in the order in which they come."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).train()
    network = model if learning == "plain" else fxfeedback.to_butd(model, n_tasks=2, input_size=(3, size, size))
    x, call = torch.randn(2, 3, size, size), (lambda x: network(x)) if learning == "plain" else lambda x: network(x, 1)
    F.cross_entropy(call(x), torch.tensor([0, 1])).backward()  # makes what the first call makes
    seen: list[tuple[float, int]] = []

    def there(parameter: torch.Tensor) -> None:
        seen.append((time.perf_counter(), parameter.nbytes))

    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(there)
    start = time.perf_counter()
    F.cross_entropy(call(x), torch.tensor([0, 1])).backward()
    end = time.perf_counter()
    return [Update((at - start) / (end - start), size) for at, size in seen]


def buckets(those: Sequence[Update]) -> list[Update]:
    """What is sent together: a bucket is ready with its last update."""
    made, ready, filled = [], 0.0, 0
    for one in those:
        ready, filled = one.ready, filled + one.bytes
        if filled >= (REST if made else FIRST):
            made.append(Update(ready, filled))
            filled = 0
    return [*made, Update(ready, filled)] if filled else made


def step(sent: Sequence[Update], alone: float, link: Link, count: int) -> float:
    """Seconds of a step of so many GPUs, of which one alone takes `alone`."""
    free = 0.0
    for one in sent:
        taken = 2 * (count - 1) / count * one.bytes / link.bytes + 2 * math.log2(count) * link.latency
        free = max(free, one.ready * alone) + taken
    return max(alone, free)


def main() -> None:
    """Print the table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="of torchvision (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="of its images (default %(default)s)")
    parser.add_argument("--step", type=float, default=0.1, help="seconds of a step on one GPU (default %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture, too")
    args = parser.parse_args()
    sent = {how: buckets(updates(args.network, how, args.size)) for how in ("plain", "counter_hebb")}
    megabytes = sum(one.bytes for one in sent["plain"]) / 1e6
    print(f"{args.network}, {megabytes:.0f} MB of updates, a step of {1e3 * args.step:.0f} ms on one GPU; efficiency\n")
    print(f"{'':<22}{'learning':<14}" + "".join(f"{count:>8}" for count in COUNTS))
    curves = {}
    for link in LINKS:
        for how, of_it in sent.items():
            curve = curves[link.name, how] = [args.step / step(of_it, args.step, link, count) for count in COUNTS]
            print(f"{link.name:<22}{how:<14}" + "".join(f"{share:>8.3f}" for share in curve))
    if args.plot:
        plot(curves, args.network, args.plot)


def plot(curves: dict[tuple[str, str], list[float]], network: str, file: Path) -> None:
    """A picture of the efficiency over the number of GPUs."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6, 3.5), layout="constrained")
    axes = picture.subplots()
    for number, ((link, how), shares) in enumerate(curves.items()):
        style = "-" if how == "plain" else "--"
        axes.plot(COUNTS, shares, style, color=f"C{number // 2}", label=f"{link}, {how.replace('_', '-')}")
    axes.set(xscale="log", xlabel="GPUs", ylabel="efficiency", ylim=(0, 1.05), title=f"{network}, simulated")
    axes.set_xticks(COUNTS, map(str, COUNTS))
    axes.legend(fontsize="small")
    picture.savefig(file)


if __name__ == "__main__":
    main()
