"""Instructed networks: the instruction says which of an image's labels to tell."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

import fxfeedback
from jobs import UserError
from training.loop import Experiment
from training.losses import Loss


class Instructed(Experiment):
    """A network that is told by a task's number which label to tell.

    A batch is images (B, ...), labels (B, tasks), and one task per image, (B,), which is not looked at in tests: there
    every image is asked for all of its labels.

    Args:
        butd: the network, with one logit per class, or a single one where labels are 0 or 1.
        tasks: the tasks' names.
        loss: of every sample.
        all_tasks: whether a training step asks for all labels of its images too, and not for one each.
        only: the task that is learned and tested alone; None: all of them.

    Raises:
        UserError: there is no such task.
    """

    def __init__(
        self, butd: fxfeedback.BUTD, tasks: Sequence[str], loss: Loss, all_tasks: bool = False, only: str | None = None
    ) -> None:
        if only is not None and only not in tasks:
            raise UserError(f"--only {only}: the tasks are {', '.join(tasks)}")
        self.model, self.tasks, self.loss = butd, tasks, loss
        self.each = all_tasks or only is not None
        self.asked = {t: task for t, task in enumerate(tasks) if only in (None, task)}

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        images, labels, task = batch
        if not self.each:
            return self.loss(model(images, task), labels.gather(1, task[:, None])[:, 0])
        each = [self.loss(model(images, self.same(t, images)), labels[:, t]) for t in self.asked]
        return torch.stack(each).mean(0)

    def same(self, task: int, images: Tensor) -> Tensor:
        """The same task for every image."""
        return torch.full((len(images),), task, device=images.device)

    def metrics(self) -> Mapping[str, Metric]:
        return {"test_loss": MeanMetric()} | {f"accuracy_{task}": self.accuracy() for task in self.asked.values()}

    def accuracy(self) -> Metric:
        """Of one task."""
        return MulticlassAccuracy(10, average="micro")

    def judge(self, batch: Any, metrics: Mapping[str, Metric]) -> None:
        images, labels, _ = batch
        for t, task in self.asked.items():
            logits = self.model(images, self.same(t, images))
            metrics["test_loss"].update(self.loss(logits, labels[:, t]))
            metrics[f"accuracy_{task}"].update(logits if logits.shape[1] > 1 else logits[:, 0], labels[:, t])
