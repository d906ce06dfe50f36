"""PyTorch's own operators, aten and prims, as calls of the functions that have rules.

`emit` is used where a graph comes from PyTorch's dispatcher: this knows no function of torch.nn.functional and no
index in brackets, but the operators that these call.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxfeedback.rules import RULES
from fxfeedback.rules.convolution import CONV, CONV_TRANSPOSE
from fxfeedback.rules.core import CONSTANT
from fxfeedback.rules.ops import check_errors_

FOLDERS = {"linalg_": torch.linalg, "special_": torch.special, "fft_": torch.fft}
"""aten::linalg_det is torch.linalg.det."""


def emit(tracer: fx.Tracer, operator: Any, args: Any, kwargs: Any) -> Any:
    """What a call of the operator makes in the tracer's graph: a proxy, or a tuple of them.

    An operator without a function that has a rule is called itself.
    """
    spelled = SPELLINGS.get(name_of_operator(operator))
    if spelled is not None:
        return spelled(*args, **kwargs)
    return tracer.create_proxy("call_function", function_of(operator) or operator, args, kwargs)


def is_spelled(operator: Any) -> bool:
    """Whether a function that has a rule, or that no gradient passes through, does what the operator does."""
    return name_of_operator(operator) in SPELLINGS or _is_known(function_of(operator))


def name_of_operator(operator: Any) -> str:
    """aten::add.Tensor is called "add"."""
    schema = getattr(operator, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else ""


@functools.cache
def function_of(operator: Any) -> Callable[..., Any] | None:
    """The function that the operator has in Python, with the same arguments; one that has a rule if there is one."""
    name = name_of_operator(operator)
    owners = [(torch, name), (torch._C._nn, name), (torch.Tensor, name), (torch.Tensor, f"__{name}__")]
    owners += [(owner, name.removeprefix(prefix)) for prefix, owner in FOLDERS.items() if name.startswith(prefix)]
    found = [getattr(owner, each, None) for owner, each in owners]
    # What is written in Python may have other arguments.
    made = [f for f in found if isinstance(f, (types.BuiltinFunctionType, types.MethodDescriptorType))]
    return next((f for f in made if _is_known(f)), next(iter(made), None))


def _is_known(function: Any) -> bool:
    return function in RULES or function in CONSTANT


def _index(input: Any, dim: int, at: Any) -> Any:
    return input[(*[slice(None)] * (dim % input.ndim), at)]


def _slice(input: Any, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    return _index(input, dim, slice(start, None if isinstance(end, int) and end == 2**63 - 1 else end, step))


def _index_by(input: Any, indices: Any) -> Any:
    return input[tuple(slice(None) if index is None else index for index in indices)]


def _put(input: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    return torch.ops.aten.index_put.default(input, indices, values, accumulate)  # torch.index_put takes no None


def _convolution(
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    if transposed:
        return CONV_TRANSPOSE[input.ndim](input, weight, bias, stride, padding, output_padding, groups, dilation)
    return CONV[input.ndim](input, weight, bias, stride, padding, dilation, groups)


def _softmax(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda input, dim, half_to_float: function(input, dim, **({"dtype": torch.float32} if half_to_float else {}))


def _check_errors(info: Any, name: str, *, is_matrix: bool) -> None:
    info.tracer.create_proxy("call_function", check_errors_, (info, name, is_matrix), {})


def _to(input: Any, dtype: torch.dtype | None = None, **options: Any) -> Any:
    return input if dtype is None else input.to(dtype)


def _as_it_is(input: Any, **options: Any) -> Any:
    return input


SPELLINGS: dict[str, Callable[..., Any]] = {
    "_adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "_adaptive_avg_pool3d": F.adaptive_avg_pool3d,
    "_linalg_check_errors": _check_errors,
    "_log_softmax": _softmax(torch.log_softmax),
    "_softmax": _softmax(torch.softmax),
    "_to_copy": _to,
    "_unsafe_index": _index_by,
    "_unsafe_index_put": _put,
    "_unsafe_view": lambda input, size: input.reshape(size),
    "alias": _as_it_is,
    "constant_pad_nd": lambda input, pad, value=0: F.pad(input, pad, "constant", value),
    "convert_element_type": lambda input, dtype: input.to(dtype),
    "convolution": _convolution,
    "copy": lambda input, src, non_blocking=False: src.to(input.dtype).expand(input.shape),
    "index": _index_by,
    "index_put": _put,
    "lift_fresh_copy": _as_it_is,
    "select": _index,
    "slice": _slice,
    "view": lambda input, size: input.reshape(size),
    "view_of": _as_it_is,
}
"""Operators whose function in Python is called otherwise or has other arguments, by name: in functions with rules."""
