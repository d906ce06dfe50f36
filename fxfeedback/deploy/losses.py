"""Losses and their errors, the gradients at the logits, in plain tensor code; torch.nn.functional has them by name.

Any other function of logits and targets gets its error by the rules of its ops, as a model does.
"""

from collections.abc import Callable

import torch
from torch import fx, nn

from fxfeedback.counter_hebb_pass import INPUT, Learning, learner
from fxfeedback.errors import OptionError
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.nodes import spec_of
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.tracing.arguments import form_of
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.open_operators import open_operators
from fxfeedback.tracing.trace_at_size import trace_for

Loss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def cross_entropy(z: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log softmax(z)[target], mean over samples and positions; its error (softmax(z) - one-hot) / number.

    z: (B, C, ...). target: (B, ...) class ids; where it is -100 nothing is learned. Where all are -100, the mean over
    none is NaN and its error 0, as in torch. Where z is -inf there is no class, and the error is 0.
    """
    classes = torch.arange(z.shape[1], device=z.device).reshape(-1, *(1,) * (z.ndim - 2))
    one_hot = (target.unsqueeze(1) == classes).to(z.dtype)
    log_p, number = z.log_softmax(1), one_hot.sum()
    error = (log_p.exp() * one_hot.sum(1, keepdim=True) - one_hot) / number.clamp(min=1)
    return -torch.where(one_hot > 0, log_p, 0.0).sum() / number, error


def mse(z: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(z - target)², mean over all elements; its error 2 (z - target) / number."""
    difference = z - target
    return (difference * difference).mean(), 2 * difference / z.numel()


def bce_with_logits(z: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-target log σ(z) - (1 - target) log(1 - σ(z)), mean over all elements; its error (σ(z) - target) / number."""
    losses = z.relu() - z * target + (-z.abs()).exp().log1p()
    return losses.mean(), (z.sigmoid() - target) / z.numel()


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mse, "bce_with_logits": bce_with_logits}
"""name -> (logits, target) -> loss () and error, shaped like the logits"""


def name_of_loss(loss: str | Callable[..., torch.Tensor]) -> str:
    """What a file calls its loss."""
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


class _Judge(nn.Module):
    """A loss as a model of logits and targets."""

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.loss(logits, target)


def by_rules(loss: Callable[..., torch.Tensor], logits: torch.Tensor, target: torch.Tensor) -> Loss:
    """The loss, a function (logits, target) -> (), with the error that its ops' rules bring to the logits.

    Args:
        loss: of ops that have rules, or that open into such.
        logits, target: an example of each with batch 1; only sizes and dtypes matter.

    Raises:
        OptionError: it does not return one number.
        TraceError, RuleError: as for a model that does the same.
    """
    judge, examples = _Judge(loss), (logits, target)
    traced, _ = trace_for(judge, examples, form_of(judge, 2))
    bu = open_modules(traced, example_inputs=examples, owner=judge)
    annotate_shapes(bu, examples)
    unpack_tuples(bu)
    open_operators(bu, examples, judge)
    (value,) = BottomUp(bu.graph).output_leaves() or (None,)
    if value is None or spec_of(value).shape != ():
        raise OptionError("loss: a function has to return one number for the batch, as F.mse_loss(logits, target) does")
    step: fx.GraphModule = learner(bu, judge, Learning(frozenset({INPUT + "logits"}), {}, {}, fused=False))

    def with_error(z: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, updates = step(z, target, z.new_ones(()))
        return value, updates[INPUT + "logits"]

    return with_error
