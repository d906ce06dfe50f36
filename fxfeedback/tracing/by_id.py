"""Objects by their ids, for functions that torch.compile takes as constants.

Such a function may not take an object of a class of ours in every version of torch, but it may take its `id`, and
torch.compile then looks in every call whether it is the same object.
"""

import weakref
from typing import Any, TypeVar

T = TypeVar("T")
_KNOWN: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def known_by_id(one: T) -> T:
    """Let `by_id` find it as long as it lives."""
    _KNOWN[id(one)] = one
    return one


def by_id(number: int) -> Any:
    """The living object with this id, which was made known."""
    return _KNOWN[number]
