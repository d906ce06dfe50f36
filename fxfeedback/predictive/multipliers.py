"""The multipliers of one prediction: β, λ, α, as numbers that are kept or as parameters that are learned."""

import math

import torch
from torch import nn

from fxfeedback.errors import OptionError
from fxfeedback.predictive.predictions import Prediction


class Multipliers(nn.Module):
    """Buffers β = `feedforward`, λ = `feedback`, α = `error` of one prediction, each of one number."""

    def __init__(self, prediction: Prediction) -> None:
        super().__init__()
        for name in ("feedforward", "feedback", "error"):
            self.register_buffer(name, torch.tensor(float(getattr(prediction, name)), dtype=torch.float64))


class LearnedMultipliers(nn.Module):
    """Parameters u, v, w and alpha: β = σ(u) / S, λ = σ(v) / S, 1 - β - λ = σ(w) / S with S their sum, α = alpha.

    They start at the logits of β, λ and 1 - β - λ. There is no v where nothing is fed back.
    """

    def __init__(self, prediction: Prediction, fed_back: bool) -> None:
        super().__init__()
        shares = {"u": prediction.feedforward, "v": prediction.feedback if fed_back else 0.0}
        shares["w"] = 1 - sum(shares.values())
        for name, share in shares.items():
            if name == "v" and not fed_back:
                continue
            if not 0 < share < 1:
                what = {"u": "feedforward", "v": "feedback", "w": "memory, 1 - feedforward - feedback,"}[name]
                raise OptionError(
                    f"learn_multipliers=True: the prediction at {prediction.node!r} has the {what} {share:.6g}; what "
                    "is learned starts between 0 and 1"
                )
            setattr(self, name, _parameter(math.log(share / (1 - share))))
        self.alpha = _parameter(prediction.error)


def _parameter(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(float(value), dtype=torch.float64))
