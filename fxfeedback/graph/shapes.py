"""What a traced graph's nodes make: `annotate_shapes` says it of each as a `Spec` (see `nodes.spec_of`)."""

import inspect
import operator
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxfeedback.errors import TraceError
from fxfeedback.graph.nodes import is_users, name_of, specs_of, tell, user_line
from fxfeedback.graph.specs import EXAMPLE_BATCH, Spec, at_batch
from fxfeedback.rules.ops import without_gradient


def annotate_shapes(module: fx.GraphModule, example_inputs: Sequence[torch.Tensor]) -> None:
    """Say of every node what it makes: a Spec per tensor; and which nodes draw random numbers.

    Args:
        module: a traced graph.
        example_inputs: one tensor per input, batch first; only sizes and dtypes matter.

    Raises:
        TraceError: the model does not run at these sizes.
    """
    small, large = _shapes(module, example_inputs, EXAMPLE_BATCH), _shapes(module, example_inputs, EXAMPLE_BATCH + 1)
    for node in module.graph.nodes:
        tell(node, spec=_spec(small.get(node), large.get(node)))
    _unpack_tuples(module)


def _unpack_tuples(module: fx.GraphModule) -> None:
    """Where a tuple that one op makes is returned, or taken whole as in torch.cat(x.chunk(2)): a node per tensor."""
    graph = module.graph
    parts: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def element(node: fx.Node, i: int) -> fx.Node:
        with graph.inserting_after(node):
            part = graph.call_function(operator.getitem, (node, i))
        tell(part, spec=specs_of(node)[i], name=f"{name_of(node)}.{i}")
        return part

    def unpack(node: fx.Node) -> Any:
        if node not in tuples or is_structure(node):
            return node
        if node not in parts:
            parts[node] = tuple(element(node, i) for i in range(len(specs_of(node))))
        return parts[node]

    tuples = {node for node in graph.nodes if isinstance(specs_of(node), tuple)}
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
    inputs = [at_batch(batch, x) for x in example_inputs]
    run = _ShapeRun(module)
    try:
        # New tensors of the model's own code go to the meta device, too.
        with torch.device("meta"), torch.no_grad():
            run.run(*inputs)
    except NotImplementedError as error:
        node = run.current
        raise TraceError(
            f"the size of what {name_of(node)!r} returns depends on values{user_line(node)}, as with boolean "
            "masks, nonzero and masked_select; a graph needs sizes beforehand. Use torch.where or a product with the "
            "mask; of a mask that never changes compute the positions in __init__ and index with these."
        ) from error
    except Exception as error:
        node = run.current
        sizes = ", ".join(str(tuple(x.shape)) for x in example_inputs)
        raise TraceError(
            f"the model does not run on an input of size {sizes}: {error} (at node {name_of(node)!r}"
            f"{user_line(node)}). Give inputs of a size that it takes; where the network is built, as input_size=."
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
        with _Drawing(n) if n.op.startswith("call") else nullcontext():
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
            tell(self.current, writes=True)
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return on_meta(self.fetch_attr(target), args, kwargs)


class _Drawing(TorchDispatchMode):
    """Says it of a node whose op draws random numbers, whatever code it calls."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self.node = node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            tell(self.node, drawn=True)
        return func(*args, **(kwargs or {}))


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
