"""Work in processes of its own: what hangs or dies takes nothing else with it."""

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

SPAWN = multiprocessing.get_context("spawn")


class Busy(NamedTuple):
    """A process, what it works on, and when it must be done."""

    process: BaseProcess
    name: str
    deadline: float


def in_workers(
    work: Callable[[str], Any], names: Sequence[str], jobs: int, limit: float
) -> Iterator[tuple[str, Any, str]]:
    """Yield (name, what `work(name)` returns, "") for each name, as they become ready.

    Of one that takes more than `limit` seconds, or whose process dies: (name, None, what happened).

    Args:
        work: a function of a module, which does not raise.
        names: what to work on.
        jobs: how many processes there are.
        limit: in seconds.
    """
    waiting, busy = deque(names), {}
    try:
        for _ in range(min(jobs, len(names))):
            connection, process = _start(work)
            busy[connection] = _give(connection, process, waiting.popleft(), limit)
        while busy:
            wait(list(busy), timeout=1)
            for connection, (process, name, deadline) in list(busy.items()):
                result, failure = None, ""
                if connection.poll():
                    try:
                        result = connection.recv()
                    except EOFError:
                        process.join()
                        failure = f"the process ended with exit code {process.exitcode}"
                elif time.monotonic() > deadline:
                    failure = f"not done after {limit:.0f} s"
                else:
                    continue
                del busy[connection]
                if failure:
                    process.kill()
                if waiting:
                    connection, process = _start(work) if failure else (connection, process)
                    busy[connection] = _give(connection, process, waiting.popleft(), limit)
                elif not failure:
                    connection.send(None)
                yield name, result, failure
    finally:
        for process, *_ in busy.values():
            process.kill()


def _start(work: Callable[[str], Any]) -> tuple[Connection, BaseProcess]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_loop, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _give(connection: Connection, process: BaseProcess, name: str, limit: float) -> Busy:
    connection.send(name)
    return Busy(process, name, time.monotonic() + limit)


def _loop(connection: Connection, work: Callable[[str], Any]) -> None:
    while (name := connection.recv()) is not None:
        connection.send(work(name))
