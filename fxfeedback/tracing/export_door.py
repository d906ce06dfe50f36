"""The second door: a graph of a model that torch.fx cannot trace, by torch.export.

torch.export runs the model's own code on tensors without data, so that it may branch on whatever does not depend on
values. Its graph of aten ops is translated (from_aten.py) and named (export_names.py) into one as `trace` makes it.
"""

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fxfeedback.errors import TraceError, first_line
from fxfeedback.graph.effects import has_effect
from fxfeedback.graph.nodes import identifier, is_torchs
from fxfeedback.graph.writable import refuse_unwritable
from fxfeedback.rules.ops import ADVANCES
from fxfeedback.tracing.arguments import Form
from fxfeedback.tracing.attributes import NOT_THEIR_OWN, Stage, plain_value
from fxfeedback.tracing.buffers import is_same
from fxfeedback.tracing.doors import say_door
from fxfeedback.tracing.draws import DRAWS
from fxfeedback.tracing.export_names import give_names
from fxfeedback.tracing.from_aten import FromAten
from fxfeedback.tracing.known_shapes import CHANGING
from fxfeedback.tracing.next_call import state_is_kept
from fxfeedback.tracing.refusals import Refusal, line_of
from fxfeedback.tracing.trace import keep_constants
from fxfeedback.tracing.while_tracing import quiet_torch

PREFIX = "model."
"""What the names of the program's tensors begin with."""
BATCH = 7
"""The examples' batch size: a number that a model's code hardly compares with."""
ON_EITHER = ("requires_grad", "is_contiguous")
"""Questions to which torch.fx's door tries both answers."""
OTHER_BATCHES = (2, 3, 4, 6, 8, 16, 64, 1009)
"""Batch sizes at which the program is to be the same."""


class _Called(nn.Module):
    """Calls a model in a form, with its inputs alone, and returns the tensors of what it returns."""

    def __init__(self, model: nn.Module, form: Form, seen: "_Seen") -> None:
        super().__init__()
        self.model, self.form, self.seen = model, form, seen

    def forward(self, *inputs: Any) -> list[Any]:
        args, named = self.form.fill(inputs)
        before = _attributes(self.model)
        with _Asked():
            self.seen.returned = self.model(*args, **named)
        after = _attributes(self.model)
        changed = [place for place in {**before, **after} if before.get(place) != after.get(place)]
        self.seen.changed = {place: getattr(self.model.get_submodule(place[0]), place[1], None) for place in changed}
        return list(_leaves(self.seen.returned))


class _Asked(TorchFunctionMode):
    """While a model runs: its own code asks nothing of a tensor that may differ from call to call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        question = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name
        if question in (*CHANGING, *ON_EITHER) and not is_torchs(sys._getframe(1).f_code.co_filename):
            raise Refusal(f"it asks for a tensor's {question}, which may differ from call to call")
        return func(*args, **(kwargs or {}))


class _Seen:
    """What a call returned, and what it made of attributes, (path of the module, name): torch.export puts them back."""

    returned: Any
    changed: dict[tuple[str, str], Any]


def _attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of every module as plain data; tensors by identity."""
    return {
        (path, name): plain_value(tree_map_only(torch.Tensor, id, value))
        for path, module in model.named_modules()
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items()
        if name not in NOT_THEIR_OWN
    }


def export_graph(model: nn.Module, examples: Sequence[torch.Tensor], form: Form) -> fx.GraphModule:
    """The graph of `model` in its present mode by torch.export, for inputs of the examples' sizes and dtypes.

    It has functions and methods of torch, and nodes for parameters and buffers, by their names.

    Args:
        model: as it stands; constants of its code become buffers of it, so pass a copy made by `share`.
        examples: one tensor for each input, batch first; only sizes and dtypes matter.
        form: of the call.

    Raises:
        TraceError: torch.export cannot export it, or what it exports is right for one call only.
    """
    _refuse_parts(model)
    stage, seen = Stage(model), _Seen()

    def again() -> Any:
        return _export(_Called(stage.copy, form, seen), _examples(model, examples))

    try:
        program = again()
        if seen.changed:
            _check_next_call(program, stage, seen, again)
        kept = [stage.name_of(*each) for each in stage.changed() if isinstance(each[0], type)]
        if kept:
            raise state_is_kept(kept, "")
        _check_batch(program, len(examples))
        own = _plain_tensors(model)
        translation = FromAten(program, PREFIX, form.names, own)
        leaves = iter(translation.run())
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"torch.export cannot export {type(model).__name__}: {first_line(error)}{line_of(error)}"
        ) from error
    finally:
        stage.restore_classes()
    graph = translation.graph
    graph.output(_rebuilt(graph, seen.returned, leaves))
    graph.eliminate_dead_code(is_impure_node=lambda node: has_effect(node) or node.target in ADVANCES.values())
    give_names(graph, translation.origin, PREFIX, model)
    vars(stage.copy).update(translation.constants)
    keep_constants(graph, stage.copy, model)
    refuse_unwritable(graph)
    module = fx.GraphModule(model, graph, identifier(type(model).__name__))
    say_door(module, "export")
    return module


def _refuse_parts(model: nn.Module) -> None:
    """Refuse what only the first door takes."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise TraceError(
                f"torch.export: the weights of {path!r} are parametrized, which only torch.fx's tracing takes"
            )
        if hasattr(type(module), "as_graph"):
            raise TraceError(
                f"torch.export: {path!r} is a network of fxfeedback already: convert the whole model at once"
            )
        if reason := getattr(type(module), "untraceable", ""):
            raise TraceError(f"{path or type(module).__name__!r} {reason}")


def _examples(model: nn.Module, examples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    sizes = [(BATCH, *x.shape[1:]) if x.ndim else () for x in examples]
    return [torch.zeros(size, dtype=x.dtype, device=device) for size, x in zip(sizes, examples, strict=True)]


def _export(called: nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
    """torch.export's program, with an open batch size."""
    auto = torch.export.Dim.AUTO
    sizes = tuple({0: auto} if x.ndim else None for x in inputs)
    state = _drawing_state()
    with _exporting():
        program = torch.export.export(called, tuple(inputs), strict=False, dynamic_shapes={"inputs": sizes})
    if _drawing_state() != state:
        raise Refusal(DRAWS)
    return program


def _check_next_call(program: Any, stage: Stage, seen: _Seen, again: Callable[[], Any]) -> None:
    """Refuse a forward that computes something else in the next call, from the attributes that this one left."""
    changed = dict(seen.changed)
    kept = state_is_kept([".".join(filter(None, place)) for place in changed], "")
    if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(list(changed.values()))):
        raise kept
    for (path, name), value in changed.items():
        vars(stage.copy.get_submodule(path))[name] = value
    other = again()
    same = str(program.graph) == str(other.graph) and all(
        is_same(program.constants.get(name), value) for name, value in other.constants.items()
    )
    if not same or seen.changed:
        raise kept


def _drawing_state() -> Any:
    """Of Python's and numpy's generators: numbers drawn from these would be constants of the graph."""
    numpy = [repr(sys.modules["numpy.random"].get_state())] if "numpy.random" in sys.modules else []
    return random.getstate(), *numpy


@contextmanager
def _exporting() -> Iterator[None]:
    """Only the model's own contexts count, composite kernels are off, and torch's own messages are kept back."""
    around = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.enable_grad())
        for device, enabled in around.items():
            torch.set_autocast_enabled(device, False)
            stack.callback(torch.set_autocast_enabled, device, enabled)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        stack.enter_context(quiet_torch())
        yield


def _check_batch(program: Any, n_inputs: int) -> None:
    """Refuse a program that serves one batch size only."""
    places = [node for node in program.graph.nodes if node.op == "placeholder"][-n_inputs:]
    values = [node.meta["val"] for node in places if isinstance(node.meta.get("val"), torch.Tensor)]
    batches = [value.shape[0] for value in values if value.ndim]
    branches = ValueError("its code branches on the batch size, which a graph leaves open")
    if any(isinstance(size, int) for size in batches):
        raise branches
    for guard in {guard.expr for size in batches[:1] for guard in size.node.shape_env.guards}:
        for batch in OTHER_BATCHES:
            if guard.subs(dict.fromkeys(guard.free_symbols, batch)) == False:  # noqa: E712  (sympy's)
                raise branches


def _plain_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that are plain attributes of modules."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }


# -- what is returned -------------------------------------------------------------------------------------------------


def _parts(value: Any) -> dict[str, Any]:
    """Of a dataclass: what it was made of."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors and sizes in a structure, in order."""
    if isinstance(value, (torch.Tensor, torch.SymInt)):
        yield value
    elif is_dataclass(value):
        yield from _leaves(list(_parts(value).values()))
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves(part)


def _rebuilt(graph: fx.Graph, value: Any, leaves: Iterator[Any]) -> Any:
    """The structure with nodes in the places of its tensors; named tuples and dataclasses are nodes that make them."""
    if isinstance(value, (torch.Tensor, torch.SymInt)):
        return next(leaves)
    if is_dataclass(value):
        named = {name: _rebuilt(graph, part, leaves) for name, part in _parts(value).items()}
        return graph.call_function(type(value), (), named)
    if isinstance(value, dict):
        return {key: _rebuilt(graph, part, leaves) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_rebuilt(graph, part, leaves) for part in value]
        return graph.call_function(type(value), tuple(parts)) if hasattr(value, "_fields") else type(value)(parts)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TraceError(f"it returns a {type(value).__name__}, which a graph cannot: return tensors, in tuples or dicts")
