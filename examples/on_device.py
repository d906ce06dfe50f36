"""What runs on the device in examples/learn_on_device.py: a network learns a task in ONNX Runtime, without torch.

    python examples/on_device.py runs/learn_on_device

This file, numpy, onnxruntime, onnx, safetensors and `fxfeedback.runtime` are all that the device needs, and what the
first process has put into the folder: learner.onnx, the step of learning with the weights to start from, and
composites.npz, the images. It leaves learned.safetensors and curve.json there.
"""

import argparse
import json
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import fxfeedback.runtime
from jobs import UserError, number, write_whole

LEARNER, IMAGES, WEIGHTS, CURVE = "learner.onnx", "composites.npz", "learned.safetensors", "curve.json"
NEW_TASK, OLD_TASK = "right", "left"
EVALUATION_BATCH = 500
FLAGS = ("steps", "batch_size", "lr", "rehearsal", "every", "seed", "provider")


class Images(NamedTuple):
    """Images (N, 1, 28, 28), normalised, and their labels (N, tasks), one column per task."""

    images: np.ndarray
    labels: np.ndarray


class Run:
    """The learning on the device: the learner, its data, and its accuracies so far.

    Creating it learns nothing, but raises `UserError` or one of fxfeedback's errors when something cannot be used.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.learner = fxfeedback.runtime.Learner(folder / LEARNER, args.provider)
        try:
            with np.load(folder / IMAGES) as arrays:
                self.train = Images(arrays["train_images"], arrays["train_labels"])
                self.test = Images(arrays["test_images"], arrays["test_labels"])
                self.tasks = [str(task) for task in arrays["tasks"]]
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{folder / IMAGES} cannot be read, learn_on_device.py writes it: {error}") from error
        self.random = np.random.default_rng(args.seed)
        self.curve: list[dict[str, Any]] = []
        self.stopped = False

    def learn(self) -> None:
        """Learn the new task step by step, and test every few; on Ctrl-C finish the step, and stop."""
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "stopped", True))
        try:
            self.keep(0, None)
            with tqdm(total=self.args.steps, desc="on device", unit="step", dynamic_ncols=True, disable=None) as bar:
                for done in range(1, self.args.steps + 1):
                    loss = self.step(done)
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    bar.update()
                    if done % self.args.every == 0 or done == self.args.steps or self.stopped:
                        self.keep(done, loss)
                    if self.stopped:
                        return
        finally:
            signal.signal(signal.SIGINT, before)

    def step(self, number: int) -> float:
        """One step, on some images of the new task and some of the old one, each with its instruction."""
        new, old = self.tasks.index(NEW_TASK), self.tasks.index(OLD_TASK)
        chosen = self.random.choice(len(self.train.images), self.args.batch_size)
        task = np.where(self.random.random(len(chosen)) < self.args.rehearsal, old, new)
        rate = self.args.lr * (1 + math.cos(math.pi * (number - 1) / self.args.steps)) / 2
        images, labels = self.train.images[chosen], self.train.labels[chosen, task]
        loss = self.learner.step(images, labels, task=task, lr=rate)
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} in step {number}; a lower --lr may help")
        return loss

    def accuracies(self) -> dict[str, float]:
        """Task -> the share of the test images that the network reads right."""
        shares = {}
        for column, task in enumerate(self.tasks):
            right = 0
            for start in range(0, len(self.test.images), EVALUATION_BATCH):
                batch = slice(start, start + EVALUATION_BATCH)
                logits = self.learner.predict(self.test.images[batch], task=column)
                right += int((logits.argmax(1) == self.test.labels[batch, column]).sum())
            shares[task] = right / len(self.test.images)
        return shares

    def keep(self, steps: int, loss: float | None) -> None:
        """Test the network, and write its weights and the curve so far."""
        accuracy = self.accuracies()
        self.curve.append({"steps": steps, "loss": loss, "accuracy": accuracy})
        self.learner.save(self.folder / WEIGHTS)
        text = json.dumps(self.curve, indent=2) + "\n"
        write_whole(self.folder / CURVE, lambda path: path.write_text(text))
        cells = "".join(f"{task:>8} {100 * accuracy[task]:5.1f} %" for task in self.tasks)
        tqdm.write(f"after {steps:>5} steps:{cells}" + ("" if loss is None else f"   loss {loss:.4f}"))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the learning on the device."""
    add, size = parser.add_argument, number(int, 1, 10_000_000)
    add("--steps", type=size, default=500, help="of learning on the device (default %(default)s)")
    add("--batch-size", type=number(int, 2, 100_000), default=64, help="images per step (default %(default)s)")
    add("--lr", type=number(float, 0, 1000), default=2e-3, help="first learning rate on the device (%(default)s)")
    add(
        "--rehearsal",
        type=number(float, 0, 1),
        default=0.25,
        help=f"share of the images that are still learned as {OLD_TASK!r}, not to forget it (default %(default)s)",
    )
    add("--every", type=size, default=50, help="steps from test to test (default %(default)s)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of weights and learning (default %(default)s)")
    add("--provider", help="of ONNX Runtime: cpu, cuda or a full name (default: cuda where it works, else cpu)")


def main(argv: Sequence[str] | None = None) -> int:
    """Learn on the device; returns the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Learn a task in ONNX Runtime, without torch.")
    parser.add_argument("folder", type=Path, help=f"with {LEARNER} and {IMAGES}, as learn_on_device.py leaves them")
    add_flags(parser)
    args = parser.parse_args(argv)
    try:
        run = Run(args.folder, args)
        run.learn()
        print(f"weights: {args.folder / WEIGHTS}" + (", of the steps so far" if run.stopped else ""))
        if run.stopped:
            print("interrupted: keeping the weights so far", file=sys.stderr)
        print(f"ran on {run.learner.providers[0]}; torch was {'' if 'torch' in sys.modules else 'never '}imported")
        return 130 if run.stopped else 0
    except (UserError, OSError, fxfeedback.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    code = main()
    if "torch" in sys.modules:
        sys.exit("error: torch was imported in the process that was to do without it")
    sys.exit(code)
