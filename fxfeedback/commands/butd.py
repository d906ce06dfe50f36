"""Derive an instructed bottom-up/top-down network from a model: what instructions reach, and what they switch on.

The active share of a site is that of its units (with --gating channel, of its channels) whose gate the task opens.
At a random start that is about half.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from fxfeedback.commands.given import add_connections, add_model, add_tasks, read_network
from fxfeedback.commands.text import Count, Percent, several, sizes, table

MOST_TASKS = 8
"""Tasks whose active shares are shown: a line has room for no more."""

EXAMPLES = [
    "fxfeedback butd resnet18 --tasks 2",
    "fxfeedback butd resnet18 --tasks 40 --gating channel --embedding 50",
    "fxfeedback butd vgg11_bn --tasks classes --json",
    "fxfeedback butd resnet18 --tasks 2 --td-weights sign --td-magnitude batch",
    "fxfeedback butd mnist:net --input-size 1x28x28 --tasks 2 --save instructed",
]
KEYS = {
    "model": "MODEL, as given",
    "inputs": "the shape of each input; in shapes null stands for the batch",
    "n_tasks": "how many tasks there are; null: instructions are vectors over the model's own outputs",
    "instruction_size": "the length of an instruction",
    "gating": "unit or channel",
    "feedback": "what TD reads in place of BU weights; empty: the BU weights",
    "head": "the prediction head, from which instructions run down",
    "sites[].name": "of a gating site",
    "sites[].shape": "of its value",
    "sites[].active": "its active share for each of tasks[]",
    "tasks[].task": f"the id; the first {MOST_TASKS} tasks are looked at",
    "tasks[].active": "the active share of all sites together",
    "not_reached": "names of rectifying activations that no instruction reaches",
    "parameters": "of the model",
    "parameters_added": "of the instruction head",
    "updated": "names of the parameters that the error pass updates",
    "not_updated": "names of those that it does not",
    "saved": "with --save: the directory; else null",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, its tasks, what else to do."""
    add_model(parser)
    add_tasks(parser)
    add_connections(parser)
    parser.add_argument("--save", metavar="DIR", help="save the network for fxfeedback.load")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Derive the network, and run the instruction pass for some tasks."""
    import fxfeedback
    from fxfeedback.commands.networks import input_shapes, parameters
    from fxfeedback.graph.nodes import name_of, spec_of
    from fxfeedback.graph.operands import rectifies
    from fxfeedback.instructed.kept_graphs import graphs_of

    butd = read_network(arguments, fxfeedback.BUTD)
    graphs = graphs_of(butd)
    graphs.require_head()
    if arguments.save:
        fxfeedback.save(butd, arguments.save)
    takes_ids = butd.options.instruction_size is None
    tasks = range(min(graphs.instruction_size, MOST_TASKS) if takes_ids else 0)
    gates = [_gates(butd, graphs, task) for task in tasks]
    sites = [name_of(site) for site in graphs.sites]
    learning = graphs.learning_parameters()
    own = [name for name, _ in butd.named_parameters() if not name.startswith("instruction_head.")]
    added = parameters(butd, butd.OWN)
    return {
        "model": arguments.model,
        "inputs": input_shapes(butd),
        "n_tasks": butd.options.n_tasks,
        "instruction_size": graphs.instruction_size,
        "gating": butd.options.gating,
        "feedback": butd.options.feedback[0],
        "head": name_of(graphs.head),
        "sites": [
            {"name": name_of(site), "shape": spec_of(site).sizes, "active": [_share([g[i]]) for g in gates]}
            for i, site in enumerate(graphs.sites)
        ],
        "tasks": [{"task": task, "active": _share(of_sites)} for task, of_sites in zip(tasks, gates, strict=True)],
        "not_reached": [
            name_of(node) for node in graphs.bu.graph.nodes if rectifies(node) and name_of(node) not in sites
        ],
        "parameters": parameters(butd) - added,
        "parameters_added": added,
        "updated": [name for name in own if name in learning],
        "not_updated": [name for name in own if name not in learning],
        "saved": arguments.save,
    }


def _gates(butd: Any, graphs: Any, task: int) -> list[Any]:
    """Each site's gates for one task: positive is open."""
    import torch

    from fxfeedback.butd import instruction_of

    with torch.no_grad():
        return graphs.gates(instruction_of(butd, task))


def _share(gates: list[Any]) -> float:
    """How many of them are open."""
    return sum(int((gate > 0).sum()) for gate in gates) / sum(gate.numel() for gate in gates)


def lines(result: dict[str, Any]) -> Iterator[str]:
    """A summary, and a table of the sites."""
    sites, missed, tasks = result["sites"], result["not_reached"], result["tasks"]
    yield f"{result['model']}: input {', '.join(map(sizes, result['inputs']))}"
    yield f"{Count(result['parameters'])} parameters, {Count(result['parameters_added'])} added"
    kind = "over the model's outputs" if result["n_tasks"] is None else f"for {several(result['n_tasks'], 'task')}"
    yield f"instruction: {several(result['instruction_size'], 'number')} {kind}, down from {result['head']}"
    if result["feedback"]:
        yield f"TD reads: {result['feedback']}"
    yield f"it reaches {several(len(sites), 'site')}" + (f", and not {', '.join(missed)}" if missed else "")
    skipped = result["not_updated"]
    yield f"an error updates {several(len(result['updated']), 'parameter tensor')}" + (
        f", and not {', '.join(skipped)}" if skipped else " (all)"
    )
    yield ""
    unit = "channels" if result["gating"] == "channel" else "units"
    first = "" if result["instruction_size"] == len(tasks) else f", first {several(len(tasks), 'task')}"
    yield f"active {unit}{first}"
    columns = [f"task {task['task']}" for task in tasks]
    rows = [(site["name"], sizes(site["shape"]), *map(Percent, site["active"])) for site in sites]
    rows.append(("all", "", *(Percent(task["active"]) for task in tasks)))
    yield from table(("site", "shape", *columns), rows)
    if result["saved"]:
        yield ""
        yield f"saved: fxfeedback.load({result['saved']!r})"
