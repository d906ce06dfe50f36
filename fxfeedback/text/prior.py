"""`TextPrior`: from the embedding of words to the activation of a source, to steer with."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fxfeedback.errors import InputError, OptionError
from fxfeedback.feedback import Steering
from fxfeedback.prototypes.moments import Label, Moments
from fxfeedback.prototypes.prototypes import Prototypes
from fxfeedback.text.denoiser import fit_denoiser
from fxfeedback.text.encoders import Encoder, encoded
from fxfeedback.text.prior_files import read_prior, write_prior
from fxfeedback.text.ridge import fit_ridge

KINDS = ("ridge", "diffusion")


class TextPrior:
    """Maps embeddings of words (N, D) to activations of one source (N, ...), made by `TextPrior.fit`.

    kind: "ridge" or "diffusion". source: the node's name. shape: of its activations, without a batch. size: D.
    """

    def __init__(self, kind: str, source: str, shape: Sequence[int], size: int, network: nn.Module) -> None:
        self.kind, self.source, self.shape, self.size = kind, source, tuple(shape), size
        self._network = network

    @classmethod
    def fit(
        cls,
        embeddings: Tensor | Mapping[Label, Any],
        prototypes: Prototypes,
        kind: str = "ridge",
        *,
        source: str | None = None,
        steps: int = 1500,
        seed: int = 0,
    ) -> Self:
        """Learn from words for classes of which there are prototypes.

        Args:
            embeddings: label -> (D,), or (n, D) for several texts; or a tensor (classes, D) or (classes, n, D), in the
                order of `prototypes.labels`.
            prototypes: of the classes; further ones are not used.
            kind: "ridge": linear, in closed form, its penalty chosen by leaving one class out after the other;
                "diffusion": a small denoiser, trained here.
            source: the node, where there are prototypes of several.
            steps, seed: of the denoiser's training; of its weights and training.

        Raises:
            OptionError: an unknown kind, fewer than three classes.
            InputError: embeddings of other shapes or not finite, or of a class without a prototype.
        """
        if kind not in KINDS:
            raise OptionError(f"kind={kind!r}: choose one of {', '.join(map(repr, KINDS))}")
        rows = _by_label(embeddings, prototypes)
        if len(rows) < 3:
            raise OptionError(f"a prior is learned from three classes or more, not from {len(rows)}")
        source = prototypes.sources[0] if source is None and len(prototypes.sources) == 1 else source
        shape = prototypes.shape(source)
        x = torch.cat(list(rows.values()))
        groups = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(each) for each in rows.values()]))
        means = torch.stack([prototypes.mean(label, source).flatten() for label in rows])
        fitted = fit_ridge(x, means[groups], groups) if kind == "ridge" else fit_denoiser(x, means[groups], seed, steps)
        return cls(kind, source or prototypes.sources[0], shape, x.shape[1], fitted)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """What `save` wrote, a .safetensors file, from which no code is read.

        Raises:
            CheckpointError: it is not there, damaged, or not ours.
        """
        return cls(*read_prior(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file.

        Raises:
            OptionError: another ending.
        """
        about = {"kind": self.kind, "source": self.source, "shape": list(self.shape), "size": self.size}
        write_prior(path, about, self._network.state_dict())

    @torch.no_grad()
    def __call__(self, embeddings: Any, *, seed: int = 0) -> Tensor:
        """The activations (N, ...) of embeddings (N, D), float64; seed: of the noise that diffusion begins with.

        Raises:
            InputError: embeddings of another width, or not finite.
        """
        x = torch.as_tensor(embeddings).detach().double().cpu()
        if x.ndim != 2 or x.shape[1] != self.size:
            raise InputError(
                f"this prior takes embeddings (N, {self.size}), not {tuple(x.shape)}: is the encoder another?"
            )
        if not x.isfinite().all():
            raise InputError("an embedding has values that are not finite (NaN or infinite)")
        made = self._network(x, seed=seed) if self.kind == "diffusion" else self._network(x)
        return made.reshape(len(x), *self.shape)

    def activation(self, text: Any, encoder: Encoder | None = None, *, seed: int = 0) -> Tensor:
        """What `steering` steers with, (1, ...), or (B, ...) for embeddings (B, D).

        Args:
            text: a string; several in a list: the mean; or embeddings (D,) or (B, D), one per image.
            encoder: of strings; the one whose embeddings the prior was fitted on.
            seed: as in the call.

        Raises:
            InputError: no encoder for strings, embeddings of another width.
        """
        if isinstance(text, Tensor):
            return self(text if text.ndim > 1 else text.unsqueeze(0), seed=seed)
        if encoder is None:
            raise InputError("pass encoder=, a function from strings to the embeddings the prior was fitted on")
        texts = [text] if isinstance(text, str) else list(text)
        return self(encoded(encoder, texts), seed=seed).mean(0, keepdim=True)

    def steering(
        self,
        text: Any,
        strength: float | Sequence[float] | Tensor = 3.0,
        alpha: float | Tensor = 1.0,
        *,
        encoder: Encoder | None = None,
        seed: int = 0,
    ) -> Steering:
        """ "Look for what this says": what a call of a model with connections takes as `steering`.

        Args:
            text, encoder, seed: as `activation` takes them.
            strength, alpha: see `Steering`.

        Raises:
            InputError: as `activation`.
        """
        return Steering(self.source, self.activation(text, encoder, seed=seed), strength, alpha)

    def prototypes(
        self, texts: Mapping[Label, str | Sequence[str]], encoder: Encoder | None = None, *, seed: int = 0
    ) -> Prototypes:
        """Prototypes made of words: of each label the mean over its texts.

        Raises:
            InputError: as `activation`.
        """
        classes = {}
        for label, several in texts.items():
            if encoder is None:
                raise InputError("pass encoder=, a function from strings to the embeddings the prior was fitted on")
            made = self(encoded(encoder, [several] if isinstance(several, str) else several), seed=seed)
            classes[label] = Moments.of({self.source: made})
        if not classes:
            raise InputError("there are no texts to make prototypes of")
        return Prototypes(classes)

    def __repr__(self) -> str:
        return f"TextPrior({self.kind}: {self.size} numbers -> {self.source} {self.shape})"


def _by_label(embeddings: Any, prototypes: Prototypes) -> dict[Label, Tensor]:
    """Label -> its embeddings (n, D), float64."""
    if not isinstance(embeddings, Mapping):
        if not hasattr(embeddings, "__len__") or len(embeddings) != len(prototypes.labels):
            raise InputError(f"give embeddings of the {len(prototypes.labels)} classes in order, or a dict by label")
        embeddings = dict(zip(prototypes.labels, embeddings, strict=True))
    rows: dict[Label, Tensor] = {}
    for label, given in embeddings.items():
        prototypes.count(label)  # refuses an unknown one
        x = torch.as_tensor(given).detach().double().cpu()
        x = x.unsqueeze(0) if x.ndim == 1 else x
        width = next((len(each[0]) for each in rows.values()), x.shape[-1])
        if x.ndim != 2 or not x.numel() or x.shape[1] != width:
            raise InputError(f"the embeddings of {label!r} have shape {tuple(x.shape)}, not ({width},) or (n, {width})")
        if not x.isfinite().all():
            raise InputError(f"the embeddings of {label!r} are not finite (NaN or infinite)")
        rows[label] = x
    return rows
