"""Open a traced graph into functional ops: `self.conv1(x)` becomes `F.conv2d(x, conv1.weight, ...)`.

Afterwards every node is a call of one out-of-place function, parameters are `get_attr` nodes, and the last node of
each opened module carries the module's name. The rules speak of these functions only.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize
from torchvision.ops import stochastic_depth

from fxfeedback.errors import RuleError
from fxfeedback.rules.core import as_tuple
from fxfeedback.trace import identifier, is_operator_in_place, user_line

OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def open_modules(module: fx.GraphModule, strict: bool = True) -> fx.GraphModule:
    """The same computation as `module`, in functional out-of-place ops with the same names.

    Raises:
        RuleError: a torch.nn module does not open, and `strict`; otherwise it stays closed.
    """
    with parametrize.cached():
        opener = _Opener(module, strict)
        for node in module.graph.nodes:
            opener.open(node)
    for node in opener.graph.nodes:
        node.meta.pop("origin", None)
        if node.op == "call_function":
            node._rename(identifier(node.meta["name"]))
    opener.graph.lint()
    return fx.GraphModule(module, opener.graph, type(module).__name__)


class _Opener(fx.Tracer):
    """One walk over a traced graph; `values` maps its nodes to proxies of the opened graph."""

    def __init__(self, module: fx.GraphModule, strict: bool) -> None:
        super().__init__()
        self.root = module
        self.strict = strict
        self.graph = fx.Graph(tracer_cls=type(self))
        self.names = _tensor_names(module)
        self.values: dict[fx.Node, Any] = {}
        self.present: Any = None  # the node that is being opened

    def open(self, node: fx.Node) -> None:
        args = fx.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.values.__getitem__)
        with self._at(node):
            if node.op == "call_module":
                value = self.open_module(self.root.get_submodule(str(node.target)), *args, **kwargs)
            else:
                name = node.name if node.op in ("placeholder", "get_attr") else None
                value = self.create_proxy(node.op, node.target, args, kwargs, name)
            if node.op.startswith("call") and isinstance(value, fx.Proxy) and value.node.meta.get("origin") is not node:
                value = _call(same, value)  # dropout that is off, an identity: they keep their name
        if isinstance(value, fx.Proxy) and value.node.meta.get("origin") is node:
            value.node.meta["name"] = node.meta["name"]
        self.values[node] = value
        if _is_in_place(node, self.root) and isinstance(node.args[0], fx.Node):
            _check_overwriting(node, self.root)
            self.values[node.args[0]] = value  # who reads the overwritten value later reads the new one

    def open_module(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        opening = next((OPENINGS[kind] for kind in type(module).__mro__ if kind in OPENINGS), None)
        try:
            return opening(module, *args, **kwargs) if opening else module.forward(*args, **kwargs)
        except Exception as error:
            node = self.present
            if not self.strict:
                return self.create_proxy("call_module", node.target, args, kwargs)
            raise RuleError(
                f"torch.nn.{type(module).__name__} does not open into ops that have rules: {error} "
                f"(at node {node.meta['name']!r}{user_line(node)}). Write that part in torch functions, or leave it "
                "outside of what is converted."
            ) from error

    @contextmanager
    def _at(self, node: fx.Node) -> Iterator[None]:
        self.present = node
        yield
        self.present = None

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, *rest: Any) -> fx.Proxy:
        changes_state = bool(args) and isinstance(args[0], fx.Proxy) and args[0].node.op == "get_attr"
        if not changes_state:
            kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
            target = _out_of_place(target)
        if kind == "call_method":
            kind, target = "call_function", getattr(torch.Tensor, target)
        if kind == "call_function" and target in OPENINGS:
            opened = OPENINGS[target](*args, **kwargs)
            if opened is not NotImplemented:
                return opened
        proxy = super().create_proxy(kind, target, args, kwargs, name, *rest)
        if self.present is not None:
            origin = self.present
            inner = f"{origin.meta['name']}.{proxy.node.name}"
            proxy.node.meta.update(origin=origin, name=inner)
            proxy.node.stack_trace = origin.stack_trace
        return proxy

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and id(a) in self.names:
            return self.parameter(a).node
        return super().create_arg(a)

    def parameter(self, tensor: torch.Tensor) -> fx.Proxy:
        """The get_attr node of a parameter or buffer, made where it is first used."""
        name = self.names[id(tensor)]
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                return self.proxy(node)
        proxy = super().create_proxy("get_attr", name, (), {})
        proxy.node.meta["name"] = name
        return proxy


def _tensor_names(module: nn.Module) -> dict[int, str]:
    """id -> qualified name of every parameter, buffer and parametrized tensor; the first name of a tied one."""
    names: dict[int, str] = {}
    for path, owner in module.named_modules():
        tensors = {**owner._parameters, **owner._buffers}
        if parametrize.is_parametrized(owner):
            tensors.update({name: getattr(owner, name) for name in owner.parametrizations})
        for name, tensor in tensors.items():
            if tensor is not None:
                names.setdefault(id(tensor), f"{path}.{name}" if path else name)
    return names


def _is_in_place(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    return bool(node.kwargs.get("inplace")) or _out_of_place(node.target) is not node.target


def _check_overwriting(node: fx.Node, root: nn.Module) -> None:
    """Refuse an in-place op that changes memory which is read later under another name: as a view, or by a view."""
    before = {}
    for other in node.graph.nodes:
        before[other] = True
        if other is node:
            break
    memory = _memory_of(node.args[0], root)
    for other in before:
        shares = other is not node and other is not node.args[0] and _memory_of(other, root) is memory
        if shares and any(user not in before for user in other.users):
            raise RuleError(
                f"the in-place op at node {node.meta['name']!r}{user_line(node)} overwrites memory that is read again "
                f"as {other.meta['name']!r}: write it out of place (x = x + y, not x.add_(y))"
            )


VIEWS = {
    "getitem", "view", "view_as", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "t", "squeeze",
    "unsqueeze", "select", "narrow", "expand", "chunk", "split", "unbind", "contiguous", "dropout",
}  # fmt: skip
VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)


def _memory_of(node: Any, root: nn.Module) -> Any:
    """The node whose memory the node's value lies in, or may lie in: what it is a view of."""
    while isinstance(node, fx.Node) and node.args and (_is_view(node, root) or _is_in_place(node, root)):
        node = node.args[0]
    return node


def _is_view(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), VIEW_MODULES)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in VIEWS


def _out_of_place(target: Any) -> Any:
    """relu_ -> relu, add_ -> add, operator.iadd -> operator.add; any other target as it is."""
    if is_operator_in_place(target):
        return OUT_OF_PLACE[target]
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if not name.endswith("_") or name.endswith("__"):
        return target
    if isinstance(target, str):
        return name[:-1]
    return getattr(torch, name[:-1], None) or getattr(F, name[:-1], target)


# -- openings: what forward does, in ops that have rules --------------------------------------------------------------


def _call(function: Callable[..., Any], input: fx.Proxy, *args: Any) -> fx.Proxy:
    """A node that calls a function of ours as a whole, for what cannot run on proxies."""
    return input.tracer.create_proxy("call_function", function, (input, *args), {})


def _batch_norm(module: Any, input: fx.Proxy) -> fx.Proxy:
    """y = (x - mean) / sqrt(var + eps) * gamma + beta; forward itself looks at the input's dimensions."""
    tracks = module.track_running_stats and module.running_mean is not None
    training = module.training or not tracks
    momentum = module.momentum
    if module.training and tracks:
        count = input.tracer.parameter(module.num_batches_tracked)
        _call(torch.Tensor.add_, count, 1)
        momentum = _call(cumulative_momentum, count) if momentum is None else momentum
    return F.batch_norm(
        input,
        module.running_mean if tracks else None,
        module.running_var if tracks else None,
        module.weight,
        module.bias,
        training,
        0.0 if momentum is None else momentum,
        module.eps,
    )


def cumulative_momentum(num_batches_tracked: torch.Tensor) -> float:
    """The momentum that makes running statistics a plain average: 1 / number of batches."""
    return 1.0 if num_batches_tracked.is_meta else 1.0 / num_batches_tracked.item()


def same(input: torch.Tensor) -> torch.Tensor:
    """The input itself: what is left of dropout in evaluation mode, and of nn.Identity."""
    return input


def _dropout(input: fx.Proxy, p: float = 0.5, training: bool = True, inplace: bool = False) -> fx.Proxy:
    """Dropout hands out the mask that it draws; the random stream is F.dropout's."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _stochastic_depth(input: fx.Proxy, p: float, mode: str, training: bool = True) -> fx.Proxy:
    return input * _call(survival, input, p, mode) if training and p > 0 else input


def survival(input: torch.Tensor, p: float, mode: str) -> torch.Tensor:
    """Stochastic depth's factor: 0 or 1 / (1 - p) per sample ("row") or per batch, drawn as torchvision draws it."""
    samples = input.shape[0] if mode == "row" else 1
    ones = torch.ones((samples,) + (1,) * (input.ndim - 1), dtype=input.dtype, device=input.device)
    return stochastic_depth(ones, p, mode, True)


def _feature_dropout(input: fx.Proxy, p: float = 0.5, training: bool = True, inplace: bool = False) -> fx.Proxy:
    return input * _call(surviving_channels, input, p) if training and p > 0 else input


def surviving_channels(input: torch.Tensor, p: float) -> torch.Tensor:
    """Channel dropout's factor, (N, C, 1, ...): 0 or 1 / (1 - p), drawn as F.dropout2d draws it."""
    return torch.feature_dropout(input.new_ones(input.shape[:2] + (1,) * (input.ndim - 2)), p, True)


def _named_padding(
    input: fx.Proxy,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """padding="same" and "valid" in numbers; an uneven "same" pads once more at the far end, as torch does."""
    if not isinstance(padding, str):
        return NotImplemented
    kernel = _shape(weight)[2:]
    convolution = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[len(kernel)]
    total = [
        0 if padding == "valid" else d * (k - 1) for d, k in zip(as_tuple(dilation, len(kernel)), kernel, strict=True)
    ]
    if any(t % 2 for t in total):
        input = F.pad(input, [extra for t in reversed(total) for extra in (0, t % 2)])
    return convolution(input, weight, bias, stride, [t // 2 for t in total], dilation, groups)


def _shape(weight: Any) -> tuple[int, ...]:
    """The shape of a parameter, as a tensor or as its node."""
    if isinstance(weight, fx.Proxy):
        path, _, leaf = str(weight.node.target).rpartition(".")
        weight = getattr(weight.tracer.root.get_submodule(path), leaf)
    return tuple(weight.shape)


OPENINGS: dict[Any, Callable[..., Any]] = {
    nn.modules.batchnorm._BatchNorm: _batch_norm,
    nn.ReLU6: lambda module, input: F.relu6(input),  # its own forward is a hardtanh
    F.dropout: _dropout,
    torch.dropout: _dropout,
    F.dropout1d: _feature_dropout,
    F.dropout2d: _feature_dropout,
    F.dropout3d: _feature_dropout,
    torch.feature_dropout: _feature_dropout,
    stochastic_depth: _stochastic_depth,
    torch.conv1d: _named_padding,
    torch.conv2d: _named_padding,
    torch.conv3d: _named_padding,
}
"""nn.Module class or function -> the same in ops that have rules, or NotImplemented.

Every other module opens by its own forward.
"""
