"""What the tests for a GPU share. DEVICE=cuda: they run there, all of them; by default on the CPU, in the small."""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

import published_nets
from networks import build

DEVICE = os.environ.get("DEVICE") or "cpu"
ON_GPU = DEVICE != "cpu"


def network(name: str, train: bool, dtype: torch.dtype = torch.double) -> tuple[nn.Module, torch.Tensor]:
    """A network on the device, and images: of the same numbers on every device."""
    if name == "published":
        torch.manual_seed(0)
        model = published_nets.Net(published_nets.simple((32, 32), 50), 50, 10).train(train)
        x = torch.randn(16, 1, 28, 28, dtype=torch.double)
    else:
        model, x = build(name, train)
    return model.to(DEVICE, dtype), x.to(DEVICE, dtype)


def ids(x: torch.Tensor, tasks: int = 2) -> torch.Tensor:
    """An instruction for every image."""
    return torch.arange(len(x), device=x.device) % tasks


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-300)).item()


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], tolerance: float) -> None:
    """Each tensor is the same, relative to its largest value. What cancels to nothing counts as 1e-5 of the largest."""
    assert ours.keys() == theirs.keys()
    least = 1e-5 * max((t.detach().abs().max().item() for t in theirs.values()), default=0)
    for name, value in theirs.items():
        value, found = value.detach().double().cpu(), ours[name].detach().double().cpu()
        far = (found - value).abs() / value.abs().max().clamp_min(max(least, 1e-300))
        assert (far <= tolerance).all(), (
            f"{name}: {(far > tolerance).sum()} of {far.numel()} are off, by {far.max():.1e}"
        )


def captured(run: Callable[[], Any], warm: int = 3) -> Callable[[], Any]:
    """The run as a CUDA graph: what replays it and returns what it writes to. On the CPU the run itself."""
    if not ON_GPU:
        return run
    before, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(before)
    with torch.cuda.stream(side):
        for _ in range(warm):
            run()
    before.wait_stream(side)
    try:
        with torch.cuda.graph(graph):
            outputs = run()
    except RuntimeError:  # or the tests that follow fail of what torch leaves behind: the stream, and the random state
        torch.cuda.set_stream(before)
        random = torch.cuda.default_generators[torch.cuda.current_device()]
        random.graphsafe_set_state(torch.Generator(DEVICE).graphsafe_get_state())
        raise

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def on_a_stream_of_its_own() -> AbstractContextManager[Any]:
    """On the CPU nothing."""
    return torch.cuda.stream(torch.cuda.Stream()) if ON_GPU else nullcontext()


def compiled(model: Any, **options: Any) -> Any:
    """Compiled whole; on the CPU without generating code, which takes long."""
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, **(options if ON_GPU else {"backend": "aot_eager"}))
