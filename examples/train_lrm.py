"""Train any torchvision or timm classifier with long-range modulatory (LRM) connections on a folder of pictures.

The recipe is the published one for LRM networks: the loss is averaged over the passes, so that the first pass alone
remains good; SGD with momentum, a rate that rises for two epochs and then falls linearly to zero, label smoothing.
Without a folder a small network learns the embedded digits.

    python examples/train_lrm.py                                         # on the embedded digits, a minute or two
    python examples/train_lrm.py --model alexnet --nodes                 # the names that a connection may use
    python examples/train_lrm.py DATA --model alexnet --connect classifier.6:features.9 --connect features.12:features.1
    python examples/train_lrm.py DATA --config lrm                       # AlexNet and five connections, as published
    python examples/train_lrm.py DATA --model timm:resnet18 --connect layer4:layer1 --pretrained --freeze-backbone
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms.functional import to_pil_image

import fxfeedback
from jobs import UserError, exit_code, number
from multi_mnist import Digits, embedded_digits
from training.backbones import Backbone, build_backbone
from training.blur_pool import with_blur_pool
from training.data import Items
from training.flags import parse, training_flags
from training.job import job
from training.loop import Experiment, Run
from training.processes import with_synced_norms

LAYOUT = """\
DATA is a folder with one folder of pictures per class, for training and for validation:

    DATA/train/cat/1.jpg  DATA/train/cat/2.jpg  DATA/train/dog/1.jpg  ...
    DATA/val/cat/7.jpg    DATA/val/dog/7.jpg    ...
"""
ON_DIGITS = ["--model", "resnet18", "--connect", "layer4:layer1.0.relu", "--image-size", "32", "--epochs", "3"]
"""The settings where neither a folder nor a model is given: a minute or two on a CPU."""

VALIDATION_CROP = 224 / 256  # share of a picture's shorter side that validation looks at
RESOLUTION_STEP = 32  # pixels; what the resolutions on the way are multiples of

Augment = Callable[[int], list[Any]]
"""Side of the images -> the random transforms of training."""


class Pictures(Items):
    """Pictures as (tensor, class), whose size in training may rise from epoch to epoch.

    Args:
        dataset: index -> (picture, class); it applies what its attribute `transform` holds.
        augment: what is random in training; None for validation.
        backbone: says how the pixels are normalised.
        args: the flags for sizes, and the seed.
        name: index -> what to call a picture that cannot be read.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        augment: Augment | None,
        backbone: Backbone,
        args: argparse.Namespace,
        name: Callable[[int], object],
    ) -> None:
        super().__init__(dataset, args.seed, name)
        self.augment, self.backbone, self.args = augment, backbone, args

    def batch(self, indices: Sequence[int], epoch: int) -> Any:
        self.dataset.transform = self.transform(epoch)  # type: ignore[attr-defined]
        return super().batch(indices, epoch)

    def transform(self, epoch: int) -> Any:
        """As the published models were trained and tested."""
        side = self.args.image_size
        if self.augment is None:
            chosen = [T.Resize(round(side / VALIDATION_CROP)), T.CenterCrop(side)]
        else:
            chosen = self.augment(resolution(epoch, self.args))
        return T.Compose([*chosen, T.ToTensor(), T.Normalize(self.backbone.mean, self.backbone.deviation)])


class DigitPictures(Dataset[Any]):
    """Digits as pictures in colour."""

    transform: Any = None

    def __init__(self, digits: Digits) -> None:
        self.digits = digits

    def __len__(self) -> int:
        return len(self.digits.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = to_pil_image(self.digits.images[index].byte()).convert("RGB")
        return self.transform(picture), int(self.digits.labels[index])


def of_photographs(side: int) -> list[Any]:
    """What is random in training, as published."""
    return [T.RandomResizedCrop(side), T.RandomHorizontalFlip()]


def of_digits(side: int) -> list[Any]:
    """The same for digits, which must not be mirrored or cropped."""
    return [T.Resize(side), T.RandomAffine(7, (0.05, 0.05), (0.9, 1.1))]


def resolution(epoch: int, args: argparse.Namespace) -> int:
    """The side of training images at an epoch: from `min_size` to `image_size` between two epochs, in steps."""
    if args.min_size is None or epoch >= args.ramp_end:
        return args.image_size
    share = max(0.0, (epoch - args.ramp_start) / (args.ramp_end - args.ramp_start))
    side = args.min_size + share * (args.image_size - args.min_size)
    return args.min_size if share == 0 else round(side / RESOLUTION_STEP) * RESOLUTION_STEP


def class_names(data: Path) -> list[str]:
    """The names of the classes in DATA. Raises `UserError` if training and validation differ."""
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


class ClassifyInPasses(Experiment):
    """Telling a picture's class in every pass; the loss is the mean over the passes."""

    drop_last = True  # as published
    evaluation_batch = 64

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, side = args, args.image_size
        if args.folder is None:
            self.classes, sets, augment = [str(digit) for digit in range(10)], embedded_digits(), of_digits
        else:
            self.classes, sets, augment = (
                class_names(args.folder),
                (args.folder / "train", args.folder / "val"),
                of_photographs,
            )
        backbone = build_backbone(args.model, len(self.classes), side, args.pretrained)
        self.train, self.test = (
            Pictures(dataset, random, backbone, args, name)
            for (dataset, name), random in zip(map(opened, sets), (augment, None), strict=True)
        )
        net = with_synced_norms(backbone.net) if args.sync_norms else backbone.net
        net = with_blur_pool(net) if args.blur_pool else net
        self.model = fxfeedback.add_feedback(net, args.connect, args.passes, input_size=(3, side, side))
        # Where only a part of a model can be traced, that part makes the passes, and only the last one has an output.
        whole = isinstance(self.model, fxfeedback.FeedbackModel)
        self.passes = range(1, args.passes + 1) if whole else [args.passes]
        if args.freeze_backbone:
            self.freeze(backbone.fresh)

    def freeze(self, fresh: frozenset[str]) -> None:
        """Leave only the new parts to be trained: the connections' blocks, and a head for new classes."""
        wrappers = [module for module in self.model.modules() if isinstance(module, fxfeedback.FeedbackModel)]
        blocks = {id(parameter) for wrapper in wrappers for parameter in wrapper.modulations.parameters()}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(id(parameter) in blocks or name in fresh)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UserError("--freeze-backbone without --connect leaves nothing to train")

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Norms, biases and scales, which are vectors and scalars, are not decayed."""
        learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        decayed = [parameter for parameter in learned if parameter.ndim > 1]
        others = [parameter for parameter in learned if parameter.ndim <= 1]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    def train_mode(self) -> None:
        self.model.train(not self.args.freeze_backbone)  # a frozen backbone keeps its batch norms' statistics, too

    def facts(self) -> dict[str, Any]:
        return {"classes": self.classes, "pictures": [len(self.train), len(self.test)]}

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        images, labels = batch
        losses = [
            F.cross_entropy(logits.float(), labels, label_smoothing=self.args.label_smoothing, reduction="none")
            for logits in as_list(model(images))
        ]
        if not losses[0].requires_grad and len(losses) == 1:
            raise UserError(f"no connection acts in {self.args.passes} pass: there is nothing to train")
        return torch.stack(losses).mean(0)

    def metrics(self) -> Mapping[str, Metric]:
        n, ranks = len(self.classes), (1, 5) if len(self.classes) > 5 else (1,)
        return {
            f"val_top{k}_pass_{i}": MulticlassAccuracy(n, top_k=k, average="micro") for i in self.passes for k in ranks
        }

    def judge(self, batch: Any, metrics: Mapping[str, Metric]) -> None:
        images, labels = batch
        passes = as_list(self.model(images))
        if self.args.flip_test:
            passes = [(a + b) / 2 for a, b in zip(passes, as_list(self.model(images.flip(3))), strict=True)]
        for i, logits in zip(self.passes, passes, strict=True):
            for name, metric in metrics.items():
                if name.endswith(f"_pass_{i}"):
                    metric.update(logits, labels)


def opened(what: Digits | Path) -> tuple[Dataset[Any], Callable[[int], object]]:
    """A data set, and how to call its pictures."""
    if isinstance(what, Digits):
        return DigitPictures(what), "digit {}".format
    try:
        folder = ImageFolder(str(what), loader=picture)
    except OSError as error:  # no folder, no classes, or a class without pictures
        raise UserError(f"{error}\n{LAYOUT}") from error
    return folder, lambda index: f"the picture {folder.samples[index][0]}"


def picture(path: str) -> Image.Image:
    """A picture, as torchvision loads it; a pipe would be waited for, a picture of too many pixels fill the memory.

    Raises:
        OSError: the file is not a picture.
    """
    if not Path(path).is_file():
        raise OSError("it is not a regular file")
    try:
        return default_loader(path)
    except Image.DecompressionBombError as error:
        raise OSError(error) from None


def as_list(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    """The logits of every pass that has some."""
    return outputs if isinstance(outputs, list) else [outputs]


def list_nodes(args: argparse.Namespace) -> int:
    """Print the names that a connection may use, in execution order, with op and output shape."""
    net = build_backbone(args.model, 1000, args.image_size, pretrained=False).net
    names = fxfeedback.node_names(net, (3, args.image_size, args.image_size))
    usable = {name: node for name, node in names.items() if len(node.shape or ()) > 1 and None in (node.shape or ())}
    width = max(map(len, usable))
    for name, node in usable.items():
        shape = ", ".join("B" if size is None else str(size) for size in node.shape or ())
        print(f"{name:{width}}  {node.op:20}  ({shape})")
    return 0


def report(run: Run) -> None:
    """Write the model, for fxfeedback.load, and print the results and where they are."""
    experiment, last = run.experiment, run.rows[-1]
    fxfeedback.save(experiment.model.eval(), run.folder / "model")
    print("\npass   top-1")
    for i in experiment.passes:
        print(f"{i:4}  {100 * last[f'val_top1_pass_{i}']:4.1f} %")
    print(f"\nresults: {run.folder} (log.csv, tensorboard, model)")


def connection(text: str) -> tuple[str, str]:
    """The connection that SOURCE:DESTINATION stands for, as argparse reads it."""
    source, colon, destination = text.partition(":")
    if not (source and colon and destination) or ":" in destination:
        raise argparse.ArgumentTypeError(f"{text!r} is not SOURCE:DESTINATION, such as classifier.6:features.9")
    return source, destination


def flags() -> argparse.ArgumentParser:
    """The command line; the defaults are the published settings, for a batch of 64."""
    parser = argparse.ArgumentParser(
        description="Train a classifier with long-range modulatory connections on a folder of pictures.",
        epilog=LAYOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, size = parser.add_argument, number(int, 1, 10_000_000)
    add(
        "folder",
        metavar="DATA",
        nargs="?",
        type=Path,
        help="folder with the pictures, see below (none: the embedded digits)",
    )
    add("--model", help="a torchvision classifier, or timm:NAME (default alexnet; without DATA a small ResNet-18)")
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
    add("--label-smoothing", type=number(float, 0, 1), default=0.1, help="(default %(default)s)")
    add("--image-size", type=size, default=224, help="height and width (default %(default)s)")
    add("--min-size", type=size, help="height and width in the first epochs of training (default: as --image-size)")
    add("--ramp-start", type=number(int, 0, 10_000), default=0, help="epoch from which it rises (default %(default)s)")
    add("--ramp-end", type=size, default=13, help="epoch from which it is --image-size (default %(default)s)")
    yes_or_no = argparse.BooleanOptionalAction
    add("--blur-pool", action=yes_or_no, default=False, help="blur before convolutions with a stride")
    add(
        "--flip-test",
        action=yes_or_no,
        default=False,
        help="validate with the mean over pictures and their mirror images",
    )
    training_flags(parser, "lrm")
    parser.set_defaults(epochs=30, batch_size=64, optimizer="sgd", lr=0.0625, schedule="cyclic", weight_decay=4e-5)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(flags(), words)
    if args.model is None:
        small = args.folder is None and not args.nodes
        args = parse(flags(), [*(ON_DIGITS if small else ["--model", "alexnet"]), *words])
    if args.nodes:
        return exit_code(lambda: list_nodes(args), fxfeedback.Error)
    return job(args, ClassifyInPasses, report)


if __name__ == "__main__":
    sys.exit(main())
