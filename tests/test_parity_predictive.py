"""The published predictive coding, as recorded in tests/parity: every step, gradient and window agrees to 1e-9."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fxfeedback

PARITY = Path(__file__).parent / "parity"
sys.path.append(str(PARITY))

from fill import fill, fill_input  # noqa: E402

from marks import long  # noqa: E402

CASES = {path.stem: json.loads(path.read_text()) for path in sorted(PARITY.glob("predictive_*.json"))}
VARIANTS = [(name, variant["name"]) for name, case in CASES.items() for variant in case["variants"]]
CALLED = [(name, variant) for name, variant in VARIANTS if f"{variant}:t0:logits" in np.load(PARITY / f"{name}.npz")]
MULTIPLIERS = {"ff_part": "u", "fb_part": "v", "mem_part": "w", "errorm": "alpha"}


def small() -> nn.Module:
    net = nn.Sequential()
    for name, layer in {
        "conv1": nn.Conv2d(3, 8, 3, padding=1),
        "relu1": nn.ReLU(),
        "pool": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(8, 12, 3, padding=1),
        "relu2": nn.ReLU(),
        "conv3": nn.Conv2d(12, 16, 3, stride=3, padding=1),
        "relu3": nn.ReLU(),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(576, 10),
    }.items():
        net.add_module(name, layer)
    return net


def backbone(case: dict) -> nn.Module:
    if case["arch"] == "small":
        return small()
    net = torchvision.models.get_model(case["arch"], weights=None, num_classes=10)
    if case["arch"] == "vgg11":
        net.classifier = nn.Linear(25088, 10)
    return net


def predictor(how: object, shape: tuple[int, int]) -> nn.Module | None:
    if how == "default":
        return None
    convolution = nn.ConvTranspose2d(*shape, how["kernel"], how["stride"], how["padding"])
    return nn.Sequential(convolution, nn.ReLU()) if how["relu"] else convolution


def build(case: dict, variant: dict) -> fxfeedback.PredictiveModel:
    predictions = []
    for i, node in enumerate(case["nodes"]):
        shape = next(s for name, s in case["tensors"].items() if name.startswith(f"pcoder{i + 1}.") and len(s) > 1)
        predictions.append(
            fxfeedback.Prediction(
                node,
                predictor(case["predictors"][i], shape[:2]),
                *(variant[name][i] for name in ("feedforward", "feedback", "error")),
                scaling=scaling(variant, i) if variant["scaling"] else "mean",
            )
        )
    net, size = backbone(case).double().eval(), case["input"][1:]
    learned = variant.get("learned", False)
    model = fxfeedback.add_prediction(net, predictions, steps=case["steps"], input_size=size, learn_multipliers=learned)
    state = {our_name(case, name): torch.tensor(fill(name, shape)) for name, shape in case["tensors"].items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("multipliers.") for name in missing)
    return model.eval()


def scaling(variant: dict, i: int) -> str | float:
    """Counted where the published system's own count is no matter of chance; its recorded C where it is."""
    return variant["C"][i] if variant["closing_relu"][i] else "window"


def our_name(case: dict, name: str) -> str:
    """The published tensor's name in our state dict."""
    if name.startswith("backbone."):
        return name.removeprefix("backbone.")
    for kind, own in MULTIPLIERS.items():
        if name.startswith(kind):
            return f"multipliers.{case['nodes'][int(name.removeprefix(kind)) - 1].replace('.', '_')}.{own}"
    pcoder, _, rest = name.partition(".pmodule.")
    return f"predictors.{case['nodes'][int(pcoder.removeprefix('pcoder')) - 1].replace('.', '_')}.{rest}"


def assert_agrees(value: torch.Tensor, recorded: dict, key: str, sample: int) -> None:
    before, _, rest = key.rpartition(":")
    of_norm = f"{before}_norm:{rest}" if before.endswith("grad") else f"{key}_norm"
    flat, expected = value.detach().flatten(), torch.tensor(recorded[key]).flatten()
    if flat.numel() > sample:
        norm = float(recorded[of_norm])
        assert abs(float(flat.norm()) - norm) <= 1e-9 * norm, key
        flat = flat[:: max(1, flat.numel() // sample) | 1]
    assert (flat - expected).abs().max() <= 1e-9 * expected.abs().max().clamp(min=1e-12), key


@pytest.mark.parametrize(("name", "variant"), [long(*case) if "vgg" in case[0] else case for case in CALLED])
def test_every_step_agrees_with_the_published_system(name, variant):
    case, recorded = CASES[name], np.load(PARITY / f"{name}.npz")
    how = next(each for each in case["variants"] if each["name"] == variant)
    model, x = build(case, how), torch.tensor(fill_input(name, case["input"]))
    outputs, readout = model(x), model.readout(x, case["nodes"])
    for t in range(case["steps"]):
        assert_agrees(outputs[t], recorded, f"{variant}:t{t}:logits", case["sample"])
        errors = torch.stack([readout[t][node].error for node in case["nodes"]])
        assert_agrees(errors, recorded, f"{variant}:t{t}:error", case["sample"])
        for i, node in enumerate(case["nodes"], 1):
            read = readout[t][node]
            assert_agrees(read.representation, recorded, f"{variant}:t{t}:representation{i}", case["sample"])
            assert_agrees(read.prediction, recorded, f"{variant}:t{t}:prediction{i}", case["sample"])


@pytest.mark.parametrize(("name", "variant"), [long(*case) if "vgg" in case[0] else case for case in VARIANTS])
def test_every_gradient_agrees_with_the_published_system(name, variant):
    case, recorded = CASES[name], np.load(PARITY / f"{name}.npz")
    how = next(each for each in case["variants"] if each["name"] == variant)
    model, x = build(case, how), torch.tensor(fill_input(name, case["input"]))
    losses = {
        "": lambda: F.cross_entropy(model(x)[-1], torch.tensor(recorded["labels"])),
        "predictor_": lambda: torch.stack(list(model.prediction_losses(x).values())).sum(),
    }
    for kind, loss in losses.items():
        if f"{variant}:{kind}loss" not in recorded:
            continue
        model.zero_grad()
        value = loss()
        value.backward()
        assert_agrees(value, recorded, f"{variant}:{kind}loss", case["sample"])
        own = dict(model.named_parameters())
        prefix = f"{variant}:{kind}grad:"
        for key in (key for key in recorded.files if key.startswith(prefix)):
            name = our_name(case, key.removeprefix(prefix))
            if name in own:  # the last one has no v
                assert_agrees(own[name].grad, recorded, key, case["sample"])
        if not kind:
            assert [own[our_name(case, name)].grad for name in how["no_gradient"]] == [None] * len(how["no_gradient"])
