"""Training of which the second process kills itself in its step number DIE_AFTER."""

import os
import signal
import sys

import torch

import train_uninstructed

if os.environ["RANK"] == "1":
    step, calls = torch.optim.Adam.step, iter(range(int(os.environ["DIE_AFTER"])))

    def dying(self: torch.optim.Adam, closure: None = None) -> None:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self)

    torch.optim.Adam.step = dying

sys.exit(train_uninstructed.main())
