"""What is feedback good for? A network with connections, pass by pass: corrupted and adversarial images, similarity.

The first pass is the network without feedback, so the passes compare the two on the same weights.

    python examples/feedback_studies.py --repeat 5                       # digits, five networks
    python examples/feedback_studies.py --data DIR --model alexnet_lrm3  # pictures, a published network

It writes accuracy.csv (a row per condition, severity and pass), similarity.csv (of nodes' values in two passes) and
studies.png. Attacks are foolbox's, on each pass: pip install 'fxfeedback[attacks]'.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torchvision.transforms.functional as TF
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fxfeedback
import picture_composites
import steer_composites
from jobs import UserError, as_csv, exit_code, make_folder, number, usable_device, write_whole
from multi_mnist import DEVIATION, MEAN, DataError, embedded_digits

Row = dict[str, Any]
Corrupt = Callable[[Tensor, float, torch.Generator], Tensor]


def noise(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise on every pixel."""
    return (images + deviation * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blur(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """A Gaussian blur, its deviation in pixels."""
    return TF.gaussian_blur(images, 2 * round(3 * deviation) + 1, deviation)


def contrast(images: Tensor, loss: float, generator: torch.Generator) -> Tensor:
    """Every pixel moved toward its image's mean: 1 leaves nothing."""
    return images.lerp(images.mean((1, 2, 3), keepdim=True), loss)


CORRUPTIONS: dict[str, tuple[Corrupt, tuple[float, ...]]] = {
    "noise": (noise, (0.2, 0.4, 0.6)),
    "blur": (blur, (1.0, 2.0, 3.0)),
    "contrast": (contrast, (0.5, 0.7, 0.9)),
}
ATTACKS = {
    "FGSM": ("LinfFastGradientAttack", {}),
    "PGD": ("LinfProjectedGradientDescentAttack", {"steps": 10, "rel_stepsize": 0.25}),
}


class Pixels(nn.Module):
    """A network that takes pixels in 0..1: (B, C, H, W) -> logits of every pass, (passes, B, classes)."""

    def __init__(self, model: fxfeedback.FeedbackModel, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(-1, 1, 1))

    def normalised(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.deviation

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.stack(self.model(self.normalised(pixels)))


class OnePass(nn.Module):
    """The logits of one pass, which an attack is against."""

    def __init__(self, network: Pixels, index: int) -> None:
        super().__init__()
        self.network, self.index = network, index

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)[self.index]


def conditions(network: Pixels, args: argparse.Namespace) -> Iterator[tuple[str, float, Callable[..., list[Tensor]]]]:
    """(name, severity, a function of images and labels that gives such images: the same for all passes, or each its).

    Every pass is attacked by images that are made against it, as they do less harm to another.
    """
    yield "clean", 0.0, lambda images, labels: [images]
    for name, (corrupt, severities) in CORRUPTIONS.items():
        for severity in severities:
            generator = torch.Generator().manual_seed(0)
            yield name, severity, lambda x, y, c=corrupt, s=severity, g=generator: [c(x.cpu(), s, g).to(x.device)]
    if args.no_attacks:
        return
    try:
        import foolbox
    except ImportError as error:
        raise UserError(f"{error}: pip install 'fxfeedback[attacks]', or leave them out: --no-attacks") from error
    passes = [OnePass(network, index).eval() for index in range(network.model.passes)]
    attacked = [foolbox.PyTorchModel(one, (0, 1), device=args.device) for one in passes]
    for name, (attack, options) in ATTACKS.items():
        made = getattr(foolbox.attacks, attack)(**options)
        for size in args.epsilons:
            yield name, size, lambda x, y, a=made, e=size: [a(one, x, y, epsilons=e)[1] for one in attacked]


def accuracies(network: Pixels, loader: Iterable[Any], args: argparse.Namespace) -> list[Row]:
    """The share of images that each pass names rightly, under every condition."""
    rows: list[Row] = []
    for name, severity, changed in tqdm(list(conditions(network, args)), "conditions", disable=None):
        right, seen = 0, 0
        for images, labels in loader:
            images, labels = images.to(args.device), labels.to(args.device)
            others = changed(images, labels)
            with torch.no_grad():
                named = [network(other).argmax(-1) for other in others]  # of each (passes, B)
            named = named[0] if len(named) == 1 else torch.stack([each[index] for index, each in enumerate(named)])
            right = right + (named == labels).sum(1).cpu()
            seen += len(labels)
        for index, count in enumerate(right, 1):
            rows.append({"condition": name, "severity": severity, "pass": index, "accuracy": int(count) / seen})
    return rows


def similarity(network: Pixels, loader: Iterable[Any], nodes: Sequence[str], args: argparse.Namespace) -> list[Row]:
    """How alike the values of nodes are in two passes, of the first batch."""
    images, _ = next(iter(loader))
    compared = fxfeedback.compare_passes(network.model, network.normalised(images.to(args.device)), list(nodes))
    names = ("node", "pass", "later_pass", "cosine", "rsa")
    return [dict(zip(names, values, strict=True)) for values in compared.rows()]


def networks(args: argparse.Namespace) -> Iterator[tuple[int, Pixels, DataLoader, list[str]]]:
    """(seed, network, its test images, nodes that are compared): digits, or pictures with a published network."""
    if args.data:
        transform = fxfeedback.models.transforms()["val_transform"]
        transform.transforms.pop()  # to pixels: they are normalised in the network
        pictures = picture_composites.Pictures(args.data, transform)
        network = Pixels(picture_composites.network(args), fxfeedback.models.MEAN, fxfeedback.models.DEVIATION)
        loader = DataLoader(pictures, args.batch_size, num_workers=args.workers)
        yield args.seed, network.to(args.device), loader, ["features.0", "features.8", "features.12", "classifier.6"]
        return
    digits, held_out = embedded_digits()
    test = TensorDataset(held_out.images[: args.test_size, None] / 255, held_out.labels[: args.test_size])
    for seed in range(args.seed, args.seed + args.repeat):
        network = Pixels(steer_composites.train(digits, args, seed), [MEAN], [DEVIATION]).to(args.device)
        yield seed, network, DataLoader(test, 250), ["conv2", "relu3", "head"]


def means(rows: Sequence[Row], keys: Sequence[str], value: str) -> list[Row]:
    """Over the seeds, with half the 95 % interval."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row[value])
    result = []
    for group, values in groups.items():
        mean, half = steer_composites.mean_and_interval(values)
        result.append({**dict(zip(keys, group, strict=True)), value: mean, "interval": half})
    return result


def figure(rows: Sequence[Row]) -> Figure:
    """A panel per condition: accuracy over severity, a line per pass."""
    names = [name for name in dict.fromkeys(row["condition"] for row in rows) if name != "clean"]
    drawn = Figure(figsize=(3 * len(names), 3), layout="constrained")
    axes = drawn.subplots(1, len(names), sharey=True, squeeze=False)[0]
    clean = {row["pass"]: row for row in rows if row["condition"] == "clean"}
    for panel, name in zip(axes, names, strict=True):
        for index, at_zero in clean.items():
            own = [at_zero, *(row for row in rows if row["condition"] == name and row["pass"] == index)]
            spread = [100 * (row["interval"] or 0) for row in own]
            shares = [100 * row["accuracy"] for row in own]
            panel.errorbar(
                [row["severity"] for row in own], shares, spread, marker=".", capsize=2, label=f"pass {index}"
            )
        panel.set(title=name, xlabel="severity", ylim=(0, 100))
    axes[0].set_ylabel("accuracy (%)")
    axes[0].legend()
    return drawn


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line: what `steer_composites.py` takes, and a few flags more."""
    parser = argparse.ArgumentParser(description="A network with feedback, pass by pass, on harder images.")
    parser.add_argument("--no-attacks", action="store_true", help="corruptions and similarity only")
    parser.add_argument("--epsilons", type=number(float, 0, 1), nargs="+", default=(0.02, 0.05, 0.1), help="of attacks")
    return steer_composites.parse_arguments(argv, parser, "runs/feedback_studies")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the studies; returns the exit code."""
    args = parse_arguments(argv)

    def job() -> int:
        usable_device(args.device)
        make_folder(args.out)
        shares, likeness = [], []
        for seed, network, loader, nodes in networks(args):
            network.eval()
            shares += [{"seed": seed, **row} for row in accuracies(network, loader, args)]
            likeness += [{"seed": seed, **row} for row in similarity(network, loader, nodes, args)]
            for name, rows in (("accuracy.csv", shares), ("similarity.csv", likeness)):
                write_whole(args.out / name, lambda path, rows=rows: path.write_text(as_csv(rows)))
        lines = means(shares, ("condition", "severity", "pass"), "accuracy")
        write_whole(args.out / "studies.png", partial(figure(lines).savefig, format="png", dpi=120))
        for line in lines:
            interval = "" if line["interval"] is None else f" ± {100 * line['interval']:.1f}"
            what = f"{line['condition']:10}{line['severity']:6g}  pass {line['pass']}"
            print(f"{what}{100 * line['accuracy']:7.1f}{interval}")
        for line in means(likeness, ("node", "pass", "later_pass"), "rsa"):
            print(f"{line['node']:16}passes {line['pass']} and {line['later_pass']}: similarity {line['rsa']:.3f}")
        print(f"accuracies in %; results: {args.out} (accuracy.csv, similarity.csv, studies.png)")
        return 0

    return exit_code(job, DataError, fxfeedback.Error)


if __name__ == "__main__":
    sys.exit(main())
