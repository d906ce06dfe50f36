"""Prototypes on disk: a safetensors file of ours, or a .pth file as published. Only data is read, never code."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import save_file

from fxfeedback.errors import CheckpointError, OptionError
from fxfeedback.files import as_path, replace_whole
from fxfeedback.graph.nodes import nearest
from fxfeedback.prototypes.moments import Label, Moments
from fxfeedback.storage.checkpoints import read_checkpoint
from fxfeedback.storage.tensor_file import read_tensor_file
from fxfeedback.version import __version__

FORMAT = 1
ABOUT = "fxfeedback_prototypes"  # in the file's metadata

_RELEASE = "https://github.com/harvard-visionlab/lrm-steering/releases/download/prototypes-v1"
SOURCE = "classifier.6"
"""Of which node the published ones are."""
PUBLISHED = {
    ("alexnet_lrm1", "pictures"): f"{_RELEASE}/visual_prototypes_alexnet_lrm1_40b29a3427-e1282174.pth",
    ("alexnet_lrm2", "pictures"): f"{_RELEASE}/visual_prototypes_alexnet_lrm2_17b4229a30-83b9be6e.pth",
    ("alexnet_lrm3", "pictures"): f"{_RELEASE}/visual_prototypes_alexnet_lrm3_63ab1b3b06-d59f87e7.pth",
    ("alexnet_lrm1", "words"): f"{_RELEASE}/clip_diffusion_prototypes_ViT_B16_to_alexnet_lrm1_40b29a3427-8729ac14.pth",
    ("alexnet_lrm2", "words"): f"{_RELEASE}/clip_diffusion_prototypes_ViT_B16_to_alexnet_lrm2_17b4229a30-97b050f0.pth",
    ("alexnet_lrm3", "words"): f"{_RELEASE}/clip_diffusion_prototypes_ViT_B16_to_alexnet_lrm3_63ab1b3b06-b710a264.pth",
}
"""(model, what they are made from) -> URL; the file's name ends in its SHA-256's first eight digits."""


def read_published(model: str, made_from: str) -> dict[Label, Moments]:
    """The published prototypes of a model.

    Raises:
        OptionError: there are none of that name.
        CheckpointError: the file cannot be read, or is another one.
    """
    if (model, made_from) not in PUBLISHED:
        names = sorted({name for name, _ in PUBLISHED})
        hint = nearest(str(model), names)
        raise OptionError(
            f"there are no published prototypes of {model!r} made from {made_from!r}{hint}; there are of "
            f"{', '.join(names)}, made from 'pictures' or 'words'"
        )
    url = PUBLISHED[model, made_from]
    return _from_published(read_checkpoint(url), SOURCE, url)


def read_file(given: str | os.PathLike[str], source: str | None) -> dict[Label, Moments]:
    """The classes of a file; source: the node that a .pth file is of.

    Raises:
        CheckpointError, OptionError: see `Prototypes.load`.
    """
    path = as_path(given)
    if path.suffix == ".safetensors":
        if source is not None:
            raise OptionError(f"source={source!r}: {path} says itself which nodes its prototypes are of")
        return _read_ours(path)
    if source is None:
        raise OptionError(f"{path} does not say which node its prototypes are of: pass source=, as {SOURCE!r}")
    return _from_published(read_checkpoint(str(path)), source, path)


def write_file(classes: Mapping[Label, Moments], given: str | os.PathLike[str]) -> None:
    """Write a .safetensors or a .pth file, atomically.

    Raises:
        OptionError: see `Prototypes.save`.
    """
    path = as_path(given)
    sources = list(next(iter(classes.values())).mean)
    if path.suffix == ".pth":
        if len(sources) > 1:
            raise OptionError(f"a .pth file has room for one node, not for {', '.join(sources)}: write .safetensors")
        content = {label: _as_published(moments, sources[0]) for label, moments in classes.items()}
        replace_whole(path, lambda new: torch.save(content, new))
        return
    if path.suffix != ".safetensors":
        raise OptionError(f"{path}: prototypes are written to a .safetensors file, or to a .pth file as published")
    about = {"format": FORMAT, "fxfeedback": __version__, "sources": sources, "labels": list(classes)}
    tensors = {"count": torch.tensor([moments.count for moments in classes.values()])}
    for i, source in enumerate(sources):
        tensors[f"{i}.mean"] = torch.stack([moments.mean[source] for moments in classes.values()])
        tensors[f"{i}.squares"] = torch.stack([moments.squares[source] for moments in classes.values()])
    replace_whole(path, lambda new: save_file(tensors, new, {ABOUT: json.dumps(about)}))


# -- ours -------------------------------------------------------------------------------------------------------------


def _read_ours(path: Path) -> dict[Label, Moments]:
    about, tensors = read_tensor_file(path, ABOUT, FORMAT, "Prototypes.save", "a file")
    labels, sources = about.get("labels"), about.get("sources")
    if not (_are_names(labels, (int, str)) and _are_names(sources, (str,))):
        raise CheckpointError(f"{path} is damaged: its labels and sources are not what save writes")
    count = _checked(tensors.get("count"), (len(labels),), torch.int64, path)
    if (count < 0).any():
        raise CheckpointError(f"{path} is damaged: a class has a negative number of samples")
    means, squares = {}, {}
    for i, source in enumerate(sources):
        means[source] = _checked(tensors.get(f"{i}.mean"), (len(labels),), torch.float64, path)
        squares[source] = _checked(tensors.get(f"{i}.squares"), tuple(means[source].shape), torch.float64, path)
    return {
        label: Moments(n, {s: x[row] for s, x in means.items()}, {s: x[row] for s, x in squares.items()})
        for row, (label, n) in enumerate(zip(labels, count.tolist(), strict=True))
    }


def _are_names(given: Any, kinds: tuple[type, ...]) -> TypeGuard[list[Any]]:
    is_list = isinstance(given, list) and bool(given) and all(type(one) in kinds for one in given)
    return is_list and len(set(given)) == len(given)


def _checked(tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, path: Path) -> torch.Tensor:
    """A tensor of the file whose shape begins like this."""
    if tensor is None or tensor.dtype != dtype or tuple(tensor.shape[: len(shape)]) != shape:
        raise CheckpointError(f"{path} is damaged: its tensors are not those that save writes")
    if not tensor.isfinite().all():
        raise CheckpointError(f"{path} is damaged: it has values that are not finite")
    return tensor


# -- as published -----------------------------------------------------------------------------------------------------


def _as_published(moments: Moments, source: str) -> dict[str, Any]:
    """A class: what the published code keeps of it, in float32 as its activations are."""
    mean, squares = moments.mean[source], moments.squares[source]
    tensors = {
        "sum": mean * moments.count,
        "sumsq": squares + mean.square() * moments.count,
        "mean": mean,
        "std": moments.deviation(source),
    }
    return {"count": moments.count, **{name: x.float() for name, x in tensors.items()}}


def _from_published(content: Any, source: str, where: Any) -> dict[Label, Moments]:
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{where} holds no prototypes: it must map classes to count, mean and std")
    classes, shape = dict[Label, Moments](), None
    for label, given in content.items():
        fields: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        count, mean, std = fields.get("count"), fields.get("mean"), fields.get("std")
        if type(label) not in (int, str) or type(count) is not int or count < 0:
            raise CheckpointError(f"{where}: class {label!r} is no prototype: it has no count")
        if not (_is_plain(mean) and _is_plain(std)):
            raise CheckpointError(f"{where}: class {label!r} is no prototype: it has no mean or std")
        shape = mean.shape if shape is None else shape
        mean, std = mean.double(), std.double().nan_to_num(nan=0)  # of a variance below zero
        if not mean.shape == std.shape == shape:
            raise CheckpointError(f"{where}: class {label!r} has another shape than the others, {tuple(mean.shape)}")
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise CheckpointError(f"{where}: class {label!r} has values that are not finite")
        classes[label] = Moments(count, {source: mean}, {source: std.square() * count})
    return classes


def _is_plain(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether a file's value is a tensor of numbers that are all there: a view can stand for any number of them."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        and not value.is_meta
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
