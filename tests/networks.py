"""Small and real networks that the tests share."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torchvision
from torch import nn
from torchvision.models import detection, video
from torchvision.models import swin_transformer as swin
from torchvision.ops import MultiScaleRoIAlign

import fxfeedback


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


class Outputs(NamedTuple):
    """What `Auxiliary` returns in training mode."""

    logits: torch.Tensor
    aux: torch.Tensor


class Auxiliary(nn.Module):
    """With an auxiliary head in training mode, as GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.second = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3)
        self.aux, self.drop, self.fc = nn.Linear(6, 5), nn.Dropout(0.4), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor | Outputs:
        x = torch.relu(self.norm(self.conv(x)))
        aux = self.aux(x.mean((2, 3))) if self.training else None
        logits = self.fc(self.drop(torch.relu(self.second(x)).mean((2, 3))))
        return logits if aux is None else Outputs(logits, aux)


def detector() -> nn.Module:
    """torchvision's Faster R-CNN with a backbone of two layers, for images of 32 x 32."""
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU())
    backbone.out_channels = 8
    return detection.FasterRCNN(
        backbone,
        min_size=32,
        max_size=32,
        rpn_anchor_generator=detection.rpn.AnchorGenerator(((16,),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 2, 2),
        box_head=detection.faster_rcnn.TwoMLPHead(32, 16),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(16, 2),
    )


class Scaled(nn.Module):
    """One of its inputs is a number: it has no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)) * scale)


class Recurrent(nn.Module):
    """Steps through positions, with torch's modules, and from a state that is made for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.places = nn.Conv2d(2, 4, 3, padding=1), nn.Embedding(50, 4)
        self.cell, self.lstm = nn.GRUCell(4, 4), nn.LSTM(4, 6, batch_first=True, bidirectional=True, proj_size=3)
        self.head = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = nn.functional.relu(self.conv(x)).flatten(2).transpose(1, 2)
        tokens = tokens + self.places(torch.arange(tokens.shape[1], device=x.device))
        state = torch.zeros((x.shape[0], 4), dtype=x.dtype, device=x.device)
        for i in range(3):
            state = self.cell(tokens[:, i], state)
        y, _ = self.lstm(tokens[:, ::6])
        y = torch.cat([state, y.mean(1)], 1) * torch.ones(x.shape[0], 1, dtype=x.dtype, device=x.device)
        return self.head(y)[torch.arange(x.size(0), device=x.device)]


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


def feedback() -> nn.Module:
    """A network of passes: what one rewriting makes, another rewrites."""
    return fxfeedback.add_feedback(convnet(), [("8", "4"), ("5", "1"), ("3", "9")], passes=3, input_size=(2, 6, 6))


class Attention(nn.Module):
    """torch's own attention in its forms: masks, keys of another width, weights, either order of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True, norm_first=True)
        self.cross = nn.MultiheadAttention(6, 3, dropout=0.2, kdim=4, vdim=6, bias=False)
        self.seen = nn.MultiheadAttention(6, 2, batch_first=True)
        self.narrow, self.head = nn.Linear(6, 4), nn.Linear(6, 5)
        self.register_buffer("later", torch.triu(torch.ones(12, 12), 1).bool())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1, 2)  # (batch, 12, 6)
        x = self.layer(x)
        t = x.transpose(0, 1)
        y, weights = self.cross(t[:5], nn.functional.relu(self.narrow(t)), t, attn_mask=self.later[3:8])
        z, _ = self.seen(x, x[:, :5], y.transpose(0, 1), key_padding_mask=x[:, :5, 0] > 1, need_weights=False)
        heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
        z = z + nn.functional.scaled_dot_product_attention(
            heads, heads, heads, dropout_p=0.3 if self.training else 0.0, is_causal=True
        ).transpose(1, 2).flatten(2)
        return self.head(z.mean(1) * weights.square().sum((1, 2))[:, None])


SMALL = {
    "residual": residual,
    "mlp": mlp,
    "convnet": convnet,
    "feedback": feedback,
    "attention": Attention,
    "recurrent": Recurrent,
}
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1, "stochastic_depth_prob": 0.1, "num_classes": 5}
TRANSFORMERS = {
    "vit": (
        lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 12, 0.1, 0.1, num_classes=5),
        (3, 16, 16),
    ),
    "swin": (lambda: swin.SwinTransformer([2, 2], 8, [2, 2], [2, 4], [4, 4], **DROPOUT), (3, 22, 14)),
    "swin_v2": (
        lambda: swin.SwinTransformer(
            [2, 2],
            8,
            [2, 2],
            [2, 4],
            [2, 2],
            block=swin.SwinTransformerBlockV2,
            downsample_layer=swin.PatchMergingV2,
            **DROPOUT,
        ),
        (3, 14, 10),
    ),
    "swin_3d": (
        lambda: video.SwinTransformer3d([2, 2, 2], 8, [2, 2], [2, 4], [2, 3, 3], **DROPOUT),
        (3, 6, 14, 14),
    ),
    "maxvit": (
        lambda: torchvision.models.MaxVit(
            (32, 32), 8, 2, [8, 12], [1, 2], 4, 0.1, mlp_dropout=0.1, attention_dropout=0.1, num_classes=5
        ),
        (3, 32, 32),
    ),
    "mvit": (lambda: mvit(True), (3, 4, 8, 8)),
    "mvit_v1": (lambda: mvit(False), (3, 4, 8, 8)),
}


def mvit(second: bool) -> nn.Module:
    """Two blocks of pooled attention; the second one pools queries, keys and values."""
    blocks = [
        video.mvit.MSBlockConfig(2, 8, 8, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        video.mvit.MSBlockConfig(2, 8, 12, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    return video.MViT(
        (8, 8),
        4,
        blocks,
        residual_pool=second,
        residual_with_cls_embed=not second,
        rel_pos_embed=second,
        proj_after_attn=second,
        attention_dropout=0.1,
        stochastic_depth_prob=0.1,
        num_classes=5,
    )


LARGE = ["resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "densenet121"]
SIZES = {"vit_b_16": (3, 224, 224)}
"""Of networks that take no other."""


def build(name: str, train: bool, seed: int = 0, others: Mapping = {}) -> tuple[nn.Module, torch.Tensor]:
    """The network in float64 with statistics that are not at their start, and an input batch for it."""
    torch.manual_seed(seed)
    if name in others:  # a test's own networks for maps of 2 x 6 x 6
        make, size = others[name], (2, 6, 6)
    elif name in TRANSFORMERS:
        make, size = TRANSFORMERS[name]
    elif name in SMALL:
        make, size = SMALL[name], (2, 6, 6)
    else:
        make, size = (lambda: torchvision.models.get_model(name, num_classes=11)), SIZES.get(name, (3, 64, 64))
    model = make().double().train(train)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    for parameter in model.parameters():
        if not parameter.any():  # a head or a table that starts at zero would hide what is behind it
            nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(4, *size, dtype=torch.double)
