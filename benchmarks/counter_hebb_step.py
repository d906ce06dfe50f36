"""One training step by Counter-Hebb learning against the same gated network under autograd, interleaved, medians.

OMP_WAIT_POLICY=passive python benchmarks/counter_hebb_step.py
"""

import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from timing import Run, interleaved, milliseconds, ratio

import fxfeedback

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from train_multi_mnist import convnet, published

NETWORKS = {
    "Multi-MNIST, published": (published, (64, 1, 28, 28), 40),
    "Multi-MNIST, convnet": (convnet, (128, 1, 28, 28), 20),
    "ResNet-18": (lambda: torchvision.models.resnet18(num_classes=10), (16, 3, 64, 64), 10),
}


def steps(make, shape: tuple[int, ...]) -> list[Run]:
    """A step of either kind of learning, Counter-Hebb first."""
    x, task, labels = torch.randn(shape), torch.randint(2, shape[:1]), torch.randint(10, shape[:1])

    def step(butd: fxfeedback.BUTD, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(butd(x, task), labels).backward()
        optimizer.step()

    runs = []
    for learning in ("counter_hebb", "backprop"):
        torch.manual_seed(0)
        butd = fxfeedback.to_butd(make(), n_tasks=2, embedding=50, input_size=shape[1:], learning=learning).train()
        optimizer = torch.optim.Adam([p for p in butd.parameters() if p.requires_grad], 5e-4)
        runs.append(functools.partial(step, butd, optimizer))
    return runs


def main() -> None:
    """Print a table: median milliseconds per step, and the ratio with the quartiles of the single pairs."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'network':<26}{'Counter-Hebb':>14}{'backprop':>12}{'ratio':>24}")
    for name, (make, shape, repeats) in NETWORKS.items():
        ours, theirs = interleaved(steps(make, shape), repeats)
        print(f"{name:<26}{milliseconds(ours):>11.1f} ms{milliseconds(theirs):>9.1f} ms{ratio(ours, theirs):>24}")


if __name__ == "__main__":
    main()
