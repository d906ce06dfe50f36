"""Losses of sequences that are aligned with targets."""

import torch
import torch.nn.functional as F

from fxfeedback.errors import GradientError
from fxfeedback.rules.core import roles, rule
from fxfeedback.rules.examples import T, call
from fxfeedback.rules.ops import one_node, records

aten = torch.ops.aten
REDUCTIONS = ["none", "mean", "sum"]  # as torch's kernels count them


@one_node
def ctc_error(e, log_probs, targets, input_lengths, target_lengths, blank, zero_infinity):
    """The error of log_probs (steps, batch, classes) from one of each sample's loss: Graves et al. (2006), eq. 16."""
    if records(log_probs):
        raise GradientError("no second derivative of ctc_loss: PyTorch has none either")
    losses, paths = aten._ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)
    given = (log_probs, targets, input_lengths, target_lengths)
    return aten._ctc_loss_backward(e, *given, losses, paths, blank, zero_infinity)


def _loss(how):
    """A call of ctc_loss on a batch of sequences of six steps."""

    def loss(x):
        steps, count = (torch.full((x.shape[0],), n) for n in (6, 3))
        targets = torch.tensor([[1, 2, 2]]).expand(x.shape[0], 3)
        return F.ctc_loss(x.permute(1, 0, 2).log_softmax(-1), targets, steps, count, reduction=how)

    return loss


@rule(F.ctc_loss, torch.ctc_loss, name="ctc_loss", examples=[call(_loss(how), T(4, 6, 3)) for how in REDUCTIONS])
def ctc_loss(y, log_probs, targets, input_lengths, target_lengths, blank=0, reduction="mean", zero_infinity=False):
    """-log of the probability of all alignments with the targets; instructed, evenly over steps and classes"""
    alone = log_probs.ndim == 2
    how = REDUCTIONS[reduction] if isinstance(reduction, int) else reduction

    def of_samples(t):
        """Each sample's share of the loss."""
        count = 1 if alone else log_probs.shape[1]
        if how == "none":
            return t.reshape([count])
        return t.reshape([1]).expand([count]) / (count if how == "mean" else 1)

    def lengths(given, like):
        return given.to(like.device) if hasattr(given, "reshape") else torch.tensor(given, device=like.device)

    def error(e):
        e = of_samples(e)
        if how == "mean":
            e = e / lengths(target_lengths, e).reshape(-1).clamp_min(1)
        x = log_probs.unsqueeze(1) if alone else log_probs
        back = ctc_error(e, x, targets, input_lengths, target_lengths, blank, zero_infinity)
        return back.squeeze(1) if alone else back

    def evenly(t):
        shape = (log_probs.shape[0], 1, log_probs.shape[-1])
        whole = of_samples(t).reshape([1, -1, 1]) / (shape[0] * shape[2])
        return whole.expand([shape[0], -1, shape[2]]).reshape(log_probs.shape)

    return {"log_probs": roles(instruct=evenly, error=error)}
