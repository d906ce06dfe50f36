"""One training step by Counter-Hebb learning against the same gated network under autograd, interleaved, medians.

OMP_WAIT_POLICY=passive python benchmarks/counter_hebb_step.py
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

import fxfeedback

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from train_multi_mnist import convnet, published

NETWORKS = {
    "Multi-MNIST, published": (published, (64, 1, 28, 28), 40),
    "Multi-MNIST, convnet": (convnet, (128, 1, 28, 28), 20),
    "ResNet-18": (lambda: torchvision.models.resnet18(num_classes=10), (16, 3, 64, 64), 10),
}


def step_times(make, shape: tuple[int, ...], repeats: int) -> dict[str, list[float]]:
    """Seconds per step, for both kinds of learning, in turns; the first two of each are not counted."""
    x, task, labels = torch.randn(shape), torch.randint(2, shape[:1]), torch.randint(10, shape[:1])
    networks, times = {}, {"counter_hebb": [], "backprop": []}
    for learning in times:
        torch.manual_seed(0)
        butd = fxfeedback.to_butd(make(), n_tasks=2, embedding=50, input_size=shape[1:], learning=learning).train()
        networks[learning] = butd, torch.optim.Adam([p for p in butd.parameters() if p.requires_grad], 5e-4)
    for i in tqdm(range(repeats + 2), leave=False):
        for learning, (butd, optimizer) in networks.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(butd(x, task), labels).backward()
            optimizer.step()
            if i > 1:
                times[learning].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Print a table: median milliseconds per step, and the ratio with the quartiles of the single pairs."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'network':<26}{'Counter-Hebb':>14}{'backprop':>12}{'ratio':>8}{'quartiles':>16}")
    for name, (make, shape, repeats) in NETWORKS.items():
        times = step_times(make, shape, repeats)
        ours, theirs = (statistics.median(times[learning]) * 1e3 for learning in ("counter_hebb", "backprop"))
        low, _, high = statistics.quantiles(a / b for a, b in zip(*times.values(), strict=True))
        print(f"{name:<26}{ours:>11.1f} ms{theirs:>9.1f} ms{ours / theirs:>8.2f}{f'{low:.2f} to {high:.2f}':>16}")


if __name__ == "__main__":
    main()
