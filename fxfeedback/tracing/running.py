"""How a network runs the graph of a call, and what it says of inputs that the graph does not take."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfeedback.errors import InputError
from fxfeedback.graph.specs import Sizes, sizes_of
from fxfeedback.tracing.arguments import Form
from fxfeedback.tracing.stand_ins import Shaped
from fxfeedback.tracing.wrapper import Wrapper, bind_of, example_of, like_of, root_of, stand_ins_of


def run_graph(
    run: Callable[..., Any],
    wrapper: Wrapper,
    inputs: Sequence[torch.Tensor],
    more: Sequence[torch.Tensor] = (),
    state: Sequence[torch.Tensor] = (),
) -> Any:
    """What a graph returns for the model's own inputs and what comes after them, of which `state` is a part.

    Raises:
        InputError: the graph does not run, and the inputs are of other sizes or dtypes than those of the example.
    """
    try:
        return run(root_of(wrapper), *inputs, *more)
    except (RuntimeError, TypeError, ValueError) as error:
        expected, found = _shown(stand_ins_of(wrapper)), _shown(inputs)
        if state:
            expected = f"{expected}, state in {like_of(wrapper).dtype}"
            found = f"{found}, state in {state[0].dtype}"
        if isinstance(error, torch.OutOfMemoryError) or found == expected:
            raise
        raise InputError(f"the model does not run on {found}, as it was made for {expected}: {error}") from error


def check_inputs(inputs: Sequence[torch.Tensor], examples: Sequence[torch.Tensor]) -> None:
    """Tensors with as many dimensions as their examples.

    Raises:
        InputError: one has others.
    """
    for x, example in zip(inputs, examples, strict=True):
        if x.ndim != example.ndim:
            raise InputError(f"an input of shape {tuple(x.shape)} does not have the dimensions of {_shown([example])}")


def bound_as_graph(
    wrapper: Wrapper, args: Sequence[Any], named: Mapping[str, Any], tensors: Any, taken: Sequence[str]
) -> tuple[dict[str, Any], Form | None, list[Any], Sizes]:
    """A call of a network inside a model that is traced: its options, form (None: the example's), inputs and sizes.

    Args:
        wrapper: what is called.
        args, named: of the call; tensors without data, or proxies.
        tensors: their classes.
        taken: the options that such a call may have.
    """
    options = {name: named[name] for name in wrapper.OPTIONS if name in named}
    for name in options.keys() - set(taken):
        raise ValueError(f"a {type(wrapper).__name__} takes no {name}= inside another model")
    own = {name: value for name, value in named.items() if name not in options}
    found, inputs = bind_of(wrapper, args, own, tensors)
    form = None if found == example_of(wrapper).form else found
    return options, form, inputs, sizes_of(map(_known, inputs))


def _known(x: Any) -> torch.Tensor:
    """A tensor with the size and the dtype of an input of a traced call."""
    if isinstance(x, fx.Proxy) and not isinstance(x, Shaped):
        raise ValueError("a model of ours inside another one looks at the size of its input")
    return x.small if isinstance(x, Shaped) else x


def _shown(inputs: Sequence[torch.Tensor]) -> str:
    """(batch, 3, 224, 224) in torch.float32, of each tensor"""
    return ", ".join(f"({', '.join(map(str, ('batch', *x.shape[1:])))}) in {x.dtype}" for x in inputs)
