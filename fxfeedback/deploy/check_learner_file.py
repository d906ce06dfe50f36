"""Compare the file of a learner with torch before it takes its place: one step from the present weights, in both.

Judged as check_file.py judges outputs, but by a wider tolerance, as rounding passes the network twice; a parameter by
the length of its own step.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from fxfeedback.butd import BUTD
from fxfeedback.deploy.check_file import DRAWS, ROUNDING, numpy_of, open_file, relative
from fxfeedback.deploy.program import Input
from fxfeedback.deploy.trials import Trial
from fxfeedback.errors import ExportError, first_line
from fxfeedback.instructed.magnitudes import Drawn
from fxfeedback.tracing.modes import eval_mode
from fxfeedback.tracing.wrapper import call_as_example

LOSSES: Mapping[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}
TOLERANCE = 1e-3
SHORT = 1e-2
"""A step that is shorter than this part of the longest is judged by that part: the exact update of a bias before a norm
is nothing, and what is left of it is the rounding of terms as large as other updates."""
State = dict[str, np.ndarray]


class Lesson(NamedTuple):
    """What a learner's file does.

    network: a copy of the network, in the file's modes. inputs: of the file. judged: the outputs that the loss is taken
    of. batch: of the step that is tried. settings: of the optimizer, under torch.optim's names.
    """

    network: BUTD
    inputs: Sequence[Input]
    judged: Sequence[int]
    batch: int
    loss: str | Callable[..., torch.Tensor]
    optimizer: str
    settings: Mapping[str, Any]


def copy_to_learn(butd: BUTD) -> BUTD:
    """A copy in the same modes whose loss.backward() gives the updates of Counter-Hebb learning."""
    network = copy.deepcopy(butd)
    vars(network)["options"] = replace(butd.options, learning="counter_hebb")
    return network


def copy_for_step(network: BUTD, magnitudes: Mapping[str, torch.Tensor]) -> BUTD:
    """The network, or a copy that takes these magnitudes in every mode, as a step of the file does."""
    if not magnitudes:
        return network
    other = copy.deepcopy(network)
    vars(other)["_drawn"] = Drawn(always=True, given=dict(magnitudes))
    return other


def check_learner_file(lesson: Lesson, file: Path) -> None:
    """Compare one step with torch's: loss, logits, prediction, new weights, statistics and the optimizer's state.

    Raises:
        ExportError: they differ, or they cannot be compared; the message names what differs.
    """
    learner = open_file(file, "Learner")
    start = {**learner.state_dict(), **learner.optimizer_state()}
    wrong = ""
    for number in range(DRAWS):
        with torch.enable_grad():
            wrong = _differs(lesson, learner, start, number)
        if not wrong:
            return
    raise ExportError(
        f"the learner's file does not do what torch does: after a step of batch {lesson.batch}, {wrong}. It was not "
        "written; check=False writes it unchecked"
    )


def _differs(lesson: Lesson, learner: Any, start: State, number: int) -> str:
    """What differs from torch's after a step, and how far; or nothing."""
    trial, target, magnitudes = _drawn(lesson, learner, number)
    try:
        network = copy_to_learn(lesson.network)
        lr = _rate(lesson, network, trial, target)
        wanted = _after(lesson, network, trial, target, lr, magnitudes)
    except Exception as error:  # whatever the user's model raises
        return f"torch cannot be asked, as the model does not take random numbers: {first_line(error)}"
    task = trial.options.get("task")
    learner.load_state_dict({name: start[name] for name in learner.state_dict()})
    try:
        found = {"prediction": numpy_of(learner.predict(*trial.inputs, task=task))}
        found["loss"] = np.asarray(learner.step(*trial.inputs, target, lr=lr, task=task, magnitudes=magnitudes))
    except Exception as error:  # of ONNX Runtime's dozen classes
        return f"ONNX Runtime cannot run it: {first_line(error)}"
    found |= {"logits": numpy_of(learner.logits), **learner.state_dict(), **learner.optimizer_state()}
    if lesson.optimizer == "adam":
        _by_own_moments(lesson, start, found, wanted, lr)
    off = _distances(found, wanted, start)
    far = [name for name in off if not off[name] <= TOLERANCE]
    if not far:
        return ""
    try:
        exact_network = copy_to_learn(lesson.network).double()
        exact = _after(lesson, exact_network, _wide(trial), _wide_tensor(target), lr, magnitudes)
    except Exception:  # a model of the user's that has its dtype in its code
        return f"{far[0]!r} is off by {off[far[0]]:.1e}"
    exact = {name: exact.get(name, wanted[name]) for name in wanted}
    ours, own = _distances(found, exact, start), _distances(wanted, exact, start)
    far = [name for name in far if not ours[name] <= max(TOLERANCE, ROUNDING * own[name])]
    return f"{far[0]!r} is off by {off[far[0]]:.1e} of its step" if far else ""


def _drawn(lesson: Lesson, learner: Any, number: int) -> tuple[Trial, torch.Tensor, dict[str, torch.Tensor]]:
    """Inputs with an instruction, a target, and magnitudes by weight name, that depend on the draw's `number` only."""
    generator = torch.Generator().manual_seed(number)
    device = next((t.device for t in lesson.network.parameters()), torch.device("cpu"))
    examples = {given.name: given.example for given in lesson.inputs}
    own = [given.example for given in lesson.inputs if given.own]

    def draw(like: torch.Tensor, largest: int = 2) -> torch.Tensor:
        shape = (lesson.batch, *like.shape[1:]) if like.ndim else ()
        if not like.dtype.is_floating_point:
            return torch.randint(largest, shape, generator=generator).to(device, like.dtype)
        return torch.randn(shape, generator=generator).to(device, like.dtype)

    xs, options = [draw(like) for like in own], {}
    if "instruction" in examples:
        vectors = examples["instruction"]
        ids = torch.randint(vectors.shape[1], (lesson.batch,), generator=generator).to(device)
        options = {"task": ids if learner.metadata["takes_ids"] else draw(vectors)}
    magnitudes = {}
    for name, b in learner.metadata.get("magnitudes", {}).items():
        like = examples[f"{name}.magnitude"]
        magnitudes[name] = (b * torch.rand(like.shape, generator=generator)).to(device, like.dtype)
    target = examples["target"]
    if target.dtype.is_floating_point:
        return Trial(xs, options), draw(target).sigmoid(), magnitudes
    classes = lesson.network.options.head_sizes(int(learner.outputs["logits"][1]))  # those that every task has
    target = draw(target, min(classes, default=int(learner.outputs["logits"][1])))
    return Trial(xs, options), target, magnitudes


def _loss(lesson: Lesson, network: BUTD, trial: Trial, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the last logits that it is taken of."""
    output = call_as_example(network, trial.inputs, **trial.options)
    alike = {id(t): t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()}
    logits = [list(alike.values())[i] for i in lesson.judged]
    loss = LOSSES[lesson.loss] if isinstance(lesson.loss, str) else lesson.loss
    losses = [loss(one, target) for one in logits]
    return torch.stack(losses).mean(), logits[-1]


def _rate(lesson: Lesson, network: BUTD, trial: Trial, target: torch.Tensor) -> float:
    """A rate at which a step is about as long as the weights: float32 would round a shorter one of them away."""
    if lesson.optimizer == "adam":
        return 0.01
    other = copy.deepcopy(network)
    _loss(lesson, other, trial, target)[0].backward()
    pairs = [(numpy_of(p), numpy_of(p.grad)) for p in other.parameters() if p.grad is not None]
    weights, updates = (sum(float(np.square(pair[i]).sum()) for pair in pairs) for i in (0, 1))
    return float(np.sqrt(weights / updates)) if weights and updates else 1.0


def _after(
    lesson: Lesson,
    network: BUTD,
    trial: Trial,
    target: torch.Tensor,
    lr: float,
    magnitudes: Mapping[str, torch.Tensor],
) -> State:
    """What torch has after a step; without the weights that Adam makes of its moments."""
    with eval_mode(network), torch.no_grad():
        found = {"prediction": _loss(lesson, network, trial, target)[1]}
    network = copy_for_step(network, magnitudes)
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[lesson.optimizer]
    names = {parameter: name for name, parameter in network.named_parameters()}
    optimizer = made([p for p in names if p.requires_grad], lr, **lesson.settings)
    found["loss"], found["logits"] = _loss(lesson, network, trial, target)
    found["loss"].backward()
    optimizer.step()
    found |= network.state_dict()
    for parameter, kept in optimizer.state.items():
        found |= {f"{names[parameter]}.{kind}": value for kind, value in kept.items() if value is not None}
        if lesson.optimizer == "adam":
            found["optimizer.step"] = found.pop(f"{names[parameter]}.step")
            del found[names[parameter]]
    return {name: numpy_of(tensor) for name, tensor in found.items()}


def _by_own_moments(lesson: Lesson, start: State, found: State, wanted: State, lr: float) -> None:
    """Adam divides the smallest updates, which are rounding, by their own size: the file's moments are torch's, and its
    weights what Adam's first step makes of these."""
    (beta, gamma), eps = lesson.settings["betas"], lesson.settings["eps"]
    for moment in [name for name in wanted if name.endswith(".exp_avg")]:
        name = moment.removesuffix(".exp_avg")
        m, v = (found[f"{name}.{kind}"].astype(np.float64) for kind in ("exp_avg", "exp_avg_sq"))
        wanted[name] = start[name] - lr * m / (1 - beta) / (np.sqrt(v / (1 - gamma)) + eps)


def _distances(found: State, wanted: State, start: State) -> dict[str, float]:
    """How far each is off: an output by its largest value, the rest by the length of its step."""
    kinds = {name: name.rpartition(".")[2] if name.rpartition(".")[0] in start else "" for name in wanted}
    steps = {name: float(np.linalg.norm(wanted[name] - start[name])) for name in wanted if name in start}
    longest = {
        kind: max([steps[name] for name in steps if kinds[name] == kind], default=0.0) for kind in kinds.values()
    }
    off = {}
    for name in wanted:
        if name not in steps:
            off[name] = relative(found[name], wanted[name])
        else:
            error = float(np.linalg.norm(found[name].astype(np.float64) - wanted[name]))
            length = max(steps[name], SHORT * longest[kinds[name]])
            off[name] = error / length if length else error
    return off


def _wide(trial: Trial) -> Trial:
    return Trial([_wide_tensor(x) for x in trial.inputs], {name: _wide_tensor(t) for name, t in trial.options.items()})


def _wide_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
