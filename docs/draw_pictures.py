"""Draw docs/pictures: a network with feedback, and an instructed one that has learned for a minute.

python docs/draw_pictures.py
"""

import sys
import tempfile
from pathlib import Path

import torchvision

import fxfeedback

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

from multi_mnist import TASKS  # noqa: E402
from train_multi_mnist import build, flags  # noqa: E402
from training.flags import parse  # noqa: E402
from training.job import job  # noqa: E402


def resnet50(path: Path) -> None:
    """ResNet-50 whose last stage feeds back into the stage before."""
    model = fxfeedback.add_feedback(torchvision.models.resnet50(), [("layer4", "layer3.0.relu")])
    fxfeedback.draw(model, path, depth=0)


def multi_mnist(path: Path) -> None:
    """The network of examples/train_multi_mnist.py, after five epochs."""
    tasks = {task: i for i, task in enumerate(TASKS)}
    with tempfile.TemporaryDirectory() as folder:
        arguments = parse(flags(), ["--epochs", "5", "--device", "cpu", "--out", folder])
        job(arguments, build, lambda run: fxfeedback.draw(run.experiment.model, path, tasks=tasks))


if __name__ == "__main__":
    pictures = HERE / "pictures"
    pictures.mkdir(exist_ok=True)
    resnet50(pictures / "resnet50.svg")
    multi_mnist(pictures / "multi_mnist.svg")
