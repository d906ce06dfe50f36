"""What the nodes of a graph make on the meta device, where tensors have shapes and no data."""

import inspect
import operator
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfeedback.graph.effects import is_in_place
from fxfeedback.graph.nodes import draws, is_users, tell
from fxfeedback.graph.structures import plain


class MetaRun:
    """One run of a graph, a node at a time: the caller keeps in `values` what `value` says.

    root: has the modules and tensors that the nodes name.
    inputs: one tensor on the meta device per placeholder.
    around: entered for the code of modules and of the user, and where `root` is read.
    """

    def __init__(
        self, root: Any, inputs: Sequence[torch.Tensor], around: Callable[[], AbstractContextManager] = nullcontext
    ) -> None:
        self.root, self.inputs, self.around = root, inputs, around
        self.values: dict[fx.Node, Any] = {}
        self.known: dict[Any, tuple[fx.Node, torch.Tensor]] = {}  # a long recurrence makes the same again and again

    def value(self, node: fx.Node) -> Any:
        """What the node makes of `values`; raises what its op does, and KeyError where it has no value for an operand.

        To be called under torch.device("meta") and torch.no_grad().
        """
        if node.op == "placeholder":
            return self.inputs[[n for n in node.graph.nodes if n.op == "placeholder"].index(node)]
        if node.op == "get_attr":
            tensor = self.attribute(node)
            return tensor.to("meta") if isinstance(tensor, torch.Tensor) else tensor
        # The generated code has plain lists also.
        args, kwargs = (plain(fx.map_arg(a, self._operand)) for a in (node.args, node.kwargs))
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            with self.around():
                return on_meta(self.root.get_submodule(str(node.target)), args, kwargs)
        if node.target in SHAPES:
            return SHAPES[node.target](*args, **kwargs)
        if node.target is F.batch_norm:  # its kernel for meta tensors takes milliseconds to say this
            return torch.empty_like(args[0])
        return self._call(node, args, kwargs) if is_users(node.target) else self._known(node, args, kwargs)

    def _known(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What a function of torch makes; if it has made the same of such tensors before, that."""
        key = _key((node.target, args, kwargs))
        if key in self.known:
            first, value = self.known[key]
            if draws(first):
                tell(node, drawn=True)
            return value.detach()
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(value, torch.Tensor) and not is_in_place(node.target):
            self.known[key] = node, value.detach()
        return value

    def attribute(self, node: fx.Node) -> Any:
        """The parameter, buffer or constant of a get_attr node."""
        tensor = registered(self.root, str(node.target))
        if tensor is not None:
            return tensor
        with self.around():
            return operator.attrgetter(str(node.target))(self.root)

    def _operand(self, source: fx.Node) -> Any:
        if source not in self.values and source.op == "get_attr":  # tracing makes these without a proxy
            self.values[source] = self.value(source)
        return self.values[source]

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Call a function of the user's; it is said of the node if it writes into its arguments."""
        given = [arg for arg in args if isinstance(arg, torch.Tensor) and not arg.is_inference()]
        versions = [arg._version for arg in given]
        with self.around():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        if [arg._version for arg in given] != versions:
            tell(node, writes=True)
        return value


def registered(root: Any, target: str) -> torch.Tensor | None:
    """The parameter or buffer with this path; None where a module computes it, or has it as something else."""
    *path, name = target.split(".")
    owner: Any = root
    for part in path:
        owner = owner._modules.get(part) if isinstance(owner, nn.Module) else None
    if not isinstance(owner, nn.Module):
        return None
    found = owner._parameters.get(name)
    return owner._buffers.get(name) if found is None else found


def _key(value: Any) -> Any:
    """What has to be the same of two arguments so that an op makes the same of them: of tensors all but the values."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.is_conj(), value.is_neg()
    if isinstance(value, (list, tuple)):
        return type(value), *map(_key, value)
    if isinstance(value, dict):
        return dict, *((key, _key(each)) for key, each in value.items())
    if isinstance(value, slice):
        return slice, value.start, value.stop, value.step
    return type(value), value if isinstance(value, Hashable) else id(value)


def _ctc_loss(log_probs: Any, *args: Any, reduction: Any = "mean", **options: Any) -> Any:
    how = args[4] if len(args) > 4 else reduction
    return log_probs.new_empty(log_probs.shape[1:-1] if how in ("none", 0) else ())


def _fft_c2c(input: Any, *how: Any) -> Any:
    return torch.empty_like(input)


def _fft_r2c(input: Any, dim: Any, normalization: int, onesided: bool) -> Any:
    size = input.shape[dim[-1]]
    return _with_size(input, dim[-1], size // 2 + 1 if onesided else size, torch.result_type(input, 1j))


def _fft_c2r(input: Any, dim: Any, normalization: int, last_dim_size: int) -> Any:
    return _with_size(input, dim[-1], last_dim_size, torch.real(input).dtype)


def _with_size(input: Any, dim: int, size: int, dtype: torch.dtype) -> Any:
    return torch.empty([size if i == dim % input.ndim else n for i, n in enumerate(input.shape)], dtype=dtype)


SHAPES: dict[Any, Callable[..., Any]] = {
    F.ctc_loss: _ctc_loss,
    torch.ctc_loss: _ctc_loss,
    torch._fft_c2c: _fft_c2c,  # in torch 2.11 their kernels fail where the dimensions are not in order
    torch._fft_r2c: _fft_r2c,
    torch._fft_c2r: _fft_c2r,
}
"""Functions without a kernel for tensors that have no data, or without a right one, and what they make of them."""

SHAPED_LIKE = {nn.TransformerEncoder: "src", nn.TransformerDecoder: "tgt", nn.Transformer: "tgt"}
"""Modules that look into their masks, and the argument that their output has the shape of."""


def on_meta(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a module makes of tensors on the meta device."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # a cumulative average would ask for a number
        return torch.empty_like(args[0])
    like = next((like for kind, like in SHAPED_LIKE.items() if isinstance(module, kind)), None)
    if like is not None:
        return torch.empty_like(inspect.signature(module.forward).bind(*args, **kwargs).arguments[like])
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    try:
        return torch.func.functional_call(module, {name: t.to("meta") for name, t in tensors.items()}, args, kwargs)
    finally:
        for inner in module.modules():
            if isinstance(inner, nn.RNNBase):
                inner._init_flat_weights()  # its list of weights has those of the call
