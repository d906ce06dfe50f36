"""Any model -> a named graph.

`trace` keeps torch.nn modules closed and gives every node its torchvision name in `name_of(node)`;
`open_modules` (open_modules.py) opens them into functional ops; `annotate_shapes` (graph/shapes.py) adds shapes. The
user's model is never traced itself, only a copy that shares its tensors (share.py).
"""

import math
import threading
import traceback
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torchvision
from torch import fx, nn
from torchvision.models.feature_extraction import NodePathTracer

from fxfeedback.errors import TraceError
from fxfeedback.graph.effects import has_effect_as_traced, is_in_place
from fxfeedback.graph.nodes import built_in, identifier, is_torchs, name_of, tell, user_line
from fxfeedback.graph.writable import refuse_unwritable
from fxfeedback.rules.ops import without_gradient
from fxfeedback.tracing.arguments import PROXIES, Form, form_of
from fxfeedback.tracing.attributes import CONSTANT, Stage
from fxfeedback.tracing.buffers import FromBuffers, is_same, noted
from fxfeedback.tracing.draws import random_states, refusing_draws, watching_draws
from fxfeedback.tracing.memory import refuse_out, refuse_writing
from fxfeedback.tracing.next_call import (
    carry_over,
    difference,
    meaning,
    noting_lines,
    of_parameters,
    state_is_kept,
)
from fxfeedback.tracing.refusals import Refusal, line_of
from fxfeedback.tracing.while_tracing import recording_sized, running_on_proxies, untraced


class PathTracer(NodePathTracer):
    """torchvision's tracer, with torch.nn modules alone as leaves."""

    record_stack_traces = True
    stage: Stage  # whose copy it traces

    def __init__(self, form: Form) -> None:
        super().__init__(leaf_modules=[], autowrap_modules=(math, torchvision.ops))
        self.form = form
        self.thread = threading.get_ident()
        self.without_gradient: dict[fx.Node, fx.Node | None] = {}
        self.given: dict[int, torch.Tensor] = {}
        self.from_buffers = FromBuffers({})
        self.constants: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.calling: nn.Module | None = None
        self.called: dict[fx.Node, nn.Module | None] = {}  # with other attributes than the model has
        self.carried: Collection[fx.Node] = ()  # of the graph of the call before, see `carry_over`

    def _filter_traceback_frames(self, user_stack_summary: traceback.StackSummary) -> traceback.StackSummary:
        """The user's frames alone: to write down all of torch's takes longer than to trace."""
        return traceback.StackSummary.from_list([one for one in user_stack_summary if not is_torchs(one.filename)])

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """A call in the tracer's form: torch.fx knows positional arguments of undecorated functions only."""
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in self.form.names]
        carry_over(self.stage.originals, self, self.carried)
        args, named = self.form.fill(inputs)
        return lambda: self.root.forward(*args, **named), []

    # torch.fx replaces methods of nn.Module while it traces; other threads may run modules in the meantime.

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        as_graph = getattr(type(m), "as_graph", None)
        if all(m is not module for module in self.root.modules()):
            if any(True for _ in m.parameters()):
                raise Refusal(
                    f"it calls a {type(m).__name__} that is not one of its modules, so that nothing learns: make "
                    "it in __init__, as an attribute or in an nn.ModuleList"
                )
            return forward(*args, **kwargs)  # made on the way, as in nn.ReLU()(x)
        reason = getattr(type(m), "untraceable", "")
        if reason:
            raise Refusal(f"its part {self.path_of_module(m)!r} {reason}")
        self.calling = m
        if as_graph is None:
            return super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        with untraced():
            module, given = as_graph(self.stage.originals.get(m, m), args, kwargs, PROXIES)
        graph, inputs = module.graph, iter(given)
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op != "output":
                own = (fx.map_arg(a, values.__getitem__) for a in (node.args, node.kwargs))
                target = f"{path}.{node.target}" if node.op in ("get_attr", "call_module") else node.target
                values[node] = value = self.create_proxy(node.op, target, *own)
                if isinstance(value, fx.Proxy):
                    self.node_to_qualname[value.node] = f"{path}.{name_of(node)}"
        return fx.map_arg(graph.output_node().args[0], values.__getitem__)

    # A graph knows no torch.no_grad(): what is computed under it passes no gradient on where it is used outside.

    def create_node(self, kind: str, target: Any, args: Any, *rest: Any, **kwargs: Any) -> fx.Node:
        if args and isinstance(args[0], fx.Node) and args[0].op == "get_attr" and is_in_place(target):
            self.from_buffers.use_all(self)
        node = super().create_node(kind, target, args, *rest, **kwargs)
        refuse_out(node)
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise Refusal("it switches autocast on, which a graph cannot hold: call what is returned under autocast")
        if kind.startswith("call") and not torch.is_grad_enabled():
            refuse_writing(node, self.root, self.without_gradient)
            self.without_gradient[node] = None
        if kind == "call_module" and self.calling is not None:
            self.called[node] = self.stage.as_called(self.calling)
        return node

    def trace(self, root: Any, *args: Any, **kwargs: Any) -> fx.Graph:
        self.given = {id(tensor): tensor for tensor in (*root.parameters(), *root.buffers())}
        buffers = dict(root.named_buffers())
        self.from_buffers = FromBuffers(buffers)
        with self.from_buffers:
            graph = super().trace(root, *args, **kwargs)
        for path, module in root.named_modules():
            for name, value in module._buffers.items():
                target = f"{path}.{name}" if path else name
                if issubclass(type(value), fx.Proxy) and (value.node.op, value.node.target) == ("get_attr", target):
                    module._buffers[name] = buffers[target]  # after self.n += 1, which the graph does
        return graph

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not issubclass(type(a), fx.Proxy) and id(a) not in self.given:
            computed = self.from_buffers.use(self, a)
            a = self.constant(a) if computed is None else computed
        if isinstance(a, dict) and is_dataclass(a):  # Hugging Face's outputs are both
            parts = {field.name: self.create_arg(getattr(a, field.name)) for field in fields(a)}
            return self.create_node("call_function", type(a), (), parts)
        arg = a.node if issubclass(type(a), fx.Proxy) else super().create_arg(built_in(a))
        if not isinstance(arg, fx.Node) or arg not in self.without_gradient or not torch.is_grad_enabled():
            return arg
        if self.without_gradient[arg] is None:
            node = self.create_node("call_function", without_gradient, (arg,), {})
            self.node_to_qualname[node] = self._get_node_qualname(self.current_module_qualname, node)
            self.proxy(node)
            self.without_gradient[arg] = node
        return self.without_gradient[arg]

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that forward has made, as a constant; also where it lies in a buffer's place by now."""
        if isinstance(tensor, nn.Parameter):
            return tensor
        if tensor.requires_grad:
            raise Refusal("it computes with a parameter that is not one of the model's: make it one in __init__")
        return self.constants.setdefault(id(tensor), (tensor, tensor.clone()))[1]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        # A counter is a value of the graph: to count in tracing would change the user's model, and never count again.
        self.proxy_buffer_attributes = isinstance(attr_val, torch.Tensor) and attr_val.ndim == 0
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def trace(model: nn.Module, n_inputs: int = 1, form: Form | None = None) -> fx.GraphModule:
    """The graph of `model` in its present mode, with torch.nn modules as leaves and names.

    Args:
        model: traced as it stands; tracing may leave constants on it, so pass a copy made by `share`.
        n_inputs: how many positional arguments of `forward` are inputs; the others keep their defaults.
        form: how the model is called, instead.

    Raises:
        TraceError: torch.fx cannot trace the model.
    """
    return trace_with(PathTracer, model, form or form_of(model, n_inputs))


def trace_with(make: Callable[[Form], PathTracer], model: nn.Module, form: Form) -> fx.GraphModule:
    """As `trace`, with tracers that the caller makes for a form."""
    reason = getattr(type(model), "untraceable", "")
    if reason:
        raise TraceError(f"{type(model).__name__} {reason}.")
    stage = Stage(model)
    try:
        tracer, graph = _traced(make, stage, form)
        if tracer.stage.changed():
            _check_next_call(make, form, tracer, graph)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"torch.fx cannot trace {type(model).__name__}: {error}{line_of(error)}. A traceable model has no control "
            "flow that depends on tensor values; wrap the part in a function marked with torch.fx.wrap, or pass a "
            "traceable part of the model."
        ) from error
    finally:
        stage.restore_classes()
    stage = tracer.stage
    keep_constants(graph, stage.copy, model)
    noted(list(stage.originals.items()), tracer.from_buffers.read, stage.copy)
    stage.forget(of_parameters)
    refuse_unwritable(graph)
    module = fx.GraphModule(model, graph, identifier(type(model).__name__))
    _put_parametrized(module, model)
    _put_as_called(module, tracer)
    return module


def keep_constants(graph: fx.Graph, copy: nn.Module, model: nn.Module) -> None:
    """Constants that tracing left on the copy become buffers of the model; one that the model has is used again."""
    for name in [name for name in vars(copy) if name.startswith(CONSTANT)]:
        value = vars(copy).pop(name)
        known = [other for other in model._buffers if other.startswith(CONSTANT)]
        found = next((other for other in known if is_same(model._buffers[other], value)), name)
        if found == name:
            model.register_buffer(name, value.clone() if value.is_inference() else value, persistent=False)
        for node in graph.find_nodes(op="get_attr", target=name):
            node.target = found


def _traced(
    make: Callable[[Form], PathTracer],
    stage: Stage,
    form: Form,
    carried: Collection[fx.Node] = (),
    watching: bool = False,
) -> tuple[PathTracer, fx.Graph]:
    """A tracer, and the graph that it made of one call, with names and without unused nodes.

    No parameter or buffer has been written and no random number drawn on the way.
    """
    tracer, states = make(form), random_states()
    tracer.stage, tracer.carried = stage, carried
    watch = watching_draws() if watching else nullcontext()
    draws = refusing_draws(stage.copy, dict(stage.model.named_parameters()))
    with stage.performed(), running_on_proxies(), recording_sized(), draws, watch:
        graph = tracer.trace(stage.copy)
    if not watching and random_states() != states:  # was it the model, or another thread?
        return _traced(make, Stage(stage.model), form, watching=True)
    for node in graph.nodes:
        tell(node, name=tracer.node_to_qualname.get(node, node.name))
        if node.op == "call_module":
            tell(node, module=str(node.target))

    def has_effect(node: fx.Node) -> bool:
        calls = node.op == "call_module"
        return has_effect_as_traced(
            node, tracer.called.get(node) or stage.copy.get_submodule(str(node.target)) if calls else None
        )

    graph.eliminate_dead_code(is_impure_node=has_effect)
    if made := stage.made():
        raise Refusal(f"its forward makes {made[0]!r} in its first call: call the model once before it is converted")
    return tracer, graph


def _check_next_call(make: Callable[[Form], PathTracer], form: Form, tracer: PathTracer, graph: fx.Graph) -> None:
    """Refuse a forward that computes something else in the next call, from the attributes that this one left."""
    stage = tracer.stage
    names, before = stage.changed(), stage.state()
    first, size = meaning(graph, stage.copy, stage.tensors, tracer.called), len(graph.nodes)
    with noting_lines() as lines:
        try:
            other, again = _traced(make, stage, form, of_parameters(graph))
            node = difference(first, meaning(again, stage.copy, stage.tensors, other.called))
            where = user_line(node) if node is not None else ""
            differs = node is not None or len(graph.nodes) != size  # its proxies were read
        except Exception as error:  # they were, together with present ones
            differs, where = True, line_of(error)
    further = stage.changed(before)
    if differs or further:
        at = next((lines[id(m), name] for m, name in further or names if (id(m), name) in lines), "")
        raise state_is_kept([stage.name_of(*each) for each in further or names], where or at)


def _put_parametrized(module: fx.GraphModule, model: nn.Module) -> None:
    """Layers of which only a parametrized weight is read are there as a whole: the weight is an attribute of theirs."""
    for node in module.graph.find_nodes(op="call_module"):
        owner, is_weight, _ = str(node.target).rpartition(".parametrizations.")
        if str(node.target).startswith("parametrizations."):
            raise TraceError("the model's own weights are parametrized: parametrize layers inside of it instead")
        if is_weight and module.get_submodule(owner) is not model.get_submodule(owner):
            module.set_submodule(owner, model.get_submodule(owner))


def _put_as_called(module: fx.GraphModule, tracer: PathTracer) -> None:
    """Nodes that call a module with other attributes than it has call a copy of it that has them."""
    for node in module.graph.nodes:
        copy = tracer.called.get(node)
        if copy is not None:
            node.target = f"{node.target}_called_as_{node.name}"
            tell(node, as_called=True)
            module.add_submodule(node.target, copy)
    module.recompile()
