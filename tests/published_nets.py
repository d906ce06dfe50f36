"""The cores of the published BU-TD system, as ordinary modules (see tests/parity/README.md)."""

import torch
from torch import nn


def simple(channels: tuple[int, int], features: int) -> nn.Sequential:
    """Two 5x5 convolutions, each with a learned depthwise pooling behind it, and a linear layer, on 28x28 digits."""
    a, b = channels
    net = nn.Sequential()
    net.add_module("_conv1", nn.Conv2d(1, a, 5))
    net.add_module("relu1", nn.ReLU())
    net.add_module("_conv1_pool", nn.Conv2d(a, a, 2, stride=2, groups=a))
    net.add_module("relu2", nn.ReLU())
    net.add_module("_conv2", nn.Conv2d(a, b, 5))
    net.add_module("relu3", nn.ReLU())
    net.add_module("_conv2_pool", nn.Conv2d(b, b, 3, stride=2, groups=b))
    net.add_module("relu4", nn.ReLU())
    net.add_module("flatten", nn.Flatten())
    net.add_module("_fc", nn.Linear(b * 9, features))
    net.add_module("relu5", nn.ReLU())
    return net


class FullyConnected(nn.Module):
    """Two hidden layers of 40."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self._fc_layers = nn.ModuleList([nn.Linear(784, 40), nn.Linear(40, 40)])
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.flatten(x)
        for layer in self._fc_layers:
            x = self.relu(layer(x))
        return x


class Block(nn.Module):
    """A basic residual block; with batch norm, or without and then always with a 1x1 downsample."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = (nn.BatchNorm2d(outputs) if norm else nn.Identity() for _ in range(2))
        self.downsample, self.downsample_norm = None, None
        if not norm or stride > 1 or inputs != outputs:
            self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample_norm = nn.BatchNorm2d(outputs) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample_norm(self.downsample(x))
        return torch.relu(out + x)


class TinyResNet(nn.Module):
    """Two blocks without norms between a convolution and a strided convolution that pools."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(Block(32, 64, 1, norm=False))
        self.layer2 = nn.Sequential(Block(64, 64, 2, norm=False))
        self.conv_pooling = nn.Conv2d(64, 64, 5, stride=3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(torch.relu(self.conv1(x))))
        return torch.relu(self.conv_pooling(x)).flatten(1)


class ResNet18(nn.Module):
    """ResNet-18 for small images: a 3x3 first convolution, no pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = [64, 64, 128, 256, 512]
        for i in range(1, 5):
            blocks = (Block(widths[i - 1], widths[i], 1 if i == 1 else 2, True), Block(widths[i], widths[i], 1, True))
            self.add_module(f"layer{i}", nn.Sequential(*blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).flatten(1)


class Net(nn.Module):
    """A core and its prediction head."""

    def __init__(self, core_net: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.core_net = core_net
        self.head_layer = nn.Linear(features, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head_layer(self.core_net(x))
