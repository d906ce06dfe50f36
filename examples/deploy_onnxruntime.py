"""Export every product of fxfeedback, compare it in ONNX Runtime with torch, and time both.

Four files are written, run and compared:

- passes: AlexNet with the published connections lrm3, two passes in one graph, steered;
- instructed: a BU-TD network of --model, image and instruction in;
- one task: its sub-network for one task, image in: no instruction pass, and no channels that this task does not use;
- learner: a whole step of Counter-Hebb learning of it, weights in and out.

    python examples/deploy_onnxruntime.py                                    # a minute
    python examples/deploy_onnxruntime.py --model mobilenet_v3_small --batch 1 --threads 1

The weights are random: nothing is downloaded. Difference: of the outputs, the largest, relative to the largest output;
of the learner's step, the length of all weights' difference, relative to the step's length. Torch's step is a float64
one: in float32 a unit at zero may fall on either side of its gate, which changes a few weights' updates. Times:
medians, torch and ONNX Runtime in turns, with the same number of threads, on the same kind of device.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fxfeedback
from fxfeedback.runtime import Learner, Session
from jobs import UserError, make_folder, number
from train_multi_mnist import OWN_MODELS, build_model

TASKS, TASK, MOMENTUM = 4, 1, 0.9
TOLERANCE = 1e-3
"""Float32 keeps seven digits; kernels that sum in another order lose a few."""
STEP_TOLERANCE = 2e-2
"""A unit or two on the other side of their gates."""


class Product(NamedTuple):
    """One exported file, open.

    tolerance: of the difference from torch, which is called once, before anything else. torch, onnx: one run of each.
    """

    path: Path
    providers: list[str]
    tolerance: float
    difference: Callable[[], float]
    torch: Callable[[], Any]
    onnx: Callable[[], Any]


def largest_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest difference of any element, relative to the largest element."""
    return max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)) / max(np.abs(b).max() for b in theirs)


def stepping(butd: fxfeedback.BUTD, lr: float) -> Callable[[Tensor, Tensor, Tensor], dict[str, np.ndarray]]:
    """A function that takes a step of SGD in torch with images, target and task, and returns the state after it."""
    one = next(butd.parameters())
    optimizer = torch.optim.SGD([p for p in butd.parameters() if p.requires_grad], lr, MOMENTUM)

    def step(x: Tensor, target: Tensor, task: Tensor) -> dict[str, np.ndarray]:
        optimizer.zero_grad()
        F.cross_entropy(butd(x.to(one), task.to(one.device)), target.to(one.device)).backward()
        optimizer.step()
        return {name: tensor.numpy(force=True) for name, tensor in butd.state_dict().items()}

    return step


class Deployment:
    """The four products, as the command line wants them.

    Raises `UserError` when there is no such model.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        model, shape = build_model(args.model)
        self.shape = shape if args.model in OWN_MODELS else (shape[0], args.size, args.size)
        self.butd = fxfeedback.to_butd(
            model, n_tasks=TASKS, embedding=50, gating="channel", input_size=self.shape
        ).eval()
        self.x = torch.randn(args.batch, *self.shape)
        self.settle()

    def settle(self) -> None:
        """Let batch norms see some statistics: with the initial ones all outputs of a deep network are nearly equal."""
        self.butd.train()
        try:
            with torch.no_grad():
                for _ in range(10):
                    self.butd(self.x)
        except ValueError as error:
            raise UserError(f"{error}: a larger --batch or --size may help") from error
        self.butd.eval()

    def products(self) -> dict[str, Callable[[], Product]]:
        """Name -> the function that exports and opens it."""
        return {
            "passes": self.passes,
            "instructed": self.instructed,
            "one task": self.one_task,
            "learner": self.learner,
        }

    def passes(self) -> Product:
        """AlexNet with feedback, steered toward what the last layer saw in another image."""
        model = fxfeedback.models.alexnet_lrm3().eval()
        fxfeedback.export(model, path := self.args.out / "passes.onnx", steerable=True)
        x = torch.randn(self.args.batch, 3, 224, 224)
        source = "classifier.6"
        seen = model.readout(torch.randn(1, 3, 224, 224), [source])[0][source].value.detach()
        steering = {"source": source, "activation": seen, "strength": 3.0}
        session = self.session(path)
        device = self.device(session.providers)
        model.to(device)
        there = {**steering, "activation": seen.to(device)}
        return self.compared(
            path, session, lambda: model(x.to(device), steering=there), lambda: session(x, steering=steering)
        )

    def instructed(self) -> Product:
        """The network with its instruction pass: every image has a task of its own."""
        fxfeedback.export(self.butd, path := self.args.out / "instructed.onnx")
        session, task = self.session(path), torch.arange(self.args.batch) % TASKS
        device = self.device(session.providers)
        self.butd.to(device)
        return self.compared(
            path,
            session,
            lambda: [self.butd(self.x.to(device), task.to(device))],
            lambda: [session(self.x, task=task)],
        )

    def one_task(self) -> Product:
        """The sub-network of one task."""
        fxfeedback.export(self.butd, path := self.args.out / "one_task.onnx", task=TASK)
        session = self.session(path)
        device = self.device(session.providers)
        selected = self.butd.to(device).select(TASK)
        return self.compared(path, session, lambda: [selected(self.x.to(device))], lambda: [session(self.x)])

    def learner(self) -> Product:
        """One step of SGD, batch norms in training mode."""
        butd, lr = self.butd.cpu().train(), 0.05
        fxfeedback.export_learner(butd, path := self.args.out / "learner.onnx", momentum=MOMENTUM)
        learner = Learner(path, self.providers(), self.options())
        classes = learner.outputs["logits"][1]
        target, task = (torch.arange(self.args.batch) % number for number in (classes, TASKS))
        exact, here = stepping(copy.deepcopy(butd).double(), lr), stepping(butd.to(self.device(learner.providers)), lr)

        def difference() -> float:
            start = learner.state_dict()
            learner.step(self.x, target, task=task, lr=lr)
            there, wanted = learner.state_dict(), exact(self.x, target, task)
            off, moved = (
                np.concatenate([(there[name] - other[name]).ravel() for name in learner.metadata["learns"]])
                for other in (wanted, start)
            )
            return float(np.linalg.norm(off) / np.linalg.norm(moved))

        return Product(
            path,
            learner.providers,
            STEP_TOLERANCE,
            difference,
            lambda: here(self.x, target, task),
            lambda: learner.step(self.x, target, task=task, lr=lr),
        )

    def compared(
        self, path: Path, session: Session, run: Callable[[], list[Tensor]], run_there: Callable[[], list[Tensor]]
    ) -> Product:
        """A product that is a network: its outputs are compared."""

        @torch.inference_mode()
        def outputs() -> list[np.ndarray]:
            return [y.cpu().numpy() for y in run()]

        def difference() -> float:
            return largest_difference([y.numpy() for y in run_there()], outputs())

        return Product(path, session.providers, TOLERANCE, difference, outputs, run_there)

    # -- ONNX Runtime -------------------------------------------------------------------------------------------------

    def session(self, path: Path) -> Session:
        """The file, open."""
        return Session(path, self.providers(), self.options())

    def providers(self) -> Any:
        """The provider that was asked for; on CUDA float32 is float32, as in torch."""
        cuda = self.args.provider in ("cuda", "CUDAExecutionProvider")
        return [("CUDAExecutionProvider", {"use_tf32": "0"})] if cuda else self.args.provider

    def options(self) -> onnxruntime.SessionOptions:
        """As many threads as torch has; between runs they sleep, where spinning ones would slow torch down."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        return options

    def device(self, providers: list[str]) -> str:
        """Where torch runs: on CUDA if ONNX Runtime does, and torch can."""
        return "cuda" if providers[0].startswith("CUDA") and torch.cuda.is_available() else "cpu"


def medians(product: Product, repeats: int, bar: tqdm) -> Iterator[float]:
    """Seconds of one run in torch and in ONNX Runtime, in turns; the first turn is not counted."""
    seconds: list[list[float]] = [[], []]
    for turn in range(repeats + 1):
        for run, taken in zip((product.torch, product.onnx), seconds, strict=True):
            start = time.perf_counter()
            run()
            if turn:
                taken.append(time.perf_counter() - start)
        bar.update()
    yield from map(statistics.median, seconds)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with a message when it is wrong."""
    parser = argparse.ArgumentParser(description="Export every product, check it in ONNX Runtime, and time it.")
    add, size = parser.add_argument, number(int, 1, 100_000)
    add("--model", default="resnet18", help="a torchvision classifier, convnet or published (default %(default)s)")
    add("--batch", type=size, default=4, help="images per run (default %(default)s)")
    add("--size", type=size, default=224, help="of the images of a torchvision classifier (default %(default)s)")
    add("--provider", help="of ONNX Runtime: cpu, cuda or a full name (default: cuda where it works, else cpu)")
    add("--threads", type=size, help="of torch and of ONNX Runtime (default: torch's)")
    add("--repeats", type=size, default=5, help="runs that are timed (default %(default)s)")
    add("--only", nargs="+", choices=["passes", "instructed", "one-task", "learner"], help="(default: all four)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of the weights and images (default %(default)s)")
    add("--out", type=Path, default=Path("runs/deploy"), help="folder for the files (default %(default)s)")
    return parser.parse_args(argv)


def report(args: argparse.Namespace) -> int:
    """Print the table; returns how many products differ from torch."""
    deployment = Deployment(args)
    wanted = [name.replace("-", " ") for name in args.only or ()]
    products = {name: make for name, make in deployment.products().items() if not wanted or name in wanted}
    print(f"{args.model}, {args.batch} images {deployment.shape}; {torch.get_num_threads()} threads")
    print(f"{'':<12}{'file':>10}{'difference':>12}{'torch':>11}{'ONNX Runtime':>14}{'ratio':>7}   provider")
    bad = 0
    with tqdm(total=len(products) * (args.repeats + 1), unit="run", dynamic_ncols=True, disable=None) as bar:
        for name, make in products.items():
            bar.set_description(f"{name}: export")
            try:
                product = make()
            except fxfeedback.errors.ExportError as error:
                bad += 1
                tqdm.write(f"{name:<12}NOT OK: {error}")
                continue
            bar.set_description(name)
            difference = product.difference()
            here, there = medians(product, args.repeats, bar)
            verdict = "" if difference <= product.tolerance else "   NOT OK: the numbers differ"
            bad += bool(verdict)
            tqdm.write(
                f"{name:<12}{product.path.stat().st_size / 1e6:>7.1f} MB{difference:>12.1e}{here * 1e3:>8.1f} ms"
                f"{there * 1e3:>11.1f} ms{there / here:>7.2f}   {product.providers[0]}{verdict}"
            )
    print(f"files: {args.out}")
    return bad


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code: 0, 1 after an error or where numbers differ, 130 after Ctrl-C."""
    args = parse_arguments(argv)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or threads)
        make_folder(args.out)
        return min(report(args), 1)
    except (UserError, OSError, fxfeedback.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; finished files are in {args.out}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
