"""Training of two passes of LRM networks against training of the plain network: time, and memory of activations.

OMP_WAIT_POLICY=passive python benchmarks/lrm_training.py [--threads 2] [NETWORK ...]

Time is that of a forward and a backward pass of 16 images (AlexNet) or 8 (ResNet-50), on a GPU of 256 or 64. Memory is
the peak in such a step, without weights and their gradients; on the CPU in one of 128 images, counted tensor by tensor
on torch's meta device.
"""

import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from lrm_inference import NETWORKS, Hooked
from timing import (
    DEVICE,
    ON_GPU,
    PLAIN,
    PRECISIONS,
    TINY,
    Figure,
    Precision,
    Ratio,
    Run,
    command_line,
    gpu_peak,
    ms,
    of_these,
    ratio,
    show,
    sized,
    timed,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxfeedback

TIMED = of_these({"alexnet": (16, 256), "resnet50": (8, 64)})
BATCH, REPEATS = 128, 9


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and not yet freed, beside a model's; `most`: at any one time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet(p.untyped_storage() for p in [*model.parameters(), *model.buffers()])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count it until it is freed."""
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, size: int) -> None:
        """It is freed."""
        self.now -= size


def activations(model: nn.Module, batch: int = BATCH, size: int = 224) -> int:
    """Bytes at the peak of a training step, less the weights and their gradients."""
    model = model.to("meta")

    def run() -> None:
        x, labels = (torch.empty(batch, *rest, device="meta") for rest in ((3, size, size), ()))
        step(model, x, labels.long())()

    return most_alive(model, run) - sum(p.nbytes for p in model.parameters())


def most_alive(model: nn.Module, run: Run) -> int:
    """Bytes at the peak of a call, less those of the model; the first one, which builds the graph, is not looked at."""
    run()
    alive = Alive(model)
    with alive:
        run()
    return alive.most


def step(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, how: Precision = PLAIN) -> Run:
    """A forward and a backward pass; the loss is the mean over the passes."""

    def run() -> None:
        model.zero_grad()
        with how():
            outputs = model(x)
            outputs = outputs if isinstance(outputs, list) else [outputs]
            loss = sum(F.cross_entropy(output, labels) for output in outputs) / len(outputs)
        loss.backward()

    return run


def ways(name: str) -> dict[str, nn.Module]:
    """What is compared, the plain network first."""
    torch.manual_seed(0)
    hooked = torchvision.models.get_model(name).eval()
    for module in hooked.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # or it overwrites what a backward pass needs
    models = {
        "plain": torchvision.models.get_model(name),
        "passes": fxfeedback.add_feedback(torchvision.models.get_model(name), NETWORKS[name]),
        "passes, checkpoint": fxfeedback.add_feedback(
            torchvision.models.get_model(name), NETWORKS[name], checkpoint=True
        ),
        "hooks": Hooked(hooked, NETWORKS[name], torch.randn(1, 3, 224, 224)),
    }
    return {way: model.train() for way, model in models.items()}


def figures(networks: Sequence[str] = tuple(TIMED)) -> Iterator[Figure]:
    """Time and memory of each network, passes and hooks over plain."""
    for how, name in itertools.product(PRECISIONS, networks):
        batch = sized(*TIMED[name])
        x, labels = how.images(batch, 3, 224, 224), torch.randint(1000, (batch,), device=DEVICE)
        runs = {way: step(how.put(model), x, labels, how) for way, model in ways(name).items()}
        if ON_GPU:
            memory = {way: gpu_peak(run) for way, run in runs.items()}
        else:
            memory = {way: activations(model, 2 if TINY else BATCH) for way, model in ways(name).items()}
        times = timed(runs, REPEATS)
        plain = times["plain"]
        for way, taken in list(times.items())[1:]:
            note = f"{ms(taken)}, {ms(plain)} ms"
            yield Figure(how.of(name), f"time of a training step, {way} / plain", ratio(taken, plain), note)
            over = memory[way] / memory["plain"]
            note = f"{memory[way] / 1e6:.0f}, {memory['plain'] / 1e6:.0f} MB"
            yield Figure(how.of(name), f"memory of activations, {way} / plain", Ratio(over, over, over), note)


def main() -> None:
    """Print the table."""
    show(figures(command_line(__doc__, TIMED).networks))


if __name__ == "__main__":
    main()
