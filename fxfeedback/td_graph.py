"""Derive the top-down graph from the bottom-up graph: the same nodes in reverse, on the same weights.

`Walk` is the whole of it: from the top down, each node's rule brings the node's counter neuron to its operands. The
instruction pass (instruction_pass.py) and the error pass (counter_hebb_pass.py) are this walk in two roles.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxfeedback.errors import Error, RuleError
from fxfeedback.feedback_weights import clamped
from fxfeedback.graph.bottom_up import BottomUp
from fxfeedback.graph.nodes import name_of, specs_of, unopened, user_line
from fxfeedback.graph.operands import is_complex, is_element, is_floating, weight_of
from fxfeedback.graph.values import Emitter, Value
from fxfeedback.rules import RULES, Rule
from fxfeedback.rules.complex_values import on_complex


@dataclass
class Walk:
    """One TD pass over a BU graph, in the role "instruct" or "error".

    bu: the BU graph.
    emitter: takes the nodes that the rules make.
    role: which side of the rules' table is used.
    values: BU node -> what rules see of it.
    wanted: the BU nodes that need a counter neuron; nothing is computed for others.
    arrive: (node, counter neuron) -> counter neuron, and whether that is its first operand's as it is, without a rule.
    depart: (node, counter neuron of the operand) -> the same, applied after the transpose of a linear layer or
        convolution: TD biases and norms.
    twin: weight node -> the TD weight that stands for it, or None.
    instead: node -> what it hands to its input whatever comes to it, or None: its transpose.
    clip: what a linear layer or convolution hands on lies in [-clip, clip]; None: as it is.
    fused: whether fused kernels may stand in for rules; saved: what their forward handed out, by node: one that has a
        forward stands in only there.
    autocast: whether BU values may have several dtypes, so that operands need casts.
    """

    bu: BottomUp
    emitter: Emitter
    role: str
    values: Callable[[fx.Node], Any]
    wanted: set[fx.Node]
    arrive: Callable[[fx.Node, Any], tuple[Any, bool]] = lambda node, t: (t, False)
    depart: Callable[[fx.Node, Any], Any] = lambda node, t: t
    twin: Callable[[fx.Node], Any] = lambda node: None
    instead: Callable[[fx.Node], Any] = lambda node: None
    clip: float | None = None
    fused: bool = False
    saved: Mapping[fx.Node, Any] = field(default_factory=dict)
    autocast: bool = False

    def run(self, seeds: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """From the counter neurons `seeds` down to those of all wanted nodes."""
        counters: dict[fx.Node, Any] = dict(seeds)
        for node in reversed(self.bu.nodes):
            if node in counters and node in self.wanted and node.op == "call_function":
                with self.emitter.named(f"{node.name}_td", counterpart=name_of(node), role=self.role):
                    t = self._whole(node, counters[node])
                    if isinstance(t, Value):
                        t.spec = specs_of(node)
                    t, done = self.arrive(node, t)
                    for source, counter in self.pass_down(node, t, done):
                        _add(counters, source, counter)
        return counters

    def pass_down(self, node: fx.Node, t: Any, as_it_is: bool) -> Iterable[tuple[fx.Node, Any]]:
        """The counter neurons that `node` brings to its operands: pairs of a BU node and what is added to it."""
        if as_it_is:
            return [(source, t) for source in node.all_input_nodes[:1] if source in self.wanted]
        if is_element(node):
            return [(node.args[0], {node.args[1] % len(specs_of(node.args[0])): t})]
        rule = RULES.get(node.target)
        if rule is None:
            raise RuleError(_no_rule(node))
        try:
            operands = rule.operands(node.args, node.kwargs)
        except TypeError as error:
            raise RuleError(
                f"the rule {rule.name!r} does not take this call: {error} (at node {_where(node)})"
            ) from None
        if self.role == "instruct" and rule.weight and operands[rule.weight] in self.bu.depending_on_inputs:
            return []  # a weight that the input makes does not exist yet
        wanted = [name for name, operand in operands.items() if self._wants(operand)]  # no set: it has no order
        given = self.instead(node) if "input" in wanted else None
        own = [name for name in wanted if given is None or name != "input"]
        try:
            results = self.apply(rule, node, t, self.values(node), own) if own else {}
        except Error:
            raise
        except Exception as error:
            raise RuleError(f"the rule {rule.name!r} fails: {error} (at node {_where(node)})") from error
        if given is not None:
            results["input"] = given
        if self.clip is not None and self.bu.is_weighted(node):
            results = clamped(results, self.clip)
        if rule.weight and "input" in results:
            results["input"] = self.depart(node, results["input"])
        pairs = [pair for name in operands if name in results for pair in _zip(operands[name], results[name])]
        return [(source, self._cast(c, node, source)) for source, c in pairs if source in self.wanted and c is not None]

    def apply(self, rule: Rule, node: fx.Node, t: Any, y: Any, wanted: Sequence[str]) -> dict[str, Any]:
        """Operand name -> counter neuron, by the rule or by its fused kernel, for the op's value `y`."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._see(rule, node, t))
        has_complex = any(map(is_complex, [node, *node.all_input_nodes]))
        kernel = rule.fused if self.fused and not has_complex else None
        if kernel and (node in self.saved or not kernel.forward) and kernel.applies(y, *args, **kwargs):
            return kernel.error(t, y, self.saved.get(node, ()), wanted, *args, **kwargs)
        table = rule.table(y, *args, **kwargs)
        table = on_complex(rule, table, is_complex(node)) if has_complex else table
        if missing := [name for name in wanted if name not in table]:
            raise RuleError(
                f"the rule {rule.name!r} brings no counter neuron to {', '.join(missing)} (at node {_where(node)})"
            )
        return {name: getattr(table[name], self.role)(t) for name in wanted}

    def _see(self, rule: Rule, node: fx.Node, t: Any) -> Callable[[fx.Node], Any]:
        """What the rule sees of each operand: a twin in the place of a weight; under autocast t's dtype.

        Only what norms have of their own keeps its dtype there, as their kernels take it.
        """
        weight = weight_of(node) if rule.weight else None
        is_norm = rule.channels is not None and rule.weight is None
        like = t[0] if isinstance(t, list) else t

        def see(source: fx.Node) -> Any:
            value = self.twin(source) if source is weight else None
            if value is None:
                value = self.values(source)
            if self.autocast and is_floating(source) and not (is_norm and source not in self.bu.dynamic):
                value = value.to(like.dtype)
            if isinstance(value, Value):
                value.spec = specs_of(source)
            return value

        return see

    def _cast(self, counter: Any, node: fx.Node, source: fx.Node) -> Any:
        """The counter neuron in the dtype of its BU value, where `node` has another one or, under autocast, may."""
        dtype = dtype_of(source)
        if isinstance(counter, dict) or (not self.autocast and dtype in (None, dtype_of(node))):
            return counter
        counter = torch.real(counter) if is_complex(node) and not is_complex(source) else counter
        return counter.to(self.values(source).dtype if self.autocast else dtype)

    def _wants(self, operand: Any) -> bool:
        return any(
            isinstance(x, fx.Node) and x in self.wanted
            for x in (operand if isinstance(operand, (list, tuple)) else [operand])
        )

    def _whole(self, node: fx.Node, t: Any) -> Any:
        """For a tuple of outputs: a counter neuron for each, zero for those that are unused."""
        if not isinstance(t, dict):
            return t
        some, specs = next(iter(t.values())), specs_of(node)
        zeros = {i: some.new_zeros(self.emitter.sizes(spec)) for i, spec in enumerate(specs) if spec and i not in t}
        return [t.get(i, zeros.get(i)) for i in range(len(specs))]


def dtype_of(node: fx.Node) -> Any:
    """The dtype of a node's value, as far as it is one."""
    spec = specs_of(node)
    parts = spec if isinstance(spec, tuple) else [spec]
    dtypes = {part.dtype for part in parts if part.dtype.is_floating_point or part.dtype.is_complex}
    return dtypes.pop() if len(dtypes) == 1 else None


def _add(counters: dict[fx.Node, Any], node: fx.Node, t: Any) -> None:
    if isinstance(t, dict):  # elements of a tuple
        elements = counters.setdefault(node, {})
        for index, element in t.items():
            elements[index] = elements[index] + element if index in elements else element
    else:
        counters[node] = counters[node] + t if node in counters else t


def _zip(operand: Any, counter: Any) -> list[tuple[fx.Node, Any]]:
    return list(zip(operand, counter, strict=True)) if isinstance(operand, (list, tuple)) else [(operand, counter)]


def _where(node: fx.Node) -> str:
    return f"{name_of(node)!r}{user_line(node)}"


def _no_rule(node: fx.Node) -> str:
    name = re.sub(r"^torch\._C\._(special|linalg|fft)\.\1_", r"torch.\1.", fx.node._get_qualified_name(node.target))
    reason = f"; {unopened(node)}" if unopened(node) else ""
    return (
        f"no rule for {name}{reason} (at node {_where(node)}). Add one with @fxfeedback.rules.rule({name}): "
        "see 'Adding a rule' in CONTRIBUTING.md."
    )
