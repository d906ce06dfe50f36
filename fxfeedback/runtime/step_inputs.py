"""What a step of learning takes beside the network's inputs, checked; and the refusal of what is not finite."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fxfeedback.errors import InputError
from fxfeedback.runtime.arrays import array, cast, dtype_of, finite, has, is_floating, is_integer
from fxfeedback.runtime.signature import Signature

LEFT_OUT = -100
"""The class id of a sample that no loss is taken of, torch's own."""


class StepInputs(Signature):
    """The inputs of a file of `fxfeedback.export_learner`."""

    def target(self, target: Any, sizes: dict[str, int]) -> Any:
        """The target, (B, ...), an array or a tensor; of a tensor one number is fetched, whether its ids are classes.

        Raises:
            InputError: it has the wrong shape, dtype or range.
        """
        dtype = np.dtype(self.dtypes["target"])  # type: ignore[arg-type]
        target = array(target, "the target", self._place)
        if is_floating(target) != np.issubdtype(dtype, np.floating) or dtype_of(target) == "bool":
            raise InputError(f"the target of {self.metadata['loss']} is of {dtype}, not {dtype_of(target)}")
        target = target if has(target, dtype) else array(target, "the target")
        classes = int(self.outputs["logits"][1]) if np.issubdtype(dtype, np.integer) else None
        if classes is not None and not bool(((target >= 0) & (target < classes) | (target == LEFT_OUT)).all()):
            raise InputError(f"target: class ids lie between 0 and {classes - 1}; {LEFT_OUT} leaves one out")
        return self.checked("target", cast(target, dtype), sizes)

    def magnitudes(self, given: Mapping[str, Any] | None, random: np.random.Generator) -> dict[str, Any]:
        """What the signs are multiplied by that TD reads: what is given by weight name, and drawn for the others.

        Raises:
            InputError: one that the file does not take, or of the wrong shape or dtype.
        """
        bounds, given = self.metadata.get("magnitudes", {}), dict(given or {})
        unknown = next((name for name in given if name not in bounds), None)
        if unknown is not None:
            takes = f"magnitudes of {', '.join(map(repr, bounds))}" if bounds else "no magnitudes"
            raise InputError(f"magnitudes of {unknown!r}: the file takes {takes}")
        feeds = {}
        for weight, b in bounds.items():
            name = f"{weight}.magnitude"
            drawn = given.get(weight)
            if drawn is None:
                drawn = cast(random.uniform(0, b, tuple(map(int, self.inputs[name]))), self.dtypes[name])
            feeds[name] = self.checked(name, array(drawn, repr(name), self._place), {})
        return feeds

    def rate(self, lr: Any) -> np.ndarray:
        """The learning rate.

        Raises:
            InputError: it is not one number, finite and not negative.
        """
        rate = cast(array(lr, "lr"), self.dtypes["lr"])
        if rate.ndim or not np.isfinite(rate) or rate < 0:
            raise InputError(f"lr={lr!r}: give one number, finite and not negative")
        return rate

    def check_finite(self, loss: float, values: float, feeds: Mapping[str, Any]) -> None:
        """Refuse a step by its loss and its look at the values; that of no sample has the loss NaN.

        Raises:
            InputError: something is not finite; it says what.
        """
        if math.isnan(values) or not (math.isfinite(loss) or _of_none(feeds["target"])):
            for name, value in feeds.items():
                finite(value, repr(name))
            what = "new weights" if math.isnan(values) else "the loss"
            raise InputError(
                f"the step would make {what} NaN or infinite (loss {loss}): nothing was learned. Mostly the inputs are "
                "too large or lr is; Learner(..., finite=False) goes on all the same"
            )


def _of_none(target: Any) -> bool:
    return is_integer(target) and bool((target == LEFT_OUT).all())
