"""Blur before sub-sampling, as the published LRM networks may have it (after Zhang, "Making Convolutional Networks
Shift-Invariant Again", ICML 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_CHANNELS = 16  # as published: not before the first convolution


class Blurred(nn.Module):
    """A convolution with a stride whose input is blurred by a binomial kernel of 3 by 3."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = (line[:, None] * line).expand(conv.in_channels, 1, 3, 3)
        self.register_buffer("kernel", kernel.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.conv2d(x, self.kernel, padding=1, groups=self.conv.in_channels))


def with_blur_pool(net: nn.Module) -> nn.Module:
    """The network with every such convolution blurred, in its place."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and module.in_channels >= FEWEST_CHANNELS:
            net.set_submodule(name, Blurred(module))
    return net
