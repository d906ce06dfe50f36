"""What the benchmarks share: a device, times taken in turns, their ratios, figures, memory, counts of operations.

They run where the environment's DEVICE says, `cuda` or by default `cpu`. TINY=1: as on a GPU, but with two images,
one turn, one network, and on the CPU: do they run?
"""

import argparse
import functools
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

Run = Callable[[], object]
T = TypeVar("T")
DEVICE, TINY = torch.device(os.environ.get("DEVICE") or "cpu"), bool(os.environ.get("TINY"))
ON_GPU = DEVICE.type != "cpu"
SECONDS = 2.0
"""On a GPU, where a turn takes milliseconds, turns end after so many."""


def sized(cpu: int, gpu: int) -> int:
    """How many images, where this runs."""
    return 2 if TINY else gpu if ON_GPU else cpu


def of_these(networks: dict[str, T]) -> dict[str, T]:
    """All, or the first, where it is only seen whether they run."""
    return dict(list(networks.items())[:1]) if TINY else networks


class Precision(NamedTuple):
    """What a benchmark computes in: all of it, or, by autocast, what torch thinks fit; and how maps lie."""

    name: str = ""
    autocast: torch.dtype | None = None
    layout: torch.memory_format = torch.contiguous_format

    def put(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module on the device, laid out so."""
        return module.to(DEVICE).to(memory_format=self.layout)

    def images(self, *shape: int) -> torch.Tensor:
        """A random batch there."""
        return torch.randn(shape, device=DEVICE).contiguous(memory_format=self.layout)

    def __call__(self) -> torch.autocast:
        """The context to compute in."""
        return torch.autocast(DEVICE.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def infers(self, model: Callable[..., object], *inputs: Any) -> Run:
        """A call without gradients."""

        def run() -> object:
            with torch.no_grad(), self():
                return model(*inputs)

        return run

    def of(self, network: str) -> str:
        """What the table calls it."""
        return f"{network}, {self.name}" if self.name else network


BFLOAT16 = Precision("bfloat16, channels last", torch.bfloat16, torch.channels_last)
TF32 = Precision("TF32")
PLAIN = Precision()
PRECISIONS = (BFLOAT16, TF32) if ON_GPU or TINY else (PLAIN,)
if ON_GPU:
    torch.set_float32_matmul_precision("high")  # TF32, as convolutions are by default, and ONNX Runtime
    torch.backends.cudnn.benchmark = True


class Ratio(NamedTuple):
    """Of medians, with the quartiles of the single pairs."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


class Figure(NamedTuple):
    """One result: of which network, what over what, and what else was seen, as the milliseconds."""

    network: str
    what: str
    ratio: Ratio
    note: str = ""
    more_is_better: bool = False


def command_line(about: str | None, networks: Iterable[str] = (), compiles: bool = False) -> argparse.Namespace:
    """What every benchmark may be told; sets torch's threads and says what it runs on.

    about: of the benchmark. networks: those that can be chosen from. compiles: whether torch.compile is a choice.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    if compiles:
        parser.add_argument("--compile", action="store_true", help="torch.compile all of them")
    if networks:
        parser.add_argument("networks", nargs="*", default=list(networks), metavar="NETWORK", help=", ".join(networks))
    given = parser.parse_args()
    unknown = [name for name in getattr(given, "networks", ()) if name not in networks]
    if unknown:
        parser.error(f"there is no network {unknown[0]!r}; choose from {', '.join(networks)}")
    ready(given.threads)
    print(", ".join(machine().values()))
    return given


@functools.cache
def device_name() -> str:
    """The card, or nothing on the CPU."""
    return torch.cuda.get_device_name(DEVICE) if ON_GPU else ""


def machine() -> dict[str, str]:
    """What the figures hold for."""
    if ON_GPU:
        cudnn = torch.backends.cudnn.version()
        where = {"card": device_name(), "cuda": f"CUDA {torch.version.cuda}, cuDNN {cudnn}"}
    else:
        cpu = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
        where = {"cpu": cpu, "threads": f"{torch.get_num_threads()} threads"}
    return {**where, "torch": f"torch {torch.__version__}"}


def ready(threads: int) -> None:
    """Set torch's threads; what the published networks' rectified destinations warn of is known here."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")


def show(figures: Iterable[Figure]) -> list[Figure]:
    """Print the figures as they come; returns them."""
    shown = []
    for figure in figures:
        print(f"{figure.network:<58}{figure.what:<52}{figure.ratio:>22}  {figure.note}", flush=True)
        shown.append(figure)
    return shown


def seconds(run: Run) -> float:
    """Of one call; on a GPU by its own clock, launching included, as the device was idle."""
    if not ON_GPU:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def interleaved(runs: Sequence[Run], repeats: int) -> list[list[float]]:
    """Seconds per call of each, in turns; the first two are not counted."""
    taken: list[list[float]] = [[] for _ in runs]
    if TINY:
        return [[seconds(run)] for run in runs]
    repeats, start = 3 * repeats if ON_GPU else repeats, time.perf_counter()
    for i in tqdm(range(repeats + 2), leave=False, disable=None):
        if ON_GPU and i > 7 and time.perf_counter() - start > SECONDS:
            break
        for run, of_it in zip(runs, taken, strict=True):
            one = seconds(run)
            if i > 1:
                of_it.append(one)
    return taken


def captured(run: Run) -> Run:
    """The same call as the replay of a CUDA graph."""
    before, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(before)
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    before.wait_stream(side)
    try:
        with torch.cuda.graph(graph):
            outputs = run()
    except RuntimeError:  # what torch leaves behind: the stream, and random numbers that wait for the graph
        torch.cuda.set_stream(before)
        random = torch.cuda.default_generators[torch.cuda.current_device()]
        random.graphsafe_set_state(torch.Generator(DEVICE).graphsafe_get_state())
        raise

    def replay(kept: object = outputs) -> None:
        graph.replay()

    return replay


def with_graphs(runs: dict[str, Run]) -> dict[str, Run]:
    """The calls and, on a GPU, each as a CUDA graph: `NAME, CUDA graph`; none where one of them cannot be captured."""
    try:
        return runs | ({f"{name}{GRAPH}": captured(run) for name, run in runs.items()} if ON_GPU else {})
    except RuntimeError as error:
        print(f"no CUDA graph: {str(error).splitlines()[0]}", flush=True)
        return runs


GRAPH = ", CUDA graph"


def timed(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """As `interleaved`, by name."""
    return dict(zip(runs, interleaved(list(runs.values()), repeats), strict=True))


def both_ways(times: dict[str, list[float]]) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """What to add to a figure's name, and its times: of the calls, and of the CUDA graphs where there are such."""
    for end in ("", GRAPH):
        of_it = {name.removesuffix(GRAPH): taken for name, taken in times.items() if name.endswith(GRAPH) == bool(end)}
        if of_it:
            yield end, of_it


def gpu_peak(run: Run) -> int:
    """The most bytes that a call holds at a time on the GPU beyond what it finds."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def milliseconds(taken: Sequence[float]) -> float:
    """The median."""
    return statistics.median(taken) * 1e3


def ms(taken: Sequence[float]) -> str:
    """The median, as tables have it."""
    value = milliseconds(taken)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(slow: Sequence[float], fast: Sequence[float], factor: float = 1.0) -> Ratio:
    """The ratio of the medians times `factor`, and the quartiles of the single pairs."""
    low, _, high = (factor * q for q in statistics.quantiles(a / b for a, b in zip(slow, fast, strict=True)))
    return Ratio(factor * statistics.median(slow) / statistics.median(fast), low, high)


def flops(run: Run) -> int:
    """Floating-point operations of one call; with gradients on, as the counter misses fused kernels without them.

    The first call is not counted: it may build a graph.
    """
    run()
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
