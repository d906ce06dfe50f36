"""Classifiers by name: torchvision's, timm's, with or without their published weights."""

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torchvision
from torch import nn

from fxfeedback.models import DEVIATION, MEAN
from jobs import UserError


@dataclass(frozen=True)
class Backbone:
    """A classifier, and what to know about its weights."""

    net: nn.Module
    fresh: frozenset[str] = frozenset()  # with --pretrained: parameters that the published weights have not filled
    mean: Sequence[float] = MEAN  # of the pixels, in 0..1, that the network expects to be normalised
    deviation: Sequence[float] = DEVIATION


def build_backbone(name: str, n_classes: int, side: int, pretrained: bool) -> Backbone:
    """The classifier called `name` (a torchvision name, or timm:NAME) for images of `side` by `side` pixels.

    Raises `UserError`, naming the nearest names, when there is no such classifier, and when its weights cannot be had.
    """
    if name.startswith("timm:"):
        return timm_backbone(name.removeprefix("timm:"), n_classes, side, pretrained)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(f"unknown model {name!r}: no torchvision classifier, nor timm:NAME{nearest(name, known)}")
    options: dict[str, Any] = {"num_classes": n_classes}
    if name in ("googlenet", "inception_v3"):  # one output, not three; their weights expect another normalisation
        options |= {"aux_logits": False, "init_weights": False, "transform_input": pretrained}
    elif name.startswith("vit_"):
        options["image_size"] = side
    elif name.startswith("maxvit"):
        options["input_size"] = (side, side)
    try:
        net = torchvision.models.get_model(name, weights=None, **options)
    except (AssertionError, ValueError) as error:
        raise UserError(f"{name} cannot be built for --image-size {side}: {error}") from error
    return Backbone(net, frozenset(load_published(net, name)) if pretrained else frozenset())


def load_published(net: nn.Module, name: str) -> list[str]:
    """Fill `net` with torchvision's default weights, all but a prediction head for another number of classes.

    Returns the names of that head's parameters. Raises `UserError` when the weights cannot be fetched or do not fit.
    """
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        published = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (AttributeError, OSError, RuntimeError) as error:
        raise UserError(f"cannot fetch torchvision's weights of {name}: {error}") from error
    # what is norm1 in DenseNet is norm.1 in its published weights
    named = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key): value for key, value in published.items()}
    own = net.state_dict()
    fitting = OrderedDict((k, value) for k, value in named.items() if k in own and value.shape == own[k].shape)
    fitting._metadata = getattr(published, "_metadata", None)  # MNASNet asks it for the weights' version
    missing = [key for key in own if key not in fitting]
    heads = {key.rpartition(".")[0] for key in missing}
    if len(heads) > 1 or not all(isinstance(net.get_submodule(head), (nn.Linear, nn.Conv2d)) for head in heads):
        raise UserError(f"torchvision's weights of {name} do not fit at this --image-size: {', '.join(sorted(heads))}")
    net.load_state_dict(fitting, strict=False)
    return missing


def timm_backbone(name: str, n_classes: int, side: int, pretrained: bool) -> Backbone:
    """timm's classifier `name`; as `build_backbone`."""
    try:
        import timm
    except ImportError as error:
        raise UserError("--model timm:NAME needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise UserError(f"unknown model {name!r}: timm has none of this name{nearest(name, timm.list_models())}")
    published = timm.models.get_pretrained_cfg(name)
    size = {"img_size": side} if published is not None and published.fixed_input_size else {}
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=n_classes, **size)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"timm cannot build {name} for --image-size {side}: {error}") from error
    if not pretrained:
        return Backbone(net)
    heads = published.classifier if isinstance(published.classifier, (tuple, list)) else [published.classifier]
    new = [f"{head}." for head in heads] if n_classes != published.num_classes else []
    fresh = frozenset(key for key, _ in net.named_parameters() if key.startswith(tuple(new)))
    return Backbone(net, fresh, published.mean, published.std)


def nearest(name: str, known: Sequence[str]) -> str:
    """'; did you mean ...?' with the names nearest to `name`, or nothing."""
    close = get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(close)}?" if close else ""
