"""A network learns where it is deployed: in ONNX Runtime, in a process without torch.

Each image shows two overlapping digits, and the instruction, "left" or "right", says which one to read. In torch the
network learns left digits only, by Counter-Hebb learning. `fxfeedback.export_learner` writes one whole step of learning
as a plain ONNX graph; a second process, examples/on_device.py, learns right digits with it, and mixes in some left ones
so as not to forget them (--rehearsal). The first process then takes the weights back into torch.

    python examples/learn_on_device.py                   # a minute
    python examples/learn_on_device.py --rehearsal 0     # right digits only: left ones are forgotten
"""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

import fxfeedback
import on_device
from jobs import UserError, make_folder, number
from multi_mnist import SIDE, SPLIT_SEED, TASKS, Composites, DataError, draw_composites, embedded_digits
from on_device import CURVE, IMAGES, LEARNER, OLD_TASK, WEIGHTS
from train_multi_mnist import EMBEDDING, OWN_MODELS, accuracies, percents

SHAPE = (1, SIDE, SIDE)


def train(train: Composites, args: argparse.Namespace) -> fxfeedback.BUTD:
    """A network that has learned the old task only, in torch."""
    torch.manual_seed(args.seed)
    butd = fxfeedback.to_butd(OWN_MODELS[args.model](), n_tasks=len(TASKS), embedding=EMBEDDING, input_size=SHAPE)
    optimizer = torch.optim.AdamW([p for p in butd.parameters() if p.requires_grad], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.first_steps)
    task = TASKS.index(OLD_TASK)
    for _ in tqdm(range(args.first_steps), f"in torch, {OLD_TASK}", unit="step", dynamic_ncols=True, disable=None):
        batch = torch.randint(len(train.labels), (args.batch_size,))
        loss = F.cross_entropy(butd(train.images[batch], task), train.labels[batch, task])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return butd


def hand_over(butd: fxfeedback.BUTD, train: Composites, test: Composites, out: Path) -> None:
    """Write what the device needs."""
    fxfeedback.export_learner(butd.train(), out / LEARNER, optimizer="adam")
    arrays = {"train_images": train.images, "train_labels": train.labels}
    arrays |= {"test_images": test.images, "test_labels": test.labels}
    np.savez(out / IMAGES, tasks=np.array(TASKS), **{name: tensor.numpy() for name, tensor in arrays.items()})


def learn_elsewhere(args: argparse.Namespace) -> int:
    """Run the device's part in a process of its own; returns its exit code. The device's process handles Ctrl-C."""
    command = [sys.executable, str(Path(on_device.__file__)), str(args.out)]
    for name in on_device.FLAGS:
        if getattr(args, name) is not None:
            command.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    with subprocess.Popen(command) as device:
        before = signal.signal(signal.SIGINT, lambda *_: device.send_signal(signal.SIGINT))
        try:
            return device.wait()
        finally:
            signal.signal(signal.SIGINT, before)


def take_back(butd: fxfeedback.BUTD, test: Composites, out: Path) -> None:
    """Load what the device learned, and compare.

    Raises:
        UserError: in torch the weights do not read as many images right as on the device.
    """
    weights = safetensors.torch.load_file(out / WEIGHTS)
    butd.load_state_dict({name: weights[name] for name in butd.state_dict()})  # the file has the optimizer's, too
    here, there = accuracies(butd, test, SHAPE), json.loads((out / CURVE).read_text())[-1]["accuracy"]
    print(f"in torch:      {percents(here)}, with the device's weights")
    # In float32 an image on the border of two classes may fall to the other side.
    if any(abs(here[task] - there[task]) > max(1, 0.001 * len(test.labels)) / len(test.labels) for task in TASKS):
        raise UserError(f"the device read other shares right: {percents(there)}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with a message when it is wrong."""
    parser = argparse.ArgumentParser(description="Train a network in torch, and let it learn on in ONNX Runtime.")
    add, size = parser.add_argument, number(int, 1, 10_000_000)
    add("--model", choices=list(OWN_MODELS), default="convnet", help="(default %(default)s)")
    add("--first-steps", type=size, default=400, help=f"of learning {OLD_TASK!r} in torch (default %(default)s)")
    add("--train-size", type=size, default=8000, help="training composites (default %(default)s)")
    add("--test-size", type=size, default=1000, help="test composites (default %(default)s)")
    on_device.add_flags(parser)
    add("--out", type=Path, default=Path("runs/learn_on_device"), help="folder for the results (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run both processes; returns the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    args = parse_arguments(argv)
    try:
        make_folder(args.out)
        digits, test_digits = embedded_digits()
        data = draw_composites(digits, args.train_size, torch.Generator().manual_seed(args.seed))
        test = draw_composites(test_digits, args.test_size, torch.Generator().manual_seed(SPLIT_SEED))
        butd = train(data, args)
        before = accuracies(butd, test, SHAPE)
        print(f"in torch:      {percents(before)}, after learning {OLD_TASK!r} only", flush=True)
        hand_over(butd, data, test, args.out)
        code = learn_elsewhere(args)
        if code in (0, 130):
            take_back(butd, test, args.out)
            print(f"results:       {args.out} ({LEARNER}, {WEIGHTS}, {CURVE}, {IMAGES})")
        return code
    except (UserError, DataError, OSError, fxfeedback.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
