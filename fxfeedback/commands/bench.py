"""How long a network takes, over the plain model on which it is built, in evaluation mode on the CPU.

Both run in turns, so that whatever else the machine does meets both; the ratio is that of the medians, and its spread
the quartiles of the single pairs. An instruction's gates are kept between calls, as in any use.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fxfeedback.commands.given import add_connections, add_model, add_tasks, positive, read_network
from fxfeedback.commands.text import several, sizes

WARM_UP = 2
"""Rounds that are not counted."""

EXAMPLES = [
    "fxfeedback bench resnet50 --connect layer4:layer3.0.relu",
    "fxfeedback bench resnet18 --tasks 2 --batch 32 --input-size 3x64x64",
    "OMP_WAIT_POLICY=passive fxfeedback bench steered --threads 2 --repeats 31",
]
KEYS = {
    "model": "MODEL, as given",
    "what": "what is measured, over the plain model",
    "torch": "its version",
    "device": "cpu",
    "threads": "of torch",
    "batch": "how many images at once",
    "inputs": "the shape of each input",
    "repeats": "how many times each ran",
    "plain_ms": "median milliseconds of the plain model",
    "ms": "median milliseconds of the network",
    "ratio": "of the medians",
    "low": "lower quartile of the pairs' ratios",
    "high": "upper quartile of the pairs' ratios",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, connections or tasks, and how it is measured."""
    add_model(parser)
    add_connections(parser)
    add_tasks(parser)
    parser.add_argument("--batch", type=positive, default=4, metavar="N", help="images at once (default %(default)s)")
    parser.add_argument("--repeats", type=positive, default=11, metavar="N", help="runs of each (default %(default)s)")
    parser.add_argument("--threads", type=positive, metavar="N", help="of torch (default: as torch chooses)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the network, and run it and the plain model in turns."""
    import torch

    import fxfeedback
    from fxfeedback.commands.networks import part_with
    from fxfeedback.storage.save_load import unwrap
    from fxfeedback.tracing.wrapper import Wrapper, example_of, stand_ins_of

    network = read_network(arguments, fxfeedback.FeedbackModel, fxfeedback.BUTD)
    _, wrapper = part_with(network, Wrapper)
    plain, wrappers = unwrap(wrapper)
    plain.eval()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    inputs = [_drawn(x, arguments.batch) for x in stand_ins_of(wrapper)]
    options = _instruction(wrapper)
    args, named = example_of(wrapper).form.fill(inputs)
    with torch.inference_mode():
        plain_seconds, seconds = _in_turns(
            [lambda: plain(*args, **named), lambda: wrapper(*args, **named, **options)], arguments.repeats
        )
    low, _, high = _quartiles([a / b for a, b in zip(seconds, plain_seconds, strict=True)])
    return {
        "model": arguments.model,
        "what": ", ".join(_what(kind, how) for _, kind, how in reversed(wrappers)),
        "torch": torch.__version__,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "batch": arguments.batch,
        "inputs": [list(x.shape) for x in inputs],
        "repeats": arguments.repeats,
        "plain_ms": 1e3 * statistics.median(plain_seconds),
        "ms": 1e3 * statistics.median(seconds),
        "ratio": statistics.median(seconds) / statistics.median(plain_seconds),
        "low": low,
        "high": high,
    }


def _drawn(example: Any, batch: int) -> Any:
    """Random numbers like an example input, with this batch where it has one."""
    import torch

    shape = (batch, *example.shape[1:]) if example.ndim else ()
    is_floating = example.is_floating_point()
    return torch.randn(shape, dtype=example.dtype) if is_floating else torch.zeros(shape, dtype=example.dtype)


def _instruction(wrapper: Any) -> dict[str, Any]:
    """What a network with tasks takes besides its inputs: the first task."""
    import torch

    import fxfeedback
    from fxfeedback.instructed.kept_graphs import graphs_of

    if not isinstance(wrapper, fxfeedback.BUTD):
        return {}
    return {"task": torch.eye(graphs_of(wrapper).instruction_size)[:1]}


def _what(kind: str, how: Mapping[str, Any]) -> str:
    return several(how["passes"], "pass", "passes") if kind == "FeedbackModel" else "one instruction"


def _in_turns(runs: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each call of each."""
    seconds: list[list[float]] = [[] for _ in runs]
    for number, (run, taken) in itertools.product(range(repeats + WARM_UP), zip(runs, seconds, strict=True)):
        start = time.perf_counter()
        run()
        if number >= WARM_UP:
            taken.append(time.perf_counter() - start)
    return seconds


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values) if len(values) > 1 else values * 3


def lines(result: dict[str, Any]) -> Iterator[str]:
    """How it was measured, and the ratio."""
    threads = several(result["threads"], "thread")
    yield (
        f"{result['model']}: {result['what']}, over the plain model; torch {result['torch']}, {result['device']}, "
        f"{threads}, batch {result['batch']}, input {', '.join(map(sizes, result['inputs']))}"
    )
    yield f"{result['ms']:.1f} ms over {result['plain_ms']:.1f} ms, medians of {several(result['repeats'], 'run')} each"
    yield f"ratio {result['ratio']:.2f} (quartiles {result['low']:.2f} to {result['high']:.2f})"
