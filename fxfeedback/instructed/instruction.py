"""Read the instruction of a call: ids of tasks, or vectors."""

from typing import Any

import torch

from fxfeedback.errors import InputError
from fxfeedback.tracing.waiting import at_hand, moved
from fxfeedback.tracing.wrapper import not_finite


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
        InputError: a wrong shape, an id out of range, or a vector that is not finite; the last two where looking would
            not wait for another device. There an id out of range is an error of the device's, and comes later.
    """
    given = task
    try:
        task = torch.as_tensor(given)  # looked at where it is
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"an instruction is made of ids or of float vectors, not of {task!r}: {error}") from None
    rows = "batch" if batch is None else batch
    if task.is_floating_point():
        if task.ndim != 2 or task.shape[1] != size or (batch is not None and task.shape[0] not in (1, batch)):
            raise InputError(f"an instruction vector has shape ({rows}, {size}), not {tuple(task.shape)}")
        vectors = task.to(like.dtype)
        if not_finite(vectors):
            raise InputError(
                "an instruction vector has values that are not finite (NaN or infinite): it opens no gates"
            )
        return vectors.to(like.device), None
    if not takes_ids:
        raise InputError(f"with instruction_size={size} an instruction is a float vector ({rows}, {size}), not ids")
    if task.dtype == torch.bool or task.ndim > 1 or (task.ndim == 1 and batch is not None and task.shape[0] != batch):
        raise InputError(
            f"instructions are ({rows},) integer ids or ({rows}, {size}) floats, "
            f"not {task.dtype} of shape {tuple(task.shape)}"
        )
    looks = at_hand(task) and not torch.compiler.is_compiling()
    if looks and task.numel() and not 0 <= int(task.min()) <= int(task.max()) < size:
        raise InputError(f"instruction ids lie between 0 and {size - 1}; got {int(task.min())} to {int(task.max())}")
    ids = moved(task, given, like.device).reshape(-1).long()
    if not looks:  # the device looks, and nobody waits
        torch._assert_async(((ids >= 0) & (ids < size)).all(), f"instruction ids lie between 0 and {size - 1}")
    return (ids.unsqueeze(-1) == torch.arange(size, device=ids.device)).to(like.dtype), ids


def distinct(
    instruction: torch.Tensor, ids: torch.Tensor | None, batch: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The distinct instructions, and which of them each sample has; None: all the only one, or each its own.

    Where there are no more tasks than samples these are all tasks, so that the next batch has the same.
    """
    if torch.compiler.is_exporting():
        return instruction, None  # for every batch size
    if ids is not None and instruction.shape[1] <= batch:
        return torch.eye(instruction.shape[1], dtype=instruction.dtype, device=instruction.device), ids
    if instruction.shape[0] == 1 or torch.compiler.is_compiling() or not at_hand(instruction):
        # No size may depend on values.
        return instruction, None
    different, rows = torch.unique(instruction, dim=0, return_inverse=True)
    if len(different) == len(instruction):
        return instruction, None
    return different, rows if len(different) > 1 else None
