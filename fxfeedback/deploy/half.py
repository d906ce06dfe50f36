"""A file that computes in half precision: weights and values in float16 or bfloat16, sums in float32.

What adds many numbers, or leaves the range of a half, is computed in float32: means and variances of norms, softmax,
exponentials, and the arithmetic element by element on such a sum, until a layer takes it as a half again. So is the
instruction pass: gates are the signs of its numbers, which may be smaller than any half.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fxfeedback.errors import ExportError, OptionError

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

SUMS = {
    *("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceLogSum", "CumSum"),
    *("ReduceLogSumExp", "GlobalAveragePool", "GlobalLpPool", "LpPool", "Exp", "Log", "Pow", "Reciprocal", "Sqrt"),
}
"""What is computed in float32, and the arithmetic on its results with it."""
ARITHMETIC = {
    *("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Max", "Min", "Sum", "Mean", "Where", "Sign", "Clip", "Floor", "Ceil"),
    *("Round", "Unsqueeze", "Squeeze", "Expand"),
}
"""What stays in float32 with an operand that is a sum, or a number that was counted."""
WHOLE = {
    *("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "LpNormalization"),
    *("MeanVarianceNormalization", "LRN", "Softmax", "LogSoftmax", "GRU", "LSTM", "RNN", "Einsum", "GridSample"),
    *("AffineGrid", "RoiAlign", "NonMaxSuppression", "Erf", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh"),
    *("Cosh", "Asinh", "Acosh", "Atanh", "Mod", "RandomNormal", "RandomNormalLike", "RandomUniform"),
    *("RandomUniformLike", "Bernoulli", "Multinomial"),
}
"""What is computed in float32, with results in half: its sums are inside, or ONNX Runtime has no kernel for halves."""
EITHER = {"Resize": (1, 2), "Shape": (0,), "Size": (0,), "Cast": (0,)}
"""Inputs that stay as they are: of any dtype, or always of float32."""
MANY = 4096
"""From so many numbers on a weight is stored in half also where float32 alone reads it."""


class Half(NamedTuple):
    """dtype: one of `HALVES`. io: whether the file's inputs and outputs are halves, too."""

    dtype: str
    io: bool


def half_of(dtype: str | None, io: str | None, own: torch.dtype) -> Half | None:
    """What `export`'s dtype= and io_dtype= ask for of a model of this dtype.

    Raises:
        OptionError: it is not a half precision, or the model is not of float32.
    """
    if dtype is None and io is None:
        return None
    if dtype not in HALVES:
        raise OptionError(f'dtype={dtype!r}: choose "float16" or "bfloat16", or None for the model\'s own')
    if io not in (None, "float32", dtype):
        raise OptionError(f'io_dtype={io!r}: choose "float32" or {dtype!r}')
    if own != torch.float32:
        raise OptionError(f"dtype={dtype!r}: the model is of {own}: convert it with .float() first")
    return Half(dtype, io == dtype)


def to_half(model: Any, half: Half) -> None:
    """Let an `onnx_ir.Model` of float32 compute in half precision, in place.

    Raises:
        ExportError: it has branches or loops.
    """
    from onnx_ir.passes import common

    branches = [node for node in model.graph if any(a.type.name in ("GRAPH", "GRAPHS") for a in _attributes(node))]
    if branches:
        raise ExportError(f"dtype={half.dtype!r}: the node {branches[0].name!r} has a graph inside: leave dtype= out")
    common.ShapeInferencePass()(model)
    _Halving(model.graph, half).run()


def rounded(model: nn.Module, half: Half) -> nn.Module:
    """A copy of a model with the weights that a file of halves has, which may open and close other gates."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(_as_halves(parameter, HALVES[half.dtype]))
    return made


def _as_halves(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Its numbers as halves; what lies beyond them as the largest that there is."""
    limits = torch.finfo(dtype)
    return torch.where(tensor.isinf(), tensor, tensor.clamp(limits.min, limits.max)).to(dtype)


def _attributes(node: Any) -> Sequence[Any]:
    return list(node.attributes.values())


class _Halving:
    """One walk over a graph; every value is float32 or half, and is cast once where it is wanted as the other."""

    def __init__(self, graph: Any, half: Half) -> None:
        import onnx_ir as ir

        self.ir, self.graph, self.io = ir, graph, half.io
        self.float, self.half, self.torchs = ir.DataType.FLOAT, ir.DataType[half.dtype.upper()], HALVES[half.dtype]
        self.sums: set[Any] = set()  # values that are float32 because of a sum
        self.casts: dict[tuple[Any, Any], Any] = {}

    def run(self) -> None:
        for value in self.graph.inputs:
            if self.io and value.dtype == self.float:
                if value.const_value is not None:  # its default
                    value.const_value = self.stored(value, value.name)
                self.say(value, self.half)
        for node in list(self.graph):
            self.convert(node)
        for number, value in enumerate(self.graph.outputs):
            self.hand_out(number, value)
        self.store_weights()

    def convert(self, node: Any) -> None:
        """Let a node take halves, or float32 where it sums."""
        given = [
            (i, value)
            for i, value in enumerate(node.inputs)
            if value is not None and value.dtype in (self.float, self.half) and i not in EITHER.get(node.op_type, ())
        ]
        follows = node.op_type in ARITHMETIC and any(v in self.sums or self.beyond(v) for _, v in given)
        made_whole = not given and not self.from_bool(node)  # counted, or all one number
        folded = node.op_type == "BatchNormalization" and any(map(self.beyond, node.inputs))  # else one with its layer
        decides = node.name.startswith(("td/", "gate/")) and not self.from_bool(node)
        wide = made_whole or follows or folded or decides or node.op_type in SUMS or node.op_type in WHOLE
        for i, value in given:
            node.replace_input_with(i, self.cast(value, self.float if wide else self.half))
        for value in node.outputs:
            if value.dtype == self.float and not wide:
                self.say(value, self.half)
                if node.op_type == "Cast":
                    node.attributes["to"] = self.ir.AttrInt64("to", self.half)
            elif value.dtype == self.float and node.op_type not in WHOLE and not folded:
                self.sums.add(value)

    def from_bool(self, node: Any) -> bool:
        """Whether it makes a gate or a mask a number."""
        return node.op_type == "Cast" and node.inputs[0].dtype == self.ir.DataType.BOOL

    def beyond(self, value: Any) -> bool:
        """Whether it holds a finite number that is too large for a half, or is one that is too small, as an ε."""
        if value.const_value is None or value.is_graph_input():
            return False
        numbers, limits = np.abs(value.const_value.numpy()), torch.finfo(self.torchs)
        too_large = bool((numbers[np.isfinite(numbers)] > limits.max).any())
        return too_large or (numbers.size == 1 and 0 < float(numbers.max()) < limits.tiny)

    def cast(self, value: Any, dtype: Any) -> Any:
        """The value in this dtype."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self.casts:
            node = self.ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}/to_{dtype.name.lower()}")
            made = self.casts[value, dtype] = node.outputs[0]
            made.name, made.shape = node.name, value.shape
            self.say(made, dtype)
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                self.graph.insert_after(producer, node)
        return self.casts[value, dtype]

    def say(self, value: Any, dtype: Any) -> None:
        value.type = self.ir.TensorType(dtype)

    def hand_out(self, number: int, value: Any) -> None:
        """An output of the file, under its name, in the dtype that it is to have."""
        wanted = self.half if self.io else self.float
        if value.dtype in (self.float, self.half) and value.dtype != wanted:
            name, value.name = value.name, f"{value.name}.{value.dtype.name.lower()}"
            self.graph.outputs[number] = made = self.cast(value, wanted)
            made.name = name

    def store_weights(self) -> None:
        """Weights that are read as halves, and large ones, are stored as such; who needs float32 has them cast."""
        for name, value in list(self.graph.initializers.items()):
            if value.dtype != self.float or value.is_graph_input():
                continue
            as_half = self.casts.get((value, self.half))
            if as_half is None and value.const_value.size < MANY:
                continue
            stored = self.ir.Value(name=name, shape=value.shape, type=self.ir.TensorType(self.half))
            stored.const_value = self.stored(value, name)
            if as_half is not None:
                node = as_half.producer()
                self.ir.convenience.replace_all_uses_with(as_half, stored)
                self.graph.remove(node, safe=True)
            if value.uses():
                self.ir.convenience.replace_all_uses_with(value, self.cast(stored, self.float))
            del self.graph.initializers[name]
            self.graph.register_initializer(stored)

    def stored(self, value: Any, name: str) -> Any:
        """Its numbers as halves."""
        tensor = torch.from_numpy(value.const_value.numpy().copy())
        return self.ir.tensor(_as_halves(tensor, self.torchs), name=name)
