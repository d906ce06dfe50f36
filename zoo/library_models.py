"""Small models of other libraries, built without downloads.

Hugging Face, kornia, segmentation_models_pytorch, open_clip, CORnets as published, torch's own transformers, and a
model of each of timm's modules.
"""

import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

SIZE = (3, 64, 64)


class Model(NamedTuple):
    """make: builds it; size: of one image."""

    make: Callable[[], nn.Module]
    size: tuple[int, ...] = SIZE


def every_model() -> Iterator[tuple[str, Model]]:
    """(name, model) of the libraries that are installed."""
    sources = {
        "transformers": hugging_face,
        "kornia": kornia,
        "segmentation_models_pytorch": segmentation,
        "open_clip": open_clip,
        "torch": of_torch,
        "timm": of_timm,
    }
    for library, models in sources.items():
        if importlib.util.find_spec(library) is not None:
            yield from models()


# -- Hugging Face ------------------------------------------------------------------------------------------------------


VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}


def hugging_face() -> Iterator[tuple[str, Model]]:
    """Small configurations of many families."""
    mit = {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 24, 32],
        "num_attention_heads": [1, 2, 3, 4],
        "decoder_hidden_size": 16,
    }
    clip = {"projection_dim": 16}
    dpt = {
        "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 16, 16],
        "fusion_hidden_size": 16,
    }
    families: dict[str, dict[str, Any]] = {
        "ViTForImageClassification": VIT,
        "DeiTForImageClassification": VIT,
        "BeitForImageClassification": VIT,
        "Dinov2ForImageClassification": {key: value for key, value in VIT.items() if key != "intermediate_size"},
        "SwinForImageClassification": {
            "image_size": 64,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        "ConvNextForImageClassification": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
        "ResNetForImageClassification": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]},
        "SegformerForImageClassification": mit,
        "SegformerForSemanticSegmentation": mit,
        "MobileViTForImageClassification": {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [4, 8, 8, 12, 16, 20, 24],
            "num_attention_heads": 2,
        },
        "CLIPVisionModel": VIT | clip,
        "SiglipVisionModel": VIT,
        "HieraForImageClassification": {
            "embed_dim": 16,
            "image_size": [64, 64],
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 2],
        },
        "DPTForDepthEstimation": VIT | dpt,
        "CvtForImageClassification": {"embed_dim": [16, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
        "LevitForImageClassification": {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        "FocalNetForImageClassification": {
            "image_size": 64,
            "embed_dim": 16,
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "hidden_sizes": [16, 32],
        },
        "ViTMAEModel": VIT,
    }
    for name, options in families.items():
        yield f"transformers/{name}", Model(lambda name=name, options=options: _hugging_face(name, options))


def _hugging_face(name: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    family = getattr(transformers, name)
    config = family.config_class(**options)
    model = family(config)
    if name.startswith("ViTMAE"):
        return Masked(model)
    if name.startswith("DPT"):  # its output ends in a ReLU, which at a random start may be zero everywhere
        nn.init.constant_(model.head.head[-2].bias, 1.0)
    return model


class Masked(nn.Module):
    """A masked autoencoder's encoder, whose order of patches is given, not drawn."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("noise", torch.rand(1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, noise=self.noise.expand(x.shape[0], -1)).last_hidden_state


# -- kornia, segmentation, open_clip -----------------------------------------------------------------------------------


class Fronted(nn.Module):
    """A classifier behind a layer on images."""

    def __init__(self, front: nn.Module) -> None:
        super().__init__()
        channels = front(torch.rand(1, *SIZE)).flatten(1, -3).shape[1]
        self.front, self.conv, self.fc = front, nn.Conv2d(channels, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(self.front(x.sigmoid()).flatten(1, -3)).relu().mean((2, 3)))


def kornia() -> Iterator[tuple[str, Model]]:
    """Normalisation, blurs, edges, colour, and pooling with a blur."""
    half = torch.full((3,), 0.5)
    layers: dict[str, tuple[Any, ...]] = {
        "enhance.Normalize": (half, half),
        "enhance.Denormalize": (half, half),
        "filters.GaussianBlur2d": ((3, 3), (1.0, 1.0)),
        "filters.BoxBlur": ((3, 3),),
        "filters.MedianBlur": ((3, 3),),
        "filters.MotionBlur": (3, 35.0, 0.5),
        "filters.UnsharpMask": ((3, 3), (1.0, 1.0)),
        "filters.Laplacian": (3,),
        "filters.Sobel": (),
        "filters.SpatialGradient": (),
        "filters.BlurPool2D": (3,),
        "filters.MaxBlurPool2D": (3,),
        "color.RgbToHsv": (),
        "color.HsvToRgb": (),
        "color.RgbToLab": (),
        "color.RgbToYcbcr": (),
        "color.RgbToXyz": (),
    }
    for name, options in layers.items():
        yield f"kornia/{name}", Model(lambda name=name, options=options: Fronted(_kornia(name, options)))


def _kornia(name: str, options: tuple[Any, ...]) -> nn.Module:
    module, _, layer = name.partition(".")
    return getattr(importlib.import_module(f"kornia.{module}"), layer)(*options)


def segmentation() -> Iterator[tuple[str, Model]]:
    """Every decoder of segmentation_models_pytorch, with a small encoder."""
    sizes = {"PAN": (3, 128, 128), "DPT": (3, 224, 224)}
    names = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer DPT"
    for name in names.split():
        yield f"segmentation/{name}", Model(lambda name=name: _segmentation(name), sizes.get(name, SIZE))


def _segmentation(name: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    encoder = "tu-vit_tiny_patch16_224" if name == "DPT" else "resnet18"
    return getattr(smp, name)(encoder_name=encoder, encoder_weights=None, classes=3)


def open_clip() -> Iterator[tuple[str, Model]]:
    """The image towers: a transformer, a residual network, and one of timm's."""
    towers = {
        "transformer": {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32},
        "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
    }
    for name, options in towers.items():
        yield f"open_clip/{name}", Model(lambda options=options: _tower(options))


def _tower(options: dict[str, Any]) -> nn.Module:
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    return _build_vision_tower(embed_dim=32, vision_cfg=CLIPVisionCfg(**options))


# -- CORnets and torch's transformers ----------------------------------------------------------------------------------


class BlockZ(nn.Module):
    """CORnet-Z's: a convolution, ReLU, and pooling."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        self.nonlin, self.pool, self.output = nn.ReLU(True), nn.MaxPool2d(3, 2, 1), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.pool(self.nonlin(self.conv(x))))


class BlockRT(nn.Module):
    """CORnet-RT's: its state of the step before is added to its input; without an input, zeros come in."""

    def __init__(self, inputs: int, outputs: int, out_size: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.out_channels, self.out_size = outputs, out_size
        self.conv_input = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        self.norm_input, self.nonlin_input = nn.GroupNorm(8, outputs), nn.ReLU(True)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.nonlin1, self.output = nn.GroupNorm(8, outputs), nn.ReLU(True), nn.Identity()

    def forward(
        self, inp: torch.Tensor | None = None, state: torch.Tensor | None = None, batch_size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if inp is None:
            zeros = torch.zeros([batch_size, self.out_channels, self.out_size, self.out_size])
            inp = zeros.to(self.conv_input.weight)
        else:
            inp = self.nonlin_input(self.norm_input(self.conv_input(inp)))
        skip = inp + (0 if state is None else state)
        x = self.nonlin1(self.norm1(self.conv1(skip)))
        state = self.output(x)
        return state, state


class CORnetRT(nn.Module):
    """All areas in each of five steps, each fed by the one below at the step before."""

    def __init__(self, times: int = 5) -> None:
        super().__init__()
        self.times = times
        self.V1 = BlockRT(3, 16, 16, 7, 4)
        self.V2, self.V4, self.IT = BlockRT(16, 16, 8, 3, 2), BlockRT(16, 24, 4, 3, 2), BlockRT(24, 32, 2, 3, 2)
        self.decoder = _decoder(32)

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        outputs, states = {"inp": inp}, {}
        blocks = ["inp", "V1", "V2", "V4", "IT"]
        for block in blocks[1:]:
            this = outputs["inp"] if block == "V1" else None
            new_output, new_state = getattr(self, block)(this, batch_size=outputs["inp"].shape[0])
            outputs[block], states[block] = new_output, new_state
        for _ in range(1, self.times):
            new_outputs = {"inp": inp}
            for block, before in zip(blocks[1:], blocks[:-1], strict=True):
                new_outputs[block], states[block] = getattr(self, block)(outputs[before], states[block])
            outputs = new_outputs
        return self.decoder(outputs["IT"])


class BlockS(nn.Module):
    """CORnet-S's: one set of convolutions for all times, norms of their own for each, a stride at the first only."""

    scale = 4

    def __init__(self, inputs: int, outputs: int, times: int = 1) -> None:
        super().__init__()
        self.times = times
        self.conv_input = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.skip = nn.Conv2d(outputs, outputs, 1, 2, bias=False)
        self.norm_skip = nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(outputs, outputs * self.scale, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs * self.scale, outputs * self.scale, 3, 2, 1, bias=False)
        self.conv3 = nn.Conv2d(outputs * self.scale, outputs, 1, bias=False)
        self.nonlin1, self.nonlin2, self.nonlin3 = nn.ReLU(True), nn.ReLU(True), nn.ReLU(True)
        self.output = nn.Identity()
        for t in range(times):
            for i in (1, 2):
                setattr(self, f"norm{i}_{t}", nn.BatchNorm2d(outputs * self.scale))
            setattr(self, f"norm3_{t}", nn.BatchNorm2d(outputs))

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        x = self.conv_input(inp)
        for t in range(self.times):
            if t == 0:
                skip, self.conv2.stride = self.norm_skip(self.skip(x)), (2, 2)
            else:
                skip, self.conv2.stride = x, (1, 1)
            for i in (1, 2, 3):
                x = getattr(self, f"norm{i}_{t}")(getattr(self, f"conv{i}")(x))
                if i == 3:
                    x += skip
                x = getattr(self, f"nonlin{i}")(x)
        return self.output(x)


def _decoder(channels: int) -> nn.Sequential:
    steps = {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(channels, 10)}
    return nn.Sequential(OrderedDict(steps))


def _cornet_z() -> nn.Module:
    areas = {
        "V1": BlockZ(3, 16, 7, 2),
        "V2": BlockZ(16, 16),
        "V4": BlockZ(16, 24),
        "IT": BlockZ(24, 32),
        "decoder": _decoder(32),
    }
    return nn.Sequential(OrderedDict(areas))


def _cornet_s() -> nn.Module:
    stem = [nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)]
    areas = {"V2": BlockS(16, 16, 2), "V4": BlockS(16, 24, 4), "IT": BlockS(24, 32, 2), "decoder": _decoder(32)}
    return nn.Sequential(OrderedDict({"V1": nn.Sequential(*stem)} | areas))


class Encoder(nn.Module):
    """A transformer over patches, each of which sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 16, 16), nn.Linear(16, 10)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).mT, mask=self.mask).mean(1))


class Decoder(nn.Module):
    """Learned queries that attend to patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 16, 16), nn.Linear(16, 10)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 2)
        self.queries = nn.Parameter(torch.randn(1, 4, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries = self.queries.expand(x.shape[0], -1, -1)
        return self.head(self.decoder(queries, self.patches(x).flatten(2).mT).mean(1))


def of_torch() -> Iterator[tuple[str, Model]]:
    """Networks of torch's own layers."""
    models = {"CORnet-Z": _cornet_z, "CORnet-RT": CORnetRT, "CORnet-S": _cornet_s}
    transformers = {"torch/TransformerEncoder": Encoder, "torch/TransformerDecoder": Decoder}
    yield from ((name, Model(make)) for name, make in (models | transformers).items())


# -- timm --------------------------------------------------------------------------------------------------------------


TIMM = [
    "cpubone_nano",
    "crossvit_tiny_240",
    "cs3darknet_focus_s",
    "csatv2",
    "cspnext_tiny",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "efficientvim_m1",
    "efficientvit_b0",
    "ese_vovnet19b_dw",
    "fasternet_t0",
    "fastvit_t8",
    "hardcorenas_b",
    "hgnetv2_b0",
    "iformer_t",
    "inception_next_atto",
    "lcnetv2_small",
    "legacy_seresnet18",
    "legacy_xception",
    "lowformer_b0",
    "mobilenetv5_base",
    "nasnetalarge",
    "nextvit_small",
    "pnasnet5large",
    "rdnet_tiny",
    "repghostnet_050",
    "resnest14d",
    "resnetv2_18",
    "rexnet_100",
    "sam2_hiera_tiny",
    "selecsls42",
    "shvit_s1",
    "test_mambaout",
    "tiny_vit_5m_224",
    "tresnet_m",
    "vgg11",
    "xception41",
]
"""Of each of timm's modules that has no row in zoo/models.py a small model, which takes images of 64 by 64."""

MADE_FOR_64 = [
    "convit_tiny",
    "efficientformerv2_s0",
    "efficientvit_m0",
    "gcvit_xxtiny",
    "gemma4_vit_167m",
    "hiera_tiny_224",
    "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap",
    "nest_tiny",
    "pit_ti_224",
    "qwen3_vit_88m",
    "sequencer2d_s",
    "swiftformer_xs",
    "swinv2_cr_tiny_224",
    "swinv2_tiny_window8_256",
    "tnt_s_legacy_patch16_224",
    "visformer_tiny",
    "vit_relpos_small_patch16_224",
    "vit_tiny_patch16_dinov3_qkvb",
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
]
"""Those that take other sizes when told so."""

LARGER = {
    "deepseek_vit_412m": 224,
    "efficientformer_l1": 224,
    "halonet_h1": 256,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
}
"""Those that need a larger image."""


def of_timm() -> Iterator[tuple[str, Model]]:
    """A small model of every module."""
    import timm

    for name in sorted([*TIMM, *MADE_FOR_64, *LARGER]):
        options = {"img_size": 64} if name in MADE_FOR_64 else {}
        size = (3, *2 * (LARGER.get(name, 64),))
        yield f"timm/{name}", Model(lambda name=name, options=options: timm.create_model(name, **options), size)
