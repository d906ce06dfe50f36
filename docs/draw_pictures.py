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
from train_multi_mnist import Run, parse_arguments  # noqa: E402


def resnet50(path: Path) -> None:
    """ResNet-50 whose last stage feeds back into the stage before."""
    model = fxfeedback.add_feedback(torchvision.models.resnet50(), [("layer4", "layer3.0.conv1")])
    fxfeedback.draw(model, path, depth=0)


def multi_mnist(path: Path) -> None:
    """The network of examples/train_multi_mnist.py, after five epochs."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(parse_arguments(["--epochs", "5", "--device", "cpu", "--out", folder]))
        run.train()
        fxfeedback.draw(run.butd, path, tasks={task: i for i, task in enumerate(TASKS)})


if __name__ == "__main__":
    pictures = HERE / "pictures"
    pictures.mkdir(exist_ok=True)
    resnet50(pictures / "resnet50.svg")
    multi_mnist(pictures / "multi_mnist.svg")
