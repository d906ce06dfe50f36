"""Try random graphs by the thousand: `make fuzz N=10000`, or `python tests/fuzz.py 10000`; SEED= repeats a run.

Ends with the first failure, shrunk, as a model's code, and with the seed of its hundred graphs.
"""

import os
import sys
import warnings

import torch
from hypothesis import given, seed, settings
from tqdm import tqdm

from random_graphs import cases
from test_random_graphs import check, some

CHUNK = 100


def main() -> None:
    """Graphs in hundreds, each hundred from a seed of its own, so that a failure is quick to repeat."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    start = int(os.environ.get("SEED", 0))
    with tqdm(total=number, unit="graph", disable=None) as bar:
        for first in range(0, number, CHUNK):
            here = start + first // CHUNK
            bar.set_postfix(seed=here)

            def one(case):
                check(case)
                bar.update(min(1, number - bar.n))  # the tries that shrink a failure do not count

            count = min(CHUNK, number - first)
            try:
                seed(here)(settings(some, derandomize=False, max_examples=count)(given(cases())(one)))()
            except BaseException:
                print(f"\nA graph fails; to repeat it: SEED={here} python tests/fuzz.py {count}\n", file=sys.stderr)
                raise
            if bar.disable:  # a log: one line a hundred
                print(f"{first + count} of {number} graphs, the last from seed {here}", file=sys.stderr)


if __name__ == "__main__":
    main()
