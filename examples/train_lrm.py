"""Train any torchvision or timm classifier with long-range modulatory (LRM) connections on a folder of pictures.

The recipe is the published one for LRM networks: the loss is averaged over the passes, so that the first pass stays
good by itself; SGD with momentum, a rate that rises for two epochs and then falls linearly to nothing, label smoothing.

    python examples/train_lrm.py --model alexnet --nodes                 # the names that a connection may use
    python examples/train_lrm.py DATA --model alexnet --connect classifier.6:features.8 --connect features.9:features.0
    python examples/train_lrm.py DATA --model timm:resnet18 --connect layer4:layer1 --pretrained --freeze-backbone
"""

import argparse
import csv
import io
import json
import math
import os
import random
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import fxfeedback
from fxfeedback.models import DEVIATION, MEAN
from jobs import UserError, make_folder, number, usable_device, write_whole

LAYOUT = """\
DATA is a folder with one folder of pictures per class, for training and for validation:

    DATA/train/cat/1.jpg  DATA/train/cat/2.jpg  DATA/train/dog/1.jpg  ...
    DATA/val/cat/7.jpg    DATA/val/dog/7.jpg    ...
"""
RATES = {"sgd": 0.5 / 512, "adamw": 1e-3 / 512}  # default of --learning-rate, per image in a batch; SGD's as published
DECAYS = {"sgd": 4e-5, "adamw": 0.05}  # default of --weight-decay; SGD's as published
MOMENTUM = 0.9
WARM_UP = 2  # epochs in which the rate rises, as published; in a short run at most SHORT_WARM_UP of it
SHORT_WARM_UP = 0.3
VALIDATION_CROP = 224 / 256  # share of a picture's shorter side that validation looks at
CHECKPOINT = "checkpoint.safetensors"
MAY_CHANGE = ("data", "device", "nodes", "out", "resume", "workers")  # between the parts of an interrupted run


@dataclass(frozen=True)
class Backbone:
    """A classifier, and what to know about its weights."""

    net: nn.Module
    fresh: frozenset[str] = frozenset()  # with --pretrained: parameters that the published weights have not filled
    mean: Sequence[float] = MEAN  # of the pixels, in 0..1, that the network expects to be normalised
    deviation: Sequence[float] = DEVIATION


def build_backbone(name: str, n_classes: int, side: int, pretrained: bool) -> Backbone:
    """The classifier called `name` (a torchvision name, or timm:NAME) for images of `side` by `side` pixels.

    Raises `UserError`, naming the nearest names, when there is no such classifier, and when its weights cannot be had.
    """
    if name.startswith("timm:"):
        return timm_backbone(name.removeprefix("timm:"), n_classes, side, pretrained)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(f"unknown model {name!r}: no torchvision classifier, nor timm:NAME{nearest(name, known)}")
    options: dict[str, Any] = {"num_classes": n_classes}
    if name in ("googlenet", "inception_v3"):  # one output, not three; their weights expect another normalisation
        options |= {"aux_logits": False, "init_weights": False, "transform_input": pretrained}
    elif name.startswith("vit_"):
        options["image_size"] = side
    elif name.startswith("maxvit"):
        options["input_size"] = (side, side)
    try:
        net = torchvision.models.get_model(name, weights=None, **options)
    except (AssertionError, ValueError) as error:
        raise UserError(f"{name} cannot be built for --image-size {side}: {error}") from error
    return Backbone(net, frozenset(load_published(net, name)) if pretrained else frozenset())


def load_published(net: nn.Module, name: str) -> list[str]:
    """Fill `net` with torchvision's default weights, all but a prediction head for another number of classes.

    Returns the names of that head's parameters. Raises `UserError` when the weights cannot be fetched or do not fit.
    """
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        published = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (AttributeError, OSError, RuntimeError) as error:
        raise UserError(f"cannot fetch torchvision's weights of {name}: {error}") from error
    # what is norm1 in DenseNet is norm.1 in its published weights
    named = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key): value for key, value in published.items()}
    own = net.state_dict()
    fitting = OrderedDict((k, value) for k, value in named.items() if k in own and value.shape == own[k].shape)
    fitting._metadata = getattr(published, "_metadata", None)  # MNASNet asks it for the weights' version
    missing = [key for key in own if key not in fitting]
    heads = {key.rpartition(".")[0] for key in missing}
    if len(heads) > 1 or not all(isinstance(net.get_submodule(head), (nn.Linear, nn.Conv2d)) for head in heads):
        raise UserError(f"torchvision's weights of {name} do not fit at this --image-size: {', '.join(sorted(heads))}")
    net.load_state_dict(fitting, strict=False)
    return missing


def timm_backbone(name: str, n_classes: int, side: int, pretrained: bool) -> Backbone:
    """timm's classifier `name`; as `build_backbone`."""
    try:
        import timm
    except ImportError as error:
        raise UserError("--model timm:NAME needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise UserError(f"unknown model {name!r}: timm has none of this name{nearest(name, timm.list_models())}")
    published = timm.models.get_pretrained_cfg(name)
    size = {"img_size": side} if published is not None and published.fixed_input_size else {}
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=n_classes, **size)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"timm cannot build {name} for --image-size {side}: {error}") from error
    if not pretrained:
        return Backbone(net)
    heads = published.classifier if isinstance(published.classifier, (tuple, list)) else [published.classifier]
    new = [f"{head}." for head in heads] if n_classes != published.num_classes else []
    fresh = frozenset(key for key, _ in net.named_parameters() if key.startswith(tuple(new)))
    return Backbone(net, fresh, published.mean, published.std)


def nearest(name: str, known: Sequence[str]) -> str:
    """'; did you mean ...?' with the names nearest to `name`, or nothing."""
    close = get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def list_nodes(args: argparse.Namespace) -> None:
    """Print the names that a connection may use, in execution order, with op and output shape."""
    net = build_backbone(args.model, 1000, args.image_size, pretrained=False).net
    names = fxfeedback.node_names(net, (3, args.image_size, args.image_size))
    usable = {name: node for name, node in names.items() if len(node.shape or ()) > 1 and None in (node.shape or ())}
    width = max(map(len, usable))
    for name, node in usable.items():
        shape = ", ".join("B" if size is None else str(size) for size in node.shape or ())
        print(f"{name:{width}}  {node.op:20}  ({shape})")


def seed_from(*numbers: int) -> int:
    """One seed made of several numbers, such as a run's seed and an epoch."""
    return random.Random(repr(numbers)).getrandbits(63)


class Pictures(Dataset):
    """The pictures of a folder, as (tensor, class).

    What is random in `transform` depends on `seed` and the picture alone, so it does not change with the workers.
    """

    def __init__(self, folder: Path, transform: Any) -> None:
        self.transform, self.seed = transform, 0
        try:
            self.folder = ImageFolder(str(folder))
        except OSError as error:  # no folder, no classes, or a class without pictures
            raise UserError(f"{error}\n{LAYOUT}") from error

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.folder.samples[index]
        try:
            picture = self.folder.loader(path)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow has all of these for damaged files
            raise UserError(f"cannot read the picture {path}: {error}") from None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from(self.seed, index))  # not that of a GPU, which drops out
            return self.transform(picture), label


def read_data(data: Path, side: int, backbone: Backbone) -> tuple[Pictures, Pictures]:
    """The pictures for training and for validation, as the published models were trained and tested."""
    tensor = [T.ToTensor(), T.Normalize(backbone.mean, backbone.deviation)]
    train = T.Compose([T.RandomResizedCrop(side), T.RandomHorizontalFlip(), *tensor])
    val = T.Compose([T.Resize(round(side / VALIDATION_CROP)), T.CenterCrop(side), *tensor])
    return Pictures(data / "train", train), Pictures(data / "val", val)


def class_names(data: Path) -> list[str]:
    """The names of the classes in DATA. Raises `UserError` where training and validation have not the same."""
    found = []
    for split in ("train", "val"):
        if not (data / split).is_dir():
            raise UserError(f"there is no folder {data / split}\n{LAYOUT}")
        found.append(sorted(path.name for path in (data / split).iterdir() if path.is_dir()))
    train, val = map(set, found)
    if train != val:
        only = ", ".join(sorted(train ^ val)[:5])
        raise UserError(f"{data}/train and {data}/val must have the same classes; only in one: {only}\n{LAYOUT}")
    if len(train) < 2:
        raise UserError(f"{data}/train has {len(train)} classes, and two are needed\n{LAYOUT}")
    return found[0]


class Run:
    """One training run: the network, its data and its results so far.

    Creating it trains and writes nothing, but raises `UserError` or one of fxfeedback's errors when something in `args`
    cannot be used.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, usable_device(args.device)
        classes, side = class_names(args.data), args.image_size
        torch.manual_seed(args.seed)
        backbone = build_backbone(args.model, len(classes), side, args.pretrained)
        self.train_data, self.val_data = read_data(args.data, side, backbone)
        model = fxfeedback.add_feedback(backbone.net, args.connect, args.passes, input_size=(3, side, side))
        self.model = model.to(self.device)
        # Where only a part of a model can be traced, that part makes the passes, and only the last one has an output.
        self.passes = range(1, args.passes + 1) if isinstance(model, fxfeedback.FeedbackModel) else [args.passes]
        self.learned = self.choose_learned(backbone.fresh)
        self.optimizer = self.make_optimizer()
        self.history: list[dict[str, float]] = []  # one row per epoch, as in log.csv
        kept = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
        self.config = {
            **kept,
            "classes": classes,
            "pictures": [len(self.train_data), len(self.val_data)],
            "mean": list(backbone.mean),
            "deviation": list(backbone.deviation),
        }
        self.find_checkpoint()

    def choose_learned(self, fresh: frozenset[str]) -> dict[str, nn.Parameter]:
        """Name -> parameter that is trained: all, or those that --freeze-backbone leaves; the others are frozen."""
        parameters = dict(self.model.named_parameters())
        if self.args.freeze_backbone:
            wrappers = [module for module in self.model.modules() if isinstance(module, fxfeedback.FeedbackModel)]
            blocks = {id(parameter) for wrapper in wrappers for parameter in wrapper.modulations.parameters()}
            for name, parameter in parameters.items():
                parameter.requires_grad_(id(parameter) in blocks or name in fresh)
        learned = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if not learned:
            raise UserError("--freeze-backbone without --connect leaves nothing to train")
        return learned

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer; norms, biases and scales, which are vectors and scalars, are not decayed."""
        args, decayed, others = self.args, list[Tensor](), list[Tensor]()
        for parameter in self.learned.values():
            (decayed if parameter.ndim > 1 else others).append(parameter)
        groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
        if args.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=args.learning_rate)
        return torch.optim.SGD(groups, lr=args.learning_rate, momentum=MOMENTUM)

    # -- training

    def loader(self, data: Pictures, train: bool) -> DataLoader:
        """The batches of one epoch; a last batch that is not full is left out of training, as published."""
        return DataLoader(
            data,
            self.args.batch_size,
            shuffle=train,
            drop_last=train and len(data) >= self.args.batch_size,
            num_workers=self.args.workers,
            pin_memory=self.device.type == "cuda",
        )

    def train(self) -> None:
        """Train the epochs that are left, and keep the results after each."""
        steps = len(self.loader(self.train_data, train=True))
        done, total = len(self.history), self.args.epochs
        with tqdm(total=total * steps, initial=done * steps, unit="step", dynamic_ncols=True) as bar:
            for epoch in range(done + 1, total + 1):
                bar.set_description(f"epoch {epoch}/{total}")
                losses = []
                for loss in self.learn(epoch, steps):
                    losses.append(loss)
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    bar.update()
                top1 = self.validate()
                self.history.append({"epoch": epoch, "train_loss": fmean(losses), **top1})
                self.keep()
                tqdm.write(f"epoch {epoch}: loss {fmean(losses):.4f}, top-1 {percents(top1.values())}")

    def learn(self, epoch: int, steps: int) -> Iterator[float]:
        """One epoch, step by step; yields each step's loss, the mean over the passes."""
        # All that is random in an epoch follows from its number, so an interrupted run goes on as if nothing had been.
        torch.manual_seed(seed_from(self.args.seed, epoch))
        self.train_data.seed = seed_from(self.args.seed, epoch, 1)
        self.model.train(not self.args.freeze_backbone)  # a frozen backbone keeps its batch norms' statistics, too
        for step, (images, labels) in enumerate(self.loader(self.train_data, train=True)):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(epoch - 1 + (step + 0.5) / steps)
            labels = labels.to(self.device, non_blocking=True)
            outputs = self.outputs(images)
            losses = [F.cross_entropy(y.float(), labels, label_smoothing=self.args.label_smoothing) for y in outputs]
            loss = torch.stack(losses).mean()
            if not loss.requires_grad:
                raise UserError(f"no connection acts in {self.args.passes} pass: there is nothing to train")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            if not math.isfinite(value := loss.item()):
                raise UserError(f"the loss became {value} in epoch {epoch}; a lower --learning-rate may help")
            yield value

    def rate(self, epochs: float) -> float:
        """The learning rate when so many epochs are done."""
        total = self.args.epochs
        peak = min(WARM_UP, SHORT_WARM_UP * total)
        return self.args.learning_rate * (epochs / peak if epochs < peak else (total - epochs) / (total - peak))

    def outputs(self, images: Tensor) -> list[Tensor]:
        """The logits of every pass that has some."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            outputs = self.model(images.to(self.device, non_blocking=True))
        return outputs if isinstance(outputs, list) else [outputs]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Column of log.csv -> the share of the validation pictures that this pass gets right."""
        self.model.eval()
        right = [0] * len(self.passes)
        for images, labels in self.loader(self.val_data, train=False):
            labels = labels.to(self.device, non_blocking=True)
            for i, logits in enumerate(self.outputs(images)):
                right[i] += int((logits.argmax(1) == labels).sum())
        return {f"val_top1_pass_{i}": n / len(self.val_data) for i, n in zip(self.passes, right, strict=True)}

    # -- results

    def keep(self) -> None:
        """Write the checkpoint, log.csv and config.json."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.learned.items():
            for key, value in self.optimizer.state[parameter].items():
                if value is not None:
                    tensors[f"optimizer.{key}.{name}"] = value
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        metadata = {"history": json.dumps(self.history), "config": json.dumps(self.config)}
        content = safetensors.torch.save(copies, metadata)  # takes no tensors that share memory, hence the copies
        write_whole(self.args.out / CHECKPOINT, lambda path: path.write_bytes(content))
        table = io.StringIO()
        rows = csv.DictWriter(table, list(self.history[0]), lineterminator="\n")
        rows.writeheader()
        rows.writerows(self.history)
        write_whole(self.args.out / "log.csv", lambda path: path.write_text(table.getvalue()))
        config = json.dumps(self.config, indent=2) + "\n"
        write_whole(self.args.out / "config.json", lambda path: path.write_text(config))

    def find_checkpoint(self) -> None:
        """With --resume, go on from the checkpoint; without, refuse to train over one."""
        path = self.args.out / CHECKPOINT
        if not path.exists():
            return
        if not self.args.resume:
            raise UserError(f"{path} is there already: --resume goes on with it, another --out starts anew")
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            config, history = json.loads(metadata["config"]), json.loads(metadata["history"])
        except (KeyError, ValueError, OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} is no checkpoint of this program: {error}") from error
        own = json.loads(json.dumps(self.config))  # tuples as lists
        for name in own:
            if own[name] != config.get(name):
                theirs = f"{name} {config.get(name)}, not {own[name]}"
                raise UserError(f"{path} was made with {theirs}: --resume needs the same")
        try:
            self.load(tensors)
        except (KeyError, RuntimeError, ValueError) as error:  # as of another version of the model
            raise UserError(f"{path} does not fit: {error}") from error
        self.history = history

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Fill the model and the optimizer's state from a checkpoint."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        places = {id(parameter): i for i, parameter in enumerate(parameters)}
        model, state = dict[str, Tensor](), self.optimizer.state_dict()
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "model":
                model[name] = tensor
            else:
                what, _, name = name.partition(".")
                state["state"].setdefault(places[id(self.learned[name])], {})[what] = tensor
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(state)

    def report(self) -> None:
        """Write the model, for fxfeedback.load, and print what was reached and where it lies."""
        fxfeedback.save(self.model.eval(), self.args.out / "model")
        print("\npass   top-1")
        for i in self.passes:
            print(f"{i:4}  {percents([self.history[-1][f'val_top1_pass_{i}']]):>6}")
        print(f"\nresults: {self.args.out} (log.csv, config.json, {CHECKPOINT}, model)")


def percents(shares: Iterable[float]) -> str:
    """Shares as people read them: "81.0 % 83.5 %"."""
    return " ".join(f"{100 * share:.1f} %" for share in shares)


def connection(text: str) -> tuple[str, str]:
    """The connection that SOURCE:DESTINATION stands for, as argparse reads it."""
    source, colon, destination = text.partition(":")
    if not (source and colon and destination) or ":" in destination:
        raise argparse.ArgumentTypeError(f"{text!r} is not SOURCE:DESTINATION, such as classifier.6:features.8")
    return source, destination


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with a message when it is wrong."""
    parser = argparse.ArgumentParser(
        description="Train a classifier with long-range modulatory connections on a folder of pictures.",
        epilog=LAYOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, size, rate = parser.add_argument, number(int, 1, 10_000_000), number(float, 0, 1000)
    add("data", metavar="DATA", nargs="?", type=Path, help="folder with the pictures, see below")
    add("--model", default="alexnet", help="a torchvision classifier, or timm:NAME (default %(default)s)")
    add(
        "--connect",
        metavar="SOURCE:DESTINATION",
        action="append",
        default=[],
        type=connection,
        help="a connection; give it several times for several (none: the plain network, for comparison)",
    )
    add("--nodes", action="store_true", help="list the names that a connection may use, and exit")
    add("--passes", type=number(int, 1, 100), default=2, help="(default %(default)s)")
    add("--pretrained", action="store_true", help="start from the published weights (fetches them)")
    add("--freeze-backbone", action="store_true", help="train only what is new: connections, a head for new classes")
    add("--epochs", type=size, default=30, help="(default %(default)s)")
    add("--batch-size", type=size, default=64, help="(default %(default)s)")
    add("--optimizer", choices=list(RATES), default="sgd", help="adamw suits transformers (default %(default)s)")
    add("--learning-rate", type=rate, help="the highest (default 0.5, of adamw 0.001, per 512 images in a batch)")
    add("--weight-decay", type=rate, help="(default 4e-5, of adamw 0.05)")
    add("--label-smoothing", type=number(float, 0, 1), default=0.1, help="(default %(default)s)")
    add("--image-size", type=size, default=224, help="height and width (default %(default)s)")
    workers = min(4, os.cpu_count() or 1)
    add("--workers", type=number(int, 0, 1000), default=workers, help="that read pictures (default here: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default here: %(default)s)")
    add("--amp", action="store_true", help="compute in bfloat16 where that is safe (autocast)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of weights and training (default %(default)s)")
    add("--out", type=Path, default=Path("runs/lrm"), help="folder for the results (default %(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    args = parser.parse_args(argv)
    if args.data is None and not args.nodes:
        parser.error(f"DATA is missing. {LAYOUT}")
    if args.learning_rate is None:
        args.learning_rate = RATES[args.optimizer] * args.batch_size
    if args.weight_decay is None:
        args.weight_decay = DECAYS[args.optimizer]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code: 0, 1 when training failed, 2 when it could not begin, 130 after Ctrl-C."""
    args, code = parse_arguments(argv), 2
    try:
        if args.nodes:
            list_nodes(args)
            return 0
        run = Run(args)
        make_folder(args.out)
        code = 1
        run.train()
        run.report()
        return 0
    except (UserError, OSError, fxfeedback.Error) as error:
        # an error in a worker that reads pictures arrives with its traceback in front
        print(f"error: {str(error).rpartition('UserError: ')[2].rstrip()}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("interrupted; --resume goes on after the last whole epoch", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
