"""One process or many: `torchrun --nproc-per-node 4 train_....py` makes a run of four."""

import os

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import nn

from jobs import UserError, usable_device


def launch(device: str, amp: bool, may_be_unused: bool = False) -> Fabric:
    """The processes that torchrun started, or this one alone.

    Args:
        device: where to compute; of several processes, each has one of its own of this kind.
        amp: whether to compute in bfloat16 where that is safe.
        may_be_unused: whether a process may see samples that do not use all parameters, such as a task's own head.

    Raises:
        UserError: the device cannot be used.
    """
    precision = "bf16-mixed" if amp else "32-true"
    if "LOCAL_WORLD_SIZE" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        kind = torch.device(device).type
        strategy = DDPStrategy(find_unused_parameters=may_be_unused)
        nodes = world // local
        fabric = Fabric(accelerator=kind, devices=local, num_nodes=nodes, strategy=strategy, precision=precision)
    else:
        chosen = usable_device(device)
        devices = 1 if chosen.index is None else [chosen.index]
        fabric = Fabric(accelerator=chosen.type, devices=devices, precision=precision)
    fabric.launch()
    return fabric


def leave(fabric: Fabric) -> None:
    """End the group, when all are done: a process that just ended could take the others' last exchange with it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        fabric.barrier()
        torch.distributed.destroy_process_group()


def with_synced_norms(net: nn.Module) -> nn.Module:
    """The network with batch norms whose statistics are those of all processes; torch has them on GPUs only."""
    if not torch.cuda.is_available():
        raise UserError("--sync-norms needs GPUs: torch's DistributedDataParallel takes synced norms nowhere else")
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)
