"""How far passes differ: `compare_passes`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fxfeedback.errors import OptionError
from fxfeedback.tracing.names import without_names

MEASURES = ("cosine", "rsa")


@dataclass(frozen=True)
class PassComparison:
    """What `compare_passes` returns: node name -> (passes, passes), in float64.

    cosine: between a sample's values in two passes, the mean over samples. rsa: between the two passes' geometries of
    all samples, the Pearson correlation of their dissimilarities (1 - Pearson correlation, of each pair of samples);
    NaN with fewer than three samples, or where all dissimilarities are one.
    """

    cosine: dict[str, torch.Tensor]
    rsa: dict[str, torch.Tensor]

    def rows(self) -> Iterator[tuple[str, int, int, float, float]]:
        """(node, pass, later pass, cosine, rsa), of each pair; passes count from 1."""
        for node, cosine in self.cosine.items():
            for i in range(len(cosine)):
                for j in range(i + 1, len(cosine)):
                    yield node, i + 1, j + 1, cosine[i, j].item(), self.rsa[node][i, j].item()

    def __str__(self) -> str:
        width = max(map(len, (*self.cosine, "node")))
        lines = [f"{'node':<{width}}  passes  cosine     rsa"]
        lines += [f"{node:<{width}}  {i:>2}, {j:<2} {cos:>7.3f} {rsa:>7.3f}" for node, i, j, cos, rsa in self.rows()]
        return "\n".join(lines)

    def plot(self, axes: Any = None) -> Any:
        """A line for each node and measure: each pass against the first. Returns matplotlib's axes.

        Args:
            axes: matplotlib's, to draw into; default: new ones.
        """
        if axes is None:
            import matplotlib.pyplot as plt

            axes = plt.subplots()[1]
        for measure, style in zip(MEASURES, ("-", "--"), strict=True):
            for i, (node, values) in enumerate(getattr(self, measure).items()):
                numbers = range(1, len(values) + 1)
                axes.plot(numbers, values[0].numpy(), style, marker="o", color=f"C{i % 10}", label=f"{node}, {measure}")
        axes.set(xlabel="pass", ylabel="likeness to pass 1", xticks=numbers)
        axes.legend()
        return axes


def compare_passes(model: Any, *inputs_and_nodes: Any, **named: Any) -> PassComparison:
    """How alike the values of nodes are in the passes of one call: by cosine, and by representational similarity.

    Args:
        model: what `add_feedback` returned.
        inputs_and_nodes, named: as for its `readout`: the inputs, and then names of nodes, each or in a list.

    Raises:
        NodeNameError: no names, or one that no node has.
        OptionError: the model has no passes to read.
    """
    if not hasattr(type(model), "readout"):
        raise OptionError(f"a {type(model).__name__} has no passes: give what add_feedback returned")
    _, names = without_names(inputs_and_nodes)
    with torch.no_grad():
        read = model.readout(*inputs_and_nodes, **named)
    values = {name: torch.stack([one[name][0].flatten(1).double().cpu() for one in read]) for name in names}
    return PassComparison(
        {name: _cosines(passes) for name, passes in values.items()},
        {name: _correlations(torch.stack([_dissimilarities(x) for x in passes])) for name, passes in values.items()},
    )


def _cosines(passes: torch.Tensor) -> torch.Tensor:
    """(passes, samples, units) -> (passes, passes); two values that are all zero are alike."""
    lengths = passes.norm(dim=-1)
    products = torch.einsum("isu,jsu->ijs", passes, passes)
    both = lengths.unsqueeze(1) * lengths.unsqueeze(0)
    neither = (lengths == 0).unsqueeze(1) & (lengths == 0).unsqueeze(0)
    return torch.where(neither, 1.0, products / both.where(both > 0, torch.ones_like(both))).mean(-1)


def _dissimilarities(values: torch.Tensor) -> torch.Tensor:
    """(samples, units) -> 1 - correlation of each pair of samples."""
    rows, columns = torch.triu_indices(len(values), len(values), 1)
    return 1 - _correlations(values)[rows, columns]


def _correlations(rows: torch.Tensor) -> torch.Tensor:
    """Pearson's, of each two rows; NaN for a row that is constant or shorter than two."""
    centred = rows - rows.mean(1, keepdim=True)
    centred = centred / centred.norm(dim=1, keepdim=True)
    result = (centred @ centred.T).clamp(-1, 1)
    return result if rows.shape[1] > 1 else torch.full_like(result, torch.nan)
