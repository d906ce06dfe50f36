"""How long it takes from the first import to the end of the first training step, against plain torch; in new processes.

OMP_WAIT_POLICY=passive python benchmarks/first_call.py
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator

from timing import Figure, ratio, show

REPEATS = 5
ENDS = {
    "resnet50": ("layer4", "layer1"),
    "vit_b_16": ("encoder.layers.encoder_layer_8", "encoder.layers.encoder_layer_2"),
}
KINDS = ("plain", "add_feedback", "to_butd")

ONE = """
import json, sys, time, warnings
start = time.perf_counter()
warnings.simplefilter("ignore")  # the connection's block is large
kind, name, *ends = sys.argv[1:]
import torch, torchvision
model = getattr(torchvision.models, name)()
x, y, ids = torch.randn(2, 3, 224, 224), torch.tensor([1, 2]), torch.tensor([0, 1])
call = model
if kind == "add_feedback":
    import fxfeedback
    model = fxfeedback.add_feedback(model, [tuple(ends)], input_size=(3, 224, 224))
    call = lambda x: model(x)[-1]
if kind == "to_butd":
    import fxfeedback
    model = fxfeedback.to_butd(model, input_size=(3, 224, 224), n_tasks=2)
    call = lambda x: model(x, ids)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
torch.nn.functional.cross_entropy(call(x), y).backward()
optimizer.step()
print(json.dumps(time.perf_counter() - start))
"""


def seconds(kind: str, name: str) -> float:
    """Of one process, from its first import to the end of its first step with two images."""
    command = [sys.executable, "-c", ONE, kind, name, *ENDS[name]]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def figures() -> Iterator[Figure]:
    """Both wrappers of both networks, in turns with the plain network."""
    for name in ENDS:
        taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(REPEATS):
            for kind in KINDS:
                taken[kind].append(seconds(kind, name))
        for kind in KINDS[1:]:
            note = f"{statistics.median(taken[kind]):.1f} and {statistics.median(taken['plain']):.1f} s"
            what = f"from import to the first step, {kind} / plain"
            yield Figure(name, what, ratio(taken[kind], taken["plain"]), note)


if __name__ == "__main__":
    show(figures())
