"""`steerability`: what steering does to the name that a network gives to a composite."""

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fxfeedback.errors import InputError, OptionError
from fxfeedback.prototypes.prototypes import Prototypes
from fxfeedback.tracing.modes import eval_mode

Row = dict[str, Any]
"""One line of a table."""
CONFIDENCE = 0.95
SHARES = ("unsteered", "steered", "gain", "absent_unsteered", "hallucinated")
RANKS = ("rank_unsteered", "rank_steered")


def steerability(
    model: nn.Module,
    dataset: Dataset | DataLoader,
    prototypes: Prototypes,
    strengths: Iterable[float] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0),
    *,
    source: str | None = None,
    batch_size: int = 500,
    progress: bool = True,
) -> list[Row]:
    """How steering changes what the last pass names, one row per strength; in evaluation mode.

    Args:
        model: made by `add_feedback`; returns logits (B, classes).
        dataset: of triplets, as `TripletDataset` gives them, or a loader of it.
        prototypes: of one of the model's sources, with a label for every class of the triplets.
        strengths: of steering.
        source: which one is steered, where the prototypes are of several.
        batch_size: composites at a time.
        progress: show a bar, where the output is a terminal.

    Returns:
        Rows with "kind" (of the data set, if it has one), "strength", "composites" (how many), and shares in 0..1:
        "unsteered", "steered": how often the target is named first, each of the two present classes being the target
        once (so without steering they share at most 1, half each); "gain": their difference; "hallucinated": how often
        the absent class is named when steered to, "absent_unsteered" when not; and "rank_unsteered", "rank_steered":
        the target's mean place among all classes, the first being 1. NAME_ci is half the width of the 95 % confidence
        interval of NAME over the composites.

    Raises:
        InputError: a class without a prototype or without an output, no composites.
        OptionError: no strengths.
    """
    levels = [float(strength) for strength in strengths]
    if not levels:
        raise OptionError("strengths is empty: give one or several numbers")
    loader = dataset if isinstance(dataset, DataLoader) else DataLoader(dataset, batch_size)
    kind = getattr(loader.dataset, "kind", "")
    parts: list[Tensor] = []
    with eval_mode(model), torch.no_grad():
        for images, present, absent in tqdm(
            loader, f"steering {kind}".strip(), unit="batch", dynamic_ncols=True, disable=None if progress else True
        ):
            classes = torch.stack([*present, absent])
            parts.append(_ranks(model, images, classes, prototypes, levels, source))
    if not parts:
        raise InputError("there are no composites: nothing can be measured")
    ranks = torch.cat(parts, -1)
    return [_row(kind, level, ranks[0], ranks[i]) for i, level in enumerate(levels, 1)]


def _ranks(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    prototypes: Prototypes,
    levels: Sequence[float],
    source: str | None,
) -> Tensor:
    """The place of each class (3, B) among all: without steering, and steered to it with each strength.

    (1 + strengths, 3, B)
    """
    like = next(model.parameters())
    images, found = images.to(like.device, like.dtype), []
    plain = _logits(model(images), classes)
    found.append(torch.stack([_rank(plain, target) for target in classes]))
    for level in levels:
        steered = []
        for target in classes:
            steering = prototypes.steering(target, level, source=source)
            steered.append(_rank(_logits(model(images, steering=steering), classes), target))
        found.append(torch.stack(steered))
    return torch.stack(found)


def _logits(outputs: Any, classes: Tensor) -> Tensor:
    """Of the last pass.

    Raises:
        InputError: they do not name all classes, or are not finite.
    """
    logits = outputs[-1] if isinstance(outputs, (list, tuple)) else outputs
    if logits.ndim != 2 or int(classes.max()) >= logits.shape[1]:
        raise InputError(f"outputs of shape {tuple(logits.shape)} do not name the classes up to {int(classes.max())}")
    if not logits.isfinite().all():
        raise InputError("the model's outputs are not finite (NaN or infinite): they name no class")
    return logits


def _rank(logits: Tensor, target: Tensor) -> Tensor:
    """The place of each target (B,), the first being 1; of equal logits the first comes first, as for argmax."""
    own = logits.gather(1, target.to(logits.device).unsqueeze(1))
    before = torch.arange(logits.shape[1], device=logits.device) < target.to(logits.device).unsqueeze(1)
    return 1 + ((logits > own) | ((logits == own) & before)).sum(1).cpu()


def _row(kind: str, strength: float, plain: Tensor, steered: Tensor) -> Row:
    """Of the ranks (3, B), without and with steering."""
    named, named_steered = (plain == 1).double(), (steered == 1).double()
    values = {
        "unsteered": named[:2].mean(0),
        "steered": named_steered[:2].mean(0),
        "gain": (named_steered - named)[:2].mean(0),
        "absent_unsteered": named[2],
        "hallucinated": named_steered[2],
        "rank_unsteered": plain[:2].double().mean(0),
        "rank_steered": steered[:2].double().mean(0),
    }
    row: Row = {"kind": kind, "strength": strength, "composites": plain.shape[1]}
    for name, per_composite in values.items():
        row[name], row[f"{name}_ci"] = _mean_and_interval(per_composite)
    return row


def _mean_and_interval(values: Tensor) -> tuple[float, float | None]:
    """The mean, and half its confidence interval; None of a single value."""
    if len(values) < 2:
        return float(values.mean()), None
    quantile = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return float(values.mean()), quantile * float(values.std()) / math.sqrt(len(values))


def table(rows: Iterable[Row]) -> str:
    """Rows of `steerability`, or means of them, as people read them, in %."""

    def percent(row: Row, name: str, sign: str = "") -> str:
        interval = row.get(f"{name}_ci")
        return f"{100 * row[name]:{sign}.1f}" + ("" if interval is None else f" ± {100 * interval:.1f}")

    text = [f"{'kind':14}{'strength':>8}{'unsteered':>15}{'steered':>15}{'gain':>15}{'hallucinated':>15}"]
    for row in rows:
        numbers = percent(row, "unsteered"), percent(row, "steered"), percent(row, "gain", "+")
        cells = "".join(f"{cell:>15}" for cell in (*numbers, percent(row, "hallucinated")))
        text.append(f"{row['kind']:14}{row['strength']:>8g}{cells}")
    return "\n".join(text)
