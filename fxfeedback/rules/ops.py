"""Functions of ours that are one node of a graph each, because torch has no function that does the same."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, fx
from torch.utils._pytree import tree_map_only


def one_node(function: Callable[..., Any]) -> Callable[..., Any]:
    """The decorated function; a call with proxies puts it into the graph as one node."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, fx.Proxy):
                return argument.tracer.create_proxy("call_function", call, args, kwargs)
        return function(*args, **kwargs)

    return call


@functools.cache
def applying(kind: Any) -> Callable[..., Any]:
    """What a torch.autograd.Function applies, under the class's name; any other function is itself."""
    if not (isinstance(kind, type) and issubclass(kind, torch.autograd.Function)):
        return kind

    def apply(*args: Any, **kwargs: Any) -> Any:
        return kind.apply(*args, **kwargs)

    apply.__module__, apply.__name__, apply.__qualname__ = kind.__module__, kind.__name__, kind.__qualname__
    apply.autograd_function = kind  # type: ignore[attr-defined]
    return apply


def is_recorded() -> bool:
    """Whether autograd records what is computed: the error pass, with create_graph=True."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def records(x: torch.Tensor) -> bool:
    """Whether autograd records what is computed of `x`."""
    return is_recorded() and x.requires_grad


def same(input: torch.Tensor) -> torch.Tensor:
    """The input itself: what is left of dropout in evaluation mode, and of nn.Identity."""
    return input


@one_node
def without_gradient(input: Any) -> Any:
    """What a model computed under torch.no_grad(): tensors that no gradient passes; sizes and the like as they are."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, input)


def _bounds_pass() -> bool:
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros((), device="cpu", requires_grad=True)
        return bool(torch.autograd.grad(x.clamp(min=0.0), x)[0] == 1)


BOUNDS_PASS = _bounds_pass()
"""Whether the gradient of torch.clamp passes where x equals a bound: torch's versions do one or the other."""


def _ties_share() -> bool:
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros((), device="cpu", requires_grad=True)
        return bool(torch.autograd.grad(torch.fmax(x, x.detach()), x)[0] == 0.5)


TIES_SHARE = _ties_share()
"""Whether the gradient of torch.fmax goes by halves to equal values; in torch's older versions the first has it all."""


@one_node
def leaky_by(input: Any, slopes: Any) -> Any:
    """x where x > 0, x times its slope elsewhere."""
    return input * slopes


def cumulative_momentum(num_batches_tracked: torch.Tensor) -> float:
    """The momentum that makes running statistics a plain average: 1 / number of batches."""
    return 1.0 if num_batches_tracked.is_meta else 1.0 / num_batches_tracked.item()


@one_node
def put_at(input: Any, index: Any, value: Any) -> Any:
    """A copy of `input` in which `index` has `value`."""
    output = input.clone()
    output[index] = value
    return output


def filled_from(input: Any, src: Any, non_blocking: bool = False) -> Any:
    """x.copy_(y) out of place."""
    return put_at(input, (...,), src)


def check_errors_(info: torch.Tensor, name: str, is_matrix: bool) -> None:
    """Raise what a function of torch.linalg raises for a singular matrix; by its name it stays although unused."""
    torch._linalg_check_errors(info, name, is_matrix=is_matrix)


@one_node
def or_zeros(update: Any, rows: Any) -> Any:
    """`update` with `rows` rows: for an empty batch, torch's convolution returns none."""
    return update if len(update) else update.new_zeros(rows, *update.shape[1:])


@one_node
def laid_out_as(e: Any, x: Any) -> Any:
    """`e` in the memory layout of `x`."""
    return e if e.stride() == x.stride() else torch.empty_like(x, dtype=e.dtype).copy_(e)


@one_node
def taking_errors_as(y: Any, x: Any) -> Any:
    """`y` itself; where autograd records it, for second derivatives, its error comes in the memory layout of `x`."""
    if records(y):
        y.register_hook(lambda e: e if e is None else laid_out_as(e, x))
    return y


@torch.no_grad()
def advance_(input: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor, momentum: float) -> None:
    """Advance batch norm's running statistics, in place, by the batch `input` (N, C, ...).

    They stay in their own dtype, and are computed in float32 at the least, as the kernel of batch norm does.
    """
    var, mean = torch.var_mean(in_float(input), [0, *range(2, input.ndim)])
    _advance_to_(running_mean, mean, momentum)
    _advance_to_(running_var, var, momentum)


def in_float(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32 at the least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _advance_to_(running: torch.Tensor, present: torch.Tensor, momentum: float) -> None:
    # Through .data, as the kernel of batch norm itself: no backward pass reads the statistics.
    running.data.lerp_(present.to(running.dtype), momentum)


# -- statistics over the batches of all processes ---------------------------------------------------------------------


class _SumOverProcesses(torch.autograd.Function):
    """See `sum_over_processes`. It is its own transpose: each process's loss depends on every process's value."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, error: torch.Tensor) -> torch.Tensor:
        return _SumOverProcesses.apply(error)


def sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The sum of what all processes of torch's default group have; the value itself where there is no group."""
    shared = distributed.is_available() and distributed.is_initialized() and not value.is_meta
    return _SumOverProcesses.apply(value) if shared else value


@one_node
def mean_over_processes(x: Any, dims: Any) -> Any:
    """The mean over `dims`, which are kept, of what all processes have; their batches may differ in size."""
    total = x.sum(dims, keepdim=True)
    count = total.new_full((1,), x.numel() / max(total.numel(), 1))
    *sums, count = sum_over_processes(torch.cat([total.flatten(), count]))
    return torch.stack(sums).view_as(total) / count


@one_node
def synced_batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """F.batch_norm over the batches of all processes, which nn.SyncBatchNorm does on GPUs only."""
    if not training or input.is_meta or not (distributed.is_available() and distributed.is_initialized()):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    dims, shape = [0, *range(2, input.ndim)], (1, -1, *(1,) * (input.ndim - 2))
    x = in_float(input)
    mean = mean_over_processes(x, dims)
    centred = x - mean
    var = mean_over_processes(centred * centred, dims)
    if running_mean is not None and running_var is not None:
        advance_by_(running_mean, running_var, mean, var, x, momentum)
    y = centred * (var + eps).rsqrt()
    y = y if weight is None else y * weight.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(input.dtype)


@torch.no_grad()
def advance_by_(running_mean: Any, running_var: Any, mean: Any, var: Any, input: Any, momentum: float) -> None:
    """Advance running statistics, in place, by those of all processes' batches; the variance is unbiased."""
    n = sum_over_processes(input.new_full((), input.numel() / max(input.shape[1], 1)))
    _advance_to_(running_mean, mean.flatten(), momentum)
    _advance_to_(running_var, var.flatten() * n / (n - 1), momentum)


@torch.no_grad()
def advance_synced_(
    input: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor, momentum: float
) -> None:
    """`advance_` by the batches of all processes."""
    synced_batch_norm(input, running_mean, running_var, training=True, momentum=momentum)


ADVANCES = {F.batch_norm: advance_, synced_batch_norm: advance_synced_}
"""A batch norm -> what advances its running statistics and no more."""


# -- the weights of several passes ------------------------------------------------------------------------------------


class _LinearOfPasses(torch.autograd.Function):
    """See `linear_of_passes`."""

    @staticmethod
    def forward(
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return F.linear(input, weight, bias), weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, error: torch.Tensor | None, later: torch.Tensor | None) -> Any:
        """The errors of input, weight and bias; `later` is what the later passes have of the weight's."""
        x, weight = ctx.saved_tensors
        if error is None:
            return None, later, None
        rows, errors = x.flatten(0, -2).to(error.dtype), error.flatten(0, -2)
        of_input = (error @ weight.to(error.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_bias = errors.sum(0) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[1]:
            return of_input, None, of_bias
        if later is None:
            return of_input, (errors.t() @ rows).to(weight.dtype), of_bias
        if torch.is_grad_enabled() or later.dtype != error.dtype:
            return of_input, later + errors.t() @ rows, of_bias
        return of_input, later.addmm_(errors.t(), rows), of_bias


def linear_of_passes(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """F.linear, and the weight for the next pass to use.

    The passes' errors of the weight are then one sum that each pass adds to. With F.linear each is a matrix of its own,
    which autograd allocates and adds to the others: that takes as long as the rest of a large linear layer.
    """
    return _LinearOfPasses.apply(input, weight, bias)
