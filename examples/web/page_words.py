"""The prior of the page, from words to what its first network shows of a digit; what words.js reads.

python examples/web/page_words.py         # fits it anew to the prototypes in examples/web/data/page.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.feature_extraction.text import TfidfVectorizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the other examples

import fxfeedback
from fxfeedback.prototypes.moments import Moments
from page_networks import DATA
from steer_by_words import SEEN, letters, sentences


def make_words(prototypes: Sequence[Sequence[float]], source: str) -> dict[str, Any]:
    """words.json: the prior's bias, the sizes of the groups of letters, and of each group what it adds."""
    texts = sentences(SEEN)
    vectorizer: TfidfVectorizer = letters([text for several in texts.values() for text in several]).__self__
    table = torch.tensor(prototypes, dtype=torch.float64)
    own = fxfeedback.Prototypes({k: Moments(1, {source: row}, {source: 0 * row}) for k, row in enumerate(table)})
    prior = fxfeedback.TextPrior.fit({k: vectorizer.transform(several).toarray() for k, several in texts.items()}, own)
    names = vectorizer.get_feature_names_out().tolist()
    nothing = torch.zeros(1, len(names))
    bias = prior(nothing)[0]
    adds = prior(torch.diag(torch.tensor(vectorizer.idf_))) - bias  # the prior is linear
    return {
        "bias": rounded(bias),
        "sizes": list(vectorizer.ngram_range),
        "groups": {name: rounded(row) for name, row in zip(names, adds, strict=True)},
    }


def rounded(row: torch.Tensor) -> list[float]:
    """With four digits."""
    return [round(value, 4) for value in row.tolist()]


def write_words(folder: Path, about: dict[str, Any]) -> None:
    """Write words.json; about: page.json's "steering"."""
    words = make_words(about["prototypes"], about["source"])
    (folder / "words.json").write_text(json.dumps(words, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    write_words(DATA, json.loads((DATA / "page.json").read_text())["steering"])
