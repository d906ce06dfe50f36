"""Write one whole step of Counter-Hebb learning as an ONNX file: a network that learns where it is deployed.

The step is a plain inference graph: the instruction pass, the gated BU pass, the loss and its error, the error pass,
an update per parameter, the optimizer. Nothing in it is special to training, so a stock ONNX Runtime runs it.
`fxfeedback.runtime.Learner` keeps the weights between steps.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

from fxfeedback.butd import BUTD
from fxfeedback.deploy.check_file import require_runtime
from fxfeedback.deploy.check_learner_file import Lesson, check_learner_file, copy_to_learn
from fxfeedback.deploy.learner_step import BATCH_NORMS, LearnerStep
from fxfeedback.deploy.losses import LOSSES, name_of_loss
from fxfeedback.deploy.optimizers import OPTIMIZERS, settings_of
from fxfeedback.deploy.writing import check_target, write
from fxfeedback.errors import OptionError
from fxfeedback.tracing.modes import eval_mode


def export_learner(
    butd: BUTD,
    path: str | os.PathLike[str],
    loss: str | Callable[..., torch.Tensor] = "cross_entropy",
    optimizer: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    instructed: bool | None = None,
    dynamic_batch: bool = True,
    check: bool = True,
) -> None:
    """Write one step of Counter-Hebb learning as an ONNX file, for `fxfeedback.runtime.Learner`.

    The step is that of torch: what has requires_grad=False stays as it is, and a batch norm in training mode uses the
    batch's statistics and advances its running ones; freeze it with `.eval()`. Everything else is in the model's own
    evaluation mode: dropout is off, where that does not keep it on. The model is called as its example calls it: flags
    have their defaults. The loss is taken at the main output: the one called "out" or "logits" or, where none is, the
    only one that the prediction head leads to; for a list of passes as the mean over all.

    Inputs: the model's own; `instruction` (B or 1, instruction size), for an instructed network; `target`, (B, ...)
    int64 class ids for cross_entropy (-100: leave out), else floats shaped like the logits; `lr` (); every entry of
    the network's state_dict, under its name, with its present value as default; and what the optimizer keeps, zero at
    first: `<parameter>.momentum_buffer`, or `<parameter>.exp_avg`, `<parameter>.exp_avg_sq` and `optimizer.step`.
    With weights="sign", td_magnitude="batch" also `<weight>.magnitude`, what its signs are multiplied by in this step:
    the file itself draws nothing.
    Outputs: `loss` (), `logits`, `<input>.new` for everything that changes, and `prediction`, the logits in evaluation
    mode, where these are others.

    Args:
        butd: what `to_butd` returned; it stays as it is.
        path: the file, replaced atomically.
        loss: "cross_entropy", "mse" or "bce_with_logits", means as in torch.nn.functional; or a function (logits,
            target) -> () of ops that have rules, with a target that is shaped like the logits.
        optimizer: "sgd" or "adam", as in torch.optim.
        momentum: of sgd.
        weight_decay: of either, added to the update as weight_decay * w.
        betas: of adam, with `eps`.
        eps: of adam.
        instructed: whether a step takes an instruction; default: where the network has tasks.
        dynamic_batch: whether the batch size is free; otherwise it is 1.
        check: compare one step of the file with torch's, in ONNX Runtime, before the file takes its place: loss,
            logits, prediction, every new value, at batch 3 where the batch is free. Equal is what float32's rounding
            explains. It takes as long as a step in ONNX Runtime and three in torch, and some more copies of the weights
            in memory. False: no comparison.

    Raises:
        OptionError: an option that does not exist or a value that it cannot have; a network that cannot learn in a
            plain graph; several outputs, none of which is the main one.
        ExportError: an op has no ONNX form, and the message names its node; or the file does not do what torch does, or
            cannot be run here, and the message names what differs. There is no new file then.
        ImportError: the packages onnx and onnxscript are missing: pip install 'fxfeedback[onnx]'; or, with check=True,
            onnxruntime: pip install 'fxfeedback[runtime]'.
    """
    if not isinstance(butd, BUTD):
        raise OptionError(
            f"a {type(butd).__name__} was not made by to_butd, and only such a network has a learner: convert the "
            "model with to_butd first"
        )
    if not callable(loss) and loss not in list(LOSSES):
        raise OptionError(f"loss={loss!r}: choose one of {', '.join(map(repr, LOSSES))}, or give a function")
    if loss in ("mse", "bce_with_logits") and not isinstance(butd.options.heads, str):
        raise OptionError(
            f"loss={loss!r}: outputs that a task does not have are -inf, which only cross_entropy takes for none: give "
            "a function that leaves them out"
        )
    settings, kept = settings_of(optimizer, momentum, weight_decay, betas, eps)
    _check_plain(butd)
    check_target(path)
    if check:
        require_runtime()
    rule = functools.partial(OPTIMIZERS[optimizer], **settings)
    with torch.no_grad():
        step = LearnerStep(butd, loss, rule, kept, instructed)
        program = step.program()
        program.metadata |= {"loss": name_of_loss(loss), "optimizer": optimizer, **settings}
        compare: Callable[[Path], None] = lambda _: None  # noqa: E731
        if check:
            with eval_mode(butd, but=BATCH_NORMS):
                network = copy_to_learn(butd)
            batch = 3 if dynamic_batch else 1
            lesson = Lesson(network, program.inputs, step.judged, batch, loss, optimizer, settings)
            compare = functools.partial(check_learner_file, lesson)
        with eval_mode(butd):  # torch's exporter wants it, and puts the modules into it
            write(program, path, dynamic_batch, compare)


def _check_plain(butd: BUTD) -> None:
    """Refuse what a step of the file does not do."""
    if butd.options.update_noise:
        raise OptionError("update_noise: a plain graph draws no noise; make the network with update_noise=0")
    if butd.options.instruction_learning != "fixed":
        raise OptionError(
            "instruction_learning: the head of a learner's file is fixed; make the network without it, and load the "
            "weights of the one whose head has learned"
        )
