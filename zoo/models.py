"""The models that both tables of the zoo go through: how each is listed, built small, warmed up and called."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models.optical_flow import raft
from torchvision.models.video import mvit

try:
    import timm
except ImportError:
    timm = None


class Problem(Exception):
    """What a rewritten model does wrong."""


BATCH = 2

MAKE_MVIT = mvit._mvit
MAKE_COORDINATES = raft.make_coords_grid

SIZES: dict[str, tuple[int, ...]] = {
    "inception": (3, 299, 299),
    "maxvit_t": (3, 224, 224),
    "s3d": (3, 16, 224, 224),
    "ssd300_vgg16": (3, 300, 300),
    "ssdlite320_mobilenet_v3_large": (3, 320, 320),
    "video": (3, 8, 64, 64),
    "optical_flow": (3, 128, 128),
}
"""The smallest legal input by model, or by the part of torchvision that has the model; elsewhere 64 by 64."""

TIMM: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"img_size": 64},
    "cait_xxs24_224": {"img_size": 64},
    "coat_lite_tiny": {"img_size": 64},
    "convmixer_768_32": {},
    "convnext_atto": {},
    "davit_tiny": {},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "ecaresnet26t": {},
    "edgenext_xx_small": {},
    "efficientnet_b0": {},
    "focalnet_tiny_srf": {},
    "ghostnet_050": {},
    "gmlp_ti16_224": {"img_size": 64},
    "hrnet_w18_small": {},
    "levit_128s": {"img_size": 64},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64},
    "mixer_s32_224": {"img_size": 64},
    "mobileone_s0": {},
    "mobilenetv3_small_100": {},
    "mobilevit_xxs": {},
    "nf_regnet_b0": {},
    "poolformer_s12": {},
    "pvt_v2_b0": {},
    "regnety_002": {},
    "repvit_m0_9": {},
    "res2net50_14w_8s": {},
    "resmlp_12_224": {"img_size": 64},
    "resnet10t": {},
    "skresnet18": {},
    "starnet_s1": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64},
    "twins_svt_small": {"img_size": 64},
    "vit_tiny_patch16_224": {"img_size": 64},
    "volo_d1_224": {"img_size": 64},
    "xcit_nano_12_p16_224": {"img_size": 64},
}
"""Small timm models of many families, with what makes them take 64 by 64."""

SHORTENED = {"vit_h_14": ("encoder.layers", 16), "regnet_y_128gf": ("trunk_output.block3", 6)}
"""The models that would take more than ten gigabytes: their longest row of blocks, and how many of these are tried."""

PARTS = {"detection": "backbone", "optical_flow": "feature_encoder"}
"""What is rewritten of the models that torch.fx cannot trace whole."""


def models() -> Iterator[tuple[str, str]]:
    """(name, part of torchvision) of every model but the quantized ones."""
    for name in torchvision.models.list_models():
        kind = torchvision.models.get_model_builder(name).__module__.split(".")[2]
        if kind != "quantization":
            yield name, kind


def more_models() -> Iterator[tuple[str, str]]:
    """(name, kind) of models from elsewhere: timm's, where it is installed, and two of odd design."""
    if timm is not None:
        yield from ((f"timm/{name}", "timm") for name in TIMM)
    yield from ((name, "odd") for name in ODD)


def size_of(name: str, kind: str) -> tuple[int, ...]:
    """The size of one input, as small as the model takes it."""
    if kind == "vision_transformer":  # two by two patches
        return 3, *2 * (2 * int(name.rpartition("_")[2]),)
    return SIZES.get(name, SIZES.get(kind, (3, 64, 64)))


def build(name: str, kind: str) -> nn.Module:
    """The model, at its smallest, with random weights."""
    if kind == "timm":
        return without_zeros(
            timm.create_model(name.removeprefix("timm/"), pretrained=False, **TIMM[name.removeprefix("timm/")])
        )
    if kind == "odd":
        return without_zeros(ODD[name]())
    size = size_of(name, kind)
    options: dict[str, Any] = {}
    if kind in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if kind == "detection":  # a few detections, however unsure they are, in images of their own size
        few = {"score_thresh": 0.0, "detections_per_img": 5}
        if "rcnn" in name:
            few = {f"box_{option}": value for option, value in few.items()}
            few |= {"rpn_post_nms_top_n_train": 10, "rpn_post_nms_top_n_test": 10}
        options |= few if name.startswith("ssd") else {**few, "min_size": size[-1], "max_size": size[-1]}
    if kind in ("googlenet", "inception", "vgg"):
        options["init_weights"] = False  # torch's own initial values will do, and are there sooner
    if kind == "vision_transformer":
        options["image_size"] = size[-1]
    # MViT's builders would fix 16 frames of 224 by 224, which take 10 GiB.
    small = {"temporal_size": size[-3], "spatial_size": size[-2:]}
    with mock.patch.object(mvit, "_mvit", lambda **given: MAKE_MVIT(**given | small)):
        return without_zeros(torchvision.models.get_model(name, weights=None, **options))


def shorten(model: nn.Module, path: str, blocks: int) -> str:
    """Leave only the first `blocks` in the sequence at `path`; returns what there is, in words."""
    sequence = model.get_submodule(path)
    model.set_submodule(path, nn.Sequential(OrderedDict(list(sequence.named_children())[:blocks])))
    return f"{blocks} of {len(sequence)} {path}: "


def without_zeros(model: nn.Module) -> nn.Module:
    """The model, with small random values for parameters that start at zero, which would say nothing."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def input_of(name: str, kind: str) -> torch.Tensor:
    """A random input of the model, or of its part that is rewritten."""
    return torch.randn(BATCH, *size_of(name, kind))


def warm_up(model: nn.Module, x: torch.Tensor) -> None:
    """Give batch norms this batch's statistics: with their initial ones a deep network returns its biases only."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def call_whole(model: nn.Module, kind: str, x: torch.Tensor) -> Any:
    """The call of a model that cannot be traced whole, as its users write it; in training mode its losses."""
    if kind == "optical_flow":
        # Its coordinates would be float32 whatever the model is.
        with mock.patch.object(raft, "make_coords_grid", lambda *size: MAKE_COORDINATES(*size).to(x)):
            flows = model(x, x.roll(3, -1), num_flow_updates=2)
        return {f"flow {i}": (flow - 3).abs().mean() for i, flow in enumerate(flows)} if model.training else flows
    images = list(x.sigmoid())
    if not model.training:
        return model(images)
    edge = x.shape[-1]
    masks = torch.zeros(1, edge, edge, dtype=torch.uint8)
    masks[:, edge // 4 : edge // 2, edge // 4 : edge // 2] = 1
    target = {
        "boxes": torch.tensor([[edge / 8, edge / 8, 7 * edge / 8, 7 * edge / 8]]),
        "labels": torch.tensor([1]),
        "masks": masks,
        "keypoints": torch.full((1, 17, 3), edge / 2, dtype=torch.float32),
    }
    return model(images, [target] * len(images))


def statistics_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the model's buffers."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def restore(model: nn.Module, statistics: dict[str, torch.Tensor]) -> None:
    """Put the buffers back."""
    for name, buffer in model.named_buffers():
        buffer.copy_(statistics[name])


def leaves(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's output."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [leaf for part in (output.values() if isinstance(output, dict) else output) for leaf in leaves(part)]


# -- two models of odd design ------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """One block, four times on its own output, with a state per step; weights that are computed; a learned median.

    Weight normalization, channel attention by einsum, gated linear units, a table of step embeddings, pixel shuffle,
    log-sum-exp pooling, running sums, a dict of outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = parametrizations.weight_norm(nn.Conv2d(3, 12, 3, 2, 1))
        self.block = nn.Conv2d(24, 24, 3, padding=1, groups=4, padding_mode="reflect")
        self.steps = nn.Embedding(4, 12)
        self.norm = nn.InstanceNorm2d(12, affine=True)
        self.slope = nn.PReLU(12)
        self.mix = nn.Parameter(torch.randn(12, 12) / 4)
        self.up = nn.PixelShuffle(2)
        self.heads = nn.ModuleDict({"fine": nn.Conv2d(3, 5, 1), "out": nn.Linear(12, 10)})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = state = self.slope(self.stem(x))
        seen = []
        for step in range(4):
            y = F.glu(self.block(torch.cat([x, state], 1)), dim=1)
            y = self.norm(y) * (1 + self.steps.weight[step, :, None, None])
            affinity = torch.einsum("bchw,bdhw->bcd", y, x).softmax(-1)
            x = x + F.leaky_relu(torch.einsum("bcd,de,behw->bchw", affinity, self.mix, y), 0.1)
            state = torch.where(y > state, y, 0.5 * state + 0.5 * torch.roll(y, 1, 3))
            seen.append(torch.logsumexp(x.flatten(2), -1))
        steps = torch.stack(seen, 1).cumsum(1)
        pooled = F.silu(steps[:, ::2].mean(1) + steps.median(1).values)
        return {"out": self.heads["out"](pooled), "fine": self.heads["fine"](self.up(x))}


class Experts(nn.Module):
    """Every input's own convolution, from a mixture of experts that a tensor of weights holds; two inputs in one.

    A hypernetwork that scales and shifts, attention of a few learned queries over the map, complex arithmetic by
    halves, sorting, a triangle of pairwise products, a maximum over positions; heads tied to a table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GroupNorm(2, 8), nn.Mish())
        self.gate = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.Softmax(-1))
        self.experts = nn.Parameter(torch.randn(4, 8, 8, 3, 3) / 8)
        self.film = nn.Sequential(nn.Linear(8, 16), nn.ELU(), nn.Linear(16, 16))
        self.queries = nn.Parameter(torch.randn(1, 3, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = nn.Parameter(torch.randn(10, 24) / 4)
        self.last = nn.Sequential(nn.LazyLinear(24), nn.Softplus(), nn.Dropout(0.2))
        self.last(torch.zeros(1, 24 + 28 + 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        batch, _, height, width = x.shape
        weight = torch.einsum("be,eoikl->boikl", self.gate(x), self.experts)
        y = F.conv2d(x.reshape(1, batch * 8, height, width), weight.flatten(0, 1), padding=1, groups=batch)
        y = F.hardswish(y.reshape(batch, 8, height, width))
        scale, shift = self.film(y.amax((2, 3))).chunk(2, 1)
        y = y * torch.sigmoid(scale)[..., None, None] + shift[..., None, None]
        tokens, _ = self.attention(self.queries.expand(batch, -1, -1), *2 * [y.flatten(2).mT], need_weights=False)
        a, b = tokens.mean(1).chunk(2, -1)
        turned = torch.cat([a * a - b * b, 2 * a * b], -1)
        rows, columns = torch.triu_indices(8, 8, 1)
        pairs = (turned[:, rows] * turned[:, columns]).flatten(1)
        ranked, _ = torch.sort(y.std((2, 3)), dim=1, descending=True)
        features = torch.cat([tokens.flatten(1), pairs, ranked, torch.stack([a, b], -1).flatten(1)], 1)
        return F.linear(self.last(features), F.normalize(self.table, dim=1)) * 3.0


ODD = {"odd/recurrent": Recurrent, "odd/experts": Experts}
