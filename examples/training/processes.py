"""One process or many: `torchrun --nproc-per-node 4 train_....py` makes a run of four."""

import os

import torch
from lightning_fabric import Fabric
from torch import nn

from jobs import usable_device


def launch(device: str, amp: bool) -> Fabric:
    """The processes that torchrun started, or this one alone. Raises `UserError` where the device cannot be used."""
    precision = "bf16-mixed" if amp else "32-true"
    if "LOCAL_WORLD_SIZE" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        kind = torch.device(device).type
        fabric = Fabric(accelerator=kind, devices=local, num_nodes=world // local, strategy="ddp", precision=precision)
    else:
        chosen = usable_device(device)
        devices = 1 if chosen.index is None else [chosen.index]
        fabric = Fabric(accelerator=chosen.type, devices=devices, precision=precision)
    fabric.launch()
    return fabric


def with_synced_norms(net: nn.Module) -> nn.Module:
    """The network with batch norms whose statistics are those of all processes."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)
