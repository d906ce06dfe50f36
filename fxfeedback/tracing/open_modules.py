"""Open a traced graph into functional ops: `self.conv1(x)` becomes `F.conv2d(x, conv1.weight, ...)`.

Afterwards every node is a call of one out-of-place function, parameters are `get_attr` nodes, and the last node of
each opened module carries the module's name. The rules speak of these functions only.
"""

import hashlib
import itertools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _Orthogonal

from fxfeedback.errors import RuleError
from fxfeedback.graph.bottom_up import has_effect
from fxfeedback.graph.nodes import (
    built_in,
    identifier,
    is_as_called,
    is_operator_in_place,
    is_users,
    module_path_of,
    name_of,
    tell,
    user_line,
)
from fxfeedback.graph.shapes import plain
from fxfeedback.graph.writable import refuse_unwritable
from fxfeedback.rules.core import CONSTANT, RULES
from fxfeedback.rules.ops import drawn_like, same
from fxfeedback.tracing.known_shapes import Shapes
from fxfeedback.tracing.openings import OPENINGS, call
from fxfeedback.tracing.stand_ins import Shaped, device_of_inputs, elements
from fxfeedback.tracing.while_tracing import parametrized_once, running_on_proxies

OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


FILLING = {
    "zero_": torch.zeros_like,
    "fill_": torch.full_like,
    "bernoulli_": drawn_like,
}  # in-place methods whose twin has another name
ON_SIZES = ("_operator", "builtins", "math")  # modules whose functions compute sizes


def open_modules(
    module: fx.GraphModule,
    strict: bool = True,
    example_inputs: Sequence[torch.Tensor] | None = None,
    owner: nn.Module | None = None,
) -> fx.GraphModule:
    """The same computation as `module`, in functional out-of-place ops with the same names.

    Args:
        module: a traced graph.
        strict: whether a torch.nn module that does not open is an error; otherwise it stays closed.
        example_inputs: where given, the graph is opened for their sizes: code that looks at sizes opens, too
            (attention, functions marked with torch.fx.wrap), and nothing but the batch size stays open.
        owner: the module on which constants of such code become buffers; default `module`.

    Raises:
        RuleError: a torch.nn module does not open.
    """
    with parametrized_once(), running_on_proxies():
        opener = _Opener(module, strict, example_inputs, owner or module)
        for node in module.graph.nodes:
            opener.open(node)
    if example_inputs is not None:
        opener.graph.eliminate_dead_code(is_impure_node=has_effect)
    for node in opener.graph.nodes:
        if node.op == "call_function":
            node._rename(identifier(name_of(node)))
    opener.graph.lint()
    refuse_unwritable(opener.graph)
    return fx.GraphModule(module, opener.graph, type(module).__name__)


class _Opener(fx.Tracer):
    """One walk over a traced graph; `values` maps its nodes to proxies of the opened graph, and to sizes."""

    def __init__(
        self, module: fx.GraphModule, strict: bool, examples: Sequence[torch.Tensor] | None, owner: nn.Module
    ) -> None:
        super().__init__()
        self.root, self.owner = module, owner
        self.strict = strict
        self.graph = fx.Graph(tracer_cls=type(self))
        self.tensors = _tensors(self.owner) | _tensors(module)
        self.memory = _Memory(module.graph, module)
        # A tied one has its first name, in the owner's order, so that it is one node, called the same in every graph.
        self.names = {id(tensor): name for name, tensor in reversed(self.tensors.items())}
        self.values: dict[fx.Node, Any] = {}
        self.present: Any = None  # the node that is being opened
        self.origin: dict[fx.Node, fx.Node] = {}  # of each node of the opened graph: which one it was made for
        self.shapes = None if examples is None else Shapes(module, examples)
        self.opening = False  # a module
        self.inside = False  # the user's own function
        self.kept: list[torch.Tensor] = []
        self.steps, self.read = _steps(self.owner), set[nn.Module]()

    def open(self, node: fx.Node) -> None:
        args = fx.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.values.__getitem__)
        with self._at(node):
            if node.op == "call_module":
                module = self.root.get_submodule(str(node.target))
                self.check_reading_once(module)
                value = self.open_module(module, *args, **kwargs)
            elif node.op == "get_attr":
                value = self.parameter(self.tensors[str(node.target)])
            elif self.shapes and _is_on_sizes(node, args):
                value = node.target(*args) if callable(node.target) else getattr(args[0], node.target)(*args[1:])
            else:
                name = node.name if node.op == "placeholder" else None
                value = self.create_proxy(node.op, node.target, args, kwargs, name)
            if isinstance(value, fx.Proxy) and value.node.op == "get_attr":
                self.origin.setdefault(value.node, node)
            elif node.op.startswith("call") and isinstance(value, fx.Proxy) and self.origin.get(value.node) is not node:
                value = call(same, value)  # dropout that is off, an identity: they keep their name
        named = value[0] if isinstance(value, tuple) and value else value
        if isinstance(named, fx.Proxy) and self.origin.get(named.node) is node:
            tell(named.node, name=name_of(node))
            if module_path_of(node) is not None:
                tell(named.node, module=module_path_of(node))
        self.values[node] = value
        if _is_in_place(node, self.root) and isinstance(node.args[0], fx.Node) and node.args[0].op != "get_attr":
            self.memory.check_overwriting(node)
            self.values[node.args[0]] = value  # who reads the overwritten value later reads the new one

    def open_module(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        opening = next((OPENINGS[kind] for kind in type(module).__mro__ if kind in OPENINGS), None)
        last = self.last_node()
        outermost, self.opening = not self.opening, True
        try:
            if opening:
                return opening(module, *args, **kwargs)
            if isinstance(module, parametrize.ParametrizationList):
                return self.parameter(module())
            with self._going_in():
                return module.forward(*args, **kwargs)
        except Exception as error:
            node = self.present
            if not self.strict and not is_as_called(node):
                if not outermost:
                    raise
                self.erase_behind(last)
                return self.create_proxy("call_module", node.target, args, kwargs)
            raise RuleError(
                f"torch.nn.{type(module).__name__} does not open into ops that have rules: {error} "
                f"(at node {name_of(node)!r}{user_line(node)}). Write that part in torch functions, or leave it "
                "outside of what is converted."
            ) from error
        finally:
            self.opening = not outermost

    @contextmanager
    def _going_in(self) -> Iterator[None]:
        """While a module's forward runs, its parameters are proxies, and the modules that it calls open, too."""
        original, original_call, thread = nn.Module.__getattr__, nn.Module.__call__, threading.get_ident()

        def get(module: nn.Module, name: str) -> Any:
            value = original(module, name)
            if not isinstance(value, torch.Tensor) or id(value) not in self.names or threading.get_ident() != thread:
                return value
            with mock.patch.object(nn.Module, "__getattr__", original):
                return self.parameter(value)

        def enter(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return original_call(module, *args, **kwargs)
            return self.open_module(module, *args, **kwargs)

        with (
            mock.patch.object(nn.Module, "__getattr__", get),
            mock.patch.object(nn.Module, "__call__", enter),
        ):
            yield

    @contextmanager
    def _at(self, node: fx.Node) -> Iterator[None]:
        self.present = node
        yield
        self.present = None

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, *rest: Any) -> Any:
        if target is getattr and args[1] == "data":
            kind, target, args = "call_method", "detach", args[:1]
        changes_state = bool(args) and isinstance(args[0], fx.Proxy) and args[0].node.op == "get_attr"
        in_place = False
        if not changes_state or self.inside:
            kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
            in_place = _out_of_place(target) is not target
            target = _out_of_place(target)
        if kind == "call_method":
            kind, target = "call_function", getattr(torch.Tensor, target) if isinstance(target, str) else target
        if kind == "call_function" and target in OPENINGS:
            opened = OPENINGS[target](*args, **kwargs)
            if opened is not NotImplemented:
                return opened
        if self.shapes and kind == "call_function" and is_users(target) and not (target in RULES or target in CONSTANT):
            opened = self.open_function(target, args, kwargs)
            if opened is not NotImplemented:
                return opened
        proxy = super().create_proxy(kind, target, args, kwargs, name, *rest)
        if not isinstance(proxy, fx.Proxy):
            return proxy  # a size, or another fact
        if self.present is not None:
            origin = self.present
            inner = f"{name_of(origin)}.{proxy.node.name}"
            self.origin[proxy.node] = origin
            tell(proxy.node, name=inner)
            proxy.node.stack_trace = origin.stack_trace
        if self.inside and in_place and isinstance(args[0], Shaped):
            if args[0].view_of is None and _is_view(args[0].node, self.root):
                raise RuleError(f"an in-place op on {args[0].node}, a view of another value: write it out of place")
            args[0].becomes(proxy)
            return args[0]
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self.inside and not torch.is_grad_enabled():
            raise RuleError("torch.no_grad() in a function that is marked with torch.fx.wrap")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> Any:
        """A proxy that knows its shape, where sizes are known; a number that the batch has no say in as itself."""
        if self.shapes is None:
            return super().proxy(node)
        self.shapes.run(node)
        values = self.shapes.of(node)
        if values and all(isinstance(value, torch.Tensor) for value in values):
            return Shaped(node, self, *values)
        fact = self.shapes.fact(node)
        if fact is not NotImplemented:
            self.graph.erase_node(node)
            return fact
        return super().proxy(node)

    def size_node(self, x: Shaped, dim: int) -> fx.Proxy:
        """The size of a batch dimension."""
        return self.create_proxy("call_function", torch.Tensor.size, (x, dim), {})

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Over the parts of a tuple, where they are known."""
        return elements(obj, self.shapes) or super().iter(obj)

    def open_function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a function of the user's does, op by op; NotImplemented where it does not run on proxies."""
        last = self.last_node()
        before = [(arg, dict(vars(arg))) for arg in args if isinstance(arg, Shaped)]
        outside, self.inside = self.inside, True
        try:
            return function(*plain(tuple(args)), **plain(dict(kwargs)))
        except Exception as error:
            if self.present is not None and not self.present.users:
                raise RuleError(
                    f"{function.__name__} writes into its arguments and does not open into single ops: {error} "
                    f"(at node {name_of(self.present)!r}{user_line(self.present)}). Let it return its result."
                ) from error
            self.erase_behind(last)
            for arg, state in before:
                arg.__dict__.update(state)
            return NotImplemented
        finally:
            self.inside = outside

    def last_node(self) -> fx.Node | None:
        """The newest one of the opened graph."""
        return next(iter(reversed(self.graph.nodes)), None)

    def erase_behind(self, last: fx.Node | None) -> None:
        """Take back what was opened since `last` was the newest node."""
        for node in itertools.takewhile(lambda node: node is not last, reversed(list(self.graph.nodes))):
            self.graph.erase_node(node)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, torch.Tensor):
            if id(a) not in self.names and self.shapes:
                self.names[id(a)] = self.constant(a)
            if id(a) in self.names:
                return self.parameter(a).node
        if self.shapes and a is self.shapes.device:
            a = device_of_inputs(self)
        return super().create_arg(built_in(a))

    def constant(self, tensor: torch.Tensor) -> str:
        """The name of a buffer with a constant of the user's code; equal ones are one."""
        if tensor.requires_grad:
            raise RuleError("a parameter was computed with before the graph could see it")
        content = hashlib.sha1(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:10]
        name = f"_constant_{content}_{'x'.join(map(str, tensor.shape))}"
        for owner in (self.owner, self.root):
            if name not in owner._buffers:
                owner.register_buffer(name, tensor, persistent=False)
        self.kept.append(tensor)  # or its id could become another's
        return name

    def check_reading_once(self, module: nn.Module) -> None:
        """Refuse a second reading of a weight in training mode where each reading is a step of its own."""
        for made in module.modules():
            if isinstance(made, parametrize.ParametrizationList) and id(made) in self.steps:
                if made in self.read:
                    raise RuleError(
                        f"{name_of(self.present)!r}{user_line(self.present)} reads the weight of "
                        f"{self.steps[id(made)]!r} again, and in training mode each reading of a "
                        f"{type(made[0]).__name__.lstrip('_')} is one more step of it, where a graph reads once: read "
                        "it once, or call eval() on that module"
                    )
                self.read.add(made)

    def parameter(self, tensor: torch.Tensor) -> fx.Proxy:
        """The one get_attr node of a parameter or buffer, made where it is first used."""
        name = self.names[id(tensor)]
        found = self.graph.find_nodes(op="get_attr", target=name)
        if found:
            return self.proxy(found[0])
        proxy = super().create_proxy("get_attr", name, (), {})
        tell(proxy.node, name=name)
        return proxy


def _is_on_sizes(node: fx.Node, args: Any) -> bool:
    """Whether the node computes with sizes and structures that are known, so that nothing of it stays in the graph."""
    if node.op == "call_method":
        return isinstance(args[0], Shaped) and node.target in ("size", "dim", "ndimension", "numel")
    if node.op != "call_function" or getattr(node.target, "__module__", "") not in ON_SIZES or node.kwargs:
        return False
    if node.target is getattr:
        return isinstance(args[0], Shaped) and args[1] in ("shape", "ndim")
    if node.target is operator.getitem:
        return not isinstance(args[0], fx.Proxy)
    return not any(isinstance(arg, fx.Proxy) for arg in args)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and parametrized tensor by its qualified name; a tied one by all of its names."""
    found: dict[str, torch.Tensor] = {}
    for path, owner in module.named_modules():
        tensors = {**owner._parameters, **owner._buffers}
        if parametrize.is_parametrized(owner):
            tensors.update({name: getattr(owner, name) for name in owner.parametrizations})
        for name, tensor in tensors.items():
            if tensor is not None:
                found[f"{path}.{name}" if path else name] = tensor
    return found


def _steps(model: nn.Module) -> dict[int, str]:
    """The parametrizations of which each reading, in the present modes, is a step: spectral norm's iteration."""
    return {
        id(made): path
        for path, owner in model.named_modules()
        if owner.training and parametrize.is_parametrized(owner)
        for made in owner.parametrizations.values()
        if any(next(m.buffers(), None) is not None and not isinstance(m, _Orthogonal) for m in made)
    }


def _is_in_place(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    return bool(node.kwargs.get("inplace")) or _out_of_place(node.target) is not node.target


class _Memory:
    """Whose memory every node's value lies in, or may lie in: what it is a view of."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.owner: dict[fx.Node, fx.Node] = {}
        self.sharing: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            first = node.args[0] if node.args else None
            shares = isinstance(first, fx.Node) and (_is_view(node, root) or _is_in_place(node, root))
            self.owner[node] = self.owner[first] if shares else node  # type: ignore[index]
            self.sharing.setdefault(self.owner[node], []).append(node)

    def check_overwriting(self, node: fx.Node) -> None:
        """Refuse an in-place op that changes memory which is read later under another name: as a view, or by a view."""
        owner = self.owner[node.args[0]]  # type: ignore[index]
        if owner.op == "get_attr":
            raise RuleError(
                f"the in-place op at node {name_of(node)!r}{user_line(node)} writes into {owner.target!r} through "
                "a view of it: write into the whole, as by copy_, under torch.no_grad()"
            )
        for other in self.sharing[self.owner[node.args[0]]]:  # type: ignore[index]
            came_before = self.order[other] < self.order[node] and other is not node.args[0]
            if came_before and any(self.order[user] > self.order[node] for user in other.users):
                raise RuleError(
                    f"the in-place op at node {name_of(node)!r}{user_line(node)} overwrites memory that is read "
                    f"again as {name_of(other)!r}: write it out of place (x = x + y, not x.add_(y))"
                )


VIEWS = {
    "getitem", "view", "view_as", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "t", "squeeze",
    "unsqueeze", "select", "narrow", "expand", "chunk", "split", "unbind", "contiguous", "dropout", "detach",
}  # fmt: skip
VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)


def _is_view(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), VIEW_MODULES)
    if node.target is getattr:
        return node.args[1] == "data"
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in VIEWS


def _out_of_place(target: Any) -> Any:
    """relu_ -> relu, add_ -> add, operator.iadd -> operator.add; any other target as it is."""
    if is_operator_in_place(target):
        return OUT_OF_PLACE[target]
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if not name.endswith("_") or name.endswith("__"):
        return target
    if name in FILLING:
        return FILLING[name]
    if isinstance(target, str):  # but not requires_grad_, whose namesake is no method
        return name[:-1] if callable(getattr(torch.Tensor, name[:-1], None)) else target
    return getattr(torch, name[:-1], None) or getattr(F, name[:-1], target)
