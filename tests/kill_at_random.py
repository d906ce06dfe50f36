"""Kill a training run at random moments, resume it each time, and compare its end with that of an undisturbed run.

    python tests/kill_at_random.py FOLDER [TIMES]

Every run is a fork of this process, so that its moments are spent in training and not in imports.
"""

import functools
import os
import random
import signal
import sys
import time
from pathlib import Path

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import multi_mnist
import train_uninstructed
from training import checkpoints

FLAGS = ["--batch-size", "50", "--feedback", "mirrored", "--hidden", "50", "--checkpoint-steps", "20"]
ENDLESS = ["--epochs", "1000000"]  # the schedule knows no end, so a run may be made shorter or longer
LONGEST = 1.0  # seconds that a run may live


def start(out: Path, *flags: str) -> int:
    """Fork a run; returns its process."""
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(train_uninstructed.main([*FLAGS, "--device", "cpu", "--out", str(out), *flags]))
    return process


def main(folder: Path, times: int) -> None:
    torch.set_num_threads(1)
    multi_mnist.mnist_data = functools.cache(multi_mnist.mnist_data)
    multi_mnist.mnist_data()
    moments, killed, path = random.Random(0), 0, folder / "killed" / checkpoints.FILE
    while killed < times:
        process = start(folder / "killed", "--resume", *ENDLESS)
        time.sleep(moments.uniform(0.1, LONGEST))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFEXITED(status):
            raise SystemExit(f"the run ended by itself, with {os.WEXITSTATUS(status)}, after {killed} kills")
        killed += 1
        if path.exists():
            checkpoints.load(path)
    epochs = checkpoints.load(path)[0]["position"]["epoch"] + 1 if path.exists() else 1
    for run in ("killed", "undisturbed"):
        _, status = os.waitpid(start(folder / run, "--resume", "--epochs", str(epochs)), 0)
        if status:
            raise SystemExit(f"{run}: ended with {status}")
    one, other = (safetensors.torch.load_file(folder / run / checkpoints.FILE) for run in ("killed", "undisturbed"))
    different = [name for name in other if not torch.equal(one[name], other[name])]
    if different or one.keys() != other.keys():
        raise SystemExit(f"other weights: {different}")
    print(f"{times} times killed, all checkpoints whole, the same weights in the end")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 50)
