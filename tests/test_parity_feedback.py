"""The published feedback weights (BioTorch), as recorded in tests/parity: gradients and metrics agree to 1e-9."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfeedback

PARITY = Path(__file__).parent / "parity"
sys.path += [str(PARITY)]

from fill import fill, fill_input  # noqa: E402

CASES = {path.stem: json.loads(path.read_text()) for path in sorted(PARITY.glob("feedback_*.json"))}
VARIANTS = [(name, variant["name"]) for name, case in CASES.items() for variant in case["variants"]]
OPTIONS = {
    "fa": {"weights": "separate", "td_learning": "fixed"},
    "usf": {"weights": "sign"},
    "brsf": {"weights": "sign", "td_magnitude": "batch"},
    "frsf": {"weights": "sign", "td_magnitude": "fixed"},
    "dfa": {"weights": "direct"},
}


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.fc1, self.fc2 = nn.Linear(192, 20), nn.Linear(20, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        return self.fc2(self.fc1(F.relu(self.conv2(x)).flatten(1)))


ARCHITECTURES = {"convnet": ConvNet}


def build(case: dict, variant: dict) -> fxfeedback.BUTD:
    """Our network with the variant's tensors."""
    options = dict(OPTIONS[variant["mode"]])
    if variant["init"] != "xavier":
        options["td_scale"] = variant["init"]
    if variant.get("gradient_clip"):
        options["td_clip"] = 1.0
    model = ARCHITECTURES[case["arch"]]().double().train(case["train"])
    butd = fxfeedback.to_butd(model, input_size=case["input"][1:], **options)
    state, magnitudes = {}, {}
    for published, shape in variant["tensors"].items():
        name, leaf = published.removeprefix("module.").rsplit(".", 1)
        value = torch.tensor(fill(published, shape))
        if leaf == "magnitude" or (leaf == "weight_backward" and variant["mode"] == "frsf"):
            magnitudes[f"{name}.weight"] = value
        elif leaf == "weight_backward":
            state[f"td_weights.{name}.weight"] = value
        elif leaf == "weight" and len(shape) > 1 and variant.get("constrain_weights"):
            state[f"{name}.weight"] = value * (variant["initial_norm"] / value.norm())
        else:
            state[f"{name}.{leaf}"] = value
    missing, unexpected = butd.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("td_magnitudes.") for name in missing)
    if magnitudes:
        butd.magnitudes = magnitudes
    return butd


def close(ours: torch.Tensor, recorded: np.ndarray, size: float = 0.0) -> bool:
    recorded = torch.tensor(recorded)
    return bool((ours.detach() - recorded).abs().max() <= 1e-9 * max(recorded.abs().max(), size))


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_agrees_with_the_published_system(name, variant):
    case, recorded = CASES[name], np.load(PARITY / f"{name}.npz")
    variant = next(one for one in case["variants"] if one["name"] == variant)
    butd = build(case, variant)
    x = torch.tensor(fill_input(name, case["input"])).requires_grad_()
    logits = butd(x)
    loss = F.cross_entropy(logits, torch.tensor(recorded["labels"])) * variant.get("loss_scale", 1.0)
    loss.backward()
    at = variant["name"]
    assert close(logits, recorded[f"{at}:logits"]) and close(loss, recorded[f"{at}:loss"])
    gradients = {key.split(":grad:")[1]: key for key in recorded.files if key.startswith(f"{at}:grad:")}
    own = {name for name, parameter in butd.named_parameters() if not name.startswith("td_weights.")}
    assert {published.removeprefix("module.") for published in gradients} == {"input", *own}
    terms = max(p.grad.abs().max() for p in butd.parameters() if p.grad is not None)  # of a bias whose gradient cancels
    for published, key in gradients.items():
        grad = (x if published == "input" else butd.get_parameter(published.removeprefix("module."))).grad
        sample = grad.flatten()[:: max(1, grad.numel() // case["sample"]) | 1]
        flat = grad.flatten() if recorded[key].size == grad.numel() else sample
        cancels = float(terms) if published.endswith("conv1.bias") else 0.0
        assert close(flat, recorded[key].flatten(), cancels), key
        assert close(grad.norm(), recorded[f"{at}:grad_norm:{published}"], cancels), key
    assert_metrics(butd, variant)


def assert_metrics(butd: fxfeedback.BUTD, variant: dict) -> None:
    """Angles and ratios; the published frSF takes its magnitudes as they are, where we take what TD reads."""
    alignment = butd.alignment()
    assert set(alignment) == {f"{layer.removeprefix('module.')}.weight" for layer in variant["metrics"]}
    for layer, metrics in variant["metrics"].items():
        angle, ratio = alignment[f"{layer.removeprefix('module.')}.weight"]
        assert (angle is None) == ("alignment" not in metrics)
        if variant["mode"] != "frsf" and angle is not None:
            assert angle == pytest.approx(metrics["alignment"], rel=1e-9)
        assert ratio == pytest.approx(metrics["weight_ratio"], rel=1e-9)
