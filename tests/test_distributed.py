"""Processes that share a batch learn what one process learns from the whole of it, through torch's own wrapper."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxfeedback

STEPS, BATCH, SIZE = 20, 8, (3, 16, 16)


class Net(nn.Module):
    """Small; its batch norm stays in evaluation mode: statistics are every process's own."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def made(kind):
    torch.manual_seed(0)
    net = Net().double().eval()
    if kind == "feedback":
        return fxfeedback.add_feedback(net, [("features.3", "features.0")], input_size=SIZE)
    return fxfeedback.to_butd(net, n_tasks=2, heads=kind, input_size=SIZE)


def learn(model, kind, share, accumulate=1):
    """Steps on `share` of every batch; with accumulate=2 a step's gradients come from its two halves."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(BATCH, *SIZE, generator=generator, dtype=torch.double)[share]
        task, labels = (torch.randint(k, (BATCH,), generator=generator)[share] for k in (2, 10))
        optimizer.zero_grad()
        parts = list(zip(x.chunk(accumulate), task.chunk(accumulate), labels.chunk(accumulate), strict=True))
        for number, (some, tasks, targets) in enumerate(parts, 1):
            waits = (
                getattr(model, "no_sync", contextlib.nullcontext)() if number < len(parts) else contextlib.nullcontext()
            )
            with waits:
                outputs = model(some) if kind == "feedback" else [model(some, tasks)]
                (sum(F.cross_entropy(y, targets) for y in outputs) / accumulate).backward()
        optimizer.step()


def one_of_two(rank, kind, accumulate, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}.rendezvous", rank=rank, world_size=2)
    model = made(kind)
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    learn(DistributedDataParallel(model, find_unused_parameters=True), kind, half, accumulate)
    if rank == 0:
        torch.save(model.state_dict(), path)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")
@pytest.mark.parametrize(("kind", "accumulate"), [("shared", 1), ("per_task", 2), ("feedback", 1)])
def test_two_processes_learn_as_one(kind, accumulate, tmp_path):
    mp.spawn(one_of_two, (kind, accumulate, str(tmp_path / "state.pt")), nprocs=2)
    together, alone = torch.load(tmp_path / "state.pt", weights_only=True), made(kind)
    learn(alone, kind, slice(None))
    for name, value in alone.state_dict().items():
        assert torch.allclose(together[name], value, rtol=0, atol=1e-10), name
    assert not torch.allclose(together["features.0.weight"], made(kind).state_dict()["features.0.weight"], atol=1e-3)
