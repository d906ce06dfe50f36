"""Files that nobody wrote: saved networks, learners, prototypes and ONNX files, damaged at random and on purpose.

Each is opened, and ends in a network or in one of our errors that is no plain `MemoryError`; nothing is written, no
process started, nothing deleted, no connection made, and memory stays bounded. `python tests/fuzz_files.py 10000`.
"""

import contextlib
import copy
import json
import os
import random
import resource
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

import fxfeedback
from fxfeedback.commands import info
from fxfeedback.errors import Error
from fxfeedback.storage.save_load import FILE

SAVED = ("lrm", "butd", "predictive", "signs")
MEMORY = 2**31
"""Bytes that a file of a few kilobytes may ask for on top of what the process has."""
MARK = "MARK"
CODE = f'[", 0)\ropen("{MARK}","w")\rdef g(x=None):\r    pass#]'


# -- good files -------------------------------------------------------------------------------------------------------


def write_files(folder: Path) -> None:
    """One of each kind, of networks as small as they come."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    maps = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(1), nn.Linear(8, 2))
    lrm = fxfeedback.add_feedback(maps, [("4", "0")], input_size=(1, 4, 4)).eval()
    butd = fxfeedback.to_butd(dense, 2, embedding=[3], input_size=(3,)).eval()
    predictive = fxfeedback.add_prediction(maps, ["0", "2"], steps=2, input_size=(1, 4, 4)).eval()
    signs = fxfeedback.to_butd(dense, 2, weights="sign", td_magnitude="fixed", lateral="add", input_size=(3,)).eval()
    for name, model in zip(SAVED, (lrm, butd, predictive, signs), strict=True):
        fxfeedback.save(model, folder / name)
    prototypes = fxfeedback.Prototypes.compute(lrm, [(torch.randn(8, 1, 4, 4), torch.arange(8) % 4)])
    prototypes.save(folder / "prototypes.safetensors")
    prototypes.save(folder / "prototypes.pth")
    prior = fxfeedback.TextPrior.fit({k: torch.randn(3, 4) for k in range(4)}, prototypes)
    prior.save(folder / "prior.safetensors")
    fxfeedback.export(lrm, folder / "lrm.onnx", steerable=True)
    fxfeedback.export(butd, folder / "instructed.onnx")
    fxfeedback.export_learner(butd, folder / "learner.onnx", momentum=0.9)
    fxfeedback.runtime.Learner(folder / "learner.onnx", providers="cpu").save(folder / "state.safetensors")


def openers(good: Path) -> dict[str, Callable[[Path], Any]]:
    """Name of a good file -> what users do with such a file."""
    learner = fxfeedback.runtime.Learner(good / "learner.onnx", providers="cpu")
    return {
        **{f"{name}/{FILE}": lambda path: fxfeedback.load(path.parent) for name in SAVED},
        "prototypes.safetensors": fxfeedback.Prototypes.load,
        "prototypes.pth": lambda path: fxfeedback.Prototypes.load(path, source="4"),
        "prior.safetensors": fxfeedback.TextPrior.load,
        "state.safetensors": learner.load,
        "lrm.onnx": lambda path: (info.about(str(path)), fxfeedback.runtime.Session(path, providers="cpu")),
        "instructed.onnx": lambda path: (info.about(str(path)), fxfeedback.runtime.Session(path, providers="cpu")),
        "learner.onnx": lambda path: (info.about(str(path)), fxfeedback.runtime.Learner(path, providers="cpu")),
    }


# -- damage -----------------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 257, 2**31, 2**63, 10**30, 1.5, -0.0, float("nan"), float("inf"), "", "x", "0",
    "é", "a b", "a\x1b[31m", "\u202e", "\x00", "lambda", "__class__", "forward", "state_dict", "named_parameters",
    "training", "../x", "/etc/passwd", CODE, [], {}, [[]], [1] * 70, {"tuple": [1, 2]}, {"set": ["a"]},
    {"dict": [["a", 1]]}, {"dict": [[CODE, 1]]}, {"dtype": "float32"}, {"dtype": "load"}, {"device": "cpu"},
    {"device": "cuda:7"}, {"name": "torch:relu"}, {"name": "os:system"}, {"name": "torch:from_file"},
    {"name": "torch:ones"}, {"name": "torch.nn.modules.linear:Linear"},
    {"name": "torch.fx.graph_module:GraphModule"}, {"name": "timm:x"},
    {"name": "torchvision.models.vision_transformer:VisionTransformer"}, {"name": "antigravity:x"},
    {"tensor": [{"dtype": "float32"}, [1.0, 2.0]]}, {"tensor": [{"dtype": "int8"}, [1000]]},
    {"helper": ["torchvision.models.detection._utils:Matcher", {"dict": [["x", 1]]}]},
    {"partial": [{"name": "torch:from_file"}, {"tuple": [MARK, True, 4096]}, {"dict": []}]},
    {"partial": [{"name": "torch:ones"}, {"tuple": [10**9]}, {"dict": []}]},
    {"partial": [{"name": "torch:relu"}, {"tuple": []}, {"dict": []}]},
    "torch.nn.modules.linear:Identity", "torch.nn.modules.rnn:LSTM", "torch.nn.modules.pooling:AdaptiveAvgPool2d",
    "torch.nn.modules.upsampling:Upsample", "torch.nn.modules.activation:MultiheadAttention", "__main__:Net",
]  # fmt: skip


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(owner, key) of everything in a structure of dicts and lists."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def damage_structure(data: Any, rng: random.Random) -> None:
    """One change of a structure: a value, a type, a name, how it is nested."""
    every = list(places(data))
    if not every:
        return
    owner, key = rng.choice(every)
    what = rng.randrange(8)
    if what == 0:
        del owner[key]
    elif what == 1:
        other, place = rng.choice(every)
        with contextlib.suppress(KeyError, IndexError):
            owner[key] = copy.deepcopy(other[place])
    elif what == 2:
        owner[key] = nested(owner[key], rng.choice([1, 2, 150]), rng)
    elif what == 3 and isinstance(owner, dict):
        owner[str(rng.choice(ODD))] = owner.pop(key)
    elif what == 4 and isinstance(owner, dict):
        owner[str(rng.choice(ODD))] = rng.choice(ODD)
    elif what == 5 and isinstance(owner[key], (int, float)):
        owner[key] = owner[key] * rng.choice([-1, 2, 1000, 10**6, 10**12])
    else:
        owner[key] = copy.deepcopy(rng.choice(ODD))


def nested(value: Any, levels: int, rng: random.Random) -> Any:
    for _ in range(levels):
        value = rng.choice([[value], {"tuple": [value]}, {"dict": [["a", value]]}])
    return value


def damage_bytes(path: Path, rng: random.Random) -> None:
    """Bytes that are others, or fewer."""
    content = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    for _ in range(rng.choice([1, 1, 5, 50])):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)


def damage_safetensors(path: Path, rng: random.Random) -> None:
    """What is said of the model, or of the tensors."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    said = header["__metadata__"]
    key = next((key for key, text in said.items() if text.startswith("{")), "")
    about = json.loads(said.get(key, "{}"))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        damage_structure(about if about and rng.random() < 0.9 else header, rng)
    if about and isinstance(header.get("__metadata__"), dict):
        header["__metadata__"][key] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def damage_onnx(path: Path, rng: random.Random) -> None:
    """What the file says of itself, its names, types and sizes."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for _ in range(rng.choice([1, 1, 2, 4])):
        values = [*graph.input, *graph.output, *graph.initializer, *graph.node]
        rng.choice(
            [_damage_metadata, _damage_metadata, _damage_metadata, _damage_name, _damage_type, _damage_data, _drop]
        )(model, rng.choice(values), rng)
    path.write_bytes(model.SerializeToString())


def _damage_metadata(model: Any, value: Any, rng: random.Random) -> None:
    entry = rng.choice(model.metadata_props)
    try:
        said = [json.loads(entry.value)]
    except (ValueError, RecursionError):
        said = [entry.value]
    damage_structure(said, rng)
    entry.value = rng.choice([json.dumps(said[0] if said else None), "[" * 100_000, "\x1b]0;x\x07", ""])
    if rng.random() < 0.2:
        model.metadata_props.remove(entry)


def _damage_name(model: Any, value: Any, rng: random.Random) -> None:
    value.name = rng.choice([value.name + ".new", "target", "instruction", "lr", "", CODE, "x" * 10_000, "../x"])


def _damage_type(model: Any, value: Any, rng: random.Random) -> None:
    if hasattr(value, "dims"):
        value.dims[:] = [rng.choice([0, 1, 3, 10**4, -1]) for _ in range(rng.randrange(4))]
    elif hasattr(value, "type"):
        value.type.tensor_type.elem_type = rng.choice([0, 1, 7, 8, 16, 99])
        for size in value.type.tensor_type.shape.dim:
            size.dim_value = rng.choice([0, 1, 3, 10**12, -1])
    else:
        value.op_type = rng.choice(["Relu", "NoSuchOp", "Shape", "Identity"])


def _damage_data(model: Any, value: Any, rng: random.Random) -> None:
    if isinstance(value, onnx.TensorProto):
        value.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", rng.choice(["../x", "/etc/passwd", "x", "", CODE])), ("length", "10")):
            entry = value.external_data.add()
            entry.key, entry.value = key, text
    elif isinstance(value, onnx.NodeProto) and len(value.input):
        value.input[rng.randrange(len(value.input))] = rng.choice(
            ["", "x", *(given.name for given in model.graph.input)]
        )


def _drop(model: Any, value: Any, rng: random.Random) -> None:
    for values in (model.graph.input, model.graph.output, model.graph.initializer, model.graph.node):
        for i, other in enumerate(values):
            if other is value:
                del values[i]
                return


def damage(path: Path, rng: random.Random) -> None:
    """One damaged file, in place."""
    by_kind = {".onnx": damage_onnx, ".safetensors": damage_safetensors}.get(path.suffix, damage_bytes)
    (damage_bytes if rng.random() < 0.2 else by_kind)(path, rng)


# -- the law ----------------------------------------------------------------------------------------------------------


class Watch:
    """Notes what a file is not to do, while it is opened."""

    DONE = ("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.remove", "os.rename",
            "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.kill", "os.truncate", "shutil.", "socket.",
            "ctypes.dlopen", "urllib.", "webbrowser.")  # fmt: skip

    def __init__(self) -> None:
        self.seen: list[str] | None = None
        sys.addaudithook(self)

    def __call__(self, event: str, args: Any) -> None:
        if self.seen is None:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event.startswith(self.DONE):
            self.seen.append(f"{event} {args}"[:200])


WATCH = Watch()


def check(path: Path, opener: Callable[[Path], Any]) -> str:
    """Open a file: what is wrong about how that ends, or nothing."""
    before = list(Path().iterdir())
    WATCH.seen = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opener(path)
    except Error as error:
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)  # type: ignore[arg-type]
        if any(isinstance(e, MemoryError) or "allocate memory" in str(e) for e in causes):
            return f"it asked for too much memory: {error}"
        if type(error) is Error or not str(error):
            return f"an error that says nothing: {error!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "".join(traceback.format_exception(error)[-3:])
    finally:
        seen, WATCH.seen = WATCH.seen, None
    after = list(Path().iterdir())
    if seen or after != before:
        return f"it did {seen}, and left {after}"
    return ""


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """No more than MEMORY on top of what there is."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(good: Path, numbers: range, keep: Path | None = None) -> dict[int, str]:
    """The files of these numbers that break the law, and how."""
    open_them = openers(good)
    names = list(open_them)
    failures = {}
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as folder, contextlib.chdir(empty):
        for number in numbers:
            name = names[number % len(names)]
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes((good / name).read_bytes())
            damage(path, random.Random(number))
            with bounded_memory():
                wrong = check(path, open_them[name])
            if wrong:
                failures[number] = f"{name}, number {number}: {wrong}"
                if keep is not None:
                    (keep / f"{number}-{path.name}").write_bytes(path.read_bytes())
    return failures


if __name__ == "__main__":
    count, first = (int(given) for given in (sys.argv[1:] + ["1000", "0"][len(sys.argv) - 1 :])[:2])
    with tempfile.TemporaryDirectory() as place:
        write_files(Path(place))
        wrong = fuzz(Path(place), range(first, first + count))
    print(*wrong.values(), f"{count} files, {len(wrong)} break the law", sep="\n")
    sys.exit(bool(wrong))
