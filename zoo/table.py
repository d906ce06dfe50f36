"""The tables of the zoo: printed row by row, and kept in docs/zoo as CSV.

A run of some models replaces their rows in the file and leaves the others.
"""

import csv
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from models import Problem

from fxfeedback.files import replace_whole

KEPT = Path(__file__).parents[1] / "docs" / "zoo"


class Line(NamedTuple):
    """A row: what stands under the columns (nothing: a dash in each), whether all is well, and what else to say."""

    cells: Sequence[str]
    ok: bool
    remark: str = ""


class Table(NamedTuple):
    """What is printed above the rows, the names and widths of the columns, and what stands before them in a file."""

    legend: str
    columns: Mapping[str, int]
    remarks: str
    first: Sequence[str] = ("model", "seconds")

    def fill(
        self,
        known: Mapping[str, str],
        names: Sequence[str],
        row: Callable[[str, str], Line],
        file: Path | None = None,
    ) -> int:
        """Print the table; returns how many models are not well.

        Args:
            known: the kinds of all models, by name.
            names: the models to try; none means all.
            row: called with a model's name and kind; what it raises becomes the row's remark.
            file: where the rows are kept.

        Raises:
            SystemExit: a name is unknown.
        """
        if unknown := set(names) - set(known):
            raise SystemExit(f"the zoo has no model {', '.join(sorted(unknown))}")
        warnings.filterwarnings("ignore")
        chosen = {name: known[name] for name in names or known}
        head = "".join(f"{column:>{width}}" for column, width in self.columns.items())
        print(f"{self.legend}\n\n{'model':<38}{'time':>8}{head}  {'':<7}{self.remarks}", flush=True)
        bad, start = 0, time.perf_counter()
        for name, kind in chosen.items():
            began = time.perf_counter()
            try:
                line = row(name, kind)
            except Exception as error:
                line = Line((), False, in_words(error))
            bad += not line.ok
            seconds, cells = time.perf_counter() - began, line.cells or len(self.columns) * ["-"]
            shown = "".join(f"{cell:>{width}}" for cell, width in zip(cells, self.columns.values(), strict=True))
            verdict = f"{'ok' if line.ok else 'NOT OK':<7}{line.remark}".rstrip()
            print(f"{name:<38}{seconds:>6.1f} s{shown}  {verdict}", flush=True)
            if file is not None:
                self.keep(
                    file, list(known), [name, f"{seconds:.0f}", *cells, " ".join(verdict.split()), torch.__version__]
                )
        minutes = (time.perf_counter() - start) / 60
        print(f"\n{len(chosen) - bad} of {len(chosen)} models ok, {bad} not, in {minutes:.0f} min", flush=True)
        return bad

    def keep(self, file: Path, order: Sequence[str], new: Sequence[str]) -> None:
        """Put one row into the file, in the place of the model's old one."""
        rows = {new[0]: new}
        if file.exists():
            with file.open(newline="") as old:
                rows = {row[0]: row for row in list(csv.reader(old))[1:]} | rows

        def write(path: str) -> None:
            with Path(path).open("w", newline="") as whole:
                table = csv.writer(whole, lineterminator="\n")
                table.writerow([*self.first, *self.columns, self.remarks, "torch"])
                table.writerows(rows[name] for name in order if name in rows)

        replace_whole(file, write)


def in_words(error: Exception) -> str:
    """What is wrong, on one line; where it is no finding of the checks, with the error's type."""
    origin = "" if isinstance(error, Problem) else f"{type(error).__name__}: "
    return origin + " ".join(str(error).split())


def command(main: Callable[[Sequence[str], Path], int], file: str) -> NoReturn:
    """Run a table from the command line: exits with the number of models that are not well."""
    try:
        sys.exit(min(main(sys.argv[1:], KEPT / file), 99))
    except KeyboardInterrupt:
        sys.exit(130)
