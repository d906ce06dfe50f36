"""Small and real networks that the tests share."""

import torch
import torchvision
from torch import nn


class Residual(nn.Module):
    """Every everyday layer once: residual sum, cat, chunk, a shared ReLU, squeeze-excitation, pooling, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False)
        self.group = nn.GroupNorm(2, 8)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.SiLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid()
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.mean = nn.AvgPool2d(2, ceil_mode=True)
        self.drop = nn.Dropout(0.3)
        self.scale = nn.Parameter(torch.randn(12, 1, 1))
        self.layer_norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.conv(x)))
        y = self.relu(self.group(self.depthwise(x)))
        y = y * self.squeeze(y)
        x = self.pool(x + y)
        a, b = self.up(x).chunk(2, dim=1)
        x = torch.cat([a, torch.tanh(b), a - 2 * b, nn.functional.gelu(b)], 1)
        x = self.drop(self.mean(x * self.scale)).permute(0, 2, 3, 1)
        x = nn.functional.hardswish(self.layer_norm(x))
        return self.head(x.flatten(1, 2).mean(1))


def residual() -> nn.Module:
    return Residual()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 5))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Linear(8, 7),
        nn.ReLU(),
        nn.Linear(7, 5),
    )


SMALL = {"residual": residual, "mlp": mlp, "convnet": convnet}
LARGE = ["resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "densenet121"]


def build(name: str, train: bool, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """The network in float64 with statistics that are not at their start, and an input batch for it."""
    torch.manual_seed(seed)
    small = name in SMALL
    model = (SMALL[name]() if small else torchvision.models.get_model(name, num_classes=11)).double().train(train)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model, torch.randn((4, 2, 6, 6) if small else (4, 3, 64, 64), dtype=torch.double)
