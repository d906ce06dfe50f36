"""Say what is installed, what of it works, and which command brings what is missing.

Ends with 1 where something is missing that every use needs.
"""

import argparse
import importlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from typing import Any

from fxfeedback.commands.text import several, table
from fxfeedback.version import __version__

EXAMPLES = ["fxfeedback doctor", "fxfeedback doctor --json"]
PACKAGES = {
    "torch": "",
    "torchvision": "",
    "networkx": "",
    "safetensors": "",
    "tqdm": "",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "runtime",
    "numpy": "runtime",
    "igraph": "draw",
    "matplotlib": "draw",
    "resvg_py": "draw",
    "argcomplete": "completion",
}
"""Package -> the extra of fxfeedback that brings it; nothing: every use needs it."""
USES = {
    "": "everything",
    "onnx": "exporting, and looking into exported files",
    "runtime": "running exported files",
    "draw": "drawing",
    "completion": "completion in the shell",
}
CUDA = "CUDAExecutionProvider"
KEYS = {
    "ok": "whether everything is there that every use needs",
    "python": "its version",
    "platform": "system and processor",
    "fxfeedback": "its version",
    "packages[].name": "of a package",
    "packages[].version": "null where it cannot be imported",
    "packages[].needed_for": "what",
    "packages[].problem": "why it cannot be imported; else empty",
    "devices": "where torch can compute",
    "threads": "of torch; 0 without torch",
    "cuda": "the version that torch was built for; null: for none",
    "cudnn": "the version that torch has; null: none",
    "driver": "of NVIDIA's cards; null: none is there",
    "takes": "the provider that a session takes of its own accord; null without ONNX Runtime",
    "not_cuda": "why that is not CUDA; else empty",
    "providers[].name": "of one of ONNX Runtime's execution providers",
    "providers[].works": "whether it runs a small graph",
    "providers[].problem": "why it does not; else empty",
    "fixes": "commands that bring what is missing",
    "summary": "what all of this comes to",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Import every package, and try every provider."""
    packages = [_package(name, extra) for name, extra in PACKAGES.items()]
    missing = dict.fromkeys(PACKAGES[package["name"]] for package in packages if package["problem"])
    of_torch = _torch() if not packages[0]["problem"] else {"devices": [], "threads": 0, "cuda": None, "cudnn": None}
    runs = not missing.keys() & {"runtime", "onnx"}
    providers, (takes, why) = (_providers(), _taken()) if runs else ([], (None, ""))
    broken = [provider["name"] for provider in providers if provider["problem"]]
    fixes = [f"pip install 'fxfeedback[{extra}]'" if extra else "pip install fxfeedback" for extra in missing]
    if len(of_torch["devices"]) > 1 and CUDA in broken:
        fixes.append("pip install 'onnxruntime-gpu[cuda,cudnn]'")
    driver = _driver()
    return {
        "ok": "" not in missing,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "fxfeedback": __version__,
        "packages": packages,
        **of_torch,
        "driver": driver,
        "takes": takes,
        "not_cuda": why,
        "providers": providers,
        "fixes": fixes,
        "summary": _summary(list(missing), takes, bool(driver)),
    }


def _summary(missing: list[str], takes: str | None, has_driver: bool) -> str:
    """What works, what does not, and where exported files run."""
    if "" in missing:
        return "something is missing that every use needs"
    lacking = ", ".join(USES[extra] for extra in missing)
    said = f"everything works but {lacking}" if lacking else "everything is installed and works"
    if takes:
        why = "" if takes == CUDA or has_driver else ", as there is no driver of NVIDIA's here"
        said += f"; exported files run on {'the GPU' if takes == CUDA else 'the CPU'}{why}"
    return said


def _package(name: str, extra: str) -> dict[str, Any]:
    version, problem = None, ""
    try:
        module = importlib.import_module(name)
        version = getattr(module, "__version__", None) or importlib.metadata.version(name)
    except Exception as error:  # one that does not fit the others may raise anything
        problem = _first_line(error)
    return {"name": name, "version": version, "needed_for": USES[extra], "problem": problem}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _torch() -> dict[str, Any]:
    """Torch's devices and threads, and the CUDA and cuDNN that it has."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    number = torch.backends.cudnn.version() if torch.version.cuda else None
    return {
        "devices": ["cpu", *(f"cuda:{i} ({name})" for i, name in enumerate(names))],
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cudnn": number and f"{number // 10000}.{number // 100 % 100}.{number % 100}",
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver, by its own command."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):  # no such command, or no card
        return None
    return said[0] if said else None


def _taken() -> tuple[str, str]:
    """The provider that a session takes of its own accord, and why it is not CUDA."""
    from fxfeedback.runtime.providers import open_session

    session, note = open_session(_small_graph(), None, None, "a small graph")
    return session.get_providers()[0], note


def _providers() -> list[dict[str, Any]]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # what it would say of a provider is said below
    return [_provider(name) for name in onnxruntime.get_available_providers()]


def _provider(name: str) -> dict[str, Any]:
    """Whether one of ONNX Runtime's execution providers runs a small graph."""
    import numpy as np

    from fxfeedback.runtime.providers import open_session

    problem = ""
    try:
        session, _ = open_session(_small_graph(), [name], None, "a small graph")
        session.run(None, {"x": np.ones((1, 1, 3, 3), np.float32)})
    except Exception as error:  # OptionError, or whatever a driver raises
        problem = _first_line(error).removeprefix(f"the provider {name} cannot be used: ")
    return {"name": name, "works": not problem, "problem": problem}


def _small_graph() -> bytes:
    """A convolution: on CUDA it needs cuDNN, without which a provider opens and fails later."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 3, 3]) for name in "xy")
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [1, 1, 3, 3], [1.0] * 9)
    node = helper.make_node("Conv", ["x", "weight"], ["y"], pads=[1, 1, 1, 1])
    graph = helper.make_graph([node], "small", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Tables, and what to do."""
    yield f"fxfeedback {result['fxfeedback']}, Python {result['python']}, {result['platform']}"
    yield ""
    rows = [
        (package["name"], package["version"] or "missing", package["needed_for"], package["problem"])
        for package in result["packages"]
    ]
    yield from table(("package", "version", "needed for", ""), rows)
    yield ""
    if result["devices"]:
        yield f"torch: {', '.join(result['devices'])}; {several(result['threads'], 'thread')}"
        parts = {"CUDA": "cuda", "cuDNN": "cudnn", "NVIDIA's driver": "driver"}
        yield "; ".join(f"{part} {result[key] or 'none'}" for part, key in parts.items())
    if result["takes"]:
        yield f"a session takes {result['takes']}" + (
            f", not {CUDA}: {result['not_cuda']}" if result["not_cuda"] else ""
        )
    for provider in result["providers"]:
        yield f"{provider['name']}: {provider['problem'] or 'works'}"
    for fix in result["fixes"]:
        yield f"to do: {fix}"
    yield f"in short: {result['summary']}"
