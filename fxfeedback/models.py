"""The published LRM models: AlexNet with 2, 4 or 5 feedback connections, their weights and their preprocessing."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from PIL import Image
from torchvision import transforms as T

from fxfeedback.feedback import Connection, FeedbackModel, add_feedback
from fxfeedback.storage.published import load_lrm_steering

CONNECTIONS = (
    ("classifier.6", "features.8"),
    ("features.9", "features.0"),
    ("classifier.6", "features.10"),
    ("features.12", "features.3"),
    ("classifier.2", "features.6"),
)

_LOGS = "https://s3.us-east-1.wasabisys.com/visionlab-projects/dnn_feedback_dev/logs"

WEIGHTS = {
    "alexnet_lrm1": f"{_LOGS}/set14/set14_alexnet_lrm_cls6to8_9to0_2steps_stepwise/"
    "df5a9767-1046-4d0f-9f82-649c0e5c7881/set14_alexnet_lrm_cls6to8_9to0_2steps_stepwise_final_weights-40b29a3427.pth",
    "alexnet_lrm2": f"{_LOGS}/set15/set15_alexnet_torchvision_imagenet1k_lrm_2back_2steps/"
    "84bdc4f4-1de0-4438-941b-43e574298694/"
    "set15_alexnet_torchvision_imagenet1k_lrm_2back_2steps_final_weights-17b4229a30.pth",
    "alexnet_lrm3": f"{_LOGS}/set15/set15_alexnet_torchvision_imagenet1k_lrm_3back_2steps/"
    "28453e80-c5e5-4d76-bc81-99c5fade39ff/"
    "set15_alexnet_torchvision_imagenet1k_lrm_3back_2steps_final_weights-63ab1b3b06.pth",
}
"""Model name -> URL of its published ImageNet weights; the file's name ends in its SHA-256's first ten digits."""

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in 0..1


def alexnet_lrm1(
    weights: str | os.PathLike[str] | None = None, passes: int = 2, *, unsafe_without_hash: bool = False
) -> FeedbackModel:
    """AlexNet with two feedback connections: from the output to conv 4, from conv 4 to conv 1.

    Args:
        weights: a checkpoint's path or URL, as `load_lrm_steering` takes them (`WEIGHTS` has the published ones); None:
            random.
        passes: how many passes a call makes by default.
        unsafe_without_hash: accept a URL whose file name has no hash.

    Returns:
        A model, in training mode: images (B, 3, H, W) -> a list of logits (B, 1000), one per pass.

    Raises:
        CheckpointError: weights that cannot be read or do not fit.
    """
    return _alexnet(2, weights, passes, unsafe_without_hash)


def alexnet_lrm2(
    weights: str | os.PathLike[str] | None = None, passes: int = 2, *, unsafe_without_hash: bool = False
) -> FeedbackModel:
    """As `alexnet_lrm1`, with two more connections: from the output to conv 5, from the last pool to conv 2."""
    return _alexnet(4, weights, passes, unsafe_without_hash)


def alexnet_lrm3(
    weights: str | os.PathLike[str] | None = None, passes: int = 2, *, unsafe_without_hash: bool = False
) -> FeedbackModel:
    """As `alexnet_lrm2`, with one more connection: from the first hidden linear layer to conv 3."""
    return _alexnet(5, weights, passes, unsafe_without_hash)


def _alexnet(
    n_connections: int, weights: str | os.PathLike[str] | None, passes: int, unsafe_without_hash: bool
) -> FeedbackModel:
    connections = [Connection(*ends, activation="relu") for ends in CONNECTIONS[:n_connections]]
    model = add_feedback(torchvision.models.alexnet(weights=None), connections, passes, input_size=(3, 224, 224))
    if weights is not None:
        load_lrm_steering(model, weights, unsafe_without_hash=unsafe_without_hash)
    return model


def transforms() -> dict[str, Callable[[Any], Any]]:
    """The published preprocessing.

    Returns:
        "train_transform", "val_transform", "test_transform": PIL image, RGB -> normalised tensor (3, 224, 224), for the
        test (3, 256, 256): the whole of a square picture, the centre of any other. "inv_transform": `picture`.
    """
    tensor = [T.ToTensor(), T.Normalize(MEAN, DEVIATION)]
    return {
        "train_transform": T.Compose([T.Resize(256), T.RandomResizedCrop(224), T.RandomHorizontalFlip(), *tensor]),
        "val_transform": T.Compose([T.Resize(256), T.CenterCrop(224), *tensor]),
        "test_transform": T.Compose([T.Resize(256), T.CenterCrop(256), *tensor]),
        "inv_transform": picture,
    }


def picture(image: torch.Tensor) -> Image.Image:
    """The RGB picture of a normalised image (3, H, W), to look at; values outside a picture's range are clipped."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    pixels = image.detach().cpu().float() * deviation + mean
    return T.functional.to_pil_image(pixels.clamp(0, 1).mul(255).round().byte())
