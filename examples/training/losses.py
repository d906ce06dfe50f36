"""The published losses, sample by sample: (logits (B, classes), labels (B,)) -> (B,)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the right class."""
    return F.cross_entropy(logits, labels, reduction="none")


def bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Of every class for itself, or of a single logit, where labels are 0 and 1."""
    return F.binary_cross_entropy_with_logits(logits, one_hot(logits, labels), reduction="none").mean(1)


def mse(logits: Tensor, labels: Tensor) -> Tensor:
    """The squared distance to 1 at the right class and 0 at the others."""
    return F.mse_loss(logits, one_hot(logits, labels), reduction="none").mean(1)


def one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    """What the outputs should be."""
    classes = logits.shape[1]
    return labels[:, None].to(logits) if classes == 1 else F.one_hot(labels, classes).to(logits)


LOSSES: dict[str, Loss] = {"cross-entropy": cross_entropy, "bce": bce, "mse": mse}
