"""One task's network against the whole one and the plain model: floating-point operations, and time, interleaved.

OMP_WAIT_POLICY=passive python benchmarks/selected_task.py [--threads 2]

The whole network keeps its gates between calls in torch, and makes them in every call in ONNX Runtime.
"""

import copy
import itertools
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import torch
import torchvision
from onnx_runtime import PROVIDER, options
from timing import (
    ON_GPU,
    PRECISIONS,
    TINY,
    Figure,
    Ratio,
    Run,
    both_ways,
    command_line,
    flops,
    ms,
    ratio,
    show,
    timed,
    with_graphs,
)
from tqdm import tqdm

import fxfeedback

TASKS, TIMED, REPEATS = (2, (0,), 15) if TINY else (40, (0,) if ON_GPU else (0, 1), 15)


def figures(threads: int = 2) -> Iterator[Figure]:
    """ResNet-18 with gated channels, at a random start."""
    torch.manual_seed(0)
    plain = torchvision.models.resnet18().eval()
    butd = fxfeedback.to_butd(plain, n_tasks=TASKS, gating="channel").requires_grad_(False).eval()
    x = torch.randn(1, 3, 224, 224)
    if not ON_GPU:  # they are the same there
        yield operations(plain, butd, x)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task in TIMED:
            yield from faster(f"ONNX Runtime, batch 1, task {task}", exported(butd, plain, x, task, threads))
        for how in PRECISIONS:
            nets = {"whole": how.put(copy.deepcopy(butd)), "plain": how.put(copy.deepcopy(plain))}
            for task, number in itertools.product(TIMED, (1, 256) if ON_GPU else (1, 8)):
                images = how.images(number, 3, 224, 224)
                runs = {way: how.infers(net, images, *[task][: way == "whole"]) for way, net in nets.items()}
                runs["selected"] = how.infers(nets["whole"].select(task), images)
                yield from faster(how.of(f"torch, batch {number}, task {task}"), with_graphs(runs))


def operations(plain: torch.nn.Module, butd: fxfeedback.BUTD, x: torch.Tensor) -> Figure:
    """The share of the operations that is left, over all tasks; noted: how far the logits are off."""
    whole = flops(lambda: plain(x))
    shares, off = [], 0.0
    for task in tqdm(range(TASKS), leave=False, disable=None):
        selected = butd.select(task)
        shares.append(flops(lambda selected=selected: selected(x)) / whole)
        logits = butd(x, task)
        off = max(off, ((selected(x) - logits).abs().max() / logits.abs().max()).item())
    spread = Ratio(statistics.mean(shares), min(shares), max(shares))
    note = f"mean, least and most of {TASKS} tasks; logits differ by {off:.1e} of the largest"
    return Figure("resnet18, one task", "operations of the selected network / plain", spread, note)


def exported(butd: fxfeedback.BUTD, plain: torch.nn.Module, x: torch.Tensor, task: int, threads: int) -> dict[str, Run]:
    """The whole, the plain and the selected network in ONNX Runtime, from arrays to arrays."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{name}.onnx") for name in ("whole", "plain", "selected")]
        fxfeedback.export(butd, files[0], check=False)
        torch.onnx.export(plain, (x,), files[1], dynamo=True, verbose=False)
        fxfeedback.export(butd, files[2], task=task, check=False)
        whole, selected = (fxfeedback.runtime.Session(file, PROVIDER, options(threads)) for file in files[::2])
        one = onnxruntime.InferenceSession(files[1], options(threads), providers=whole.providers)
    image, name = x.numpy(), one.get_inputs()[0].name
    return {
        "whole": lambda: whole(image, task=task),
        "plain": lambda: one.run(None, {name: image}),
        "selected": lambda: selected(image),
    }


def faster(where: str, runs: dict[str, Run]) -> Iterator[Figure]:
    """The selected network's time over the whole's and the plain model's."""
    for graph, times in both_ways(timed(runs, REPEATS)):
        note = ", ".join(f"{ms(times[way])}" for way in ("selected", "whole", "plain")) + " ms"
        for other, more in (("whole", note), ("plain", "")):
            what = f"selected network / {other}{graph}"
            yield Figure(f"resnet18, {where}", what, ratio(times["selected"], times[other]), more)


def main() -> None:
    """Print the table."""
    show(figures(command_line(__doc__).threads))


if __name__ == "__main__":
    main()
