"""A training script's life: one run for every seed, the table, and how it ends."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from lightning_fabric import Fabric

import fxfeedback
from jobs import UserError, make_folder
from training.loop import Experiment, Run
from training.processes import launch, leave
from training.results import summary, write_summary


def job(
    args: argparse.Namespace,
    build: Callable[[argparse.Namespace], Experiment],
    report: Callable[[Run], None],
) -> int:
    """Run what the command line asks for.

    Args:
        args: the script's own flags, and those of `flags.training_flags`.
        build: makes the experiment, for arguments whose `seed` torch has already been given.
        report: called after each run on the first process, to write and print what it gave.

    Returns:
        The exit code: 0; 1 after an error, whose message is printed; 130 after an interruption.
    """
    try:
        may_be_unused = getattr(args, "heads", "shared") == "per-task"
        fabric = launch(args.device, args.amp, may_be_unused)
        code = run_all(args, fabric, build, report)
        leave(fabric)
        return code
    except (UserError, OSError, fxfeedback.Error, torch.cuda.OutOfMemoryError) as error:
        message = str(error).rpartition("UserError: ")[2].rstrip()  # from a worker it comes with its traceback
    except RuntimeError as error:
        message = explain(error)
    except KeyboardInterrupt:
        message = "interrupted at once; --resume goes on from the last checkpoint"
        print(message, file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 1


def run_all(
    args: argparse.Namespace,
    fabric: Fabric,
    build: Callable[[argparse.Namespace], Experiment],
    report: Callable[[Run], None],
) -> int:
    """One run for every seed, and their table; returns the exit code."""
    rows = {}
    for seed in range(args.seed, args.seed + args.repeat):
        one = argparse.Namespace(**vars(args) | {"seed": seed})
        folder = Path(args.out) if args.repeat == 1 else Path(args.out, f"seed-{seed}")
        torch.manual_seed(seed)
        run = Run(build(one), one, fabric, folder)
        if not run.train():
            if fabric.is_global_zero:
                print(f"interrupted after step {run.steps_done()}; --resume goes on from there", file=sys.stderr)
            return 130
        rows[seed] = run.rows[-1]
        if fabric.is_global_zero:
            report(run)
    if args.repeat > 1 and fabric.is_global_zero:
        make_folder(args.out)
        write_summary(args.out, rows)
        print(f"\n{args.repeat} runs, mean ± half of the 95 % confidence interval:")
        for name, value in summary(list(rows.values())).items():
            print(f"{name:24} {value}")
    return 0


def explain(error: RuntimeError) -> str:
    """What a failed process means to the user; other errors are raised again."""
    first = str(error).strip().splitlines()[0]
    if "DataLoader worker" in first:
        return f"a process that reads data ended ({first}): too little memory? --workers 0 reads in this one; --resume"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return f"this process lost the others of its group ({first}); start them again with --resume"
    raise error
