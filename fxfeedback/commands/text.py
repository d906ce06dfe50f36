"""How results are written for people."""

from collections.abc import Iterator, Sequence
from typing import Any


def printable(text: str) -> str:
    """A line for a terminal: what a file has put into it is shown, and not carried out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Aligned lines; numbers are written to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    for row in cells:
        aligned = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        yield "  ".join(aligned).rstrip()


class Count(int):
    """A whole number, written with commas: 61,100,840."""

    def __str__(self) -> str:
        return f"{self:,}"


class Percent(float):
    """A share of one, written as 49.8 %."""

    def __str__(self) -> str:
        return f"{100 * self:.1f} %"


def sizes(shape: Sequence[Any] | None) -> str:
    """A shape, B for the batch: (B, 64, 56, 56)."""
    return "" if shape is None else f"({', '.join('B' if size is None else str(size) for size in shape)})"


def several(number: int, what: str, plural: str = "") -> str:
    """1 site, 2 sites."""
    return f"{number:,} {what if number == 1 else plural or what + 's'}"


def operations(flops: int) -> str:
    """A count of operations: 3.6 G."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if flops >= 10**power:
            return f"{flops / 10**power:.3g} {unit}"
    return str(flops)


def megabytes(size: int) -> str:
    """A file's size."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
