"""Ridge regression in closed form, regularised so that classes that were left out are predicted best."""

import torch
from torch import Tensor, nn

LEVELS = torch.logspace(-6, 4, 41, dtype=torch.float64)
"""Penalties that are tried, as multiples of the largest eigenvalue of the embeddings' scatter."""


class Ridge(nn.Module):
    """y = x W + b."""

    weight: Tensor
    bias: Tensor

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(size, outputs, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(outputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def fit_ridge(x: Tensor, y: Tensor, groups: Tensor) -> Ridge:
    """The map from x (N, D) to y (N, P), all in float64; groups (N,): the class of each row, from 0 on.

    Of the penalties in `LEVELS` the smallest whose error on the class left out is within one standard error of the
    least: the classes do not tell it from the best, and it changes the prototypes of known words least.
    """
    scatter = float(torch.linalg.matrix_norm(x - x.mean(0), 2)) ** 2
    penalties = LEVELS * (scatter or 1.0)
    errors = torch.stack([left_out_errors(x, y, groups, float(penalty)) for penalty in penalties])
    means = errors.mean(1)
    best = int(means.argmin())
    limit = means[best] + errors[best].std() / errors.shape[1] ** 0.5
    chosen = float(penalties[int((means <= limit).nonzero()[0])])
    fitted = Ridge(x.shape[1], y.shape[1])
    fitted.weight, fitted.bias = solve(x, y, chosen)
    return fitted


def solve(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """(W, b) that minimise Σ |x W + b - y|² + penalty |W|²."""
    apart, middle = x - x.mean(0), y.mean(0)
    inner = apart @ apart.T + penalty * torch.eye(len(x), dtype=x.dtype)
    weight = apart.T @ torch.linalg.solve(inner, y - middle)
    return weight, middle - x.mean(0) @ weight


def left_out_errors(x: Tensor, y: Tensor, groups: Tensor, penalty: float) -> Tensor:
    """The mean squared error on each class, by the fit to the others, (classes,).

    No fit is repeated: with H the matrix that takes y to its fit, the residuals of rows G that are left out are
    (1 - H_GG)⁻¹ (y - H y)_G.
    """
    apart = x - x.mean(0)
    inner = apart @ apart.T
    ones = torch.ones_like(inner) / len(x)
    eye = torch.eye(len(x), dtype=x.dtype)
    left = eye - ones - torch.linalg.solve(inner + penalty * eye, inner)  # 1 - H
    residuals = left @ y
    errors = []
    for group in groups.unique():
        rows = groups == group
        missed = torch.linalg.solve(left[rows][:, rows], residuals[rows])
        errors.append(missed.square().sum(1).mean())
    return torch.stack(errors)
