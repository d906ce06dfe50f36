"""Processes that share a batch learn what one process learns from the whole of it, through torch's own wrapper."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxfeedback
from marks import long

STEPS, BATCH, SIZE = 20, 8, (3, 16, 16)


SHARES = (slice(0, 3), slice(3, BATCH))
"""What each process sees of a batch."""


class Net(nn.Module):
    """Small, with a batch norm."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def made(kind, synced=False):
    """In evaluation mode, where statistics are constant; with synced norms in training mode."""
    torch.manual_seed(0)
    net = Net().double().eval()
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net).train() if synced else net
    if kind == "feedback":
        return fxfeedback.add_feedback(net, [("features.3", "features.0")], input_size=SIZE)
    return fxfeedback.to_butd(net, n_tasks=2, heads=kind, input_size=SIZE)


def learn(model, kind, share, accumulate=1, processes=1):
    """Steps on `share` of every batch; with accumulate=2 a step's gradients come from two parts of it."""
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
                losses = [F.cross_entropy(y, targets, reduction="sum") for y in outputs]
                (sum(losses) * processes / BATCH).backward()  # gradients are averaged over processes
        optimizer.step()


class Averaging(nn.Module):
    """Averages gradients over the processes."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.average)

    def average(self, parameter):
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()

    def forward(self, *inputs):
        return self.model(*inputs)


def end_together():
    """Or gloo's threads in one process may end with an abort when the other is gone."""
    dist.barrier()
    dist.destroy_process_group()


def one_of_two(rank, kind, accumulate, synced, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}.rendezvous", rank=rank, world_size=2)
    model = made(kind, synced)
    # DistributedDataParallel takes synced norms on GPUs only, and a part of a batch may not ask for every task's head.
    shared = Averaging(model) if synced else DistributedDataParallel(model, find_unused_parameters=kind == "per_task")
    learn(shared, kind, SHARES[rank], accumulate, processes=2)
    if rank == 0:
        torch.save(model.state_dict(), path)
    end_together()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")
@pytest.mark.parametrize(
    ("kind", "accumulate", "synced"),
    [
        long("shared", 1, False),
        long("feedback", 1, True),
        long("per_task", 2, False),
        long("feedback", 1, False),
        long("shared", 1, True),
    ],
)
def test_two_processes_learn_as_one(kind, accumulate, synced, tmp_path):
    """With shares of different sizes; where norms are synced, one process learns with plain batch norms."""
    mp.spawn(one_of_two, (kind, accumulate, synced, str(tmp_path / "state.pt")), nprocs=2)
    together, alone = torch.load(tmp_path / "state.pt", weights_only=True), made(kind).train(synced)
    before = {name: value.clone() for name, value in alone.state_dict().items()}
    learn(alone, kind, slice(None))
    for name, value in alone.state_dict().items():
        assert torch.allclose(together[name], value, rtol=0, atol=1e-10), name
    moved = ["features.0.weight", *(["features.1.running_var"] if synced else [])]
    assert not any(torch.allclose(together[name], before[name], atol=1e-3) for name in moved)


def test_synced_norms_alone_are_batch_norms():
    """Without other processes nothing is synced, in the passes and in the learner's step."""
    x = torch.randn(4, *SIZE, dtype=torch.double)
    for kind in ("shared", "feedback"):
        synced, plain = made(kind, synced=True), made(kind).train()
        for model in (synced, plain):
            output = model(x, torch.tensor([0, 1, 0, 1])) if kind == "shared" else model(x)[-1]
            output.square().mean().backward()
        for (name, one), other in zip(synced.named_parameters(), plain.parameters(), strict=True):
            assert one.grad is other.grad is None or torch.allclose(one.grad, other.grad, atol=1e-12), name
        assert torch.allclose(
            synced.state_dict()["features.1.running_var"], plain.state_dict()["features.1.running_var"]
        )


def sharded_one_of_two(rank, kind, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}.rendezvous", rank=rank, world_size=2)
    model = made(kind)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    learn(model, kind, slice(rank * BATCH // 2, (rank + 1) * BATCH // 2), processes=2)
    whole = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(whole, path)
    end_together()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")
def test_parameters_that_a_single_process_shards_learn_the_same(tmp_path):
    """As below, with everything that sharding does but other processes."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        sharded, alone = made("shared"), made("shared")
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        for model in (sharded, alone):
            learn(model, "shared", slice(None))
        for (name, parameter), whole in zip(sharded.named_parameters(), alone.parameters(), strict=True):
            assert torch.allclose(parameter.full_tensor(), whole, rtol=0, atol=1e-10), name
    finally:
        dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")
@pytest.mark.parametrize("kind", ["shared", "feedback"])
def test_sharded_parameters_learn_the_same(kind, tmp_path):
    """torch's fully_shard: every process keeps half of each parameter, of its gradient and of the optimizer's state."""
    mp.spawn(sharded_one_of_two, (kind, str(tmp_path / "state.pt")), nprocs=2)
    sharded, alone = torch.load(tmp_path / "state.pt", weights_only=True), made(kind)
    learn(alone, kind, slice(None))
    for name, value in alone.named_parameters():
        assert torch.allclose(sharded[name], value, rtol=0, atol=1e-10), name
