"""Steps of predictive coding against the plain network and against hooks that call autograd: time, in turns.

OMP_WAIT_POLICY=passive python benchmarks/prediction.py [--threads 2] [--compile] [NETWORK ...]

The hooks do in every step what the published code does: a predictor's run with gradients, and `torch.autograd.grad`.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
import torchvision
from timing import PRECISIONS, Figure, Precision, Run, command_line, ms, of_these, ratio, show, sized, timed
from torch import nn

import fxfeedback

NETWORKS = of_these(
    {
        "resnet18": ["relu", "layer1", "layer2", "layer3"],
        "vgg11": ["features.1", "features.4", "features.9", "features.14"],
    }
)
STEPS, REPEATS = 5, 7
FEEDFORWARD, FEEDBACK, ERROR = 0.3, 0.3, 0.01


class Coder(nn.Module):
    """A prediction, as hooks keep it: what a node represents, its prediction and the error's gradient."""

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor
        self.forget()

    def forget(self) -> None:
        """Before step 0."""
        self.r: torch.Tensor | None = None
        self.p: torch.Tensor | None = None
        self.g: torch.Tensor | None = None

    def forward(self, f: torch.Tensor, above: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
        """The representation of this step."""
        r = f.detach()
        if self.r is not None and self.g is not None:
            memory = 1 - FEEDFORWARD - (0 if above is None else FEEDBACK)
            r = FEEDFORWARD * r + memory * self.r - ERROR * self.g
            r = r if above is None else r + FEEDBACK * above
        with torch.enable_grad():
            r = r.requires_grad_()
            p = self.predictor(r)
            self.g = torch.autograd.grad(F.mse_loss(p, target), r)[0]
        self.r, self.p = r.detach(), p.detach()
        return self.r


class Hooked(nn.Module):
    """Steps of a network by forward hooks, the usual way."""

    def __init__(self, model: nn.Module, nodes: Sequence[str], predictors: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model, self.coders = model, nn.ModuleList(map(Coder, predictors))
        self.x = torch.empty(0)
        for i, name in enumerate(nodes):
            model.get_submodule(name).register_forward_hook(lambda *call, i=i: self.at(i, call[-1]))

    def at(self, i: int, f: torch.Tensor) -> torch.Tensor:
        """What the network reads in the place of a node's value."""
        above = self.coders[i + 1].p if i + 1 < len(self.coders) else None
        return self.coders[i](f, above, self.x if i == 0 else self.coders[i - 1].r)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One output per step."""
        self.x = x
        for coder in self.coders:
            coder.forget()  # type: ignore[operator]
        return [self.model(x) for _ in range(STEPS)]


def figures(networks: Sequence[str] = tuple(NETWORKS), compiled: bool = False) -> Iterator[Figure]:
    """Of each network a step over the plain pass, and the steps over those by hooks; ours compiled, if so wanted."""
    how = ", compiled" if compiled else ""
    for precision, name in itertools.product(PRECISIONS, networks):
        torch.compiler.reset()
        times = timed(calls(name, precision, compiled), REPEATS)
        plain, steps, hooks = times["plain"], times["steps"], times["hooks"]
        of_it, note = precision.of(name), f"{ms(steps)} and {ms(plain)} ms for {STEPS} steps and one pass"
        yield Figure(of_it, f"a step / the plain pass{how}", ratio(steps, plain, 1 / STEPS), note)
        yield Figure(of_it, f"steps / by hooks and autograd{how}", ratio(steps, hooks), f"{ms(hooks)} ms")


def calls(name: str, how: Precision, compiled: bool) -> dict[str, Run]:
    """The plain network, its steps, and those by hooks, without gradients for whoever calls."""
    images = how.images(sized(4, 64), 3, 112, 112)
    plain, other = (torchvision.models.get_model(name, num_classes=10).eval() for _ in range(2))
    other.load_state_dict(plain.state_dict())
    predictions = [
        fxfeedback.Prediction(node, None, FEEDFORWARD, FEEDBACK, ERROR, scaling="mean") for node in NETWORKS[name]
    ]
    model = fxfeedback.add_prediction(plain, predictions, STEPS, input_size=images.shape[1:]).eval()
    hooked = Hooked(other, NETWORKS[name], [model.predictor(node) for node in NETWORKS[name]]).eval()
    models = {"plain": plain, "steps": model, "hooks": hooked}
    for each in models.values():
        how.put(each)
    if compiled:
        models |= {way: torch.compile(models[way]) for way in ("plain", "steps")}
    return {way: how.infers(each, images) for way, each in models.items()}


def main() -> None:
    """Print the table."""
    given = command_line(__doc__, NETWORKS, compiles=True)
    show(figures(given.networks, given.compile))


if __name__ == "__main__":
    main()
