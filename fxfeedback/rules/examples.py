"""The example calls of a rule, which the law is tried on.

    @rule(F.linear, examples=[call(F.linear, T(4, 3), T(2, 3), T(2))])

says: x of shape (4, 3), a weight (2, 3) and a bias (2). The first tensor is a BU value with its batch first, the others
are parameters; a `C` is a positive constant that learns nothing.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class T:
    """A standard normal tensor of this shape."""

    shape: tuple[int, ...]

    def __init__(self, *shape: int) -> None:
        object.__setattr__(self, "shape", shape)


@dataclass(frozen=True)
class C:
    """A constant tensor of this shape, between 0.5 and 1.5."""

    shape: tuple[int, ...]

    def __init__(self, *shape: int) -> None:
        object.__setattr__(self, "shape", shape)


@dataclass(frozen=True)
class Example:
    """One call of a BU op, with `T` and `C` in the place of tensors.

    tolerance: of the law, relative to the gradient's largest value.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tolerance: float = 1e-9

    def __str__(self) -> str:
        arguments = [*map(str, self.args), *(f"{key}={value}" for key, value in self.kwargs.items())]
        return f"{getattr(self.function, '__name__', self.function)}({', '.join(arguments)})"


def call(function: Any, *args: Any, **kwargs: Any) -> Example:
    """An example call."""
    return Example(function, args, kwargs)
