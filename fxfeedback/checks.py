"""Checks of what users give, for every option that takes the like; and what is said of old names."""

import functools
import warnings
from collections.abc import Callable
from numbers import Integral
from typing import Any, TypeVar

from fxfeedback.errors import OptionError

Function = TypeVar("Function", bound=Callable[..., Any])


def say_deprecated(old: str, new: str, gone_in: str, stacklevel: int = 2) -> None:
    """Warn the caller of a public function that `old` goes in a version, and that `new` does the same."""
    message = f"{old} is deprecated and will be gone in fxfeedback {gone_in}: use {new}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 1)


def renamed_argument(old: str, new: str, gone_in: str) -> Callable[[Function], Function]:
    """A decorator: the argument `new` of a public function may still be given as `old`, with a warning.

    Raises (the decorated function):
        OptionError: it is given by both names.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                if new in kwargs:
                    raise OptionError(f"{old}= and {new}= are one argument: give {new}=")
                say_deprecated(f"{old}=", f"{new}=", gone_in)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return renamed  # type: ignore[return-value]

    return decorate


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
