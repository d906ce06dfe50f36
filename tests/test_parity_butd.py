"""The published BU-TD system, as recorded in tests/parity: logits, counter neurons and updates agree to 1e-9."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fxfeedback
from marks import one_in

PARITY = Path(__file__).parent / "parity"
sys.path += [str(PARITY), str(PARITY.parent)]

from fill import fill, fill_input  # noqa: E402

import published_nets  # noqa: E402

CASES = sorted(path.stem for path in PARITY.glob("butd_*.json"))
CORES = {
    "simple": lambda: (published_nets.simple((8, 12), 50), 50),
    "fc": lambda: (published_nets.FullyConnected(), 40),
    "tiny_resnet": lambda: (published_nets.TinyResNet(), 576),
    "resnet18": lambda: (published_nets.ResNet18(), 8192),
}


def our_name(name: str) -> str | None:
    """The published tensor's name in our state dict; None for aliases and for biases of the instruction head."""
    if name.startswith("core_net.layers."):
        return None
    if name.startswith("task_head."):
        # It is written bottom-up there, and TD runs through it from the instruction to the features.
        _, layer, leaf = name.split(".")
        return None if leaf == "bias" else f"instruction_head.{2 * (1 - int(layer))}.weight"
    if name.endswith(".back_weight"):
        return "td_weights." + name.replace(".back_weight", ".weight")
    name = name.replace("downsample_norm_layer", "downsample_norm")
    if ".back_batch_norm." in name:
        norm = name.split(".back_batch_norm.")[0]
        convolution = norm.replace("downsample_norm", "downsample").replace("bn", "conv")
        return f"td_norms.{convolution}." + name.split(".back_batch_norm.")[1]
    return name


def build(case: dict) -> tuple[fxfeedback.BUTD, dict[str, torch.Tensor]]:
    """Our network with the case's tensors, and the published names of its tensors."""
    core, features = CORES[case["core"]]()
    butd = fxfeedback.to_butd(
        published_nets.Net(core, features, case["n_classes"]).double().eval(),
        n_tasks=case["n_tasks"] or None,
        embedding=case.get("task_embedding_size"),
        input_size=case["input"][1:],
        weights="shared" if case["shared_weights"] else "separate",
        norm="separate" if case["core"] == "resnet18" else "shared",
    )
    state, separate = {}, not case["shared_weights"]
    for name, shape in case["tensors"].items():
        value = fill(name, shape) * (case.get("gain", 1.0) if len(shape) > 1 else 1.0)
        ours = our_name(name)
        # The instruction head runs on `weight` transposed where weights are shared, and on `back_weight` as it is else.
        if name.startswith("task_head.") and name.endswith("back_weight" if separate else ".weight"):
            key = our_name(name.replace("back_weight", "weight"))
            state[key] = torch.tensor(value if separate else value.T)
        elif name.startswith("task_head."):
            continue
        elif ours is not None:
            transposed = name.endswith("back_weight") and len(shape) == 2
            state[ours] = torch.tensor(value.T if transposed else value)
    butd.load_state_dict(state, strict=True)
    return butd, {name: butd.get_parameter(our_name(name)) for name in case["tensors"] if is_learned(name)}


def is_learned(name: str) -> bool:
    return (
        not name.startswith("task_head.") and "batch_norm" not in name and "running" not in name and "num_" not in name
    )


def site_of(layer: str, core: str) -> str:
    """The site whose counter neurons are those at the layer's output."""
    if core == "simple":
        return f"core_net.relu{['_conv1', '_conv1_pool', '_conv2', '_conv2_pool', '_fc'].index(layer) + 1}"
    if not layer.startswith("layer"):
        return "core_net.relu" + ("_1" if layer == "conv_pooling" else "")
    block = ".".join(layer.split(".")[:2])
    return f"core_net.{block}.relu" + ("" if layer.endswith(".conv1") else "_1")


def close(ours: torch.Tensor, recorded: np.ndarray) -> bool:
    recorded = torch.tensor(recorded)
    return bool((ours.detach() - recorded).abs().max() <= 1e-9 * recorded.abs().max())


@one_in(2)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_published_system(name):
    case = json.loads((PARITY / f"{name}.json").read_text())
    recorded = np.load(PARITY / f"{name}.npz")
    butd, parameters = build(case)
    x = torch.tensor(fill_input(name, case["input"]))
    labels = torch.tensor(recorded["labels"])
    assert close(butd(x), recorded["plain"])
    logits = butd(x)
    if case["n_tasks"]:
        tasks = torch.tensor(recorded["tasks"])
        logits = butd(x, tasks)
        assert close(logits, recorded["instructed"])
        counters = butd.counter_neurons(tasks)
        layers = [key.removeprefix("td_active:") for key in recorded.files if key.startswith("td_active:")]
        assert len({site_of(layer, case["core"]) for layer in layers}) == len(counters)
        for layer in layers:
            share = (counters[site_of(layer, case["core"])] > 0).double().mean()
            assert close(share, recorded[f"td_active:{layer}"]), layer
    loss = F.cross_entropy(logits, labels)
    assert close(loss, recorded["loss"])
    if not case.get("learn", True):
        return
    loss.backward()
    updates = [key.removeprefix("update:") for key in recorded.files if key.startswith("update:")]
    assert set(updates) == set(parameters)
    for key in updates:
        update = parameters[key].grad
        if key.endswith("back_weight") and update.ndim == 2:
            update = update.T
        sample = update.flatten()
        if f"update_norm:{key}" in recorded.files:
            assert close(update.norm(), recorded[f"update_norm:{key}"]), key
            sample = sample[:: max(1, update.numel() // 2000)]
        assert close(sample, recorded[f"update:{key}"].flatten()), key
