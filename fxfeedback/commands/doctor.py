"""Say what is installed, what of it works, and which command brings what is missing.

Ends with 1 where something is missing that every use needs.
"""

import argparse
import importlib
import importlib.metadata
import platform
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
    "providers[].name": "of one of ONNX Runtime's execution providers",
    "providers[].works": "whether it runs a small graph",
    "providers[].problem": "why it does not; else empty",
    "fixes": "commands that bring what is missing",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Import every package, and try every provider."""
    packages = [_package(name, extra) for name, extra in PACKAGES.items()]
    missing = dict.fromkeys(PACKAGES[package["name"]] for package in packages if package["problem"])
    threads, devices = _torch() if not packages[0]["problem"] else (0, [])
    providers = _providers() if not missing.keys() & {"runtime", "onnx"} else []
    broken = [provider["name"] for provider in providers if provider["problem"]]
    fixes = [f"pip install 'fxfeedback[{extra}]'" if extra else "pip install fxfeedback" for extra in missing]
    if len(devices) > 1 and CUDA in broken:
        fixes.append("pip install 'onnxruntime-gpu[cuda,cudnn]'")
    return {
        "ok": "" not in missing,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "fxfeedback": __version__,
        "packages": packages,
        "devices": devices,
        "threads": threads,
        "providers": providers,
        "fixes": fixes,
    }


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


def _torch() -> tuple[int, list[str]]:
    """Torch's threads, and its devices."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return torch.get_num_threads(), ["cpu", *(f"cuda:{i} ({name})" for i, name in enumerate(names))]


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
        session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:  # OptionError, or whatever a driver raises
        problem = _first_line(error).removeprefix(f"the provider {name} cannot be used: ")
    return {"name": name, "works": not problem, "problem": problem}


def _small_graph() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "small", [x], [y])
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
    for provider in result["providers"]:
        yield f"{provider['name']}: {provider['problem'] or 'works'}"
    for fix in result["fixes"]:
        yield f"to do: {fix}"
    if not result["fixes"]:
        yield "nothing is missing"
