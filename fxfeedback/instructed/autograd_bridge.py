"""Let `loss.backward()` run the learner.

`CounterHebb` is the autograd function whose forward is a learner's first half and whose backward is the second (see
halves.py). With create_graph=True backward runs on values that replay.py computes again, so that autograd can
differentiate the updates.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from fxfeedback.errors import GradientError
from fxfeedback.instructed.halves import Halves
from fxfeedback.tracing.autocast import same_autocast


def _unchanged(values: Sequence[Any], versions: Sequence[int]) -> Sequence[Any]:
    """The values.

    Raises:
        GradientError: one of them was written into since it had its version.
    """
    for value, version in zip(values, versions, strict=True):
        if _version(value) != version:
            raise GradientError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of size {tuple(value.shape)}, after the call that took or made it. Write into it after the "
                "backward pass, or into a copy"
            )
    return values


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def _recorded(ctx: Any, saved: Sequence[Any]) -> list[Any]:
    """The values for the error pass, computed again while autograd looks on.

    Raises:
        GradientError: updates have no derivatives here, or an input or parameter was written into since the call.
    """
    again = ctx.halves.replay
    if again.refused:
        raise GradientError(f"create_graph=True: {again.refused}")
    with ctx.autocast():
        return again.run(None, *_unchanged(*ctx.inputs), *(saved[i] for i in again.values))


class _Watched(torch.autograd.Function):
    """The value itself; backward refuses create_graph=True."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, error: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise GradientError(
                "create_graph=True: under torch.compile updates have no derivatives: call the network that was "
                "compiled itself (compiled._orig_mod) for gradient penalties, Hessian-vector products and the like"
            )
        return error


@torch.compiler.allow_in_graph
def _watched(value: torch.Tensor) -> torch.Tensor:
    return _Watched.apply(value)


def refuse_transforms() -> None:
    """torch.func's transforms do not differentiate the learner.

    Raises:
        GradientError: one of them is at work.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise GradientError(
            "Counter-Hebb learning does not run under functorch transforms (torch.func.grad, vmap, jvp, ...): use "
            'torch.autograd.grad or torch.autograd.functional, or call to_butd with learning="backprop"'
        )


class CounterHebb(torch.autograd.Function):
    """The learner as an autograd function: backward runs the error pass and returns the updates as gradients."""

    @staticmethod
    def forward(ctx: Any, halves: Halves, names: Sequence[str], *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """names: of `values`, the graph's inputs and attributes. Returns the tensors of the model's output."""
        compiling = torch.compiler.is_compiling()
        if not compiling:
            inputs = [values[i] for i in halves.replay.inputs]
            ctx.inputs = inputs, [_version(value) for value in inputs]  # before a buffer advances
            ctx.autocast = same_autocast(values[0].device.type)
        outputs, saved = halves.forward(None, *values)
        ctx.halves, ctx.names = halves, names
        kept = halves.kept
        if compiling:  # torch.compile frees by itself what autograd saves, and knows no other way
            kept = [isinstance(value, torch.Tensor) for value in saved]
        ctx.save_for_backward(*(value if keep else None for value, keep in zip(saved, kept, strict=True)))
        ctx.between = [None if keep else value for value, keep in zip(saved, kept, strict=True)]
        ctx.versions = [] if compiling else [_version(value) for value in ctx.between]
        ctx.mark_non_differentiable(*(value for value in outputs if not value.is_floating_point()))
        ctx.set_materialize_grads(False)
        ctx.like = [(value.shape, value.dtype, value.device) for value in outputs if value.is_floating_point()]
        ctx.floating = [value.is_floating_point() for value in outputs]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *errors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        saved = [b if b is not None else a for a, b in zip(ctx.saved_tensors, ctx.between, strict=True)]
        recorded = torch.is_grad_enabled() and not compiling  # create_graph=True
        if not compiling:
            _unchanged(ctx.between, ctx.versions)
        if recorded:
            saved = _recorded(ctx, saved)
        elif not compiling and not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.between, ctx.inputs = [None] * len(saved), None
        given = [error for error, floating in zip(errors, ctx.floating, strict=True) if floating]
        arrived = {i for i, error in enumerate(given) if error is not None}
        for (shape, dtype, device), error in zip(ctx.like, given, strict=True):
            saved.append(torch.zeros(shape, dtype=dtype, device=device) if error is None else error)
        with ctx.autocast(enabled=False) if recorded else contextlib.nullcontext():
            made = ctx.halves.backward(None, saved)
        results = zip(ctx.halves.updates, ctx.halves.reached, made, strict=True)
        # As autograd has it, what only unused outputs depend on gets nothing rather than zeros. What needs no error is
        # no gradient of anything, so it has no derivatives.
        updates = {
            name: update.detach() if reached is None else update
            for name, reached, update in results
            if reached is None or reached & arrived
        }
        return None, None, *(updates.get(name) for name in ctx.names)


def learned(halves: Halves, names: Sequence[str], values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """What a learner returns, for autograd.

    torch.compile runs the error pass without gradients, so that create_graph=True is refused outside of it.
    """
    outputs = CounterHebb.apply(halves, names, *values)
    if not torch.compiler.is_compiling():
        return outputs
    return [_watched(value) if value.is_floating_point() else value for value in outputs]
