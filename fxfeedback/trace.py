"""Any model -> a named graph with shapes.

`trace` keeps torch.nn modules closed and gives every node its torchvision name in `node.meta["name"]`;
`open_modules` (open_modules.py) opens them into functional ops; `annotate_shapes` writes a `Spec` per tensor into
`node.meta["spec"]`. The user's model is never traced itself, only a copy that shares its tensors.
"""

import contextlib
import copy
import difflib
import functools
import inspect
import keyword
import math
import operator
import random
import re
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.overrides import is_tensor_method_or_property
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction
from torchvision.models.feature_extraction import NodePathTracer

from fxfeedback.errors import InputError, NodeNameError, TraceError
from fxfeedback.ops import applying, without_gradient

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
"""Packages of quantized modules; what computes with floats there are only the `FloatFunctional`s."""

EXAMPLE_BATCH = 2
"""Batch size of the shapes in a `Spec`; no broadcasting can hide in it, as it could in 1."""


@dataclass(frozen=True)
class Spec:
    """What tracing knows of a tensor: its shape at batch size `EXAMPLE_BATCH`, and how each size grows with the batch.

    `per_sample[i]` is what one more sample adds to `shape[i]`: 0 where the batch has no say, 1 for a batch dimension,
    64 where 64 windows of an image lie in the batch dimension.
    """

    shape: tuple[int, ...]
    per_sample: tuple[int, ...]
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """The shape with None where it depends on the batch."""
        return tuple(None if slope else size for size, slope in zip(self.shape, self.per_sample, strict=True))


def share(model: nn.Module) -> nn.Module:
    """A copy of `model` whose modules are new (modes, attributes) and whose parameters and buffers are the same.

    Raises:
        TraceError: a quantized, compiled, scripted, wrapped or uninitialized model.
    """
    refuse_untraceable(model)
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [tensor for module in model.modules() for tensor in _tensors_in(vars(module))]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in an attribute's value: some models keep what they computed, in a dict or a list."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def put(model: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """`model` with the module at `path` replaced by `part`, in a copy that shares all tensors."""
    if not path:
        return part
    model = share(model)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, part)
    return model


SIZED = {
    torch: ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros"),
    torch.Tensor: ("expand", "repeat"),
}
"""What gives a tensor of the model's own a size, which may be a proxy: nodes, where it is one."""

UNTRACED = {owner: {name: getattr(owner, name) for name in names} for owner, names in SIZED.items()}
UNTRACED[nn.Module] = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}
"""All that is replaced while a model is traced, as it is otherwise."""


class PathTracer(NodePathTracer):
    """torchvision's tracer, with torch.nn modules alone as leaves."""

    record_stack_traces = True

    def __init__(self) -> None:
        super().__init__(leaf_modules=[], autowrap_modules=(math, torchvision.ops))
        self.thread = threading.get_ident()
        self.without_gradient: dict[fx.Node, fx.Node | None] = {}

    # torch.fx replaces methods of nn.Module while it traces; other threads may run modules in the meantime.

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        as_graph = getattr(type(m), "as_graph", None)
        reason = getattr(type(m), "untraceable", "")
        if reason:
            raise ValueError(f"its part {self.path_of_module(m)!r} {reason}")
        if as_graph is None:
            return super().call_module(m, forward, args, kwargs)
        with untraced():
            graph = as_graph(m).graph
        path, inputs = self.path_of_module(m), iter(args)
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op != "output":
                own = (fx.map_arg(a, values.__getitem__) for a in (node.args, node.kwargs))
                target = f"{path}.{node.target}" if node.op in ("get_attr", "call_module") else node.target
                values[node] = value = self.create_proxy(node.op, target, *own)
                if isinstance(value, fx.Proxy):
                    self.node_to_qualname[value.node] = f"{path}.{node.meta['name']}"
        return fx.map_arg(graph.output_node().args[0], values.__getitem__)

    # A graph knows no torch.no_grad(): what is computed under it passes no gradient on where it is used outside.

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise ValueError("it switches autocast on, which a graph cannot hold: call what is returned under autocast")
        if kind.startswith("call") and not torch.is_grad_enabled():
            self.without_gradient[node] = None
        return node

    def create_arg(self, a: Any) -> Any:
        arg = super().create_arg(a)
        if not isinstance(arg, fx.Node) or arg not in self.without_gradient or not torch.is_grad_enabled():
            return arg
        if self.without_gradient[arg] is None:
            node = self.create_node("call_function", without_gradient, (arg,), {})
            self.node_to_qualname[node] = self._get_node_qualname(self.current_module_qualname, node)
            self.proxy(node)
            self.without_gradient[arg] = node
        return self.without_gradient[arg]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        # A counter is a value of the graph: to count in tracing would change the user's model, and never count again.
        self.proxy_buffer_attributes = isinstance(attr_val, torch.Tensor) and attr_val.ndim == 0
        return super().getattr(attr, attr_val, parameter_proxy_cache)


@contextmanager
def running_on_proxies() -> Iterator[None]:
    """While a model's code runs: only its own contexts count, and autograd functions stay whole."""
    around = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for device, enabled in around.items():
            torch.set_autocast_enabled(device, False)
            stack.callback(torch.set_autocast_enabled, device, enabled)
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", _applied()))
        yield


@contextmanager
def replaced(by: Mapping[Any, Mapping[str, Any]]) -> Iterator[None]:
    """Of each owner, these attributes are these."""
    with contextlib.ExitStack() as stack:
        for owner, attributes in by.items():
            stack.enter_context(mock.patch.multiple(owner, **attributes))
        yield


def untraced() -> Any:
    """While a model is traced: what runs in this context is not."""
    return replaced(UNTRACED)


@contextmanager
def recording_sized() -> Iterator[None]:
    """While a model is traced: it may make a tensor of its own that is as large as the batch, which is a proxy."""
    is_tensor_method_or_property(torch.relu)  # makes torch's own tables of functions, before some are replaced
    with torch.device("meta"):
        torch.empty(())
    with replaced({owner: {name: _recorded(UNTRACED[owner][name]) for name in SIZED[owner]} for owner in SIZED}):
        yield


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which becomes a node where it gets a proxy."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, fx.Proxy):
                return value.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    return call


def _applied() -> Any:
    """torch.autograd.Function.apply, which becomes a node where it gets a proxy; checkpoints are seen through."""
    original = inspect.getattr_static(torch.autograd.Function, "apply")

    def apply(kind: type, *args: Any, **kwargs: Any) -> Any:
        if kind is CheckpointFunction and any(isinstance(value, fx.Proxy) for value in args):
            function, _, *given = args
            return function(*given)
        if any(isinstance(value, fx.Proxy) for value in tree_leaves((args, kwargs))):
            return _recorded(applying(kind))(*args, **kwargs)
        return original.__get__(None, kind)(*args, **kwargs)

    return classmethod(apply)


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def building(model: nn.Module) -> Iterator[None]:
    """While graphs are made: by one thread at a time, and outside of inference mode, as their constants are kept."""
    with _ONE_AT_A_TIME, torch.inference_mode(False), settled(model):
        yield


@contextmanager
def settled(module: nn.Module) -> Iterator[None]:
    """Parametrizations in evaluation mode: to look at a weight is no step of training (spectral norm's iteration)."""
    owners = [owner for owner in module.modules() if parametrize.is_parametrized(owner)]
    parametrizations = [owner.get_submodule("parametrizations") for owner in owners]
    inner = [m for each in parametrizations for m in each.modules() if m.training]
    for m in inner:
        m.training = False
    try:
        yield
    finally:
        for m in inner:
            m.training = True


def trace(model: nn.Module, n_inputs: int = 1) -> fx.GraphModule:
    """The graph of `model` in its present mode, with torch.nn modules as leaves and names.

    Args:
        model: traced as it stands; tracing may leave constants on it, so pass a copy made by `share`.
        n_inputs: how many positional arguments of `forward` are inputs; the others keep their defaults.

    Raises:
        TraceError: torch.fx cannot trace the model.
    """
    return trace_with(PathTracer(), model, n_inputs)


def trace_with(tracer: PathTracer, model: nn.Module, n_inputs: int) -> fx.GraphModule:
    """As `trace`, with a tracer of the caller's."""
    as_graph = getattr(type(model), "as_graph", None)
    if as_graph is not None:  # a model of ours
        return as_graph(model)
    reason = getattr(type(model), "untraceable", "")
    if reason:
        raise TraceError(f"{type(model).__name__} {reason}.")
    wanted = len([a for a in _arguments(model) if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD])
    if wanted > n_inputs:
        raise TraceError(
            f"{type(model).__name__} takes {wanted} inputs, not {n_inputs}: pass example_inputs= with a tensor for each"
        )
    versions = {name: buffer._version for name, buffer in model.named_buffers()}
    drawn = torch.get_rng_state(), random.getstate()
    try:
        with _as_they_were(model), running_on_proxies(), recording_sized():
            graph = tracer.trace(model, concrete_args=_defaults(model, n_inputs))
        for name, buffer in model.named_buffers():
            if buffer._version != versions.get(name, buffer._version):
                raise ValueError(f"its forward writes into the buffer {name!r}, and did so while it was traced")
        if not torch.equal(drawn[0], torch.get_rng_state()) or drawn[1] != random.getstate():
            raise ValueError(
                "its forward draws random numbers that do not depend on its input's values or size, and would be the "
                "same in every call: draw them with torch.rand_like(x), x.new_empty(...).bernoulli_(p) or nn.Dropout"
            )
    except Exception as error:
        raise TraceError(
            f"torch.fx cannot trace {type(model).__name__}: {error}{_line_of(error)}. A traceable model has no control "
            "flow that depends on tensor values; wrap the part in a function marked with torch.fx.wrap, or pass a "
            "traceable part of the model."
        ) from error
    for node in graph.nodes:
        node.meta["name"] = tracer.node_to_qualname.get(node, node.name)
    for node in [node for node in graph.nodes if node.op == "placeholder"][n_inputs:]:
        _erase_with_users(node)  # a constant argument, and torch.fx's assertion that it keeps its value
    graph.eliminate_dead_code(is_impure_node=lambda node: _has_effect(node, model))
    for node in graph.nodes:
        words = [word for word in str(node.target).split(".") if keyword.iskeyword(word)]
        if words and node.op in ("call_module", "get_attr"):
            raise TraceError(
                f"the model's {node.target!r} is called like Python's own word {words[0]!r}, which the code of a graph "
                f"cannot say: rename it, for example to {words[0] + '_'!r}"
            )
    return fx.GraphModule(model, graph, type(model).__name__)


def example_for(model: nn.Module, input_size: Sequence[int] | None = None) -> tuple[torch.Tensor]:
    """The one-image example input for `model`: (1, *input_size), in the model's dtype.

    `input_size` defaults to 224 by 224 with the first convolution's channels, or, without a convolution, to the first
    linear layer's features.
    """
    refuse_untraceable(model)
    if input_size is None:
        input_size = _default_size(model)
    if any(not isinstance(size, int) or size < 1 for size in input_size):
        raise InputError(
            f"input_size={tuple(input_size)}: give the size of one input without its batch, as (3, 224, 224)"
        )
    floating = (tensor.dtype for tensor in model.parameters() if tensor.is_floating_point())
    return (torch.empty(1, *input_size, dtype=next(floating, torch.get_default_dtype()), device="meta"),)


def annotate_shapes(module: fx.GraphModule, example_inputs: Sequence[torch.Tensor]) -> None:
    """Write `node.meta["spec"]` into every node that makes a tensor (a tuple of specs for a tuple of tensors).

    Args:
        module: a traced graph.
        example_inputs: one tensor per input, batch first; only sizes and dtypes matter.

    Raises:
        TraceError: the model does not run at these sizes.
    """
    small, large = _shapes(module, example_inputs, EXAMPLE_BATCH), _shapes(module, example_inputs, EXAMPLE_BATCH + 1)
    for node in module.graph.nodes:
        node.meta["spec"] = _spec(small.get(node), large.get(node))
    _unpack_tuples(module)


def _unpack_tuples(module: fx.GraphModule) -> None:
    """Where a tuple that one op makes is returned, or taken whole as in torch.cat(x.chunk(2)): a node per tensor."""
    graph = module.graph
    parts: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def element(node: fx.Node, i: int) -> fx.Node:
        with graph.inserting_after(node):
            part = graph.call_function(operator.getitem, (node, i))
        part.meta.update(spec=node.meta["spec"][i], name=f"{node.meta['name']}.{i}")
        return part

    def unpack(node: fx.Node) -> Any:
        if node not in tuples or is_structure(node):
            return node
        if node not in parts:
            parts[node] = tuple(element(node, i) for i in range(len(node.meta["spec"])))
        return parts[node]

    tuples = {node for node in graph.nodes if isinstance(node.meta["spec"], tuple)}
    joined = {node for node in tuples if node.target in (operator.getitem, operator.add)}
    for node in list(graph.nodes):
        if node.target is operator.getitem and node.args[0] in tuples and isinstance(node.args[1], slice):
            parts[node] = unpack(node.args[0])[node.args[1]]
        elif node.target is operator.getitem and node.args[0] in joined & parts.keys():
            node.replace_all_uses_with(parts[node.args[0]][node.args[1]])
        elif node.target not in (operator.getitem, getattr, without_gradient):
            node.args, node.kwargs = fx.map_arg(node.args, unpack), fx.map_arg(node.kwargs, unpack)
        if node.target is operator.add and node in joined:
            parts[node] = operator.add(*node.args)
    module.recompile()


def is_structure(node: fx.Node) -> bool:
    """Whether the node only builds a named tuple or a dataclass of others."""
    return node.op == "call_function" and (hasattr(node.target, "_fields") or is_dataclass(node.target))


def leaves_of(structure: Any) -> list[fx.Node]:
    """The nodes in what a model returns, in order, each once; a named tuple or dataclass stands for its elements."""
    leaves: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if is_structure(node):
            fx.map_arg((node.args, node.kwargs), visit)
        else:
            leaves[node] = None

    fx.map_arg(structure, visit)
    return list(leaves)


def plain(arguments: Any) -> Any:
    """torch.fx's immutable lists and dicts as plain ones."""
    if isinstance(arguments, dict):
        return {key: plain(value) for key, value in arguments.items()}
    if isinstance(arguments, list):
        return [plain(value) for value in arguments]
    return tuple(map(plain, arguments)) if type(arguments) is tuple else arguments


def _spec(small: Any, large: Any) -> Any:
    if isinstance(small, torch.Tensor):
        return Spec(
            tuple(small.shape), tuple(b - a for a, b in zip(small.shape, large.shape, strict=True)), small.dtype
        )
    if isinstance(small, (tuple, list)):
        return tuple(_spec(a, b) for a, b in zip(small, large, strict=False))
    if isinstance(small, dict):
        return {key: _spec(small[key], large[key]) for key in small}
    return None


def _shapes(module: fx.GraphModule, example_inputs: Sequence[torch.Tensor], batch: int) -> dict[fx.Node, Any]:
    inputs = [torch.empty(batch, *x.shape[1:], dtype=x.dtype, device="meta") for x in example_inputs]
    run = _ShapeRun(module)
    try:
        # New tensors of the model's own code go to the meta device, too.
        with torch.device("meta"), torch.no_grad():
            run.run(*inputs)
    except NotImplementedError as error:
        node = run.current
        raise TraceError(
            f"the size of what {node.meta.get('name')!r} returns depends on values{user_line(node)}, as with boolean "
            "masks, nonzero and masked_select; a graph needs sizes beforehand. Use torch.where or a product with the "
            "mask; of a mask that never changes compute the positions in __init__ and index with these."
        ) from error
    except Exception as error:
        node = run.current
        sizes = ", ".join(str(tuple(x.shape)) for x in example_inputs)
        raise TraceError(
            f"the model does not run on an input of size {sizes}: {error} (at node {node.meta.get('name')!r}"
            f"{user_line(node)}). Pass the size that it expects as input_size=."
        ) from error
    return run.values


class _ShapeRun(fx.Interpreter):
    """Run a graph on the meta device, where tensors have shapes and no data, and keep every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False  # `current` says where an error came from
        self.values: dict[fx.Node, Any] = {}
        self.current: fx.Node = next(iter(module.graph.nodes))

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        value = super().run_node(n)
        if n.op != "output":
            self.values[n] = value
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        return plain(super().fetch_args_kwargs_from_env(n))  # the generated code has plain lists, too

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is F.batch_norm:  # its kernel for meta tensors takes milliseconds to say this
            return torch.empty_like(args[0])
        if not is_users(target):
            return super().call_function(target, args, kwargs)
        given = [arg for arg in args if isinstance(arg, torch.Tensor)]
        versions = [arg._version for arg in given]
        value = super().call_function(target, args, kwargs)
        if [arg._version for arg in given] != versions:
            self.current.meta["writes"] = True
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return on_meta(self.fetch_attr(target), args, kwargs)


def on_meta(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a module makes of tensors on the meta device."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # a cumulative average would ask for a number
        return torch.empty_like(args[0])
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return torch.func.functional_call(module, {name: t.to("meta") for name, t in tensors.items()}, args, kwargs)


# -- names ------------------------------------------------------------------------------------------------------------


def find_node(graph: fx.Graph, name: str) -> fx.Node:
    """The node called `name`; a module's own name stands for its last node.

    Raises:
        NodeNameError: no such node; the message has the nearest names.
    """
    named = {node.meta["name"]: node for node in graph.nodes if node.op != "output" and "name" in node.meta}
    if name in named:
        return named[name]
    inside = [node for key, node in named.items() if key.startswith(name + ".")]
    if inside and name:
        return inside[-1]
    steps = [key.split(".") for key in named]
    modules = [".".join(path[:i]) for path in steps for i in range(1, len(path))]
    hint = nearest(name, dict.fromkeys([*modules, *named]))
    raise NodeNameError(f"no node is called {name!r}{hint}. fxfeedback.node_names(model) lists all names.")


def identifier(name: str) -> str:
    """A node or parameter name as a Python name: layer1.0.conv1 -> layer1_0_conv1."""
    name = re.sub(r"\W", "_", name)
    return f"_{name}" if name[:1].isdigit() else name


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean ...?' with the names nearest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def user_line(node: fx.Node) -> str:
    """', called at FILE:LINE: CODE' of the model's source that made `node`, or nothing where it is not known."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s+(.*)', node.stack_trace or "")
    own = [frame for frame in frames if not _is_torch(frame[0])]
    return f", called at {own[-1][0]}:{own[-1][1]}: {own[-1][2]}" if own else ""


def _is_torch(file: str) -> bool:
    return (
        bool(re.search(r"[/\\](torch|fxfeedback)[/\\]", file))
        or "feature_extraction.py" in file
        or file.startswith("<")
    )


def _line_of(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_torch(frame.filename)]
    return f" (at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


# -- small parts of trace ---------------------------------------------------------------------------------------------


def _arguments(model: nn.Module) -> list[inspect.Parameter]:
    """What forward takes."""
    return list(inspect.signature(model.forward).parameters.values())


def _defaults(model: nn.Module, n_inputs: int) -> dict[str, Any]:
    """forward's arguments beyond the inputs stay at their defaults and are no inputs of the graph."""
    return {a.name: a.default for a in _arguments(model)[n_inputs:] if a.default is not a.empty}


@contextmanager
def _as_they_were(model: nn.Module) -> Iterator[None]:
    """Afterwards the modules have the attributes that they had before: a traced forward may have kept proxies.

    Tensors that tracing left on the model, from torch.tensor(...) in its code, become buffers: they move with it.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        constants = {name: value for name, value in vars(model).items() if name.startswith("_tensor_constant")}
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
        for name, value in constants.items():
            model.register_buffer(name, value.clone() if value.is_inference() else value, persistent=False)


def _erase_with_users(node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_users(user)
    node.graph.erase_node(node)


def _has_effect(node: fx.Node, model: nn.Module) -> bool:
    """In-place ops change values that other nodes read; assertions about shapes have done their work in tracing."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        counts = module.training and getattr(module, "running_mean", None) is not None  # a norm that nothing reads
        return counts or bool(getattr(module, "inplace", False))
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or bool(node.kwargs.get("inplace")) or is_operator_in_place(node.target)
    in_place |= is_users(node.target)  # who knows
    return in_place or node.op in ("placeholder", "output")


def is_users(function: Any) -> bool:
    """Whether a function is Python code of the model's, from outside torch."""
    if not isinstance(function, types.FunctionType) or hasattr(function, "autograd_function"):
        return False
    return function.__module__.split(".")[0] not in ("torch", "fxfeedback")


def is_operator_in_place(target: Any) -> bool:
    """Whether `target` is operator.iadd or one of its kind: x += y."""
    return target in (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def refuse_untraceable(model: nn.Module) -> None:
    """Say what to pass instead of a model, or a part of it, whose code or weights are out of reach."""
    for name, module in model.named_modules():
        reason = _untraceable(module)
        if reason:
            raise TraceError(f"{name or type(model).__name__!r} {reason}")


def _untraceable(module: nn.Module) -> str:
    if type(module).__module__.startswith("torch._dynamo"):
        return "is compiled: convert the model inside, model._orig_mod, and compile what is returned"
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return f"is a {type(module).__name__}: convert the model inside, model.module, and wrap what is returned"
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript: pass the Python model that it was made from"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
        return "has no weights before its first call: call the model once"
    packed = type(module).__module__.startswith(QUANTIZED) and not isinstance(module, FloatFunctional)
    if packed or any(tensor.is_quantized for tensor in module._parameters.values() if tensor is not None):
        # Packed integers are nothing that could be modulated, transposed or learned.
        return (
            f"is quantized ({type(module).__name__}): convert the floating-point model, and quantize what is exported"
        )
    return ""


def _default_size(model: nn.Module) -> tuple[int, ...]:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return (module.in_channels, 224, 224)
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        if isinstance(module, (nn.Conv1d, nn.Conv3d)):
            break
    raise InputError(f"the input size of {type(model).__name__} cannot be guessed: pass input_size= or example_inputs=")
