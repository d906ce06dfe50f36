"""The published LRM system, as recorded in tests/parity: every pass, state, steering and statistics agree to 1e-9."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import fxfeedback
from marks import one_in

PARITY = Path(__file__).parent / "parity"
sys.path.append(str(PARITY))

from fill import fill, fill_input  # noqa: E402

CASES = sorted(path.stem for path in PARITY.glob("lrm_*.json"))


def small() -> nn.Module:
    net = nn.Sequential()
    for name, layer in {
        "conv1": nn.Conv2d(3, 8, 3, padding=1),
        "relu1": nn.ReLU(),
        "pool": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(8, 12, 3, padding=1),
        "relu2": nn.ReLU(),
        "conv3": nn.Conv2d(12, 16, 3, stride=2, padding=1),
        "relu3": nn.ReLU(),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(256, 20),
        "relu4": nn.ReLU(),
        "fc2": nn.Linear(20, 10),
    }.items():
        net.add_module(name, layer)
    return net


def our_name(name: str) -> str:
    """The published tensor's name in our state dict."""
    name = re.sub(r"^lrm\.\w+_modulation\.from_(\w+?)\.", r"modulations.\1.", name.removeprefix("feedforward."))
    return name.replace(".rescale.norm.", ".norm.")


def build(case: dict) -> fxfeedback.FeedbackModel:
    backbone = small() if case["arch"] == "small" else torchvision.models.get_model(case["arch"], weights=None)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    size = (3, case["img_size"], case["img_size"])
    connections = [tuple(connection) for connection in case["connections"]]
    model = fxfeedback.add_feedback(backbone.double().train(case.get("train", False)), connections, input_size=size)
    state = {our_name(name): torch.tensor(fill(name, shape)) for name, shape in case["tensors"].items()}
    model.load_state_dict(state, strict=True)
    return model


@one_in(3)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_published_system(name):
    case = json.loads((PARITY / f"{name}.json").read_text())
    recorded = np.load(PARITY / f"{name}.npz")
    model, state = build(case), None
    x = torch.tensor(fill_input(name, case["input"]))
    for i, call in enumerate(case["calls"]):
        steering = [
            {**steer, "activation": torch.tensor(fill_input(steer["activation"], steer["shape"]))}
            for steer in call.get("steering", [])
        ]
        for steer in steering:
            del steer["shape"]
        outputs, state = model.unroll(
            x,
            passes=call.get("forward_passes"),
            state=None if call.get("drop_state", True) else state,
            steering=steering,
            steer_first_pass=call.get("first_pass_steering", False),
        )
        keys = [key for key in recorded.files if key.startswith(f"call{i}_pass")]
        assert len(outputs) == len(keys)
        for p, output in enumerate(outputs):
            expected = torch.tensor(recorded[f"call{i}_pass{p}"])
            assert (output - expected).abs().max() <= 1e-9 * expected.abs().max(), (i, p)
    for key in recorded.files:
        if key.startswith("buffer:"):
            ours = model.get_buffer(our_name(key.removeprefix("buffer:")))
            assert torch.allclose(ours.double(), torch.tensor(recorded[key]).double(), rtol=1e-9, atol=0), key
