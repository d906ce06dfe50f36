"""Which parameters of a test are for the long suite only."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def long(*values: Any) -> Any:
    """One row of parameters that `make test` leaves to `make test-all`."""
    return pytest.param(*values, marks=pytest.mark.long)


def long_but(short: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """All values of one parameter, of which `make test` takes only those in `short`."""
    values = list(values)
    assert set(short) <= set(values), set(short) - set(values)
    return [value if value in short else long(value) for value in values]
