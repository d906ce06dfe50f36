"""Write a program as an ONNX file: the whole way from a torch.fx graph to the file, which is replaced atomically."""

import glob
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxfeedback.deploy.exporting import to_onnx
from fxfeedback.deploy.finishing import finish
from fxfeedback.deploy.half import Half, to_half
from fxfeedback.deploy.kept_gates import keep_gates
from fxfeedback.deploy.program import Program
from fxfeedback.errors import ExportError, OptionError, first_line
from fxfeedback.files import LARGEST, as_path, beside, sync

OLDEST = 18
"""The first version of ONNX's operators that torch's exporter writes."""


def check_target(path: str | os.PathLike[str]) -> None:
    """Find out early whether a file can be written.

    Raises:
        OptionError: no directory for the file.
        ImportError: the packages onnx and onnxscript are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: to export, pip install 'fxfeedback[onnx]'") from error
    path = as_path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise OptionError(f"path={str(path)!r}: give the name of a file in a directory that exists")


def check_opset(opset: int | None) -> None:
    """Refuse a version of ONNX's operators that torch's exporter does not write, or that this onnx does not know.

    Raises:
        OptionError: there is no such one.
    """
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and (type(opset) is not int or not OLDEST <= opset <= newest):
        raise OptionError(f"opset={opset!r}: choose one from {OLDEST} to {newest}, or None")


def write(
    program: Program,
    path: str | os.PathLike[str],
    dynamic_batch: bool,
    check: Callable[[Path], None] = lambda _: None,
    opset: int | None = None,
    half: Half | None = None,
) -> None:
    """Write the program as an ONNX file.

    opset: of the standard ONNX domain; None: the exporter's own.
    half: the half precision in which the file computes, if any.
    check: looks at the file before it takes its place, and raises if something is wrong with it.

    Raises:
        ExportError: an op has no ONNX form; the message names its node.
    """
    exported, labels, outputs = to_onnx(program, dynamic_batch, opset)
    finish(exported, program, labels, outputs)
    if half is not None:
        to_half(exported, half)
    if program.gates:
        keep_gates(exported, program.gates)
    _write(exported, Path(path), check)


def _require_valid(model: Any, **options: Any) -> None:
    import onnx

    try:
        onnx.checker.check_model(model, **options)
    except Exception as error:  # of two classes of onnx's own; for a dtype that an op does not take, say
        raise ExportError(f"onnx's checker refuses the file: {first_line(error)}") from error


def _write(model: Any, path: Path, check: Callable[[Path], None]) -> None:
    """The file, and with more weights than it can hold a second one beside it; in place in one step."""
    import onnx_ir as ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    with beside(path) as new:
        if weights > LARGEST:
            # Under a name of its own: the old file keeps the old weights until the new one has taken its place.
            data = f"{path.name}.{model.metadata_props['weights_sha256'][:8]}-{secrets.token_hex(4)}.data"
            ir.save(model, new, external_data=data)
            _require_valid(str(new))
            check(new)
            sync(new.with_name(data)).replace(path.parent / data)
        else:
            data = ""
            proto = ir.to_proto(model)
            _require_valid(proto, full_check=True)
            new.write_bytes(proto.SerializeToString())
            check(new)
        try:
            sync(new).replace(path)
        except BaseException:
            if data:
                (path.parent / data).unlink()
            raise
    for old in path.parent.glob(f"{glob.escape(path.name)}.*.data"):
        if old.name != data and re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{8}", old.name[len(path.name) + 1 : -len(".data")]):
            old.unlink()
