"""Two passes of LRM networks against the plain network and against forward hooks: time, in turns.

OMP_WAIT_POLICY=passive python benchmarks/lrm_inference.py [--threads 2] [--compile] [NETWORK ...]

Efficiency is the plain network's time, times how many more operations the passes take, over the time of the passes: 1
where only the arithmetic costs time.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
import torchvision
from timing import (
    PRECISIONS,
    Figure,
    Precision,
    Run,
    both_ways,
    command_line,
    flops,
    ms,
    of_these,
    ratio,
    show,
    sized,
    timed,
    with_graphs,
)
from torch import nn

import fxfeedback

LRM3 = [
    ("classifier.6", "features.8"),
    ("features.9", "features.0"),
    ("classifier.6", "features.10"),
    ("features.12", "features.3"),
    ("classifier.2", "features.6"),
]
NETWORKS = of_these(
    {
        "alexnet": LRM3,
        "resnet50": [("layer4", "layer3.0.conv1")],
        "vit_b_16": [("encoder.layers.encoder_layer_11", "encoder.layers.encoder_layer_5")],
    }
)
BATCHES = {"alexnet": 256, "resnet50": 128, "vit_b_16": 64}
"""On a GPU; on the CPU 8 images."""
REPEATS = 9


class HookedBlock(nn.Module):
    """A connection's block, each step as it is written in the paper."""

    def __init__(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        super().__init__()
        size = destination.shape[2:] if source.ndim > 2 else ()
        self.weight = nn.Parameter(torch.ones(source.shape[1], *size))
        self.bias = nn.Parameter(torch.zeros(source.shape[1], *size))
        self.neg_scale, self.pos_scale = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        self.modulation = nn.Conv2d(source.shape[1], destination.shape[1], 1)

    def forward(self, a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The connection's share of y's modulation."""
        weight, bias = self.weight, self.bias
        if a.ndim > 2:
            weight, bias = (
                F.interpolate(p[None], a.shape[2:], mode="bilinear", align_corners=True)[0] for p in (weight, bias)
            )
        z = torch.tanh(F.layer_norm(a, a.shape[1:], weight, bias))
        if a.ndim > 2:
            z = F.interpolate(z, y.shape[2:], mode="bilinear", align_corners=True)
        else:
            z = z[:, :, None, None].expand(*z.shape, *y.shape[2:])
        return self.modulation(torch.where(z < 0, self.neg_scale * z, self.pos_scale * z))


class Hooked(nn.Module):
    """Passes of a network of maps and vectors by forward hooks, the usual way."""

    def __init__(self, model: nn.Module, connections: Sequence[tuple[str, str]], x: torch.Tensor) -> None:
        super().__init__()
        self.model, self.connections = model, connections
        self.past: dict[str, torch.Tensor] = {}
        self.present: dict[str, torch.Tensor] = {}
        self.blocks: nn.ModuleList | None = None
        for name in dict.fromkeys(name for connection in connections for name in connection):
            model.get_submodule(name).register_forward_hook(lambda *call, name=name: self.at(name, call[-1]))
        with torch.no_grad():
            self(x[:1])
        self.blocks = nn.ModuleList(HookedBlock(self.past[s], self.past[d]) for s, d in connections)

    def at(self, name: str, y: torch.Tensor) -> torch.Tensor:
        """Keep a node's value, modulated if it is a destination."""
        links = [(block, s) for block, (s, d) in zip(self.blocks or [], self.connections, strict=False) if d == name]
        if links and self.past:
            y = torch.relu(y + y * sum(block(self.past[s], y) for block, s in links))
        self.present[name] = y
        return y

    def forward(self, x: torch.Tensor, passes: int = 2) -> list[torch.Tensor]:
        """One output per pass."""
        self.past, outputs = {}, []
        for _ in range(passes):
            self.present = {}
            outputs.append(self.model(x))
            self.past = self.present
        return outputs


def figures(networks: Sequence[str] = tuple(NETWORKS), compiled: bool = False) -> Iterator[Figure]:
    """Of each network the efficiency, and its passes over those by hooks; all of them compiled, if so wanted."""
    how = ", compiled" if compiled else ""
    for precision, name in itertools.product(PRECISIONS, networks):
        torch.compiler.reset()
        more, runs = calls(name, precision, compiled)
        of_it = precision.of(name)
        for graph, times in both_ways(timed(runs if compiled else with_graphs(runs), REPEATS)):
            plain, passes, end = times["plain"], times["passes"], how + graph
            note = f"{ms(passes)} and {ms(plain)} ms, operations {more:.2f}"
            yield Figure(of_it, f"efficiency of two passes{end}", ratio(plain, passes, more), note, more_is_better=True)
            if "hooks" in times:
                hooks = times["hooks"]
                yield Figure(of_it, f"two passes / by hooks{end}", ratio(passes, hooks), f"{ms(hooks)} ms")


def calls(name: str, how: Precision, compiled: bool) -> tuple[float, dict[str, Run]]:
    """How many times the operations the passes take; the plain network, its passes and those by hooks."""
    x = torch.randn(1, 3, 224, 224)
    plain = torchvision.models.get_model(name).eval()
    models = {"plain": plain, "passes": fxfeedback.add_feedback(plain, NETWORKS[name]).eval()}
    graph = models["passes"].unrolled()  # whose operations are those of the formulas
    more = flops(lambda: graph(x)) / flops(lambda: plain(x))
    if name != "vit_b_16":  # its tokens are no maps
        models["hooks"] = Hooked(torchvision.models.get_model(name).eval(), NETWORKS[name], x).eval()
    images = how.images(sized(8, BATCHES[name]), 3, 224, 224)
    ready = torch.compile if compiled else lambda model: model
    return more, {way: how.infers(ready(how.put(model)), images) for way, model in models.items()}


def main() -> None:
    """Print the table."""
    given = command_line(__doc__, NETWORKS, compiles=True)
    show(figures(given.networks, given.compile))


if __name__ == "__main__":
    main()
