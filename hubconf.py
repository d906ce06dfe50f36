"""torch.hub entry points of the published LRM models, called as the published repository's are.

model, transforms = torch.hub.load("OWNER/fxfeedback", "alexnet_lrm3", pretrained=True, steering=True)
"""

from fxfeedback import models as _models

dependencies = ["torch", "torchvision", "networkx", "safetensors", "tqdm"]


def alexnet_lrm1(pretrained: bool = True, steering: bool = True):
    """AlexNet with two feedback connections; see `alexnet_lrm3`."""
    return _entry("alexnet_lrm1", pretrained)


def alexnet_lrm2(pretrained: bool = True, steering: bool = True):
    """AlexNet with four feedback connections; see `alexnet_lrm3`."""
    return _entry("alexnet_lrm2", pretrained)


def alexnet_lrm3(pretrained: bool = True, steering: bool = True):
    """AlexNet with five feedback connections.

    pretrained: with the published ImageNet weights, downloaded into torch.hub's cache; else with random weights.
    steering: makes no difference, every model can be steered: model(images, steering=[dict(source=..., ...)]).

    Returns (model, transforms): a dict with train_transform, val_transform, test_transform and inv_transform.
    """
    return _entry("alexnet_lrm3", pretrained)


def _entry(name: str, pretrained: bool):
    model = getattr(_models, name)(weights=_models.WEIGHTS[name] if pretrained else None)
    return model, _models.transforms()
