"""What a description may name: classes of modules and a few functions that compute, found by their names."""

import re
import sys
from importlib import import_module
from typing import Any

import torch
from torch import fx, nn

PACKAGES = (
    "torch.nn.modules",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
    "timm.layers",
    "timm.models",
)
"""Packages that are imported where a description names a class of modules in them."""
ALSO = (
    "torch.ao.nn.quantized.modules.functional_modules:FloatFunctional",
    "torch.ao.quantization.stubs:QuantStub",
    "torch.ao.quantization.stubs:DeQuantStub",
)
"""Classes from elsewhere in torch that torchvision's quantizable models use."""
NOT_USERS = {"torch", "torchvision", "timm", "fxfeedback", *sys.stdlib_module_names} - {"__main__"}
"""Packages in which no class of the user's is looked for."""
FUNCTIONS = {
    "torch": "abs add clamp cos erf exp log_softmax maximum minimum mul relu selu sigmoid sin softmax square sub tanh",
    "torch._C._nn": "elu gelu glu hardsigmoid hardswish hardtanh leaky_relu log_sigmoid mish relu6 silu softplus",
    "torch.nn.functional": "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d "
    "avg_pool3d batch_norm celu dropout elu gelu glu group_norm gumbel_softmax hardshrink hardsigmoid hardswish "
    "hardtanh instance_norm layer_norm leaky_relu local_response_norm log_softmax logsigmoid max_pool1d max_pool2d "
    "max_pool3d mish normalize prelu relu relu6 rms_norm rrelu selu sigmoid silu softmax softmin softplus softshrink "
    "softsign tanh tanhshrink threshold",
    "torchvision.ops": "box_iou",
}
"""Functions that a module may keep: they compute, and what they make is no larger than what they are given."""
HELPERS = (
    "torchvision.models.detection._utils:BalancedPositiveNegativeSampler",
    "torchvision.models.detection._utils:BoxCoder",
    "torchvision.models.detection._utils:BoxLinearCoder",
    "torchvision.models.detection._utils:Matcher",
    "torchvision.models.detection._utils:SSDMatcher",
    "timm.models._features:FeatureInfo",
)
"""Classes whose objects are not modules and are described as well."""
MADE_LATER = re.compile(
    r"\w*(BatchNorm|LayerNorm|GroupNorm|InstanceNorm|RMSNorm|RmsNorm|LRN)\w*|"
    r"(Leaky|P|RR)?ReLU6?|[CS]?ELU|GELU|GLU|SiLU|Mish|Hard\w+|Sigmoid|LogSigmoid|Tanh\w*|Soft\w+|LogSoftmax|Identity"
)
"""Classes of modules of which a partial may be kept: norms and activations, whose tensors are vectors."""


def found_by_name(name: str) -> Any:
    """The class of modules, or the function, that is called `name` and may be named by a file; or None."""
    module_name, _, path = name.partition(":")
    if module_name in FUNCTIONS:
        if path in FUNCTIONS[module_name].split():
            return getattr(torch if module_name == "torch" else import_module(module_name), path, None)
        return None
    found = class_by_name(name)
    no_code_of_its_own = isinstance(found, type) and (
        issubclass(found, nn.Module)
        and not issubclass(found, (fx.GraphModule, torch.jit.ScriptModule, nn.RNNBase))
        and is_inside(next(c.__module__ for c in found.__mro__ if "__setstate__" in vars(c)), ("torch.nn.modules",))
    )
    return found if no_code_of_its_own else None


def class_by_name(name: str) -> Any:
    """The class that is called `name`, of one of `PACKAGES` or of the user's modules that are imported already."""
    module_name, _, path = name.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module_name):
        return None
    module = sys.modules.get(module_name)
    if is_inside(module_name, PACKAGES) or name in ALSO or name in HELPERS:
        try:
            module = import_module(module_name)
        except ImportError:
            return None
    elif module_name.split(".")[0] in NOT_USERS:
        return None
    found: Any = module
    for step in path.split("."):  # past what modules and classes do when they are asked for an attribute
        found = vars(found).get(step) if hasattr(found, "__dict__") else None
    is_at_home = isinstance(found, type) and found.__module__ == module_name
    return found if is_at_home else None


def functions() -> list[Any]:
    """All of `FUNCTIONS`."""
    return [found_by_name(f"{module}:{name}") for module, names in FUNCTIONS.items() for name in names.split()]


def is_inside(module_name: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of the packages, or in one."""
    return any(module_name == package or module_name.startswith(f"{package}.") for package in packages)
