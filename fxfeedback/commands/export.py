"""Write a network as an ONNX file, and say what is in it.

With --connect: the passes of a model with connections. With --tasks: an instructed network; with --task the network of
one task; with --learner a whole step of learning. A directory that fxfeedback.save wrote needs neither.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from fxfeedback.commands import info
from fxfeedback.commands.given import add_connections, add_model, add_tasks, read_network
from fxfeedback.errors import OptionError

EXAMPLES = [
    "fxfeedback export alexnet lrm.onnx --connect classifier.6:features.9 --steerable",
    "fxfeedback export resnet18 instructed.onnx --tasks 2",
    "fxfeedback export resnet18 left.onnx --tasks 2 --gating channel --task 0",
    "fxfeedback export resnet18 half.onnx --tasks 2 --dtype float16",
    "fxfeedback export resnet18 learner.onnx --tasks 2 --learner --optimizer adam",
    "fxfeedback export steered lrm.onnx --passes 4",
    "fxfeedback export steered video.onnx --passes 1 --stateful --outputs features.11",
]
KEYS = {"model": "MODEL, as given", **info.KEYS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, FILE, and what of the network is written."""
    add_model(parser)
    parser.add_argument("file", metavar="FILE.onnx", help="replaced atomically")
    add_connections(parser)
    parser.add_argument("--steerable", action="store_true", help="sources can be steered, by optional inputs")
    parser.add_argument("--dynamic-size", action="store_true", help="height and width are also free")
    parser.add_argument("--stateful", action="store_true", help="a call can go on from the signals of an earlier one")
    parser.add_argument("--outputs", nargs="+", metavar="NODE", help="nodes whose values are outputs as well")
    parser.add_argument("--opset", type=int, metavar="N", help="version of ONNX's operators, 18 or later")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], help="the file computes in half precision")
    parser.add_argument("--io-dtype", metavar="DTYPE", help="of its inputs and outputs, with --dtype: float32, or that")
    add_tasks(parser)
    parser.add_argument("--task", type=int, metavar="ID", help="only this task's network")
    parser.add_argument("--keep-gates", action="store_true", help="a session computes the gates of a task once")
    parser.add_argument("--learner", action="store_true", help="a step of learning, for fxfeedback.runtime.Learner")
    parser.add_argument("--loss", choices=["cross_entropy", "mse", "bce_with_logits"], help="the learner's")
    parser.add_argument("--optimizer", choices=["sgd", "adam"], help="the learner's")
    parser.add_argument("--momentum", type=float, metavar="X", help="of the learner's sgd")
    parser.add_argument("--weight-decay", type=float, metavar="X", help="of the learner's optimizer")
    parser.add_argument("--fixed-batch", action="store_true", help="the batch size is 1, not free")
    parser.add_argument("--no-check", action="store_true", help="do not compare the file with torch")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Export, and read the file again."""
    import fxfeedback

    given = vars(arguments)
    names = ("loss", "optimizer", "momentum", "weight_decay")
    of_learner: dict[str, Any] = {name: given[name] for name in names if given[name] is not None}
    if of_learner and not arguments.learner:
        raise OptionError(f"--{next(iter(of_learner)).replace('_', '-')} belongs to --learner")
    network = read_network(arguments, fxfeedback.FeedbackModel, fxfeedback.BUTD, fxfeedback.PredictiveModel)
    dynamic_batch = not arguments.fixed_batch
    if arguments.learner:
        others = (
            "steerable",
            "dynamic_size",
            "stateful",
            "outputs",
            "opset",
            "dtype",
            "io_dtype",
            "keep_gates",
            "task",
        )
        for name in (name for name in others if given[name] not in (None, False)):
            raise OptionError(f"--{name.replace('_', '-')} does not belong to --learner")
        fxfeedback.export_learner(
            network, arguments.file, dynamic_batch=dynamic_batch, check=not arguments.no_check, **of_learner
        )
    else:
        fxfeedback.export(
            network,
            arguments.file,
            steerable=arguments.steerable,
            task=arguments.task,
            dynamic_batch=dynamic_batch,
            dynamic_size=arguments.dynamic_size,
            stateful=arguments.stateful,
            outputs=arguments.outputs or (),
            opset=arguments.opset,
            dtype=arguments.dtype,
            io_dtype=arguments.io_dtype,
            keep_gates=arguments.keep_gates,
            check=not arguments.no_check,
        )
    return {"model": arguments.model, **info.about(arguments.file)}


def lines(result: dict[str, Any]) -> Iterator[str]:
    """What `info` says of the file."""
    yield from info.lines(result)
