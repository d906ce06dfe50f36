"""Learning on 1, 2 and 4 processes of this machine: what a step takes, and how many bytes each process hands over.

    python benchmarks/many_processes.py [--network convnet] [--steps 30]

Every process has a batch of its own, as on machines of their own; here they share the machine's cores, so the time
shows what the exchange costs only as long as there are as many cores as processes. Counter-Hebb learning exchanges
what backpropagation does: one update per learned parameter, averaged by torch's DistributedDataParallel (gloo).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import fxfeedback

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from train_multi_mnist import build_model

WARM_UP = 3


def network(name: str, learning: str) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    """A network that learns, and the shape of its images."""
    torch.manual_seed(0)
    net, shape = build_model(name)
    return fxfeedback.to_butd(net, n_tasks=2, input_size=shape, learning=learning), shape


def one_process(rank: int, world: int, folder: str, args: argparse.Namespace, learning: str) -> None:
    """Learn for some steps; the first process writes what it saw."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    butd, shape = network(args.network, learning)
    shared, sent = DistributedDataParallel(butd), [0]

    def counted(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent[0] += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    shared.register_comm_hook(None, counted)
    optimizer = torch.optim.SGD([p for p in butd.parameters() if p.requires_grad], 1e-3)
    x, task, labels = torch.randn(args.batch, *shape), torch.randint(2, (args.batch,)), torch.randint(10, (args.batch,))
    times = []
    for _ in range(WARM_UP + args.steps):
        start, before = time.perf_counter(), sent[0]
        optimizer.zero_grad()
        F.cross_entropy(shared(x, task), labels).backward()
        optimizer.step()
        dist.barrier()
        times.append(time.perf_counter() - start)
        step = sent[0] - before
    if rank == 0:
        seen = {"seconds": statistics.median(times[WARM_UP:]), "bytes": step}
        Path(folder, "seen.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def measured(world: int, args: argparse.Namespace, learning: str) -> dict[str, float]:
    """Seconds and bytes of a step."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(one_process, (world, folder, args, learning), nprocs=world)
        return json.loads(Path(folder, "seen.json").read_text())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="convnet", help="as in train_multi_mnist.py (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="samples of each process (default %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="(default %(default)s)")
    args = parser.parse_args()
    print(f"{args.network}, batch {args.batch} per process, one thread per process, {mp.cpu_count()} cores\n")
    print(f"{'processes':>10}{'learning':>16}{'ms per step':>14}{'images/s':>11}{'MB per step':>13}")
    for world in (1, 2, 4):
        for learning in ("counter_hebb", "backprop"):
            seen = measured(world, args, learning)
            rate, megabytes = world * args.batch / seen["seconds"], seen["bytes"] / 1e6
            print(f"{world:>10}{learning:>16}{1e3 * seen['seconds']:>14.1f}{rate:>11.0f}{megabytes:>13.2f}", flush=True)


if __name__ == "__main__":
    main()
