"""Checks of what users give, for every option that takes the like."""

from numbers import Integral
from typing import Any

from fxfeedback.errors import OptionError


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 1 on."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def check_passes(passes: Any) -> None:
    """Refuse what is not a number of passes.

    Raises:
        OptionError: it is not a whole number from 1 on.
    """
    if not is_count(passes):
        raise OptionError(f"passes={passes!r}: give a whole number from 1 on")


def check_steps(steps: Any) -> None:
    """Refuse what is not a number of steps.

    Raises:
        OptionError: it is not a whole number from 1 on.
    """
    if not is_count(steps):
        raise OptionError(f"steps={steps!r}: give a whole number from 1 on")
