"""A feedback connection in every model of torchvision: does it build, and does it behave? A table, one row per model.

    python zoo/feedback.py [NAME ...]

Each model gets a connection from its last linear layer or convolution back to its second one. The first pass must
equal the plain model exactly, the second must differ, gradients must reach every new parameter, and the model must run
in both modes.
"""

import sys
import time
import warnings
from collections.abc import Iterator

import torch
import torchvision
from torch import nn

import fxfeedback
from fxfeedback.bottom_up import BottomUp
from fxfeedback.open_modules import open_modules
from fxfeedback.trace import annotate_shapes, share, trace

SIZES = {"inception_v3": (3, 299, 299), "r3d_18": (3, 8, 64, 64), "mc3_18": (3, 8, 64, 64), "video": (3, 16, 224, 224)}
"""Input size by model name, or by the part of torchvision that has the model; 224 by 224 elsewhere."""
SMALL = (
    "vgg",
    "resn",
    "regnet",
    "densenet",
    "mobilenet",
    "mnasnet",
    "shufflenet",
    "squeezenet",
    "efficientnet",
    "conv",
)


def models() -> Iterator[tuple[str, str]]:
    """(name, part of torchvision) of every model but the quantized ones."""
    for name in torchvision.models.list_models():
        part = torchvision.models.get_model_builder(name).__module__.split(".")[2]
        if part != "quantization":
            yield name, part


def input_size(name: str, part: str) -> tuple[int, ...]:
    """The size of one input, as small as the model takes it."""
    small = (3, 64, 64) if part not in ("video", "segmentation") and name.startswith(SMALL) else (3, 224, 224)
    return SIZES.get(name, SIZES.get(part, small))


def connection(model: nn.Module, x: torch.Tensor) -> tuple[str, str]:
    """From the last linear layer or convolution back to the second one."""
    module = open_modules(trace(share(model)), strict=False)
    annotate_shapes(module, (x,))
    bu = BottomUp(module.graph)
    weighted = [node.meta["name"] for node in bu.nodes if bu.is_weighted(node)]
    return weighted[-1], weighted[1]


def leaves(output: object) -> list[torch.Tensor]:
    """The tensors of a model's output."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [leaf for part in (output.values() if isinstance(output, dict) else output) for leaf in leaves(part)]


def check(name: str, part: str) -> str:
    """The row of one model: "ok", with its connection, or what went wrong."""
    torch.manual_seed(0)
    options: dict[str, object] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if part in ("segmentation", "detection"):
        options["weights_backbone"] = None
    plain = torchvision.models.get_model(name, weights=None, **options).eval()
    x = torch.randn(2, *input_size(name, part))
    source, destination = connection(plain, x)
    for parameter in plain.parameters():
        if not parameter.any():  # a head that starts at zero would say nothing
            nn.init.normal_(parameter, std=0.02)
    model = fxfeedback.add_feedback(plain, [(source, destination)], example_inputs=(x,))
    first, second = model(x)
    expected = plain(x)  # with gradients, too: without, attention takes other kernels
    if not all(map(torch.equal, leaves(first), leaves(expected))):
        return "the first pass differs from the plain model"
    if all(map(torch.equal, leaves(first), leaves(second))):
        return "the second pass equals the first"
    sum(leaf.square().mean() for leaf in leaves(second)).backward()
    without = [
        name for name, p in model.modulations.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    if without:
        return f"no gradient reaches {', '.join(without)}"
    model.train()(x)
    model.eval()
    return f"ok: {source} -> {destination}"


def main(names: list[str]) -> int:
    """Print the table; returns how many models failed."""
    warnings.filterwarnings("ignore")
    failed = 0
    for name, part in models():
        if names and name not in names:
            continue
        start = time.perf_counter()
        try:
            row = check(name, part)
        except Exception as error:
            row = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
        failed += not row.startswith("ok")
        print(f"{name:<36}{time.perf_counter() - start:>7.1f} s  {row}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
