"""A small diffusion model: noise becomes what a text embedding stands for, in a few steps ("diffusion prior")."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOMENTS = 32  # of time, as sines and cosines


class Denoiser(nn.Module):
    """Predicts the clean value (B, P) of a noisy one at a time in 0..1, given an embedding (B, D).

    Values and embeddings are brought to a mean of 0 and a deviation of 1 inside.
    """

    value_mean: Tensor
    value_scale: Tensor
    text_mean: Tensor
    text_scale: Tensor

    def __init__(self, size: int, outputs: int, width: int = 256) -> None:
        super().__init__()
        self.outputs = outputs
        for name, length in (("value_mean", outputs), ("value_scale", 1), ("text_mean", size), ("text_scale", 1)):
            self.register_buffer(name, torch.zeros(length) if name.endswith("mean") else torch.ones(length))
        self.enter = nn.Linear(outputs + size + 2 * MOMENTS, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.leave = nn.Linear(width, outputs)

    def predict(self, noisy: Tensor, text: Tensor, time: Tensor) -> Tensor:
        """The clean value, both normalised; time (B,)."""
        rates = math.pi * 2 ** torch.linspace(0, 8, MOMENTS)
        angles = time.unsqueeze(1) * rates
        x = self.enter(torch.cat([noisy, text, angles.sin(), angles.cos()], 1))
        for block in self.blocks:
            x = x + block(x)
        return self.leave(F.silu(x))

    def forward(self, embeddings: Tensor, steps: int = 8, samples: int = 8, seed: int = 0) -> Tensor:
        """The mean of some samples for each embedding (N, D): (N, P), in float64.

        steps: from noise to value, by DDIM's deterministic rule. seed: of the noise, which is the same for every row.
        """
        generator = torch.Generator().manual_seed(seed)
        text = ((embeddings.float() - self.text_mean) / self.text_scale).repeat_interleave(samples, 0)
        noise = torch.randn(samples, self.outputs, generator=generator).repeat(len(embeddings), 1)
        times = torch.linspace(1, 0, steps + 1)
        value, clean = noise, noise
        for now, then in itertools.pairwise(times):
            clean = self.predict(value, text, now.expand(len(value)))
            share, rest = schedule(now)
            noise = (value - share * clean) / rest
            share, rest = schedule(then)
            value = share * clean + rest * noise
        made = clean.view(len(embeddings), samples, -1).mean(1)
        return (made * self.value_scale + self.value_mean).double()


def schedule(time: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of value and noise at a time, along a quarter of a circle: all value at 0, nearly all noise at 1."""
    angle = time * (math.pi / 2) * 0.999
    return angle.cos(), angle.sin()


def fit_denoiser(x: Tensor, y: Tensor, seed: int, steps: int = 1500, batch: int = 128, rate: float = 2e-3) -> Denoiser:
    """A denoiser of the values y (N, P), given embeddings x (N, D); the global generator stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = Denoiser(x.shape[1], y.shape[1])
    for name, values in (("text", x), ("value", y)):
        apart = values - values.mean(0)
        getattr(denoiser, f"{name}_mean").copy_(values.mean(0))
        getattr(denoiser, f"{name}_scale").fill_(float(apart.square().mean().sqrt()) or 1.0)
    text = (x.float() - denoiser.text_mean) / denoiser.text_scale
    value = (y.float() - denoiser.value_mean) / denoiser.value_scale
    optimizer = torch.optim.AdamW(denoiser.parameters(), rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=generator)
        time = torch.rand(batch, generator=generator)
        share, rest = (part.unsqueeze(1) for part in schedule(time))
        noise = torch.randn(batch, y.shape[1], generator=generator)
        predicted = denoiser.predict(share * value[rows] + rest * noise, text[rows], time)
        optimizer.zero_grad()
        F.mse_loss(predicted, value[rows]).backward()
        optimizer.step()
        decay.step()
    return denoiser.requires_grad_(False).eval()
