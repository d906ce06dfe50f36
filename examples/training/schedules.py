"""The learning rate, as a share of its highest, when so many epochs of so many are done: name -> function.

A schedule remembers nothing, so that a run can go on anywhere.
"""

import argparse
import math
from collections.abc import Callable

import numpy as np

START = 1e-4  # of the linear rise, as published
LOW = 2e-5 / 0.5  # of the plateau, as published

Schedule = Callable[[float, argparse.Namespace], float]


def constant(done: float, args: argparse.Namespace) -> float:
    """Always the same."""
    return 1.0


def decay(done: float, args: argparse.Namespace) -> float:
    """Times `lr_decay` after every epoch; the published one of BU-TD networks."""
    return float(args.lr_decay ** math.floor(done))


def step(done: float, args: argparse.Namespace) -> float:
    """Times `lr_decay` after every `lr_step` epochs."""
    return float(args.lr_decay ** math.floor(done / args.lr_step))


def cosine(done: float, args: argparse.Namespace) -> float:
    """Up along a line for `warm_up` epochs, then down to nothing along half a cosine."""
    rise = min(args.warm_up, args.epochs / 2)
    return done / rise if done < rise else (1 + math.cos(math.pi * (done - rise) / (args.epochs - rise))) / 2


def cyclic(done: float, args: argparse.Namespace) -> float:
    """Up along a line for `warm_up` epochs, then down to nothing along another; the published one of LRM networks."""
    rise = min(args.warm_up, args.epochs / 2)
    return float(np.interp(done, [0, rise, args.epochs], [START, 1, 0]))


def cyclic_plateau(done: float, args: argparse.Namespace) -> float:
    """As `cyclic`, but down to a low rate at `lr_step` epochs, which then stays."""
    rise = min(args.warm_up, args.lr_step / 2)
    return float(np.interp(done, [0, rise, args.lr_step], [START, 1, LOW]))


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "decay": decay,
    "step": step,
    "cosine": cosine,
    "cyclic": cyclic,
    "cyclic-plateau": cyclic_plateau,
}
