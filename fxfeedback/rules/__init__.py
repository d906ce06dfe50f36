"""The rules: for every BU op its TD counterpart and its Counter-Hebb update, one file per op family.

`core.py` says what a rule is and how one is written.
"""

from fxfeedback.rules import (  # noqa: F401  (importing a file registers its rules)
    activation,
    arithmetic,
    attention,
    complex_values,
    convolution,
    dropout,
    elementwise,
    embedding_bags,
    factorizations,
    gating,
    indexing,
    linear,
    linear_algebra,
    linear_systems,
    matmul,
    normalization,
    pooling,
    reduction,
    reflections,
    repeating,
    reshaping,
    resizing,
    sampling,
    scattering,
    sequence_losses,
    special,
    spectra,
    two_values,
    unpooling,
    writing,
)
from fxfeedback.rules.core import RULES, Roles, Rule, constant, fused, known, roles, rule, sum_to, transpose, update
from fxfeedback.rules.examples import C, T, call

__all__ = [
    "RULES",
    "C",
    "Roles",
    "Rule",
    "T",
    "call",
    "constant",
    "fused",
    "known",
    "roles",
    "rule",
    "sum_to",
    "transpose",
    "update",
]
