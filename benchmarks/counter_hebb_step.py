"""One training step by Counter-Hebb learning against the same gated network under autograd: time and peak memory.

OMP_WAIT_POLICY=passive python benchmarks/counter_hebb_step.py [--compile] [--threads 2] [NETWORK ...]

The steps are taken in turns. The peak is what torch's profiler saw allocated in one step, gradients included.
"""

import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from timing import Figure, Ratio, Run, command_line, interleaved, milliseconds, ratio, show
from torch.profiler import ProfilerActivity, profile

import fxfeedback

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from train_multi_mnist import convnet, published

models = torchvision.models
NETWORKS = {
    "Multi-MNIST, published": (published, (128, 1, 28, 28), 30),
    "Multi-MNIST, convnet": (convnet, (128, 1, 28, 28), 30),
    "ResNet-18": (lambda: models.resnet18(num_classes=10), (16, 3, 64, 64), 15),
    "ResNet-50": (lambda: models.resnet50(num_classes=10), (8, 3, 64, 64), 15),
    "MobileNetV2": (lambda: models.mobilenet_v2(num_classes=10), (16, 3, 96, 96), 15),
    "ViT-B/32": (lambda: models.vit_b_32(num_classes=10), (4, 3, 224, 224), 9),
}


def figures(networks: Sequence[str] = (), compiled: bool = False) -> Iterator[Figure]:
    """Counter-Hebb over backpropagation, for each network; without names all."""
    what = "Counter-Hebb step / backprop" + (", both compiled" if compiled else "")
    for name in networks or NETWORKS:
        make, shape, repeats = NETWORKS[name]
        runs = steps(make, shape, compiled)
        ours, theirs = interleaved(runs, repeats)
        note = f"{milliseconds(ours):.1f}, {milliseconds(theirs):.1f} ms"
        yield Figure(name, f"{what}: time", ratio(ours, theirs), note)
        ours, theirs = (peak(run) / 1e6 for run in runs)
        yield Figure(name, f"{what}: peak memory", Ratio(*[ours / theirs] * 3), f"{ours:.0f}, {theirs:.0f} MB")


def steps(make, shape: tuple[int, ...], compiled: bool = False) -> list[Run]:
    """A step of either kind of learning, Counter-Hebb first."""
    torch.compiler.reset()  # it compiles a function for so many models only
    x, task, labels = torch.randn(shape), torch.randint(2, shape[:1]), torch.randint(10, shape[:1])

    def step(butd: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(butd(x, task), labels).backward()
        optimizer.step()

    runs = []
    for learning in ("counter_hebb", "backprop"):
        torch.manual_seed(0)
        butd = fxfeedback.to_butd(make(), n_tasks=2, embedding=50, input_size=shape[1:], learning=learning).train()
        optimizer = torch.optim.SGD([p for p in butd.parameters() if p.requires_grad], 1e-3)
        runs.append(functools.partial(step, torch.compile(butd, fullgraph=True) if compiled else butd, optimizer))
    return runs


def peak(run: Run) -> int:
    """The most bytes that one call holds at a time beyond what it found."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def main() -> None:
    """Print the table."""
    given = command_line(__doc__, NETWORKS, compiles=True)
    show(figures(given.networks, given.compile))


if __name__ == "__main__":
    main()
