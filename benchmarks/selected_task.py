"""One task's network against the whole one and the plain model: floating-point operations, and time, interleaved.

OMP_WAIT_POLICY=passive python benchmarks/selected_task.py

The whole network makes its gates in every call; the plain model, which has none, is what its bottom-up pass costs.
"""

import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
import torchvision
from timing import flops, interleaved, milliseconds, ratio
from tqdm import tqdm

import fxfeedback

TASKS, TIMED_TASKS, REPEATS = 40, 3, 15


def show(name: str, runs: list[Callable[[], object]]) -> None:
    """Print median milliseconds of the whole, the plain model and the selected network, and how much faster this is.

    Behind each ratio: the quartiles of the single pairs.
    """
    seconds = interleaved(runs, REPEATS)
    row = f"{name:<22}" + "".join(f"{milliseconds(taken):>9.1f}" for taken in seconds)
    row += "".join(f"{ratio(slow, seconds[2]):>24}" for slow in seconds[:2])
    print(row, flush=True)


def main() -> None:
    """Print the share of operations over all tasks, and a table of times of a few."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    butd = fxfeedback.to_butd(model, n_tasks=TASKS, gating="channel").requires_grad_(False).eval()
    x = torch.randn(1, 3, 224, 224)
    whole = flops(lambda: model(x))
    shares, largest = [], 0.0
    for task in tqdm(range(TASKS), leave=False):
        selected = butd.select(task)
        shares.append(flops(lambda selected=selected: selected(x)) / whole)
        logits = butd(x, task)
        largest = max(largest, ((selected(x) - logits).abs().max() / logits.abs().max()).item())
    print(f"ResNet-18, {TASKS} tasks, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        f"load {os.getloadavg()[0]:.1f}; {whole / 1e9:.2f} GFLOPs in the plain model; of these in a selected network:"
    )
    print(f"  mean {statistics.mean(shares):.3f}, min {min(shares):.3f}, max {max(shares):.3f}")
    print(f"logits differ by at most {largest:.1e} of the largest")
    print(f"{'ms, batch 1':<22}{'whole':>9}{'plain':>9}{'selected':>9}{'whole / selected':>24}{'plain / selected':>24}")
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        paths = [str(Path(directory, f"{name}.onnx")) for name in ("whole", "plain", "selected")]
        fxfeedback.export(butd, paths[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x,), paths[1], dynamo=True, verbose=False)
        image = x.numpy()
        for task in range(TIMED_TASKS):
            selected = butd.select(task)
            show(f"torch, task {task}", [lambda t=task: butd(x, t), lambda: model(x), lambda s=selected: s(x)])
            fxfeedback.export(butd, paths[2], task=task)
            one, two = (fxfeedback.runtime.Session(path, "cpu") for path in (paths[0], paths[2]))
            plain = onnxruntime.InferenceSession(paths[1], providers=["CPUExecutionProvider"])
            feed = {plain.get_inputs()[0].name: image}
            runs = [
                lambda s=one, t=task: s(image, task=t),
                lambda s=plain, f=feed: s.run(None, f),
                lambda s=two: s(image),
            ]
            show(f"ONNX Runtime, task {task}", runs)


if __name__ == "__main__":
    main()
