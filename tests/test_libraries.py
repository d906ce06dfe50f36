"""Models of other libraries go in as they come: what `make zoo-libraries` checks of all, here of some."""

import importlib
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import fxfeedback
from fxfeedback.errors import OptionError
from marks import long

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
zoo = importlib.import_module("libraries")

MODELS = dict(zoo.every_model())


@pytest.mark.parametrize(
    "name",
    [
        "kornia/filters.BoxBlur",
        *map(
            long,
            [
                "CORnet-RT",
                "transformers/ViTForImageClassification",
                "CORnet-Z",
                "kornia/color.RgbToLab",
                "open_clip/resnet",
                "open_clip/transformer",
                "torch/TransformerDecoder",
                "transformers/LevitForImageClassification",
                "transformers/SegformerForSemanticSegmentation",
                "transformers/SwinForImageClassification",
            ],
        ),
    ],
)
def test_the_law(name):
    _, door, errors = zoo.law(MODELS[name])
    assert max(errors) < 1e-9
    assert door == ("export" if "BoxBlur" in name else "fx")


@pytest.mark.long
@pytest.mark.parametrize("name", ["CORnet-S", "transformers/ViTMAEModel"])
def test_passes_as_a_file(name):
    file = zoo.file_of(MODELS[name].make(), MODELS[name])
    assert isinstance(file, zoo.File) and file.difference < 1e-4, file


class Layer(nn.Linear):
    """Of a library."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("installed", [True, False])
def test_a_hook_of_an_installed_library_on_its_own_module_is_traced_with_it(installed, monkeypatch, tmp_path):
    def hook(module, given, output):
        return 2 * output

    folder = sysconfig.get_paths()["purelib"] if installed else tmp_path
    library = types.ModuleType("a_library")
    library.__file__ = f"{folder}/a_library/__init__.py"
    monkeypatch.setitem(sys.modules, "a_library", library)
    monkeypatch.setattr(Layer, "__module__", "a_library.layers")
    hook.__module__ = "a_library.capture"
    model, x = nn.Sequential(Layer(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    model[0].register_forward_hook(hook)
    if not installed:
        with pytest.raises(OptionError, match="'0' has a forward hook \\(hook\\), which would not run"):
            fxfeedback.to_butd(model, input_size=(4,))
        return
    assert torch.equal(fxfeedback.to_butd(model, input_size=(4,))(x), model(x))
