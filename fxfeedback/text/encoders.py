"""Encoders: callables from a list of strings to embeddings (N, D); CLIP's among them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxfeedback.errors import InputError, OptionError

Encoder = Callable[[list[str]], Any]
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven prompts for the names of ImageNet's classes that CLIP's authors chose, as the published priors use them."""


def clip(
    name: str = "ViT-B-16",
    pretrained: str | None = "openai",
    *,
    templates: Sequence[str] = TEMPLATES,
    device: Any = "cpu",
    model: Any = None,
) -> Encoder:
    """CLIP's text encoder, by open_clip.

    Args:
        name: a model of open_clip's.
        pretrained: its weights, which open_clip downloads, or a file of them; None: random ones.
        templates: each text stands in each of them in turn, at `{}`, and the normalised embeddings are averaged, as
            usual for the names of classes. For whole sentences: ("{}",).
        device: where the encoder runs.
        model: an open_clip model that you have already, of this name; nothing is then made or loaded.

    Returns:
        A function: N strings -> normalised embeddings (N, D), float32, on the CPU.

    Raises:
        ImportError: open_clip is missing: pip install 'fxfeedback[text]'.
        OptionError: no templates, or one without a place for the text.
    """
    templates = tuple(templates)
    if isinstance(templates, str) or not templates or not all("{}" in one for one in templates):
        raise OptionError(f"templates={templates!r}: give one or several strings with {{}} in the place of the text")
    try:
        import open_clip  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError(f"{error}: to encode words by CLIP, pip install 'fxfeedback[text]'") from error
    if model is None:
        model = open_clip.create_model(name, pretrained=pretrained, device=device)
    encoder, tokenizer = model.eval(), open_clip.get_tokenizer(name)

    @torch.no_grad()
    def encode(texts: list[str]) -> torch.Tensor:
        means = []
        for text in texts:
            tokens = tokenizer([template.replace("{}", text) for template in templates]).to(device)
            each = torch.nn.functional.normalize(encoder.encode_text(tokens).float(), dim=-1)
            means.append(torch.nn.functional.normalize(each.mean(0), dim=-1).cpu())
        return torch.stack(means)

    return encode


def encoded(encoder: Encoder, texts: Sequence[str]) -> torch.Tensor:
    """What an encoder of anybody's makes of texts, (N, D) in float64.

    Raises:
        InputError: there are no texts or something else; what comes back is not (N, D), or not finite.
    """
    texts = list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"give one or several strings to encode, not {texts!r}")
    made = encoder(texts)
    made = made.toarray() if hasattr(made, "toarray") else made  # a sparse matrix of scipy's
    try:
        embeddings = torch.as_tensor(made).detach().double().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the encoder gives a {type(made).__name__}, not embeddings (N, D): {error}") from None
    if embeddings.ndim != 2 or len(embeddings) != len(texts):
        raise InputError(f"the encoder gives shape {tuple(embeddings.shape)} for {len(texts)} texts, not (N, D)")
    if not embeddings.isfinite().all():
        raise InputError("the encoder gives embeddings that are not finite (NaN or infinite)")
    return embeddings
