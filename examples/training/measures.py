"""What can be measured in a BU-TD network: its tasks' sub-networks, and how far TD weights are from BU weights."""

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

import fxfeedback


@torch.no_grad()
def sub_networks(
    butd: fxfeedback.BUTD, tasks: Sequence[str], instructions: torch.Tensor | None = None
) -> dict[str, Any]:
    """What part of the network each task uses; `instructions` are the tasks' own where they are not their numbers.

    Returns:
        `active_share`: task -> site -> share of its units with a positive counter neuron.
        `active_share_total`: the same over all sites.
        `overlap`: site -> cosine between two tasks' 0/1 vectors of active units, 0 where one is empty, mean over pairs.
    """
    training = butd.training
    device = next(butd.parameters()).device
    given = torch.arange(len(tasks)) if instructions is None else instructions
    counters = butd.eval().counter_neurons(given.to(device))
    butd.train(training)
    active = {site: (value > 0).flatten(1).float() for site, value in counters.items()}
    shares = {site: units.mean(1).tolist() for site, units in active.items()}
    totals = torch.cat(list(active.values()), 1).mean(1).tolist()
    pairs = list(combinations(range(len(tasks)), 2))
    return {
        "active_share": {task: {site: shares[site][t] for site in shares} for t, task in enumerate(tasks)},
        "active_share_total": dict(zip(tasks, totals, strict=True)),
        "overlap": {
            site: fmean(F.cosine_similarity(units[a], units[b], dim=0).item() for a, b in pairs)
            for site, units in active.items()
        },
    }


def angles(butd: fxfeedback.BUTD) -> dict[str, float]:
    """`angle` -> the mean over the weights of the angle to what TD reads, in degrees; `angle_NAME` -> one weight's.

    Empty where TD reads the BU weights themselves, or the error.
    """
    if butd.options.weights == "shared":
        return {}
    found = {f"angle_{name}": one.angle for name, one in butd.alignment().items() if one.angle is not None}
    return {"angle": fmean(found.values()), **found} if found else {}
