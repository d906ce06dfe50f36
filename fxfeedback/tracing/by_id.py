"""What torch.compile can follow: objects by their ids, and what is made once by its name.

A function that it takes as a constant may not take an object of a class of ours in every version of torch. It may take
the object's `id`, and torch.compile then looks in every call whether it is the same. What such a function makes, it
names.
"""

import itertools
import weakref
from typing import Any, TypeVar

T = TypeVar("T")
_NUMBERS = itertools.count()
_KNOWN: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def known_by_id(one: T) -> T:
    """Let `by_id` find it as long as it lives."""
    _KNOWN[id(one)] = one
    return one


def by_id(number: int) -> Any:
    """The living object with this id, which was made known."""
    return _KNOWN[number]


class Shelf:
    """What was made, by a key, as attributes: at these torch.compile looks one by one, where of a dict it also looks at
    the length, and would compile anew with every further entry.
    """

    def __init__(self) -> None:
        self._names: dict[Any, str] = {}  # the last used last

    def __len__(self) -> int:
        return len(self._names)

    def find(self, key: Any) -> str | None:
        """The name of the attribute with what was made for this key, if there is one."""
        name = self._names.pop(key, None)
        if name is not None:
            self._names[key] = name
        return name

    def put(self, key: Any, made: Any) -> str:
        """Keep what was made for this key; returns the attribute's name, which no other ever has."""
        name = f"made_{next(_NUMBERS)}"
        setattr(self, name, made)
        self._names[key] = name
        return name

    def keep(self, n: int) -> None:
        """Only the n that were used last."""
        for key in list(self._names)[:-n]:
            vars(self).pop(self._names.pop(key, ""), None)
