"""Which units each task's instruction opens, counted so that counts of layers add up to counts of modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxfeedback.butd import BUTD, instruction_of
from fxfeedback.drawing.parts import Network, drawn_as
from fxfeedback.errors import OptionError
from fxfeedback.instructed.kept_graphs import graphs_of

MOST_TASKS = 10
"""How many tasks are drawn if the user chooses none."""


@dataclass(frozen=True)
class Active:
    """Counts of active units at a site, or at several: of each task, and of each pair of tasks both.

    units: how many there are. both: (tasks, tasks); its diagonal is each task's own count.
    """

    units: int
    both: torch.Tensor

    def __add__(self, other: "Active") -> "Active":
        return Active(self.units + other.units, self.both + other.both)

    def share(self, task: int) -> float:
        """The part of the units that a task's instruction opens."""
        return self.both[task, task].item() / self.units

    def overlap(self, one: int, other: int) -> float:
        """The cosine between two tasks' 0/1 vectors of active units, 0 where one of them is empty."""
        lengths = (self.both[one, one] * self.both[other, other]).item() ** 0.5
        return self.both[one, other].item() / lengths if lengths else 0.0


@torch.no_grad()
def active_units(butd: BUTD, network: Network, tasks: Any = None) -> tuple[list[str], dict[str, Active]]:
    """The tasks' names, and site -> counts; a site that several passes have counts once for each.

    Args:
        butd: in evaluation mode. A unit is a channel where it gates by channels.
        network: what is drawn of it.
        tasks: name -> id or instruction vector, or a sequence of ids; None: the first `MOST_TASKS`.

    Raises:
        OptionError, NodeNameError: no tasks, or a network that takes no instruction.
        InputError: an id out of range, or a vector of the wrong size.
    """
    graphs = graphs_of(butd)
    if not graphs.can_instruct and tasks is None:
        return [], {}
    graphs.require_head()
    chosen = _chosen(tasks, graphs.instruction_size, "class" if butd.options.n_tasks is None else "task")
    open_units: list[list[torch.Tensor]] = [[] for _ in graphs.sites]
    for task in chosen.values():
        one_hot = isinstance(task, int) and butd.options.instruction_size is not None
        given = torch.eye(graphs.instruction_size)[[task]] if one_hot else task
        for units, gate in zip(open_units, graphs.gates(instruction_of(butd, given)), strict=True):
            units.append((gate > 0).flatten())
    active: dict[str, Active] = {}
    for site, per_task in zip(graphs.sites, open_units, strict=True):
        gates = torch.stack(per_task).double()
        counted = Active(gates.shape[1], (gates @ gates.T).cpu())
        name = drawn_as(network, site)
        active[name] = active[name] + counted if name in active else counted
    return list(chosen), active


def _chosen(tasks: Any, size: int, word: str) -> dict[str, Any]:
    if tasks is None:
        tasks = range(min(size, MOST_TASKS))
    if not isinstance(tasks, Mapping):
        tasks = {f"{word} {task}": task for task in tasks}
    if not tasks:
        raise OptionError("tasks= is empty: give ids, or a dict from names to ids or instruction vectors")
    return dict(tasks)
