"""ONNX Runtime against torch: passes of LRM networks, one known task, and a step of a learner; time, in turns.

OMP_WAIT_POLICY=passive python benchmarks/onnx_runtime.py [--threads 2]

Images lie where they are used. On a GPU both compute in TF32.
"""

import collections
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnxruntime as ort
import torch
import torch.nn.functional as F
import torchvision
from lrm_inference import NETWORKS
from timing import (
    DEVICE,
    ON_GPU,
    PLAIN,
    TF32,
    TINY,
    Figure,
    command_line,
    flops,
    interleaved,
    ms,
    ratio,
    show,
    sized,
)

import fxfeedback

BATCH, REPEATS = sized(8, 64), 9
PROVIDER = "cuda" if ON_GPU else "cpu"
HOW = TF32 if ON_GPU else PLAIN


def figures(threads: int = 2) -> Iterator[Figure]:
    """Two passes, and a task and a step of ResNet-18."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (name for name in NETWORKS if name != "vit_b_16"):
            yield from passes(name, Path(folder), threads)
        yield known_task(Path(folder), threads)
        for mode in ("train",) if ON_GPU or TINY else ("eval", "train"):
            yield learner(mode, Path(folder), threads)


def options(threads: int, profile: Path | None = None) -> ort.SessionOptions:
    """For so many threads, and quiet; threads that wait do not spin, as they would in the others' turns."""
    made = ort.SessionOptions()
    made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    made.intra_op_num_threads, made.log_severity_level = threads, 3
    if profile:
        made.enable_profiling, made.profile_file_prefix = True, str(profile)
    return made


def passes(name: str, folder: Path, threads: int) -> Iterator[Figure]:
    """Two unrolled passes; one pass is the plain network."""
    torch.manual_seed(0)
    x, one_image = HOW.images(BATCH, 3, 224, 224), torch.randn(1, 3, 224, 224)
    plain = torchvision.models.get_model(name).eval()
    model = fxfeedback.add_feedback(plain, NETWORKS[name]).eval()
    more = flops(lambda: model(one_image)) / flops(lambda: plain(one_image))
    sessions = []
    for number in (1, 2):
        fxfeedback.export(model, folder / f"{name}{number}.onnx", passes=number, check=False)
        sessions.append(fxfeedback.runtime.Session(folder / f"{name}{number}.onnx", PROVIDER, options(threads)))
    runs = [HOW.infers(HOW.put(model), x), lambda: sessions[0](x), lambda: sessions[1](x)]
    theirs, one, two = interleaved(runs, REPEATS)
    yield Figure(
        f"{name}, 2 passes",
        "ONNX Runtime / torch",
        ratio(two, theirs),
        f"{ms(two)} and {ms(theirs)} ms",
    )
    yield Figure(
        f"{name}, 2 passes",
        "ONNX Runtime / (one pass in it x operations)",
        ratio(two, one, 1 / more),
        f"one pass {ms(one)} ms, operations {more:.2f}",
    )


def known_task(folder: Path, threads: int) -> Figure:
    """An instructed ResNet-18 whose gates are kept, with one task for all images; one pass is the plain network."""
    torch.manual_seed(0)
    plain, x = torchvision.models.resnet18().eval(), HOW.images(BATCH, 3, 224, 224)
    butd = fxfeedback.to_butd(plain, n_tasks=4).eval()
    fxfeedback.export(butd, folder / "instructed.onnx", keep_gates=True, check=False)
    lrm = fxfeedback.add_feedback(plain, [("layer4", "layer1.1.relu_1")]).eval()
    fxfeedback.export(lrm, folder / "plain.onnx", passes=1, check=False)
    session, one = (
        fxfeedback.runtime.Session(folder / f"{name}.onnx", PROVIDER, options(threads))
        for name in ("instructed", "plain")
    )
    taken, theirs = interleaved([lambda: session(x, task=1), lambda: one(x)], REPEATS)
    note = f"{ms(taken)} and {ms(theirs)} ms"
    return Figure("resnet18, one known task", "instructed / plain, both in ONNX Runtime", ratio(taken, theirs), note)


def learner(mode: str, folder: Path, threads: int) -> Figure:
    """A step of ResNet-18's learner, its batch norms in this mode; noted: the share of the time by kind of op."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10).train(mode == "train")
    path = folder / f"{mode}.onnx"
    fxfeedback.export_learner(fxfeedback.to_butd(net), path, momentum=0.9, check=False)
    ours, net = fxfeedback.runtime.Learner(path, PROVIDER, options(threads)), HOW.put(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    x, target = HOW.images(BATCH, 3, 224, 224), torch.randint(10, (BATCH,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), target).backward()
        optimizer.step()

    theirs, taken = interleaved([step, lambda: ours.step(x, target, lr=0.01)], REPEATS)
    profiled = fxfeedback.runtime.Learner(path, PROVIDER, options(threads, folder / "profile"))
    for _ in range(4):
        profiled.step(x, target, lr=0.01)
    shares: collections.Counter[str] = collections.Counter()
    for event in json.loads(Path(profiled._sessions.stepping.session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            shares[f"{event['name'].split('/')[0]}: {event['args']['op_name']}"] += event["dur"]
    total = sum(shares.values())
    parts = ", ".join(f"{what} {spent / total:.0%}" for what, spent in shares.most_common(5))
    note = f"{ms(taken)} and {ms(theirs)} ms; {parts}"
    return Figure(f"resnet18, norms in {mode}", "a learner's step in ONNX Runtime / torch", ratio(taken, theirs), note)


def main() -> None:
    """Print the table."""
    show(figures(command_line(__doc__).threads))


if __name__ == "__main__":
    main()
