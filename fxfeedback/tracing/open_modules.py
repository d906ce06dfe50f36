"""Open a traced graph into functional ops: `self.conv1(x)` becomes `F.conv2d(x, conv1.weight, ...)`.

Afterwards every node is a call of one out-of-place function, parameters are `get_attr` nodes, and the last node of
each opened module carries the module's name. The rules speak of these functions only.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from fxfeedback.errors import RuleError
from fxfeedback.graph.effects import has_effect, has_twin, out_of_place, writes_into_first
from fxfeedback.graph.nodes import (
    built_in,
    carry,
    identifier,
    is_as_called,
    is_users,
    name_of,
    tell,
    user_line,
)
from fxfeedback.graph.structures import plain
from fxfeedback.graph.writable import refuse_unwritable
from fxfeedback.rules.core import CONSTANT, RULES
from fxfeedback.rules.ops import put_at, same
from fxfeedback.tracing.doors import door_of, of_same_door
from fxfeedback.tracing.known_shapes import Shapes
from fxfeedback.tracing.memory import Write, check_overwriting, is_view
from fxfeedback.tracing.on_sizes import is_on_sizes
from fxfeedback.tracing.openings import OPENINGS
from fxfeedback.tracing.stand_ins import Shaped, call, device_of_inputs, elements
from fxfeedback.tracing.tensors import Readings, Tensors
from fxfeedback.tracing.while_tracing import parametrized_once, running_on_proxies


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
        example_inputs: where given, the graph is opened for their sizes: code that looks at sizes opens also
            (attention, functions marked with torch.fx.wrap), and nothing but the batch size stays open.
        owner: the module on which constants of such code become buffers; default `module`.

    Raises:
        RuleError: a torch.nn module does not open.
    """
    with parametrized_once(), running_on_proxies():
        opener = _Opener(module, strict, example_inputs, owner or module)
        for node in module.graph.nodes:
            opener.open(node)
    check_overwriting(opener.graph, opener.writes if door_of(module) == "fx" else (), opener.shapes)
    if example_inputs is not None:
        opener.graph.eliminate_dead_code(is_impure_node=has_effect)
    for node in opener.graph.nodes:
        if node.op == "call_function":
            node._rename(identifier(name_of(node)))
    opener.graph.lint()
    refuse_unwritable(opener.graph)
    return of_same_door(module, opener.graph)


class _Opener(fx.Tracer):
    """One walk over a traced graph; `values` maps its nodes to proxies of the opened graph, and to sizes."""

    def __init__(
        self, module: fx.GraphModule, strict: bool, examples: Sequence[torch.Tensor] | None, owner: nn.Module
    ) -> None:
        super().__init__()
        self.root, self.owner, self.strict = module, owner, strict
        self.graph = fx.Graph(tracer_cls=type(self))
        self.tensors = Tensors(self.owner, module)
        self.writes: list[Write] = []  # what was in place
        self.values: dict[fx.Node, Any] = {}
        self.present: Any = None  # the node that is being opened
        self.origin: dict[fx.Node, fx.Node] = {}  # of each node of the opened graph: which one it was made for
        self.shapes = None if examples is None else Shapes(module, examples)
        self.opening = False  # a module
        self.inside = False  # the user's own function
        self.readings = Readings(self.owner)

    def open(self, node: fx.Node) -> None:
        args = fx.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.values.__getitem__)
        self.present = node
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            self.readings.check(module, node)
            value = self.open_module(module, *args, **kwargs)
        elif node.op == "get_attr":
            value = self.parameter(self.tensors.by_name[str(node.target)])
        elif self.shapes and is_on_sizes(node, args):
            value = node.target(*args) if callable(node.target) else getattr(args[0], node.target)(*args[1:])
        else:
            name = node.name if node.op == "placeholder" else None
            value = self.create_proxy(node.op, node.target, args, kwargs, name)
        if isinstance(value, fx.Proxy) and value.node.op == "get_attr":
            self.origin.setdefault(value.node, node)
        elif node.op.startswith("call") and isinstance(value, fx.Proxy) and self.origin.get(value.node) is not node:
            value = call(same, value)  # dropout that is off, an identity: they keep their name
        self.present = None
        named = value[0] if isinstance(value, tuple) and value else value
        if isinstance(named, fx.Proxy) and self.origin.get(named.node) is node:
            tell(named.node, name=name_of(node))
            carry(node, named.node)
        self.values[node] = value
        first = args[0] if args and writes_into_first(node, self.root) else None
        if isinstance(first, fx.Proxy) and first.node.op != "get_attr":
            if has_twin(node, self.root) and isinstance(value, fx.Proxy):
                self.writes.append((first.node, value.node))
            for other in [other for other, known in self.values.items() if known is first]:
                self.values[other] = value  # later readers of the overwritten value read the new one

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
                self.erase_after(last)
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
        """While a module's forward runs, its parameters are proxies, and the modules that it calls open also."""
        original, original_call, thread = nn.Module.__getattr__, nn.Module.__call__, threading.get_ident()

        def get(module: nn.Module, name: str) -> Any:
            value = original(module, name)
            if not isinstance(value, torch.Tensor) or value not in self.tensors or threading.get_ident() != thread:
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

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, *rest: Any) -> Any:
        if target is getattr and args[1] == "data":
            kind, target, args = "call_method", "detach", args[:1]
        changes_state = bool(args) and isinstance(args[0], fx.Proxy) and args[0].node.op == "get_attr"
        in_place, given = False, kwargs
        if not changes_state or self.inside:
            in_place = out_of_place(target) is not target or bool(kwargs.get("inplace"))
            kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
            target = out_of_place(target)
        if kind == "call_method":
            kind, target = "call_function", getattr(torch.Tensor, target) if isinstance(target, str) else target
        value: Any = NotImplemented
        if kind == "call_function" and target in OPENINGS:
            value = OPENINGS[target](*args, **given)
        has_rule = target in RULES or target in CONSTANT
        if value is NotImplemented and self.shapes and kind == "call_function" and is_users(target) and not has_rule:
            value = self.open_function(target, args, kwargs)
        if value is NotImplemented:
            value = self.make(super().create_proxy(kind, target, args, kwargs, name, *rest))
        old = args[0] if in_place or target is put_at else None
        if not isinstance(value, fx.Proxy) or not isinstance(old, fx.Proxy) or old.node is value.node:
            return value
        if value.node.args[:1] == (old.node,):
            tell(value.node, in_place=True)
        if not isinstance(old, Shaped) or old.view_of is None:  # otherwise the whole is written, which is noted then
            self.writes.append((old.node, value.node))
        if not (self.inside and in_place and isinstance(old, Shaped)):
            return value
        if old.view_of is None and is_view(old.node):
            raise RuleError(f"an in-place op on {old.node}, a view of another value: write it out of place")
        old.becomes(value)
        return old

    def make(self, proxy: Any) -> Any:
        """The proxy of a new node; it is said of the node what it was made for."""
        if isinstance(proxy, fx.Proxy) and self.present is not None:  # otherwise a size, or another fact
            origin = self.present
            self.origin[proxy.node] = origin
            tell(proxy.node, name=f"{name_of(origin)}.{proxy.node.name}")
            proxy.node.stack_trace = origin.stack_trace
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self.inside and not torch.is_grad_enabled():
            raise RuleError("torch.no_grad() in a function that is marked with torch.fx.wrap")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> Any:
        """A proxy that knows its shape, where sizes are known; a number that does not depend on the batch as itself."""
        if self.shapes is None:
            return super().proxy(node)
        self.shapes.run(node)
        values = self.shapes.of(node)
        if values and all(isinstance(value, torch.Tensor) for value in values):
            return Shaped(node, self, *values)
        fact = self.shapes.fact(node)
        if fact is not NotImplemented:
            if self.inside:
                self.shapes.note_dtype(node)
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
            self.erase_after(last)
            for arg, state in before:
                arg.__dict__.update(state)
            return NotImplemented
        finally:
            self.inside = outside

    def last_node(self) -> fx.Node | None:
        return next(iter(reversed(self.graph.nodes)), None)

    def erase_after(self, last: fx.Node | None) -> None:
        """Take back what was opened since `last` was the newest node."""
        for node in itertools.takewhile(lambda node: node is not last, reversed(list(self.graph.nodes))):
            self.graph.erase_node(node)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, torch.Tensor):
            if a not in self.tensors and self.shapes:
                self.tensors.keep_constant(a)
            if a in self.tensors:
                return self.parameter(a).node
        if self.shapes and a is self.shapes.device:
            a = device_of_inputs(self)
        return super().create_arg(built_in(a))

    def parameter(self, tensor: torch.Tensor) -> fx.Proxy:
        """The one get_attr node of a parameter or buffer, made where it is first used."""
        name = self.tensors.name_of(tensor)
        found = self.graph.find_nodes(op="get_attr", target=name)
        if found:
            return self.proxy(found[0])
        proxy = super().create_proxy("get_attr", name, (), {})
        tell(proxy.node, name=name)
        return proxy
