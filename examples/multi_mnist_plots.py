"""The figures of a training run, drawn from what `train_multi_mnist.py` writes into metrics.json."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def figures(metrics: dict[str, Any]) -> dict[str, Figure]:
    """File name -> figure; no curves before the first epoch, no angles when BU and TD share their weights."""
    drawn = {"active_share.png": active_share(metrics), "overlap.png": overlap(metrics)}
    if metrics["epochs"]:
        drawn["learning_curves.png"] = learning_curves(metrics["epochs"])
        if "angle" in metrics["epochs"][0]:
            drawn["angles.png"] = angles(metrics["epochs"])
    return drawn


def learning_curves(epochs: list[dict[str, Any]]) -> Figure:
    """Training loss, and test accuracy in % of each task, over the epochs."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    numbers = [epoch["epoch"] for epoch in epochs]
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    loss.plot(numbers, [epoch["loss"] for epoch in epochs], marker=".", color="black")
    loss.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    for name in epochs[0]:
        if name.startswith("accuracy_"):
            shares = [100 * epoch[name] for epoch in epochs]
            accuracy.plot(numbers, shares, marker=".", label=name.removeprefix("accuracy_"))
    accuracy.set(xlabel="epoch", ylabel="test accuracy (%)")
    accuracy.legend()
    return figure


def active_share(metrics: dict[str, Any]) -> Figure:
    """Bars: the share in % of each layer's units that each task's sub-network uses."""
    figure, axes = layer_axes(list(metrics["overlap"]))
    width = 0.8 / len(metrics["active_share"])
    for i, task in enumerate(metrics["active_share"]):
        shares = [100 * share for share in metrics["active_share"][task].values()]
        axes.bar([site + (i - 0.5) * width for site in range(len(shares))], shares, width, label=task)
    axes.set(ylabel="active units (%)", ylim=(0, 100))
    axes.legend()
    return figure


def overlap(metrics: dict[str, Any]) -> Figure:
    """Bars: the cosine between the tasks' sets of active units, layer by layer."""
    figure, axes = layer_axes(list(metrics["overlap"]))
    axes.bar(range(len(metrics["overlap"])), list(metrics["overlap"].values()), 0.6)
    axes.set(ylabel="overlap of the sub-networks (cosine)", ylim=(0, 1))
    return figure


def angles(epochs: list[dict[str, Any]]) -> Figure:
    """The angle in degrees between each weight and its TD twin over the epochs, and their mean in black."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    numbers = [epoch["epoch"] for epoch in epochs]
    names = [name for name in epochs[0] if name.startswith("angle_")]
    for name in names:
        axes.plot(numbers, [epoch[name] for epoch in epochs], label=name.removeprefix("angle_"))
    axes.plot(numbers, [epoch["angle"] for epoch in epochs], color="black", marker=".", label="mean")
    axes.set(xlabel="epoch", ylabel="angle between W and its TD twin (degrees)", ylim=(0, 95))
    if len(names) <= 12:  # a deep network has more lines than a legend can tell apart
        axes.legend(fontsize="small")
    return figure


def layer_axes(sites: list[str]) -> tuple[Figure, Axes]:
    """A figure wide enough for one bar per site, with the sites' names below."""
    figure = Figure(figsize=(max(5, 0.5 * len(sites)), 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xticks(range(len(sites)), sites, rotation=45, ha="right")
    return figure, axes
