"""The networks and digits in examples/web/data, run in Python as the page runs them in the browser.

python examples/web/page_networks.py      # says how often they are correct, as the page does
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import safetensors.numpy
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the other examples

from multi_mnist import DEVIATION, MEAN, SIDE, TASKS, Digits, compose

DATA = Path(__file__).with_name("data")
BATCH, RATE = 32, 1e-3  # of a lesson, as the page gives it
RECORD = 1 + SIDE * SIDE  # bytes of a digit in a file: its label, and its pixels


def write_digits(path: Path, digits: Digits) -> None:
    """A record for every digit."""
    pixels = digits.images.round().byte().flatten(1)
    path.write_bytes(torch.cat([digits.labels.byte().unsqueeze(1), pixels], 1).numpy().tobytes())


def read_digits(path: Path) -> Digits:
    """What `write_digits` wrote."""
    records = torch.from_numpy(np.fromfile(path, np.uint8).reshape(-1, RECORD))
    return Digits(records[:, 1:].reshape(-1, SIDE, SIDE).float(), records[:, 0].long())


class Networks:
    """The page's networks, and its test pairs: the digits of the first half of the test digits with those of the other.

    labels: (pairs, 2), the left and the right digit's. Logits are (pairs, 10).
    """

    def __init__(self, folder: Path = DATA) -> None:
        self.page = json.loads((folder / "page.json").read_text())
        digits = read_digits(folder / "test_digits.bin")
        half = len(digits.labels) // 2
        left, right = digits.images[:half], digits.images[half:]
        self.labels = torch.stack([digits.labels[:half], digits.labels[half:]], 1).numpy()
        self.overlaid = (((left + right) / 2 / 255 - MEAN) / DEVIATION).unsqueeze(1).numpy()
        self.composed = compose(left, right).numpy()
        self.steering, self.instructed, self.prediction = (
            ort.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
            for name in ("steering.onnx", "instructed.onnx", "learner_predict.onnx")
        )
        self.step = ort.InferenceSession(folder / "learner_step.onnx", providers=["CPUExecutionProvider"])
        self.lesson = read_digits(folder / "lesson_digits.bin")
        self.weights = safetensors.numpy.load_file(folder / "weights.safetensors")

    def passes(self, targets: np.ndarray | None) -> list[np.ndarray]:
        """Logits of each pass over the overlaid pairs, steered toward `targets` (pairs,), or not."""
        about = self.page["steering"]
        prototypes = np.array(about["prototypes"], np.float32)
        given = {
            "activation": prototypes[:1] * 0 if targets is None else prototypes[targets],
            "alpha": np.float32(targets is not None),
            "strength": np.full(2, 1 if targets is None else about["strength"], np.float32),
        }
        named = {f"{about['source']}.{name}": np.asarray(value) for name, value in given.items()}
        return self.steering.run(None, {"input": self.overlaid, **named})

    def instructed_to(self, task: int) -> np.ndarray:
        """Logits of the instructed network, told to read that digit of every pair."""
        return self.instructed.run(None, {"input": self.composed, "instruction": instruction(task)})[0]

    def learner(self, task: int, weights: dict[str, np.ndarray]) -> np.ndarray:
        """Logits of the learner with these weights: `self.weights` before it has learned anything here."""
        used = {given.name: weights[given.name] for given in self.prediction.get_inputs()[2:]}
        return self.prediction.run(None, {"input": self.composed, "instruction": instruction(task), **used})[0]

    def taught(self, steps: int) -> dict[str, np.ndarray]:
        """The learner's weights after so many steps in right digits, with left ones mixed in, as the page teaches."""
        outputs = [output.name for output in self.step.get_outputs()]
        changing = [given for given in self.step.get_inputs() if f"{given.name}.new" in outputs]
        state = {given.name: self.weights.get(given.name, np.zeros(given.shape, np.float32)) for given in changing}
        generator, labels = torch.Generator().manual_seed(0), self.lesson.labels
        for _ in range(steps):
            pairs = torch.randint(len(labels), (len(TASKS), BATCH), generator=generator)
            tasks = torch.randint(len(TASKS), (BATCH,), generator=generator)
            given = {
                "input": compose(*self.lesson.images[pairs]).numpy(),
                "instruction": np.eye(len(TASKS), dtype=np.float32)[tasks],
                "target": labels[pairs[tasks, torch.arange(BATCH)]].numpy(),
                "lr": np.array(RATE, np.float32),
            }
            results = dict(zip(outputs, self.step.run(None, given | state), strict=True))
            state = {name: results[f"{name}.new"] for name in state}
        return state

    def steered(self) -> np.ndarray:
        """Whether the last pass names the target, each of a pair's two digits being the target once: (pairs, 2)."""
        return np.stack([self.passes(targets)[-1].argmax(1) == targets for targets in self.labels.T], 1)

    def measured(self) -> dict[str, dict[str, float]]:
        """What the page says of its networks; shares in 0..1.

        `steering`: of the pairs of two classes, how often the last pass names the target, and how often without
        steering. `instructed`, `untaught`: task -> how often that digit is read correctly.
        """
        two = self.labels[:, 0] != self.labels[:, 1]
        unsteered = self.passes(None)[-1].argmax(1)[:, None] == self.labels
        return {
            "steering": {"unsteered": share(unsteered[two]), "steered": share(self.steered()[two])},
            "instructed": {task: share(self.read(self.instructed_to(k), k)) for k, task in enumerate(TASKS)},
            "untaught": {task: share(self.read(self.learner(k, self.weights), k)) for k, task in enumerate(TASKS)},
        }

    def read(self, logits: np.ndarray, task: int) -> np.ndarray:
        """Whether that digit was read correctly: (pairs,)."""
        return logits.argmax(1) == self.labels[:, task]


def instruction(task: int) -> np.ndarray:
    """The task's instruction (1, tasks)."""
    return np.eye(len(TASKS), dtype=np.float32)[[task]]


def share(hits: np.ndarray) -> float:
    """The mean of true and false, as page.json has it."""
    return round(float(hits.mean()), 4)


if __name__ == "__main__":
    print(json.dumps(Networks().measured(), indent=2))
