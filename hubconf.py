"""torch.hub entry points of the published LRM models and classes, called as the published repository's are.

model, transforms = torch.hub.load("OWNER/fxfeedback", "alexnet_lrm3", pretrained=True, steering=True)
LRMNet = torch.hub.load("OWNER/fxfeedback", "LRMNet")
"""

import torchvision as _torchvision

import fxfeedback as _fxfeedback

dependencies = ["torch", "torchvision", "networkx", "safetensors", "tqdm"]


def LRMNet():
    """The class: LRMNet(backbone, mod_connections, forward_passes=2, img_size=224)."""
    return _fxfeedback.lrm_steering.LRMNet


def SteerableLRM():
    """The class, whose call takes steering_signals; so does `LRMNet`'s."""
    return _fxfeedback.lrm_steering.SteerableLRM


def alexnet_lrm1(pretrained: bool = True, steering: bool = True):
    """AlexNet with two feedback connections; see `alexnet_lrm3`."""
    return _entry("alexnet_lrm1", 2, pretrained, steering)


def alexnet_lrm2(pretrained: bool = True, steering: bool = True):
    """AlexNet with four feedback connections; see `alexnet_lrm3`."""
    return _entry("alexnet_lrm2", 4, pretrained, steering)


def alexnet_lrm3(pretrained: bool = True, steering: bool = True):
    """AlexNet with five feedback connections.

    pretrained: with the published ImageNet weights, downloaded into torch.hub's cache; else with random weights.
    steering: a `SteerableLRM`, or an `LRMNet`; both can be steered, model(images, steering_signals=[dict(...)]).

    Returns (model, transforms): a dict with train_transform, val_transform, test_transform and inv_transform.
    """
    return _entry("alexnet_lrm3", 5, pretrained, steering)


def _entry(name: str, n_connections: int, pretrained: bool, steering: bool):
    models = _fxfeedback.models
    ends = [{"source": source, "destination": to} for source, to in models.CONNECTIONS[:n_connections]]
    made_of = SteerableLRM() if steering else LRMNet()
    model = made_of(_torchvision.models.alexnet(weights=None), ends)
    if pretrained:
        _fxfeedback.load_lrm_steering(model, models.WEIGHTS[name])
    return model, models.transforms()
