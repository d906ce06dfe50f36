"""Words as steering: encoders of text, and `TextPrior`, which maps their embeddings to what a network's source would
show of what they name.

An encoder is any callable from a list of strings to embeddings (N, D). Built on `fxfeedback.prototypes`; everything
public is an attribute of this module.
"""

from fxfeedback.text.encoders import TEMPLATES, Encoder, clip
from fxfeedback.text.prior import TextPrior

__all__ = ["TEMPLATES", "Encoder", "TextPrior", "clip"]
