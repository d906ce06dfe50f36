"""Draw a network: its graph, with --connect its connections and what passes share, with --tasks its sites and what
tasks switch on.

The file's name says how: .svg, .png or .html, one page to look around in.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxfeedback.commands.given import add_connections, add_model, add_tasks, read_network, tasks
from fxfeedback.commands.text import megabytes
from fxfeedback.errors import OptionError

EXAMPLES = [
    "fxfeedback draw resnet18 resnet18.svg --connect layer4:layer1",
    "fxfeedback draw resnet18 tasks.html --tasks 2 --gating channel",
    "fxfeedback draw steered steered.png",
    "fxfeedback draw instructed two.svg --tasks 3,7",
    "fxfeedback draw vit_b_16 vit_b_16.html",
]
KEYS = {"model": "MODEL, as given", "file": "what was drawn", "bytes": "its size"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, FILE, connections or tasks."""
    add_model(parser)
    parser.add_argument("file", metavar="FILE", help="FILE.svg, FILE.png or FILE.html")
    add_connections(parser)
    add_tasks(parser, tasks_or_ids)


def tasks_or_ids(text: str) -> Any:
    """As for other commands, or 3,7: ids of the tasks that are drawn."""
    return [number(part) for part in text.split(",")] if "," in text else tasks(text)


def number(text: str) -> int:
    """An id of a task."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no task's id, a whole number from 0 on")
    return int(text)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """As `fxfeedback.draw`."""
    import fxfeedback
    from fxfeedback.tracing.wrapper import Wrapper

    shown = arguments.tasks if isinstance(arguments.tasks, list) else None
    if shown:
        arguments.tasks = None
        network = read_network(arguments)
        if not any(isinstance(part, fxfeedback.BUTD) for part in network.modules()):
            raise OptionError(
                "--tasks 3,7 chooses among the tasks of a saved network: give a plain model --tasks N first"
            )
    else:
        network = read_network(arguments)
    how: dict[str, Any] = {"tasks": shown} if shown else {}
    if arguments.input_size and not isinstance(network, Wrapper):
        how["input_size"] = arguments.input_size
    fxfeedback.draw(network, arguments.file, **how)
    return {"model": arguments.model, "file": arguments.file, "bytes": Path(arguments.file).stat().st_size}


def lines(result: dict[str, Any]) -> Iterator[str]:
    """One line."""
    yield f"{result['file']} ({megabytes(result['bytes'])})"
