"""Read the instruction of a call: ids of tasks, or vectors."""

from typing import Any

import torch
import torch.nn.functional as F

from fxfeedback.errors import InputError


def read_instruction(
    task: Any, size: int, batch: int | None, like: torch.Tensor, takes_ids: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The instruction vectors (B, size) in the dtype of `like`, and the ids (B,) where the user gave ids.

    Args:
        task: one id, (B,) integer ids, or (B, size) floats; B may be 1, one instruction for the whole batch.
        size: length of an instruction vector, which is the number of ids.
        batch: how many instructions there must be, if that is known.
        like: gives dtype and device.
        takes_ids: whether ids stand for one-hot vectors.

    Raises:
        InputError: a wrong shape, or an id out of range.
    """
    task = torch.as_tensor(task, device=like.device)
    rows = "batch" if batch is None else batch
    if task.is_floating_point():
        if task.ndim != 2 or task.shape[1] != size or (batch is not None and len(task) not in (1, batch)):
            raise InputError(f"an instruction vector has shape ({rows}, {size}), not {tuple(task.shape)}")
        return task.to(like.dtype), None
    if not takes_ids:
        raise InputError(f"with instruction_size={size} an instruction is a float vector ({rows}, {size}), not ids")
    if task.dtype == torch.bool or task.ndim > 1 or (task.ndim == 1 and batch is not None and len(task) != batch):
        raise InputError(
            f"instructions are ({rows},) integer ids or ({rows}, {size}) floats, "
            f"not {task.dtype} of shape {tuple(task.shape)}"
        )
    # Looking at ids on a GPU would wait for it; there, one_hot raises.
    if task.device.type == "cpu" and task.numel() and not 0 <= int(task.min()) <= int(task.max()) < size:
        raise InputError(f"instruction ids lie between 0 and {size - 1}; got {int(task.min())} to {int(task.max())}")
    ids = task.reshape(-1).long()
    return F.one_hot(ids, size).to(like.dtype), ids
