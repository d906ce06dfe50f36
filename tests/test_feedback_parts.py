"""Models that torch.fx cannot trace whole: a part that has all the connections is rewritten, in a copy."""

import pytest
import torch
import torchvision
from torch import nn

import fxfeedback
import networks
from marks import long
from networks import convnet


class Outer(nn.Module):
    """Its own call looks at values; its backbone does not."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"backbone": convnet()})
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        y = self.parts["backbone"](x)
        return self.head(y) * scale if y.sum() > -1e9 else y


def test_a_part_is_rewritten_in_a_copy():
    model = Outer().double().eval()
    x = torch.randn(3, 2, 6, 6, dtype=torch.double)
    expected = model(x)
    connections = [("parts.backbone.8", "parts.backbone.0"), ("parts.backbone.10", "parts.backbone.4")]
    rewritten = fxfeedback.add_feedback(model, connections, input_size=(2, 6, 6))
    assert type(rewritten) is Outer and type(model.parts["backbone"]) is nn.Sequential
    assert torch.equal(model(x), expected)
    backbone = rewritten.parts["backbone"]
    assert isinstance(backbone, fxfeedback.FeedbackModel)
    assert torch.equal(backbone(x, passes=1), model.parts["backbone"](x))
    second = fxfeedback.add_feedback(model.parts["backbone"], [("8", "0"), ("10", "4")], input_size=(2, 6, 6))
    second.modulations.load_state_dict(backbone.modulations.state_dict())
    assert torch.equal(rewritten(x, scale=2.0), model.head(second(x)[1]) * 2.0)
    rewritten(x).sum().backward()
    assert all(p.grad is not None for p in rewritten.parameters())
    assert model.head.weight.grad is not None  # the parameters are shared


@pytest.mark.parametrize("name", ["small", long("fasterrcnn_resnet50_fpn")])
def test_a_detector_keeps_its_call_and_its_losses(name):
    sizes = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 64}
    model = networks.detector() if name == "small" else torchvision.models.get_model(name, **sizes)
    connection = ("backbone.2", "backbone.0")
    if name != "small":
        connection = ("backbone.body.layer4", "backbone.body.layer2.0.conv1")
    detector = fxfeedback.add_feedback(model, [connection]).train()
    images = [torch.rand(3, 64, 64)] * 2
    targets = [{"boxes": torch.tensor([[10.0, 10.0, 50.0, 50.0]]), "labels": torch.tensor([1])}] * 2
    losses = detector(images, targets)
    assert set(losses) == set(model.train()(images, targets))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.backbone.modulations.parameters())
    assert set(detector.eval()(images)[0]) == {"boxes", "labels", "scores"}


def test_connections_across_parts_cannot_be_rewritten():
    with pytest.raises(fxfeedback.errors.TraceError, match=r"cannot trace Outer.*inside one part of the model"):
        fxfeedback.add_feedback(Outer(), [("head", "parts.backbone.0")], input_size=(2, 6, 6))
