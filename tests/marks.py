"""Which parameters of a test are for the long suite only."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch

OLD_TORCH = torch.__version__ < (2, 14)
"""torch 2.11, the oldest that we take, cannot do all that 2.14 does; what lies between was not tried."""


def long(*values: Any) -> Any:
    """One row of parameters that `make test` leaves to `make test-all`."""
    return pytest.param(*values, marks=pytest.mark.long)


def sweep(*values: Any) -> Any:
    """One row of parameters that `make test-all` leaves to `make test-sweep`: a large model, of a kind with others."""
    return pytest.param(*values, marks=pytest.mark.sweep)


def long_but(short: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """All values of one parameter, of which `make test` takes only those in `short`."""
    values = list(values)
    assert set(short) <= set(values), set(short) - set(values)
    return [value if value in short else long(value) for value in values]


def one_in(n: int) -> Callable[[Any], Any]:
    """A test of many cases, of which `make test` takes every n-th: see `pytest_collection_modifyitems` in conftest.py.

    With cases that are corners of several parameters, take an n that divides none of the parameters' numbers of values:
    then corners of all kinds are tried.
    """

    def thinned(test: Any) -> Any:
        test.one_in = n
        return test

    return thinned
