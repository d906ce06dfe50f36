"""The networks for digits: ours, and the published one."""

from collections import OrderedDict

from torch import nn

SIDE = 28  # pixels, of a digit and of a composite


def convnet(width: int = SIDE, classes: int = 10) -> nn.Module:
    """The default network, for images (B, 1, 28, width).

    Every rectifier is a layer of gates, and a gate that learning closes rarely opens again. So there are few of them:
    the first convolution, whose features both tasks use, gets its nonlinearity from max-pooling, which has no gates.
    """
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 32, 5, bias=False)),
        ("norm1", nn.BatchNorm2d(32)),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(32, 48, 5, bias=False)),
        ("norm2", nn.BatchNorm2d(48)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.AvgPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(48 * 4 * (((width - 4) // 2 - 4) // 2), 256)),
        ("relu3", nn.ReLU()),
        ("head", nn.Linear(256, classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


def published(width: int = SIDE) -> nn.Module:
    """The published network, for images (B, 1, 28, width); its pooling layers are learned depthwise convolutions."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 32, 5)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.Conv2d(32, 32, 2, stride=2, groups=32)),
        ("relu2", nn.ReLU()),
        ("conv2", nn.Conv2d(32, 32, 5)),
        ("relu3", nn.ReLU()),
        ("pool2", nn.Conv2d(32, 32, 3, stride=2, groups=32)),
        ("relu4", nn.ReLU()),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(32 * 3 * (((width - 4) // 2 - 7) // 2 + 1), 50)),
        ("relu5", nn.ReLU()),
        ("head", nn.Linear(50, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))
