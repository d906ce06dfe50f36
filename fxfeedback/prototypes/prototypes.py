"""`Prototypes`: what the pictures of a class have in common at a node, and steering with it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn
from tqdm import tqdm

from fxfeedback.errors import InputError, NodeNameError, OptionError
from fxfeedback.feedback import Steering
from fxfeedback.graph.nodes import nearest
from fxfeedback.prototypes.moments import Label, Moments, by_class
from fxfeedback.prototypes.prototype_files import read_file, read_published, write_file
from fxfeedback.prototypes.reading import check_values, label_of, labels_of, parts_of, readable, reader, sources_of

SHOWN = 10  # labels that an error lists


class Prototypes:
    """The mean activation of every class at one or several nodes, made by `Prototypes.compute`.

    sources: the names of the nodes. labels: of the classes, in order. `a + b` are the prototypes of both's samples.
    """

    def __init__(self, classes: Mapping[Label, Moments]) -> None:
        numbers = sorted(label for label in classes if isinstance(label, int))
        names = sorted(label for label in classes if isinstance(label, str))
        self.labels: list[Label] = [*numbers, *names]
        self._classes = {label: classes[label] for label in self.labels}
        self.sources: list[str] = list(next(iter(classes.values())).mean)

    @classmethod
    def compute(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        sources: Sequence[str] | str | None = None,
        *,
        progress: bool = True,
    ) -> Self:
        """Go through a labelled loader once; nothing is kept but count, mean and deviation of each class.

        Args:
            model: any model that can be traced. One with connections is read after its last pass, an instructed one
                without an instruction; all in evaluation mode, in the model's dtype and on its device.
            loader: gives batches (inputs, labels, ...): inputs a tensor, or several in a tuple or, by name, in a dict;
                labels whole numbers (B,), or strings.
            sources: names of nodes, whose values are (B, ...): maps, tokens or vectors; None: the connections' sources,
                or the prediction head of a model without connections.
            progress: show a bar, where the output is a terminal.

        Raises:
            InputError: a loader without batches or labels, or an activation that is not finite.
            NodeNameError: a name that no node has.
            TraceError: the model cannot be traced.
        """
        read, classes = None, dict[Label, Moments]()
        names = [sources] if isinstance(sources, str) else list(sources or ())
        for batch in tqdm(loader, "prototypes", unit="batch", dynamic_ncols=True, disable=None if progress else True):
            inputs, labels = parts_of(batch)
            if read is None:
                net = readable(model, inputs)
                names = names or sources_of(model, net)
                read = reader(net, names)
            values = read(inputs)
            check_values(values, labels)
            for label, own in by_class(values, labels):
                found = Moments.of(own)
                classes[label] = classes[label] + found if label in classes else found
        if not classes:
            raise InputError("the loader gives no samples: there is nothing to make prototypes of")
        return cls(classes)

    @classmethod
    def load(cls, path: str | os.PathLike[str], source: str | None = None) -> Self:
        """What `save` wrote.

        Args:
            path: a .safetensors file; or a .pth file as the published ones are, class -> {count, mean, std, ...}. Only
                data is read from it, never code.
            source: the node that a .pth file is of, which it does not say.

        Raises:
            CheckpointError: the file is not there, damaged, or holds anything else.
            OptionError: a .pth file without a source, or another file with one.
        """
        return cls(read_file(path, source))

    @classmethod
    def published(cls, model: str, made_from: str = "pictures") -> Self:
        """The published prototypes of an `alexnet_lrm1`, `2` or `3`, of its logits, "classifier.6".

        They are downloaded into torch.hub's cache and checked against the hash in the file's name.

        Args:
            model: the model's name.
            made_from: "pictures": the means over ImageNet's; "words": of CLIP's embeddings of the classes' names.

        Raises:
            OptionError: an unknown name.
            CheckpointError: the file cannot be read, or is another one.
        """
        return cls(read_published(model, made_from))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file, or, of one source, a .pth file in the published format, in float32.

        Raises:
            OptionError: another ending; several sources for a .pth file.
        """
        write_file(self._classes, path)

    def __add__(self, other: Self) -> Self:
        """Of both's samples, as if one computation had seen them all.

        Raises:
            OptionError: they are of other nodes, or of nodes of other shapes.
        """
        if not isinstance(other, Prototypes):
            return NotImplemented
        if sorted(self.sources) != sorted(other.sources):
            raise OptionError(f"prototypes of {self.sources} and of {other.sources} have no sum")
        for source in self.sources:
            if self.shape(source) != other.shape(source):
                raise OptionError(f"{source!r} has shape {self.shape(source)} here and {other.shape(source)} there")
        both = dict(self._classes)
        for label, moments in other._classes.items():
            both[label] = both[label] + moments if label in both else moments
        return type(self)(both)

    def shape(self, source: str | None = None) -> tuple[int, ...]:
        """Of a source's prototypes, without a batch."""
        return tuple(self._classes[self.labels[0]].mean[self._source(source)].shape)

    def count(self, label: Label) -> int:
        """How many samples of a class there were."""
        return self._of(label).count

    def mean(self, label: Label, source: str | None = None) -> torch.Tensor:
        """The prototype of one class, (...), float64; source: where there are several."""
        return self._seen(label).mean[self._source(source)]

    def deviation(self, label: Label, source: str | None = None) -> torch.Tensor:
        """The standard deviation over the samples of a class, (...), float64."""
        return self._seen(label).deviation(self._source(source))

    def activation(self, label: Any, contrast: Any = None, source: str | None = None) -> torch.Tensor:
        """What `steering` steers with: (1, ...), or (B, ...) for a tensor of labels (B,); float64.

        Args:
            label: one label; a list or a tuple of several: their mean; a tensor of labels (B,): one per image.
            contrast: the same; its prototype is subtracted, and the difference has the norm of the first one.
            source: the node, where there are several.

        Raises:
            InputError: an unknown label, a class without samples, a contrast with itself.
            NodeNameError: a node that these prototypes are not of.
        """
        wanted = self._means(label, source)
        if contrast is None:
            return wanted
        apart = wanted - self._means(contrast, source)
        norms = [torch.linalg.vector_norm(x, dim=list(range(1, x.ndim)), keepdim=True) for x in (wanted, apart)]
        if not norms[1].all():
            raise InputError(f"the prototype of {label!r} does not differ from that of {contrast!r}: no contrast")
        return apart * (norms[0] / norms[1])

    def steering(
        self,
        label: Any,
        strength: float | Sequence[float] | torch.Tensor = 3.0,
        alpha: float | torch.Tensor = 1.0,
        contrast: Any = None,
        source: str | None = None,
    ) -> Steering:
        """ "Look for this class": what a call of a model with connections takes as `steering`.

        Args:
            label, contrast, source: as `activation` takes them.
            strength, alpha: see `Steering`.

        Raises:
            InputError, NodeNameError: as `activation`.
        """
        return Steering(self._source(source), self.activation(label, contrast, source), strength, alpha)

    def instruction(self, label: Any, contrast: Any = None, source: str | None = None) -> torch.Tensor:
        """ "Look for this class": the instruction of `to_butd(model)` without tasks, a vector over the outputs.

        Args:
            label, contrast, source: as `activation` takes them.

        Returns:
            (1, outputs), or (B, outputs) for a tensor of labels.

        Raises:
            InputError: as `activation`; a source whose value is no vector.
            NodeNameError: as `activation`.
        """
        made = self.activation(label, contrast, source)
        if made.ndim != 2:
            raise InputError(
                f"{self._source(source)!r} has values of shape {tuple(made.shape[1:])}: an instruction is a vector "
                "over the model's outputs, a prototype of its prediction head"
            )
        return made

    def __repr__(self) -> str:
        total = sum(moments.count for moments in self._classes.values())
        return f"Prototypes({len(self.labels)} classes, {total} samples, of {', '.join(self.sources)})"

    # -- inside -------------------------------------------------------------------------------------------------------

    def _source(self, source: str | None) -> str:
        if source is None and len(self.sources) > 1:
            raise NodeNameError(f"there are prototypes of {', '.join(self.sources)}: say which, source=...")
        if source is not None and source not in self.sources:
            raise NodeNameError(f"there are no prototypes of {source!r}; there are of {', '.join(self.sources)}")
        return source or self.sources[0]

    def _of(self, label: Label) -> Moments:
        label = label_of(label)
        if label not in self._classes:
            known = ", ".join(map(repr, self.labels[:SHOWN]))
            more = f" and {len(self.labels) - SHOWN} more" if len(self.labels) > SHOWN else ""
            hint = (
                nearest(label, [one for one in self.labels if isinstance(one, str)]) if isinstance(label, str) else ""
            )
            raise InputError(f"there is no prototype of {label!r}{hint}; labels: {known}{more}")
        return self._classes[label]

    def _seen(self, label: Label) -> Moments:
        moments = self._of(label)
        if not moments.count:
            raise InputError(f"class {label!r} has no samples, and so no prototype")
        return moments

    def _means(self, label: Any, source: str | None) -> torch.Tensor:
        """(1, ...), or (B, ...) for a tensor of labels."""
        if isinstance(label, torch.Tensor) and label.ndim:
            return torch.stack([self.mean(one, source) for one in labels_of(label)])
        several = label if isinstance(label, (list, tuple, set, frozenset, range)) else [label]
        if not several:
            raise InputError("no label is given: steer to one class, or to several")
        return torch.stack([self.mean(one, source) for one in labels_of(several)]).mean(0, keepdim=True)
