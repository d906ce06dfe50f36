"""Training, step by step, on one process or on many; a run that was stopped goes on exactly where it was.

What a step does follows from its number alone: which samples it sees (data.py), what is random in them, the rate
(schedules.py), and the state from which the network draws random numbers. So a checkpoint holds the weights, the
optimizer's state, the number of steps done and the log, and nothing else.
"""

import argparse
import json
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm import tqdm

from jobs import UserError, make_folder
from training import checkpoints
from training.data import Data, Part, Steps, number, read
from training.flags import settings
from training.results import NOT_SCORES, Log
from training.schedules import SCHEDULES

REMEMBERS_NO_END = ("constant", "decay", "step")
"""The schedules that are the same for another number of epochs, so that a run can be made longer."""

SHOWN = 6
"""How many values of an epoch are printed; the log has all."""


class Experiment(ABC):
    """What is trained on what: every script makes one of its own.

    model: the network, on the CPU.
    train, test: the samples.
    drop_last: whether a last batch that is not full is left out of training.
    evaluation_batch: samples at once when the network is tested.
    """

    model: nn.Module
    train: Data
    test: Data
    drop_last = False
    evaluation_batch = 500

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of every sample, (B,); `model` is the network, as the processes share it."""

    @abstractmethod
    def metrics(self) -> Mapping[str, Metric]:
        """New metrics, by their names in the log."""

    @abstractmethod
    def judge(self, batch: Any, metrics: Mapping[str, Metric]) -> None:
        """Update the metrics with a batch of test samples; the network is in evaluation mode."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """What is learned, as the optimizers take it."""
        learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [{"params": learned, "weight_decay": weight_decay}]

    def train_mode(self) -> None:
        """Put the network into the mode in which it learns."""
        self.model.train()

    def facts(self) -> dict[str, Any]:
        """What else makes a run the run that it is, for JSON."""
        return {}

    def notes(self) -> dict[str, float]:
        """What else the log is to say after an epoch."""
        return {}


class Run:
    """One run: creating it trains nothing, but raises `UserError` where something in `args` cannot be used.

    Args:
        experiment: what is trained.
        args: as `flags.training_flags` has them.
        fabric: the processes and the device, launched.
        folder: for the checkpoint and the log; a checkpoint in it is gone on with if `args.resume` says so.
    """

    def __init__(self, experiment: Experiment, args: argparse.Namespace, fabric: Fabric, folder: Path) -> None:
        self.experiment, self.args, self.fabric, self.folder = experiment, args, fabric, folder
        make_folder(folder)
        parts = fabric.world_size * args.accumulate
        self.steps = Steps(len(experiment.train), args.batch_size, args.seed, parts, experiment.drop_last)
        self.optimizer = make_optimizer(experiment.parameter_groups(args.weight_decay), args)
        self.epoch, self.step, self.loss = 0, 0, 0.0  # whole epochs done, steps of the next one, and their losses' sum
        self.stopping = 0.0  # how many processes want to end
        self.rows: list[dict[str, Any]] = []  # of the log: one for every whole epoch
        if args.channels_last:
            experiment.model.to(memory_format=torch.channels_last)
        self.network, self.stepper = fabric.setup(experiment.model, self.optimizer)
        self.resume()
        self.log = Log(folder, self.rows) if fabric.is_global_zero else None

    # -- training

    def train(self) -> bool:
        """Train what is left; False when it was interrupted, and a checkpoint was written."""
        total, done = self.args.epochs * len(self.steps), self.epoch * len(self.steps) + self.step
        off = None if self.fabric.is_global_zero else True  # None: on a terminal only, so that a log has lines alone
        with Stop() as stop, tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=off) as bar:
            while self.epoch < self.args.epochs:
                bar.set_description(f"epoch {self.epoch + 1}/{self.args.epochs}")
                start = time.perf_counter()
                for loss in self.learn(stop):
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    bar.update()
                if self.step == len(self.steps):
                    self.finish_epoch(time.perf_counter() - start)
                if self.stopping and self.epoch < self.args.epochs:
                    self.save()
                    return False
        return True

    def learn(self, stop: "Stop") -> Iterator[float]:
        """The steps of an epoch that are left, or those until it is to stop; yields each step's loss."""
        args, device = self.args, self.fabric.device
        first = self.fabric.global_rank * args.accumulate
        mine = (parts[first : first + args.accumulate] for parts in self.steps.of(self.epoch, self.step))
        self.experiment.train_mode()
        for batches in read(self.experiment.train, self.epoch, mine, args.workers, device.type == "cuda"):
            self.optimizer.zero_grad(set_to_none=True)
            torch.manual_seed(number(args.seed, self.epoch, self.step, self.fabric.global_rank))
            rate = SCHEDULES[args.schedule](self.epoch + (self.step + 0.5) / len(self.steps), args)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * args.lr
            total = torch.zeros(2, device=device)
            for place, (batch, weight) in enumerate(batches, 1):
                waits = place < len(batches)
                with self.fabric.no_backward_sync(self.network, enabled=waits) if waits else nullcontext():
                    loss = (self.experiment.losses(self.network, self.put(batch)) * weight).sum()
                    self.fabric.backward(loss * self.fabric.world_size)  # processes average their gradients
                total[0] += loss.detach()
            total[1] = stop.wanted or self.steps_done() + 1 == args.stop_after
            loss, self.stopping = self.fabric.all_reduce(total, reduce_op="sum").tolist()
            if not math.isfinite(loss):
                raise UserError(f"the loss became {loss} in epoch {self.epoch + 1}; a lower --lr may help")
            self.stepper.step()
            self.step, self.loss = self.step + 1, self.loss + loss
            yield loss
            if self.stopping:
                return
            if self.step % args.checkpoint_steps == 0 and self.step < len(self.steps):
                self.save()

    def steps_done(self) -> int:
        return self.epoch * len(self.steps) + self.step

    def finish_epoch(self, seconds: float) -> None:
        """Test the network, and keep the epoch's results."""
        scores = self.evaluate()
        row = {"epoch": self.epoch + 1, "loss": self.loss / len(self.steps), **scores, **self.experiment.notes()}
        self.rows.append(row | {"lr": self.optimizer.param_groups[0]["lr"], "seconds": round(seconds, 3)})
        self.epoch, self.step, self.loss = self.epoch + 1, 0, 0.0
        self.save()
        if self.log is not None:
            self.log.add(self.rows[-1])
            tqdm.write(as_words(self.rows[-1]))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The metrics of the test samples, of which every process looks at its share."""
        experiment, fabric = self.experiment, self.fabric
        if fabric.world_size > 1:
            for buffer in experiment.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        experiment.model.eval()
        metrics = {name: metric.to(fabric.device) for name, metric in experiment.metrics().items()}
        whole = torch.arange(len(experiment.test)).split(experiment.evaluation_batch)
        shares = (one.tensor_split(fabric.world_size)[fabric.global_rank].tolist() for one in whole)
        parts = ([Part(share, 1.0)] for share in shares if share)
        for [(batch, _)] in read(experiment.test, 0, parts, self.args.workers, fabric.device.type == "cuda"):
            with fabric.autocast():
                experiment.judge(self.put(batch), metrics)
        return {name: round(metric.compute().item(), 6) for name, metric in metrics.items()}

    def put(self, batch: Any) -> list[Tensor]:
        """A batch, on the device; images lie in memory as the weights do."""
        images = torch.channels_last if self.args.channels_last else torch.preserve_format
        layouts = (images if tensor.ndim == 4 else torch.preserve_format for tensor in batch)
        device = self.fabric.device
        return [
            tensor.to(device, non_blocking=True, memory_format=layout)
            for tensor, layout in zip(batch, layouts, strict=True)
        ]

    # -- checkpoints

    def save(self) -> None:
        """Write the checkpoint."""
        if self.fabric.is_global_zero:
            at = {"epoch": self.epoch, "step": self.step, "loss": self.loss}
            about = {"position": at, "log": self.rows, "settings": self.settings()}
            checkpoints.save(self.folder / checkpoints.FILE, self.experiment.model, self.optimizer, about)

    def settings(self) -> dict[str, Any]:
        """What must be the same when the run goes on, as JSON gives it back."""
        return json.loads(json.dumps(settings(self.args) | self.experiment.facts()))

    def resume(self) -> None:
        """With --resume, go on from the checkpoint; without, the one that is there is kept under another name."""
        path = self.folder / checkpoints.FILE
        if not self.args.resume:
            if self.fabric.is_global_zero and path.exists():  # the other processes do not look at it
                path.replace(path.with_name(checkpoints.BEFORE))
            return
        if not path.exists():
            return
        about, tensors = checkpoints.load(path)
        checkpoints.check(path, about, len(self.steps))
        theirs, position, self.rows = about["settings"], about["position"], about["log"]
        for name, value in self.settings().items():
            longer = name == "epochs" and self.args.schedule in REMEMBERS_NO_END
            if theirs.get(name) != value and not longer:
                raise UserError(f"{path} was made with {name} {theirs.get(name)}, not {value}: --resume needs the same")
        begun = bool(position["epoch"] or position["step"])
        checkpoints.restore(tensors, self.experiment.model, self.optimizer, begun)
        self.epoch, self.step, self.loss = position["epoch"], position["step"], position["loss"]


class Stop:
    """Notices Ctrl-C and a request to end, so that the step at hand is finished first; a second one ends at once."""

    wanted = False

    def __enter__(self) -> Self:
        self.before = {sign: signal.signal(sign, self.notice) for sign in (signal.SIGINT, signal.SIGTERM)}
        return self

    def notice(self, sign: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True

    def __exit__(self, *error: object) -> None:
        for sign, handler in self.before.items():
            signal.signal(sign, handler)


def make_optimizer(groups: list[dict[str, Any]], args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer that the flags ask for."""
    make: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adam": lambda: torch.optim.Adam(groups, lr=args.lr),
        "adamw": lambda: torch.optim.AdamW(groups, lr=args.lr),
        "sgd": lambda: torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum),
    }
    return make[args.optimizer]()


def as_words(row: dict[str, Any]) -> str:
    """A row of the log, as people read it."""
    values = [f"{name} {value:.4f}" for name, value in row.items() if name not in NOT_SCORES]
    return f"epoch {row['epoch']}: {', '.join(values[:SHOWN])}"
