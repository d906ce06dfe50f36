"""What instructions cost at inference: one for the whole batch, and mixed ones, against the plain model.

OMP_WAIT_POLICY=passive python benchmarks/instructed_inference.py [--threads 2]

Gates are kept between calls; the time of the instruction pass that makes them is noted beside.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision
from timing import Figure, command_line, interleaved, milliseconds, ratio, show

import fxfeedback

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from train_multi_mnist import convnet, published

TASKS, REPEATS = 4, 15
NETWORKS = {
    "Multi-MNIST, published": (published, (64, 1, 28, 28)),
    "Multi-MNIST, convnet": (convnet, (64, 1, 28, 28)),
    "ResNet-18": (torchvision.models.resnet18, (32, 3, 64, 64)),
}


def figures() -> Iterator[Figure]:
    """For each network: a fixed instruction, and mixed ones, over the plain model."""
    for name, (make, shape) in NETWORKS.items():
        torch.manual_seed(0)
        plain = make().eval()
        butd = fxfeedback.to_butd(plain, n_tasks=TASKS, embedding=50, input_size=shape[1:])
        x, mixed = torch.randn(shape), torch.arange(shape[0]) % TASKS
        runs = [
            lambda plain=plain, x=x: plain(x),
            lambda butd=butd, x=x: butd(x, 1),
            lambda butd=butd, x=x, mixed=mixed: butd(x, mixed),
            lambda butd=butd: butd.counter_neurons(torch.arange(TASKS)),
        ]
        with torch.no_grad():
            alone, fixed, several, pass_down = interleaved(runs, REPEATS)
        note = "{:.1f}, {:.1f} ms; the instruction pass alone: {:.1f} ms"
        times = [milliseconds(taken) for taken in (fixed, alone, pass_down)]
        yield Figure(name, "one instruction / plain: time", ratio(fixed, alone), note.format(*times))
        times[0] = milliseconds(several)
        yield Figure(name, f"{TASKS} instructions mixed / plain: time", ratio(several, alone), note.format(*times))


def main() -> None:
    """Print the table."""
    command_line(__doc__)
    show(figures())


if __name__ == "__main__":
    main()
