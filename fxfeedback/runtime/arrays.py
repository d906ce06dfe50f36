"""What a call brings, as arrays of numpy or as tensors of any library that stay where they lie; and looks at both."""

import reprlib
from typing import Any

import numpy as np

from fxfeedback.errors import InputError


def lies(value: Any) -> tuple[int, int] | None:
    """Where a tensor of a library lies, as DLPack numbers devices; None: it is no such tensor."""
    if isinstance(value, np.ndarray) or not all(hasattr(value, part) for part in ("__dlpack__", "dtype", "shape")):
        return None
    try:
        kind, number = value.__dlpack_device__()
    except (BufferError, RuntimeError, TypeError, ValueError, NotImplementedError):  # it lies nowhere, as on meta
        return None
    return int(kind), int(number)


def array(value: Any, what: str, place: tuple[int, int] | None = None) -> Any:
    """A numpy array of an array, a number, a list, or a tensor on any device; a tensor that lies in `place` stays one.

    Such a tensor comes back without its gradient's graph and contiguous: itself, or a copy where it lies.

    Raises:
        InputError: it is not made of numbers; `what` begins the message.
    """
    try:
        for method in ("detach", "resolve_neg", "contiguous"):  # torch's: of all three DLPack knows nothing
            value = getattr(value, method)() if hasattr(value, method) else value
        if place and lies(value) == place:
            return value
        if hasattr(value, "cpu"):
            value = value.cpu()
        alone = lies(value) and not hasattr(value, "__array__")
        made = np.from_dlpack(value) if alone else np.asarray(value.numpy() if hasattr(value, "detach") else value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:  # a ragged list, a dtype that numpy lacks
        raise InputError(f"{what}: this is not an array of numbers: {error}") from None
    if made.dtype.kind not in "biuf":
        raise InputError(f"{what}: {reprlib.repr(value)} is not a number or an array of numbers")
    return made


def dtype_of(value: Any) -> str:
    """The name of an array's or a tensor's dtype, the same in every library."""
    dtype = value.dtype
    return str(getattr(dtype, "name", dtype)).rpartition(".")[2]


def is_floating(value: Any) -> bool:
    """Whether its numbers have parts."""
    return "float" in dtype_of(value)


def is_integer(value: Any) -> bool:
    """Whether they are whole ones."""
    return dtype_of(value).startswith(("int", "uint"))


def has(value: Any, dtype: Any) -> bool:
    """Whether it is of this dtype."""
    return value.dtype == dtype if isinstance(value, np.ndarray) else dtype_of(value) == np.dtype(dtype).name


def cast(value: Any, dtype: Any) -> Any:
    """The value in this dtype, a tensor of another one as an array; what is too large for it becomes infinite."""
    if has(value, dtype):
        return value
    with np.errstate(over="ignore"):
        return array(value, "a value").astype(dtype)


def finite(value: Any, what: str) -> Any:
    """The value, if it has no NaN and nothing infinite; of a tensor one number is fetched.

    Raises:
        InputError: it has; `what` begins the message.
    """
    if is_floating(value) and not bool((abs(value) < np.inf).all()):
        raise InputError(f"{what} has values that are not finite: NaN, or beyond the range of {dtype_of(value)}")
    return value
