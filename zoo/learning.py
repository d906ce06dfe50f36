"""Counter-Hebb learning and instructions in every model of torchvision, and in some of timm: a table, a row per model.

    python zoo/learning.py [NAME ...]

Learning: in float64, in evaluation and in training mode, from the same random state, the updates of
`fxfeedback.to_butd(model)` equal autograd's gradients in the plain model, for the input and for every parameter; who
has no gradient gets no update. The outputs are equal, too, and so are the running statistics afterwards. torch.fx
cannot trace the detection and optical flow models whole: there the part that computes their features is converted, and
besides the part's own law the losses of the whole model must have the same gradients. Two models are tried with fewer
blocks than they have, and their rows say so.

Instruction: at a random start, the active share of a gating site, the fraction of its counter neurons above zero, lies
between 5 and 95 percent: for one of ten tasks, and for one of the model's own classes. Only positions that the
output uses are counted: of its last block, a vision transformer uses only the class token. There is no upper limit for
a site whose output reaches only other sites. An example is DenseNet's first ReLU, which reaches seven others through
batch norms. Its counter neurons are sums of theirs, none of which is negative, so a unit is on if any of theirs is.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import models as zoo
import torch
from models import PARTS, SHORTENED, Problem, call_whole, leaves, restore, shorten, statistics_of, warm_up
from table import Line, Table, command
from torch import fx, nn

import fxfeedback
from fxfeedback.graph.channels import channel_dim
from fxfeedback.instructed.kept_graphs import graphs_of
from fxfeedback.rules import RULES

TOLERANCE = 1e-9
CANCELLED = 1e-5
"""A gradient smaller than this part of the model's largest is judged by that part: the exact gradient of a bias before
a batch norm is nothing, and what is left of it is the rounding of terms that are as large as other gradients' are."""

ACTIVE = (0.05, 0.95)
TASKS = 10

HEADS = {"timm/deit_tiny_distilled_patch16_224": "head"}
"""The prediction head of those that have more than one."""

TABLE = Table(
    "eval, train: the largest error of an update, relative to its gradient\n"
    "sites: how many; behind it the lowest and the highest active share, for a task | for a class",
    {"eval": 10, "train": 10, "sites": 7},
    "active shares, or what is wrong",
)

KEEPS_SIGNS = ("cat", "batch_norm", "max_pool", "avg_pool", "identity")
"""The rules that bring down no negative counter neuron where none comes from above."""


class Shares(NamedTuple):
    """How many gating sites there are, and the lowest and the highest active share, with its site."""

    sites: int
    lowest: tuple[float, str]
    highest: tuple[float, str]

    def __str__(self) -> str:
        return f"{100 * self.lowest[0]:.0f} % {self.lowest[1]}, {100 * self.highest[0]:.0f} % {self.highest[1]}"


class Row(NamedTuple):
    """What the table says of a model that is well.

    errors: the largest error of an update, relative to its gradient, in evaluation and in training mode.
    tasks, classes: the active shares for an instruction of ten tasks, and over the model's own outputs.
    part: what was tried of a model that is too large.
    """

    errors: tuple[float, float]
    tasks: Shares | None
    classes: Shares | None
    part: str = ""


@contextmanager
def in_double() -> Iterator[None]:
    """Everything in float64, what models make inside of themselves included."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.double)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -- learning ----------------------------------------------------------------------------------------------------------


def check(name: str, kind: str) -> Row:
    """Build one model and hold its updates against its gradients.

    Raises:
        Problem: an update is not the gradient, or an instruction opens nearly all or nearly no gates of a site.
    """
    torch.manual_seed(0)
    plain, path = zoo.build(name, kind).double().eval(), PARTS.get(kind, "")
    tried = shorten(plain, *SHORTENED[name]) if name in SHORTENED else ""
    x, another = zoo.input_of(name, kind), zoo.input_of(name, kind)
    plain_part = plain.get_submodule(path)
    model = copy.deepcopy(plain) if path else plain
    size, head = x.shape[1:], HEADS.get(name)
    part = fxfeedback.to_butd(model.get_submodule(path), head=head, input_size=size)
    classes = None if path else active_shares(part, x)
    tasks = classes and active_shares(fxfeedback.to_butd(plain, TASKS, head=head, input_size=size), x)
    unsettle(plain_part)
    warm_up(plain_part, another)
    part.load_state_dict(plain_part.state_dict())
    errors = [compare(plain_part.train(mode), part.train(mode), x, lambda model: model(x)) for mode in (False, True)]
    if path:
        setattr(model, path, part)
        whole = compare(plain.train(), model.train(), x, lambda model: call_whole(model, kind, x))
        errors[1] = max(errors[1], whole)
    for shares in (tasks, classes):
        if shares and not (ACTIVE[0] <= shares.lowest[0] and shares.highest[0] <= ACTIVE[1]):
            raise Problem(f"active shares: {shares} for {'tasks' if shares is tasks else 'classes'}")
    return Row((errors[0], errors[1]), tasks, classes, tried)


def unsettle(model: nn.Module) -> None:
    """Random values for what starts at a constant that hides what is behind it, and for the batch norms' scales."""
    for parameter in model.parameters():
        if parameter.abs().max() < 0.1 and parameter.unique().numel() == 1:
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)


def compare(plain: nn.Module, model: nn.Module, x: torch.Tensor, run: Callable[[nn.Module], Any]) -> float:
    """The largest error of an update, relative to its gradient; both start from the same random state and buffers.

    Args:
        plain: the model.
        model: the same, converted, or with a converted part; it may share the parameters of `plain`.
        x: the input that `run` uses.
        run: what calls either of them, and returns an output whose gradients are compared.

    Raises:
        Problem: the outputs, the updates or the statistics differ.
    """
    mode = "training" if model.training else "evaluation"
    x.requires_grad_()
    start = statistics_of(plain)
    outputs, updates = learn(model, x, run)
    advanced = statistics_of(model)
    restore(plain, start)
    errors: dict[str, tuple[float, float]] = {}

    def judge(name: str, gradient: torch.Tensor) -> None:
        update = updates.pop(name, None)
        if update is None:
            raise Problem(f"{mode}: {name} has a gradient, but no update")
        if not gradient.isfinite().all():
            raise Problem(f"{mode}: {name} has no finite gradient")
        errors[name] = (update - gradient).abs().max().item(), gradient.abs().max().item()

    expected, _ = learn(plain, x, run, judge)
    for output, reference in zip(outputs, expected, strict=True):
        difference = (output - reference).abs().max() / reference.abs().max()
        if not difference <= TOLERANCE:
            raise Problem(f"{mode}: an output is off by {difference:.1e}")
    if updates:
        raise Problem(f"{mode}: {min(updates)} has an update, but no gradient")
    largest = max(size for _, size in errors.values())
    relative = {name: error / max(size, CANCELLED * largest) for name, (error, size) in errors.items()}
    worst = max(relative, key=relative.__getitem__)
    if not relative[worst] <= TOLERANCE:
        wrong = sum(not error <= TOLERANCE for error in relative.values())
        raise Problem(f"{mode}: the update of {worst} is off by {relative[worst]:.1e} ({wrong} of {len(relative)} are)")
    for name, buffer in statistics_of(plain).items():
        if not torch.allclose(buffer, advanced[name], rtol=TOLERANCE):
            raise Problem(f"{mode}: {name} does not advance as the plain model's does")
    restore(plain, start)
    restore(model, {**advanced, **start})  # it may have constants of its own
    return relative[worst]


def learn(
    model: nn.Module,
    x: torch.Tensor,
    run: Callable[[nn.Module], Any],
    take: Callable[[str, torch.Tensor], None] | None = None,
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The outputs, and the gradient of their mean square for every tensor that has one; `take` gets each as it comes.

    The largest models fit into memory because only one set of gradients is kept.
    """
    gradients: dict[str, torch.Tensor] = {}
    take = take or gradients.__setitem__

    def accumulated(name: str, tensor: torch.Tensor) -> None:
        gradient, tensor.grad = tensor.grad, None
        if gradient is not None:
            take(name, gradient)

    tensors = {"the input": x, **dict(model.named_parameters())}
    hooks = [
        tensor.register_post_accumulate_grad_hook(lambda tensor, name=name: accumulated(name, tensor))
        for name, tensor in tensors.items()
        if tensor.requires_grad
    ]
    torch.manual_seed(1)
    outputs = leaves(run(model))
    sum(output.square().mean() for output in outputs if output.requires_grad).backward()
    for hook in hooks:
        hook.remove()
    return [output.detach() for output in outputs], gradients


# -- instruction -------------------------------------------------------------------------------------------------------


def active_shares(butd: fxfeedback.BUTD, x: torch.Tensor) -> Shares | None:
    """The active shares of the sites for random one-hot instructions; None where the model takes none."""
    graphs = graphs_of(butd)
    if not graphs.can_instruct:
        return None
    task = torch.randperm(graphs.instruction_size)[: len(x)]
    counters = butd.counter_neurons(task)
    used = used_positions(butd.bu, list(counters), x)
    shares = {name: (t > 0)[used[name].expand_as(t)].double().mean().item() for name, t in counters.items()}
    limited = {name: share for name, share in shares.items() if not has_gated_readers(butd.bu, name, set(counters))}
    lowest, highest = min(shares, key=shares.__getitem__), max(limited, key=limited.__getitem__)
    return Shares(len(shares), (shares[lowest], lowest), (shares[highest], highest))


def has_gated_readers(bu: fx.GraphModule, name: str, sites: set[str]) -> bool:
    """Whether nothing but other sites reads this one, at most through ops that keep signs."""
    open_ends = [node for node in bu.graph.nodes if node.meta.get("name") == name]
    while open_ends:
        for reader in open_ends.pop().users:
            rule = RULES.get(reader.target)
            if rule is not None and rule.name in KEEPS_SIGNS:
                open_ends.append(reader)
            elif reader.meta.get("name") not in sites:
                return False
    return True


def used_positions(bu: fx.GraphModule, sites: Sequence[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """For every site, the positions of which the main output depends: where autograd's gradient is not zero."""
    values: dict[str, torch.Tensor] = {}
    channels: dict[str, int] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and n.meta.get("name") in sites:
                values[n.meta["name"]], channels[n.meta["name"]] = value, channel_dim(n)
            return value

    output = leaves(Watching(bu).run(x.detach().requires_grad_()))[0]
    gradients = torch.autograd.grad(output.square().sum(), [values[name] for name in sites])
    return {
        name: (gradient != 0).any(channels[name], keepdim=True) for name, gradient in zip(sites, gradients, strict=True)
    }


# -- the table ---------------------------------------------------------------------------------------------------------


def main(names: Sequence[str], file: Path | None = None) -> int:
    """Print the table; returns how many models are not well."""
    worst = 0.0

    def row(name: str, kind: str) -> Line:
        nonlocal worst
        with in_double():
            errors, tasks, classes, part = check(name, kind)
        worst = max(worst, *errors)
        cells = [*(f"{error:.1e}" for error in errors), f"{classes.sites if classes else '-'}"]
        return Line(cells, True, f"{part}{f'{tasks} | {classes}' if classes else ''}")

    bad = TABLE.fill(dict(every_model()), names, row, file)
    print(f"the largest error {worst:.1e}", flush=True)
    return bad


def every_model() -> Iterator[tuple[str, str]]:
    """(name, kind) of all models, of torchvision and from elsewhere."""
    yield from zoo.models()
    yield from zoo.more_models()


if __name__ == "__main__":
    command(main, "learning.csv")
