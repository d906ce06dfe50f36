"""What the tests take: `make durations` writes the table tests/durations.md.

A pytest plugin (`-p cpu_times`) that notes every test's seconds of CPU, with those of the processes that it starts, in
the file that CPU_TIMES names: they depend less than the time on the clock on what else the machine does. `python
tests/cpu_times.py FILE` prints them as a table.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

SUITES = ("short", "long", "sweep")
LEAST = 2.0
"""Seconds of the tests that get a row of their own."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note the seconds that a test takes, with those of its fixtures."""
    before = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        suite = next((suite for suite in SUITES[:0:-1] if item.get_closest_marker(suite)), SUITES[0])
        with Path(os.environ["CPU_TIMES"]).open("a") as file:
            file.write(f"{sum(os.times()[:4]) - before:.2f} {suite} {item.nodeid}\n")


def table(lines: list[str]) -> str:
    """Test functions by the seconds of all their cases, in every suite."""
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: {suite: [] for suite in SUITES})
    for line in lines:
        seconds, suite, name = line.split(" ", 2)
        sums[name.partition("[")[0].strip().removeprefix("tests/")][suite].append(float(seconds))
    seconds_of = {suite: sum(sum(each[suite]) for each in sums.values()) for suite in SUITES}
    tests_of = {suite: sum(len(each[suite]) for each in sums.values()) for suite in SUITES}
    text = [
        "# What the tests take",
        "",
        "Seconds of CPU, `make durations`. Two idle cores take half as many on the clock, and half a minute to start.",
        "",
        f"- short suite, `make test`: {tests_of['short']} tests, {seconds_of['short']:.0f} s",
        f"- `make test-all` has {tests_of['long']} more: {seconds_of['long']:.0f} s",
        f"- `make test-sweep`: {tests_of['sweep']} others, {seconds_of['sweep']:.0f} s",
        "",
        f"Tests that take {LEAST:.0f} s or more, with all their cases:",
        "",
        "| test | cases, short | s | cases, long | s | cases, sweep | s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, each in sorted(sums.items(), key=lambda item: -sum(map(sum, item[1].values()))):
        if sum(map(sum, each.values())) >= LEAST:
            cells = (f"{len(each[suite])} | {sum(each[suite]):.1f}" for suite in SUITES)
            text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*text, ""])


if __name__ == "__main__":
    print(table(Path(sys.argv[1]).read_text().splitlines()), end="")
