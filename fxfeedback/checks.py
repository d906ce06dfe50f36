"""Checks of what users give, for every option that takes the like."""

from numbers import Integral
from typing import Any


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 1 on."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
