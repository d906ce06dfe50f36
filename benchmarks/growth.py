"""How the cost of LRM passes grows with passes, connections, batch, depth and width: time and memory.

OMP_WAIT_POLICY=passive python benchmarks/growth.py [--threads 2]

Efficiency is the plain network's time, times how many more operations the passes take, over the time of the passes: 1
where only the arithmetic costs time. Memory is the peak in a call, counted tensor by tensor on torch's meta
device, without the weights.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
import torchvision
from lrm_inference import LRM3
from lrm_training import most_alive
from timing import Figure, Ratio, command_line, flops, interleaved, milliseconds, ratio, show
from torch import nn

import fxfeedback

REPEATS = 7
ONE = [("layer4", "layer3.0.conv1")]


def figures() -> Iterator[Figure]:
    """One thing grows at a time: AlexNet lrm3 and ResNets, two passes, four images of 224 x 224."""
    alexnet, resnet = torchvision.models.alexnet(), torchvision.models.resnet18()
    for passes in (1, 2, 4, 8):
        yield from costs(f"alexnet, passes: {passes}", alexnet, LRM3, passes=passes)
    for count in (1, 3, 5):
        yield from costs(f"alexnet, connections: {count}", alexnet, LRM3[:count])
    for batch in (1, 8, 32):
        yield from costs(f"resnet18, batch: {batch}", resnet, ONE, batch=batch)
    for depth in (18, 50, 152):
        yield from costs(f"resnet, depth: {depth}", torchvision.models.get_model(f"resnet{depth}"), ONE)
    for width in (32, 64, 128):
        yield from costs(f"resnet50, width: {width}", torchvision.models.resnet50(width_per_group=width), ONE)


def costs(
    name: str, plain: nn.Module, connections: Sequence[tuple[str, str]], passes: int = 2, batch: int = 4
) -> Iterator[Figure]:
    """Of the passes of a network, beside the plain one."""
    plain.eval()
    x = torch.randn(batch, 3, 224, 224)
    model = fxfeedback.add_feedback(plain, connections, passes=passes).eval()
    more = flops(lambda: model(x)) / flops(lambda: plain(x))
    with torch.no_grad():
        one, all_passes = interleaved([lambda: plain(x), lambda: model(x)], REPEATS)
        bytes_of_one, bytes_of_all = (memory(network, x) for network in (plain, model))
    note = f"{milliseconds(all_passes):.0f} and {milliseconds(one):.0f} ms, operations {more:.2f}"
    yield Figure(name, "efficiency", ratio(one, all_passes, more), note, more_is_better=True)
    over = bytes_of_all / bytes_of_one
    note = f"{bytes_of_all / 1e6:.1f} and {bytes_of_one / 1e6:.1f} MB"
    yield Figure(name, "memory, passes / plain", Ratio(over, over, over), note)


def memory(model: nn.Module, x: torch.Tensor) -> int:
    """The most bytes that live at once in a call."""
    model = copy.deepcopy(model).to("meta")
    return most_alive(model, lambda: model(torch.empty_like(x, device="meta")))


def main() -> None:
    """Print the table."""
    command_line(__doc__)
    show(figures())


if __name__ == "__main__":
    main()
