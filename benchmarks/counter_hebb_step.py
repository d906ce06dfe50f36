"""One training step by Counter-Hebb learning against the same gated network under autograd: time and peak memory.

OMP_WAIT_POLICY=passive python benchmarks/counter_hebb_step.py [--compile] [--threads 2] [NETWORK ...]

The steps are taken in turns. The peak is what torch's profiler, or a GPU's own count, saw allocated in one step,
gradients included.
"""

import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from timing import (
    DEVICE,
    ON_GPU,
    PLAIN,
    PRECISIONS,
    Figure,
    Precision,
    Ratio,
    Run,
    both_ways,
    command_line,
    gpu_peak,
    ms,
    of_these,
    ratio,
    show,
    sized,
    timed,
    with_graphs,
)
from torch.profiler import ProfilerActivity, profile

import fxfeedback

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from digit_networks import convnet, published

models = torchvision.models
NETWORKS = of_these(
    {
        # what makes it, the shape of its images, and on a GPU; turns
        "Multi-MNIST, published": (published, (128, 1, 28, 28), (4096, 1, 28, 28), 30),
        "Multi-MNIST, convnet": (convnet, (128, 1, 28, 28), (4096, 1, 28, 28), 30),
        "ResNet-18": (lambda: models.resnet18(num_classes=10), (16, 3, 64, 64), (256, 3, 224, 224), 15),
        "ResNet-50": (lambda: models.resnet50(num_classes=10), (8, 3, 64, 64), (128, 3, 224, 224), 15),
        "MobileNetV2": (lambda: models.mobilenet_v2(num_classes=10), (16, 3, 96, 96), (128, 3, 224, 224), 15),
        "ViT-B/32": (lambda: models.vit_b_32(num_classes=10), (4, 3, 224, 224), (128, 3, 224, 224), 9),
    }
)
PAIR = ("Counter-Hebb", "backprop")


def figures(networks: Sequence[str] = (), compiled: bool = False) -> Iterator[Figure]:
    """Counter-Hebb over backpropagation, for each network; without names all."""
    for how, name in itertools.product(PRECISIONS, networks or NETWORKS):
        make, small, large, repeats = NETWORKS[name]
        shape = (sized(small[0], large[0]), *(large if ON_GPU else small)[1:])
        runs = steps(make, shape, compiled, how)
        ours, theirs = ((gpu_peak if ON_GPU else peak)(run) / 1e6 for run in runs.values())
        for graph, times in both_ways(timed(runs if compiled else with_graphs(runs), repeats)):
            what = f"Counter-Hebb step / backprop{', both compiled' if compiled else ''}{graph}"
            note = ", ".join(f"{ms(times[way])}" for way in PAIR) + " ms"
            yield Figure(how.of(name), f"{what}: time", ratio(*(times[way] for way in PAIR)), note)
            if not graph:
                over = Ratio(*[ours / theirs] * 3)
                yield Figure(how.of(name), f"{what}: peak memory", over, f"{ours:.0f}, {theirs:.0f} MB")


def steps(make, shape: tuple[int, ...], compiled: bool = False, how: Precision = PLAIN) -> dict[str, Run]:
    """A step of either kind of learning."""
    torch.compiler.reset()  # it compiles a function for so many models only
    x = how.images(*shape)
    task, labels = torch.randint(2, shape[:1], device=DEVICE), torch.randint(10, shape[:1], device=DEVICE)

    def step(butd: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        with how():
            loss = F.cross_entropy(butd(x, task), labels)
        loss.backward()
        optimizer.step()

    runs = {}
    for way, learning in zip(PAIR, ("counter_hebb", "backprop"), strict=True):
        torch.manual_seed(0)
        butd = fxfeedback.to_butd(make(), n_tasks=2, embedding=50, input_size=shape[1:], learning=learning)
        butd = how.put(butd).train()
        optimizer = torch.optim.SGD([p for p in butd.parameters() if p.requires_grad], 1e-3)
        runs[way] = functools.partial(step, torch.compile(butd, fullgraph=True) if compiled else butd, optimizer)
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
