"""What a run leaves: its log as CSV and as TensorBoard's curves, and the table over runs with several seeds."""

import csv
import io
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from jobs import write_whole

CONFIDENCE = 0.95
NOT_SCORES = ("epoch", "lr", "seconds")


class Log:
    """The rows of a run, one per epoch, in `log.csv` and in the folder `tensorboard`.

    Both are written from the rows that the checkpoint has, so a run that goes on has no gap and no double entry.
    """

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
        self.file, self.rows = folder / "log.csv", list[dict[str, Any]]()
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.curves = SummaryWriter(str(folder / "tensorboard"))
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self.rows.append(row)
        write_whole(self.file, lambda path: path.write_text(as_csv(self.rows)))
        for name, value in row.items():
            if name != "epoch":
                self.curves.add_scalar(name, value, row["epoch"])
        self.curves.flush()


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the same columns as CSV."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


class Interval(NamedTuple):
    """A mean, and half the width of its 95 % confidence interval (Student's t); not a number for a single run."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isnan(self.half) else f"{self.mean:.4f} ± {self.half:.4f}"


def interval(values: Sequence[float]) -> Interval:
    """The mean of what several runs gave, and how sure it is."""
    n = len(values)
    if n < 2:
        return Interval(fmean(values), math.nan)
    return Interval(fmean(values), float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(values) / math.sqrt(n))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Interval]:
    """Name -> interval, over the last rows of several runs."""
    return {name: interval([row[name] for row in rows]) for name in rows[0] if name not in NOT_SCORES}


def write_summary(folder: Path, rows: dict[int, dict[str, Any]]) -> None:
    """`results.json` and `results.csv`: what each seed ended with, and their means; rows by seed."""
    table = [{"seed": seed, **row} for seed, row in rows.items()]
    means = {name: one._asdict() for name, one in summary(list(rows.values())).items()}
    text = json.dumps({"runs": table, "summary": means}, indent=2).replace("NaN", "null") + "\n"
    write_whole(folder / "results.json", lambda path: path.write_text(text))
    write_whole(folder / "results.csv", lambda path: path.write_text(as_csv(table)))
