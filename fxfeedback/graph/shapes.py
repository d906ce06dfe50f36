"""What a traced graph's nodes make: `annotate_shapes` says it of each as a `Spec` (see `nodes.spec_of`)."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from fxfeedback.errors import TraceError
from fxfeedback.graph.meta_device import MetaRun
from fxfeedback.graph.nodes import name_of, specs_of, tell, user_line, was_in_place
from fxfeedback.graph.specs import EXAMPLE_BATCH, NamedSpecs, Spec, at_batch


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
        if was_in_place(node):
            _check_dtype(node)


def _check_dtype(node: fx.Node) -> None:
    """An op in place keeps its tensor's dtype, where the same out of place may have another."""
    kept, made = (getattr(specs_of(each), "dtype", None) for each in (node.args[0], node))  # type: ignore[arg-type]
    if kept != made:
        raise TraceError(
            f"the in-place op at node {name_of(node)!r}{user_line(node)} puts {made} into a tensor of {kept}: write it "
            "out of place, with the cast, as in x = x + y.to(x.dtype)"
        )


def _spec(small: Any, large: Any) -> Any:
    if isinstance(small, torch.Tensor):
        return Spec(
            tuple(small.shape), tuple(b - a for a, b in zip(small.shape, large.shape, strict=True)), small.dtype
        )
    if isinstance(small, (tuple, list)):
        fields = getattr(type(small), "__match_args__", ())
        return NamedSpecs((_spec(a, b) for a, b in zip(small, large, strict=False)), fields)
    if isinstance(small, dict):
        return {key: _spec(small[key], large[key]) for key in small}
    return None


def _shapes(module: fx.GraphModule, example_inputs: Sequence[torch.Tensor], batch: int) -> dict[fx.Node, Any]:
    run = MetaRun(module, [at_batch(batch, x) for x in example_inputs])
    # New tensors of the model's own code go to the meta device also.
    with torch.device("meta"), torch.no_grad():
        for node in module.graph.nodes:
            if node.op != "output":
                run.values[node] = _made(run, node, example_inputs)
    return run.values


def _made(run: MetaRun, node: fx.Node, example_inputs: Sequence[torch.Tensor]) -> Any:
    """What the node makes on the meta device; whether it draws is said of it."""
    try:
        with _Drawing(node) if node.op.startswith("call") else nullcontext():
            return run.value(node)
    except NotImplementedError as error:
        raise TraceError(
            f"the size of what {name_of(node)!r} returns depends on values{user_line(node)}, as with boolean "
            "masks, nonzero and masked_select; a graph needs its sizes before it runs. Use torch.where or a product "
            "with the mask; of a mask that never changes compute the positions in __init__ and index with these."
        ) from error
    except Exception as error:
        sizes = ", ".join(str(tuple(x.shape)) for x in example_inputs)
        raise TraceError(
            f"the model does not run on an input of size {sizes}: {error} (at node {name_of(node)!r}"
            f"{user_line(node)}). Give inputs of a size that it takes; where the network is built, as input_size=."
        ) from error


class _Drawing(TorchDispatchMode):
    """Says of a node whether its op draws random numbers, whatever code it calls."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self.node = node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            tell(self.node, drawn=True)
        return func(*args, **(kwargs or {}))
