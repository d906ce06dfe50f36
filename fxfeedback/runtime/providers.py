"""Open ONNX Runtime sessions on the execution providers that work here, and say why one does not."""

import contextlib
import ctypes
import functools
import io
import logging
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort

from fxfeedback.errors import CheckpointError, OptionError, first_line

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def open_session(source: Path | bytes, providers: Any, options: Any, file: str) -> tuple[Any, str]:
    """An ONNX Runtime session, and why it does not run on CUDA where that was tried.

    Args:
        source: the file or what is in it; `file` is what errors call it.
        providers: as the user gave them; None: CUDA where it works, else the CPU.
        options: ONNX Runtime's SessionOptions, or None.
        file: its path.

    Raises:
        CheckpointError: the CPU cannot load it.
        OptionError: a provider that was asked for cannot be used.
    """
    if options is None:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what fails is raised; that an optional input is not a constant is intended
    if providers is not None:
        wanted = [_full(provider) for provider in ([providers] if isinstance(providers, str) else providers)]
        for name in map(_name, wanted):
            reason = _not_there(name) or (_no_driver() or _missing_libraries() if name == CUDA else "")
            if reason:
                raise OptionError(f"the provider {name} cannot be used: {reason}")
        session = _load(source, wanted, options, file)
        for name in map(_name, wanted):
            if name not in session.get_providers():
                raise OptionError(f"the provider {name} cannot be used: {_broken(name)}")
        return session, ""
    note = _not_there(CUDA)
    if not note and _no_driver():
        note = _no_driver()
        _say_once(f"sessions run on the CPU, as there is no NVIDIA driver here ({note})")
    note = note or _missing_libraries()
    if not note:
        try:
            session = _load(source, [CUDA, CPU], options, file)
            if CUDA in session.get_providers():
                return session, ""
            note = _broken(CUDA)
        except OptionError as error:
            note = str(error)
    return _load(source, [CPU], options, file), note


def _load(source: Path | bytes, providers: list[Any], options: Any, file: str) -> Any:
    try:
        return ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:  # of a dozen classes, some of them no subclasses of anything useful
        message = first_line(error)
        if len(providers) > 1 or _name(providers[0]) != CPU:
            _load(source, [CPU], options, file)  # the file is at fault if the CPU cannot take it either
            raise OptionError(f"the provider {_name(providers[0])} cannot run {file!r}: {message}") from error
        raise CheckpointError(f"{file!r} cannot be loaded: it is damaged, or no ONNX file: {message}") from error


def cannot_run(file: str, error: Exception) -> CheckpointError:
    """What ONNX Runtime says while it runs a file that it has opened, as one of our errors."""
    return CheckpointError(
        f"ONNX Runtime fails while it runs {file!r}: {first_line(error)}. The file is damaged, or there is too little "
        "memory: try a smaller batch, or export the file again"
    )


def _full(provider: Any) -> Any:
    return {"cpu": CPU, "cuda": CUDA}.get(provider, provider) if isinstance(provider, str) else provider


def _name(provider: Any) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _not_there(name: str) -> str:
    """Why this onnxruntime does not have the provider, or nothing."""
    there = ort.get_available_providers()
    if name in there:
        return ""
    hint = " (pip install onnxruntime-gpu)" if name == CUDA else ""
    return f"this onnxruntime has {', '.join(there)}{hint}"


def _no_driver() -> str:
    """What says that NVIDIA's driver is not there, or nothing: without it ONNX Runtime only prints that it fails."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        return str(error)
    return ""


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger("fxfeedback").warning("fxfeedback: %s", message)


def _missing_libraries() -> str:
    """Load CUDA's and cuDNN's libraries from where pip or the system put them; those that are missing, or nothing.

    ONNX Runtime from 1.31 on goes without cuDNN until the first convolution, and then fails.
    """
    if not hasattr(ort, "preload_dlls"):
        return ""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()
    failed = [line.removeprefix("Failed to load ") for line in said.getvalue().split("\n") if "Failed to load" in line]
    cudnn = "cudnn64_9.dll" if sys.platform == "win32" else "libcudnn.so.9"
    if not any("cudnn" in line for line in failed):
        try:
            ctypes.CDLL(cudnn)
        except OSError as error:
            failed.append(f"{cudnn}: {error}")
    return "; ".join(failed) + (" (pip install 'onnxruntime-gpu[cuda,cudnn]')" if failed else "")


def _broken(name: str) -> str:
    """Why a provider that was asked for is not in the session: the library that its own library misses."""
    kind = name.removesuffix("ExecutionProvider").lower()
    pattern = {"win32": "onnxruntime_providers_{}.dll", "darwin": "libonnxruntime_providers_{}.dylib"}
    file = pattern.get(sys.platform, "libonnxruntime_providers_{}.so").format(kind)
    library = Path(ort.__file__).parent / "capi" / file
    if library.is_file():
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            return str(error)
    return "ONNX Runtime could not start it: is there a device and a driver for it?"
