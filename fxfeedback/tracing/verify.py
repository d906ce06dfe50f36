"""Compare a model's graph with the model itself, once, when a network is built.

This catches what tracing cannot see: state kept between calls, attributes that forward changes, a wrong opening.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import fx, nn

from fxfeedback.errors import TraceError
from fxfeedback.graph.nodes import asked_dtype, module_path_of, name_of, user_line
from fxfeedback.graph.structures import plain
from fxfeedback.tracing.arguments import Form
from fxfeedback.tracing.attributes import attributes_of
from fxfeedback.tracing.draws import seed
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.share import share
from fxfeedback.tracing.trace_at_size import trace_for

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far apart two ways to compute a value may lie, relative to its largest element; in other dtypes 3e-2."""

Values = dict[Any, Any]
"""What was computed: by node, for torch.nn's modules; by its place ("output[0]"), for what is returned."""


def verify_graph(graph: fx.GraphModule, net: nn.Module, form: Form, examples: Sequence[torch.Tensor]) -> None:
    """Refuse a graph that does not compute what its model does, on one random sample: one run of each.

    The model runs twice where its first call changed attributes or drew random numbers, to see that it keeps nothing.

    What is compared is the output of every torch.nn module, and what is returned: a head that starts at zero would hide
    everything before it. Where they differ by more than rounding they are compared again in float64, as a deep network
    may magnify rounding.

    Args:
        graph: the model's graph in the mode of `net`.
        net: the model, in evaluation mode. It stays as it is.
        form: how the model is called.
        examples: one tensor per input, batch first. Floating-point inputs are drawn anew; they keep their values only
            where the model does not run on random ones.

    Raises:
        TraceError: the graph differs, and where first; the model returns another result when it is called again; or it
            does not run.
    """
    tensors = [*net.parameters(), *net.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return  # without values there is nothing to compare
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.random.fork_rng(devices):
        net = _private(net)
        before = attributes_of(net)
        inputs, first = _first_call(graph.graph, net, form, examples, device)
        # Another call can only differ by what this one has left behind.
        again = _drew(device) or attributes_of(net) != before
        if again and (changed := _differences(first, _of_model(graph.graph, net, form, inputs))):
            raise TraceError(
                f"{type(net).__name__} computes something else when it is called again with the same input "
                f"({_shown(changed)}): it keeps something between calls, which a graph does not. Return it, and take "
                "it as an input of the next call. verify=False skips this check."
            )
        if _differences(first, _of_graph(graph.graph, net, inputs)):
            _compare_exactly(graph.graph, net, form, inputs)


def verify_under_autocast(
    net: nn.Module, form: Form, examples: Sequence[torch.Tensor], dtype: torch.dtype
) -> fx.GraphModule:
    """Refuse autocast where the model asks its values for their dtypes, and computes something else for the answers.

    A graph at one size has the answers of a call without autocast. One run of each, in evaluation mode; they may differ
    by rounding in `dtype`.

    Returns:
        the graph that was compared.

    Raises:
        TraceError: the graph differs from the model.
    """
    device = next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    net = _private(net).eval()
    graph = open_modules(trace_for(net, examples, form)[0], strict=False, example_inputs=examples, owner=net)
    if device.type == "meta":
        return graph
    with torch.no_grad(), torch.autocast(device.type, dtype), torch.random.fork_rng(devices):
        inputs, first = _first_call(graph.graph, net, form, examples, device)
        found = _of_graph(graph.graph, net, inputs)
        differences = _differences(first, found, {})
    if differences:
        asked = next((node for node in graph.graph.nodes if asked_dtype(node)), None)
        where = f" at node {name_of(asked)!r}{user_line(asked)}" if asked is not None else ""
        raise TraceError(
            f"under autocast the graph does not compute what {type(net).__name__} does ({_shown(differences)}): its "
            f"forward asks what dtype a value has{where}, and the graph has the answer of a call without autocast. "
            "Let the tensor decide, as in y.to(x), x.new_zeros(...) and torch.zeros_like(x), or call without autocast."
        )
    return graph


def _drew(device: torch.device) -> bool:
    """Whether the last call, which `_run` began with seed 0, drew random numbers; taken for granted on GPUs."""
    state = torch.get_rng_state()
    seed(device, 0)
    return device.type != "cpu" or not torch.equal(state, torch.get_rng_state())


def _compare_exactly(graph: fx.Graph, net: nn.Module, form: Form, inputs: Sequence[torch.Tensor]) -> None:
    """In float64, and without what depends on random numbers, which a graph may draw in another order."""
    net, inputs = copy.deepcopy(net).double(), [x.double() if x.is_floating_point() else x for x in inputs]
    first = _of_model(graph, net, form, inputs)
    by_chance = _differences(first, _of_model(graph, net, form, inputs, 1))
    differences = _differences(first, _of_graph(graph, net, inputs))
    wrong = {place: size for place, size in differences.items() if place not in by_chance}
    if wrong:
        raise TraceError(
            f"the graph does not compute what {type(net).__name__} does: they differ ({_shown(wrong)}). Its forward "
            "depends on something that tracing does not see: let it depend on inputs, parameters and buffers alone. "
            "verify=False skips this check."
        )


def _private(net: nn.Module) -> nn.Module:
    """A copy with buffers of its own, as forward may write into them."""
    net = share(net)
    copies: dict[int, torch.Tensor] = {}
    for module in net.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
    return net


def _first_call(
    graph: fx.Graph, net: nn.Module, form: Form, examples: Sequence[torch.Tensor], device: torch.device
) -> tuple[list[torch.Tensor], Values]:
    """A sample on which the model runs, and what it computes."""
    given = [torch.zeros(x.shape, dtype=x.dtype, device=device) if x.is_meta else x.to(device) for x in examples]
    given = [x[:1] if x.ndim else x for x in given]
    seed(device, 0)
    random = [torch.randn_like(x) if x.is_floating_point() else x for x in given]
    two = [torch.cat([x, torch.randn_like(x) if x.is_floating_point() else x]) if x.ndim else x for x in random]
    failed: Exception | None = None
    for inputs in (random, given, two):  # a norm may refuse one sample of size 1
        try:
            return inputs, _of_model(graph, net, form, inputs)
        except Exception as error:
            failed = failed or error
    raise TraceError(
        f"{type(net).__name__} runs neither on a random sample nor on its example: {failed}. Pass example_inputs= with "
        "numbers that it takes. verify=False skips this check."
    ) from failed


# -- what is computed -------------------------------------------------------------------------------------------------


def _of_model(graph: fx.Graph, net: nn.Module, form: Form, inputs: Sequence[torch.Tensor], number: int = 0) -> Values:
    """By a call of the model, at the modules that have nodes in the graph."""
    paths = set(_called_modules(net))
    nodes: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        path = module_path_of(node)
        if path in paths:
            nodes[path].append(node)
    called: dict[str, list[Any]] = defaultdict(list)
    hooks = [
        net.get_submodule(path).register_forward_hook(lambda *call, path=path: called[path].append(_first_of(call[2])))
        for path in nodes
    ]

    def call(*given: torch.Tensor) -> Any:
        args, named = form.fill(given)
        return net(*args, **named)

    try:
        returned = _run(call, net, inputs, number)
    finally:
        for hook in hooks:
            hook.remove()
    # A call that is not in the graph was without consequence; which one it was is not known.
    known = [path for path in nodes if len(nodes[path]) == len(called[path])]
    values = {node: value for path in known for node, value in zip(nodes[path], called[path], strict=True)}
    return {**values, **dict(_places(returned))}


def _called_modules(net: nn.Module, path: str = "") -> Iterator[str]:
    """The paths of all modules but those in a network of ours, which runs its graph instead of them."""
    if not hasattr(type(net), "as_graph"):
        yield path
        for name, child in net.named_children():
            yield from _called_modules(child, f"{path}.{name}" if path else name)


def _of_graph(graph: fx.Graph, net: nn.Module, inputs: Sequence[torch.Tensor]) -> Values:
    """By the graph, with the tensors of `net`."""
    run = _Interpreter(getattr(net, "_root", net), graph=graph)  # a network of ours has its tensors in _root
    returned = _run(run.run, net, inputs, 0)
    return {**run.values, **dict(_places(returned))}


class _Interpreter(fx.Interpreter):
    """Keeps the values of modules."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.values: Values = {}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        return plain(super().fetch_args_kwargs_from_env(n))  # the generated code has plain lists as well

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if module_path_of(n) is not None:
            self.values[n] = _first_of(value)
        return value


def _run(function: Any, net: nn.Module, inputs: Sequence[torch.Tensor], number: int) -> Any:
    """A call, after which the buffers are as before: what it writes into them a graph writes as well."""
    seed(next((x.device for x in inputs), torch.device("cpu")), number)
    before = [(buffer, buffer.clone()) for buffer in net.buffers()]
    try:
        return function(*[x.clone() for x in inputs])
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _first_of(value: Any) -> Any:
    """Of several values the first, which has the module's name; before an op in place changes it."""
    first = value[0] if isinstance(value, tuple) else value
    return first.clone() if isinstance(first, torch.Tensor) else first


def _places(value: Any, place: str = "output") -> Iterator[tuple[str, Any]]:
    """Every value in a structure, with where it is."""
    if isinstance(value, Mapping):
        parts = [(f"{place}[{key!r}]", part) for key, part in value.items()]
    elif is_dataclass(value):
        parts = [(f"{place}.{field.name}", getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, (list, tuple)):
        parts = [(f"{place}[{i}]", part) for i, part in enumerate(value)]
    else:
        yield place, value
        return
    for inner, part in parts:
        yield from _places(part, inner)


# -- how far it differs -----------------------------------------------------------------------------------------------


def _differences(expected: Values, found: Values, rounding: Mapping[torch.dtype, float] = ROUNDING) -> dict[Any, float]:
    """Place -> relative difference, where that is more than rounding; infinite where they cannot be compared."""
    differences = {place: _difference(value, found.get(place), rounding) for place, value in expected.items()}
    return {place: size for place, size in differences.items() if size > 0}


def _difference(a: Any, b: Any, rounding: Mapping[torch.dtype, float]) -> float:
    """0 where two values are the same but for rounding."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return 0.0 if type(a) is type(b) and a == b else float("inf")
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return float("inf")
    if torch.equal(a, b):
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    size = (a - b).abs().masked_fill(same, 0).max() / a.abs().nan_to_num(posinf=0.0).max()
    return 0.0 if size <= rounding.get(a.dtype, 3e-2) else float(size.nan_to_num(nan=float("inf")))


def _shown(differences: Mapping[Any, float]) -> str:
    """Of the nodes the first, and the places in what is returned."""
    nodes = [place for place in differences if isinstance(place, fx.Node)]
    first = sorted(nodes, key=list(nodes[0].graph.nodes).index)[:1] if nodes else []
    parts = [f"first at node {name_of(node)!r}{user_line(node)}" for node in first]
    parts += [f"{place} by {size:.1g} of its largest" for place, size in differences.items() if place not in nodes]
    return "; ".join(parts[:4])
