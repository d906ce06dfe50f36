"""The law, as a checker that proves any rule: Counter-Hebb updates equal autograd's gradients.

    fxfeedback.check_rule(rule)

tries each of the rule's examples in float64, with the rule's plain form and with its fused kernels.
"""

from typing import Any

import torch
from torch import fx, nn

from fxfeedback.counter_hebb_pass import Learning, key_of, learner
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.nodes import spec_of
from fxfeedback.graph.shapes import annotate_shapes
from fxfeedback.graph.structures import unpack_tuples
from fxfeedback.graph.values import Emitter, Unknown, batch_size
from fxfeedback.instructed.autograd_bridge import CounterHebb
from fxfeedback.instructed.halves import cut
from fxfeedback.rules import Rule
from fxfeedback.rules.examples import C, Example, T
from fxfeedback.td_graph import Walk
from fxfeedback.tracing.open_modules import open_modules
from fxfeedback.tracing.open_operators import open_operators
from fxfeedback.tracing.trace import trace


def check_rule(rule: Rule, device: torch.device | str = "cpu") -> None:
    """Try `rule` on its examples.

    Args:
        rule: as `rule` registers it, in `RULES`.
        device: where the examples' tensors are, and what an example's function makes of numbers, as torch.tensor([1]).

    Raises:
        AssertionError: an update differs from autograd's gradient by more than the example's tolerance, with the plain
            rule or with its fused kernels, or the instruction's counter neuron does not have the operand's shape.
        ValueError: the rule has no examples, or torch itself does not differentiate its op.
    """
    if not rule.examples:
        raise ValueError(f"the rule {rule.name!r} has no examples: write @rule(..., examples=[call(...)])")
    for example in rule.examples:
        with torch.device(device):
            _check(Call(example, device))


def _check(module: "Call") -> None:
    bu = open_modules(trace(module), example_inputs=(module.x,))
    annotate_shapes(bu, (module.x,))
    unpack_tuples(bu)
    open_operators(bu, (module.x,), module)
    for fused in (False, True):
        _check_updates(module, bu, fused)
    _check_instruction(module, bu)


class Call(nn.Module):
    """The example as a model: its first tensor is the input, further ones are parameters."""

    def __init__(self, example: Example, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.example, self.device = example, device
        self.places: list[Any] = []
        generator = torch.Generator("cpu").manual_seed(0)
        self.args = tuple(self._place(argument, generator) for argument in example.args)
        self.kwargs = {key: self._place(argument, generator) for key, argument in example.kwargs.items()}

    def _place(self, argument: Any, generator: torch.Generator) -> Any:
        if isinstance(argument, (list, tuple)):
            return [self._place(item, generator) for item in argument]
        if not isinstance(argument, (T, C)):
            return argument
        name = f"tensor_{len(self.places)}"
        self.places.append(name)
        if isinstance(argument, C):
            drawn = torch.rand(argument.shape, generator=generator, dtype=torch.double, device="cpu")
            self.register_buffer(name, (0.5 + drawn).to(self.device))
        else:
            value = torch.randn(argument.shape, generator=generator, dtype=torch.double, device="cpu").to(self.device)
            if len(self.places) == 1:
                self.x = value
            else:
                self.register_parameter(name, nn.Parameter(value))
        return _Place(name)

    def forward(self, x: torch.Tensor) -> Any:
        def fill(argument: Any) -> Any:
            if isinstance(argument, list):
                return [fill(item) for item in argument]
            if not isinstance(argument, _Place):
                return argument
            return x if argument.name == self.places[0] else getattr(self, argument.name)

        return self.example.function(*map(fill, self.args), **{key: fill(a) for key, a in self.kwargs.items()})


class _Place:
    def __init__(self, name: str) -> None:
        self.name = name


def _check_updates(module: Call, bu: fx.GraphModule, fused: bool) -> None:
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    x = module.x.clone().requires_grad_()
    torch.manual_seed(0)  # of dropout's masks
    expected = _gradients(module.example, module(x), {"x": x, **dict(module.named_parameters())})
    module.load_state_dict(buffers, strict=False)

    names = [
        key_of(node) for node in bu.graph.nodes if node.op in ("placeholder", "get_attr") and node.target not in buffers
    ]
    halves = cut(learner(bu, module, Learning(wanted=frozenset(names), twins={}, td_biases={}, fused=fused)))
    x = module.x.clone().requires_grad_()
    attributes = [getattr(module, name) for name in halves.attributes]
    torch.manual_seed(0)
    outputs = CounterHebb.apply(halves, ["input:x", *halves.attributes], x, *attributes)
    updates = _gradients(module.example, outputs, {"x": x, **dict(module.named_parameters())})
    for name, gradient in expected.items():
        update = updates[name]
        if gradient is None or update is None:
            assert gradient is None and update is None, (
                f"{module.example}: {name} has an update or a gradient, not both"
            )
            continue
        error = (update - gradient).abs().max() / gradient.abs().max().clamp_min(1e-30)
        assert error <= module.example.tolerance, (
            f"{module.example}: the update of {name} is off by {error:.1e} (fused kernels: {fused})"
        )


def _gradients(example: Example, outputs: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Gradients of a loss that weighs every value of the floating-point outputs differently."""
    leaves = [y for y in (outputs if isinstance(outputs, (tuple, list)) else [outputs]) if y.is_floating_point()]
    loss = sum(
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)).sum() for y in leaves
    )
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        raise ValueError(
            f"torch has no gradient of {example} to compare with: declare such an op with constant(), or let the "
            "example compute the same with ops that torch differentiates"
        )
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values()), allow_unused=True), strict=True))


def _check_instruction(module: Call, bu: fx.GraphModule) -> None:
    """The rule runs where no BU value exists, and its counter neuron has the input's shape."""
    view, emitter = BottomUp(bu.graph), Emitter()
    seeds = {leaf: emitter.placeholder(f"t{i}", spec_of(leaf)) for i, leaf in enumerate(view.output_leaves())}
    emitter.batch = batch_size(seeds.values())
    if emitter.batch is None:
        return  # the example sums over the batch: no instruction of a batch can come from above
    constants = {node: emitter.attribute(str(node.target), spec_of(node)) for node in view.parameters}
    see = lambda node: constants[node] if node in constants else Unknown(emitter, node)  # noqa: E731
    counters = Walk(view, emitter, "instruct", see, view.below(view.inputs)).run(seeds)
    emitter.graph.output(counters[view.inputs[0]].node)
    y = module(module.x)
    leaves = [t for t in (y if isinstance(y, (tuple, list)) else [y]) if t.is_floating_point()]
    t = fx.GraphModule(module, emitter.graph)(*(leaf.detach() for leaf in leaves))
    assert t.shape == module.x.shape, (
        f"{module.example}: instructed, {tuple(t.shape)} comes to x {tuple(module.x.shape)}"
    )
