"""What instructions cost at inference: one for the whole batch, and mixed ones, against the plain model.

OMP_WAIT_POLICY=passive python benchmarks/instructed_inference.py [--threads 2]

Gates are kept between calls; the time of the instruction pass that makes them is noted beside.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision
from timing import DEVICE, ON_GPU, PRECISIONS, Figure, command_line, ms, of_these, ratio, show, sized, timed

import fxfeedback

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from digit_networks import convnet, published

TASKS, REPEATS = 4, 15
NETWORKS = of_these(
    {
        # what makes it, the shape of its images, and on a GPU
        "Multi-MNIST, published": (published, (64, 1, 28, 28), (4096, 1, 28, 28)),
        "Multi-MNIST, convnet": (convnet, (64, 1, 28, 28), (4096, 1, 28, 28)),
        "ResNet-18": (torchvision.models.resnet18, (32, 3, 64, 64), (256, 3, 224, 224)),
    }
)


def figures() -> Iterator[Figure]:
    """For each network: a fixed instruction, and mixed ones, over the plain model."""
    for how, (name, (make, small, large)) in itertools.product(PRECISIONS, NETWORKS.items()):
        batch, *size = (sized(small[0], large[0]), *(large if ON_GPU else small)[1:])
        torch.manual_seed(0)
        plain = make().eval()
        butd = how.put(fxfeedback.to_butd(plain, n_tasks=TASKS, embedding=50, input_size=tuple(size)))
        plain, x, mixed = how.put(plain), how.images(batch, *size), torch.arange(batch, device=DEVICE) % TASKS
        runs = {
            "plain": how.infers(plain, x),
            "one instruction": how.infers(butd, x, 1),
            f"{TASKS} instructions mixed": how.infers(butd, x, mixed),
            "alone": how.infers(butd.counter_neurons, torch.arange(TASKS, device=DEVICE)),
        }
        times = timed(runs, REPEATS)
        for what in list(runs)[1:3]:
            note = "{}, {} ms; the instruction pass alone: {} ms"
            note = note.format(*(ms(times[way]) for way in (what, "plain", "alone")))
            yield Figure(how.of(name), f"{what} / plain: time", ratio(times[what], times["plain"]), note)


def main() -> None:
    """Print the table."""
    command_line(__doc__)
    show(figures())


if __name__ == "__main__":
    main()
