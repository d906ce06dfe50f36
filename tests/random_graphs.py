"""Random models for the tests, grown from every op that has a rule, as source code that can be read and kept.

`cases()` is a strategy. It grows a model statement by statement: an op from the table `OPS` writes an expression for
one of the values that exist already, and the statement is run at once at three batch sizes. That tells which sizes
depend on the batch, keeps values finite and moderate, and throws statements away that torch itself refuses.

Ties: where an op picks the greatest of several values, equal ones would make its derivative a matter of taste. Such ops
read values through `Grower.distinct`, which adds random constants wherever two values are equal, or could be (dropout).
"""

import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: F401  (generated code runs in these globals)
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.utils import parametrizations  # noqa: F401
from torchvision.ops import stochastic_depth  # noqa: F401

PROBES = (2, 3)
"""Batch sizes at which a statement is tried, besides that of the case."""
LARGEST, MOST_VALUES = 20.0, 600
"""Values beyond the first are scaled down; a tensor has at most so many."""


# -- what generated code may call beside torch ------------------------------------------------------------------------


def awake(module: nn.Module) -> nn.Module:
    """`module` with random values where it starts with zeros, ones, or one number for all."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point() and (tensor == tensor.flatten()[0]).all():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return module


@fx.wrap
def written(x, z):
    """A copy of x with z at position 0 of dimension 1."""
    x = x.clone()
    x[:, 0] = z
    return x


@fx.wrap
def halved(x, z):
    """A copy of x with z + x in its second half along dimension 1."""
    y = torch.zeros_like(x)
    y[:, : x.shape[1] // 2] = x[:, : x.shape[1] // 2]
    y[:, x.shape[1] // 2 :] = x[:, x.shape[1] // 2 :] + z
    return y


def changed(module, **attributes):
    """`module`, which has other attributes from now on."""
    vars(module).update(attributes)
    return module


# -- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """One input: its name, its size without the batch, how it lies in memory, and whether it asks for a gradient."""

    name: str
    size: tuple[int, ...]
    layout: str
    learns: bool

    def make(self, batch: int) -> torch.Tensor:
        shape = (batch, *self.size)
        if self.layout == "ids":
            return torch.randint(5, shape)
        if self.layout == "transposed":
            return torch.randn(shape[::-1], dtype=torch.double).permute(*reversed(range(len(shape))))
        if self.layout == "sliced":
            return torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.double)[..., ::2]
        return torch.randn(shape, dtype=torch.double)


@dataclass(frozen=True)
class Case:
    """A model as source code, and how it is called.

    links: for `add_feedback`: numbers of source and destination among the legal ones, and options.
    """

    inputs: tuple[Input, ...]
    init: tuple[str, ...]
    body: tuple[str, ...]
    seed: int
    train: bool
    batch: int
    headed: bool
    random: bool
    links: tuple[tuple[int, int, dict[str, str]], ...] = ()
    passes: int = 2

    @property
    def source(self) -> str:
        init = textwrap.indent("\n".join(["super().__init__()", *self.init]), " " * 8)
        body = textwrap.indent("\n".join(self.body), " " * 8)
        arguments = ", ".join(["self", *(i.name for i in self.inputs)])
        return f"class Grown(nn.Module):\n    def __init__(self):\n{init}\n\n    def forward({arguments}):\n{body}\n"

    def make(self) -> tuple[nn.Module, list[torch.Tensor]]:
        """The model and its inputs, always the same ones."""
        torch.manual_seed(self.seed)
        model = _class(self.source)().double().train(self.train)
        inputs = [i.make(self.batch) for i in self.inputs]
        return model, [x.requires_grad_(i.learns) for x, i in zip(inputs, self.inputs, strict=True)]

    def out_of_place(self) -> "Case":
        """The same without ops in place."""
        init, body = (
            tuple(
                line.replace("inplace=True", "inplace=False").replace("relu_(", "relu(").replace("mul_(", "mul(")
                for line in lines
            )
            for lines in (self.init, self.body)
        )
        return replace(self, init=init, body=body)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        call = f"seed={self.seed} train={self.train} batch={self.batch} links={self.links} passes={self.passes}"
        return f"Case:\n{self.source}# {call}\n# inputs: {', '.join(map(str, self.inputs))}\n"


def _class(source: str) -> Any:
    space: dict[str, Any] = {}
    exec(source, globals(), space)  # in our globals, where torch.fx finds the functions that it is not to enter
    return space["Grown"]


@dataclass(frozen=True, eq=False)
class Value:
    """A value of the growing model at each batch size."""

    name: str
    runs: tuple[torch.Tensor, ...]
    random: bool = False
    made_of: frozenset[str] = frozenset()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.runs[0].shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def slopes(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.runs[0].shape, self.runs[1].shape, strict=True))

    @property
    def free(self) -> list[int]:
        """The dimensions that do not depend on the batch."""
        return [d for d, slope in enumerate(self.slopes) if slope == 0]

    @property
    def proper(self) -> bool:
        """Whether the first dimension is the batch as it came, and it alone."""
        return self.shape[:1] == PROBES[:1] and self.slopes == (1,) + (0,) * (self.ndim - 1)

    @property
    def small(self) -> bool:
        return self.runs[1].numel() * 3 <= MOST_VALUES


class Lazy(dict):
    def __getitem__(self, key):
        value = super().__getitem__(key)
        return value() if callable(value) else value


@dataclass
class Grower:
    """A model that grows."""

    draw: Any
    inputs: tuple[Input, ...]
    seed: int
    train: bool
    batch: int
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    parameters: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    modules: dict[tuple[str, bool], str] = field(default_factory=dict)
    random: bool = False  # the statement that is being written draws at random

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = nn.Module().train(self.train)
        self.stream = torch.get_rng_state()
        made = [[i.make(batch) for batch in (*PROBES, self.batch)] for i in self.inputs]
        values = [Value(i.name, tuple(runs)) for i, runs in zip(self.inputs, made, strict=True)]
        self.ids = next((value for value in values if value.runs[0].dtype == torch.long), None)
        self.values = [value for value in values if value is not self.ids]
        self.environments = [
            {"self": self.model} | {i.name: runs[k] for i, runs in zip(self.inputs, made, strict=True)}
            for k in range(len(PROBES) + 1)
        ]

    # -- drawing ------------------------------------------------------------------------------------------------------

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def fill(self, x: Value, templates: Any, **parts: Any) -> str:
        """One of the templates; parts that are functions are called where the template has them."""
        return self.pick(templates).format_map(Lazy(x=x.name, **parts))

    def dim(self, x: Value, among: Any = None) -> int:
        """A dimension, counted from either end."""
        d = self.pick(range(x.ndim) if among is None else among)
        return d - self.pick((0, x.ndim))

    def dims(self, x: Value) -> tuple[int, ...]:
        return tuple(sorted(self.draw(st.sets(st.sampled_from(range(x.ndim)), min_size=1, max_size=2))))

    # -- what expressions are made of ---------------------------------------------------------------------------------

    def add(self, line: str) -> None:
        """A line of __init__. It is run at once, on the random numbers that it will have in the model."""
        present = torch.get_rng_state()
        torch.set_rng_state(self.stream)
        exec(line, globals(), {"self": self.model})
        self.model.double()
        self.stream = torch.get_rng_state()
        torch.set_rng_state(present)
        self.init.append(line)

    def parameter(self, *shape: int, plain: bool = False) -> str:
        """A parameter: new or reused, tied or frozen; or what is computed from one."""
        ways = ["new"] * 5 + ["reused"] * 2 + ["frozen", "tied"] + ([] if plain else ["computed", "transposed"])
        way, same = self.pick(ways), [name for name, other in self.parameters if other == shape]
        own = [name for name in same if isinstance(eval(name, {"self": self.model}), nn.Parameter)]
        if way == "reused" and same:
            return self.pick(same)
        name = f"self.p{len(self.init)}"
        if way == "tied" and own:
            self.add(f"{name} = {self.pick(own)}")
        elif way == "transposed" and len(shape) == 2:
            return f"{self.parameter(*shape[::-1], plain=True)}.t()"
        elif way == "computed":
            return self.pick(["({} * 2)", "torch.tanh({})", "F.softplus({})", "{}.clone()"]).format(
                self.parameter(*shape, plain=True)
            )
        else:
            size = f"{shape[0]}" if len(shape) == 1 else f"{shape}"
            self.add(f"{name} = nn.Parameter(torch.randn({size}){', False' if way == 'frozen' else ''})")
        self.parameters.append((name, shape))
        return name

    def constant(self, *shape: int) -> str:
        """A buffer of random numbers."""
        name = f"c{len(self.init)}"
        self.add(f"self.register_buffer('{name}', torch.randn({shape}))")
        return f"self.{name}"

    def module(self, made: str, changing: bool = False) -> str:
        """A module, new or reused; forward may read its parameters by hand, too.

        changing: one whose every call sets its attributes.
        """
        key = (made, changing)
        if key in self.modules and self.pick([True, False]):
            return self.modules[key]
        self.modules[key] = name = f"self.m{len(self.init)}"
        self.add(f"{name} = awake({made})")
        own = dict(self.model.get_submodule(name.removeprefix("self.")).named_parameters())
        if "parametrizations.weight.original0" in own:
            own["weight"] = self.model.get_submodule(name.removeprefix("self.")).weight
        self.parameters += [
            (f"{name}.{path}", tuple(tensor.shape))
            for path, tensor in own.items()
            if all(map(str.isidentifier, path.split(".")))
        ]
        return name

    def value(self) -> Value:
        """A value: more often a late one."""
        last = len(self.values) - 1
        return self.values[max(last - self.pick([0, 0, 0, 0, 1, 2, 3, 5, 8]), 0)]

    def like(self, x: Value) -> str:
        """A value of x's shape; x itself if there is no other."""
        return self.pick([v.name for v in reversed(self.values) if v.shape == x.shape and v.slopes == x.slopes])

    def narrow_shape(self, x: Value) -> tuple[int, ...]:
        """A shape that broadcasts to x's and does not depend on the batch."""
        start = self.number(0, x.ndim)
        return tuple(
            n if slope == 0 and self.pick([True, True, False]) else 1
            for n, slope in zip(x.shape[start:], x.slopes[start:], strict=True)
        )

    def other(self, x: Value) -> str:
        """A tensor that broadcasts with x."""
        fits = [v.name for v in reversed(self.values) if v is not x and _broadcast(v, x)]
        way = self.pick(["parameter", "parameter", "value", "value", "itself", "mean", "wider"])
        if way == "value" and fits:
            return self.pick(fits)
        if way == "mean" and x.free:
            return f"{x.name}.mean({self.dim(x, x.free)}, keepdim=True)"
        if way == "itself":
            return self.pick(["{}", "{}.tanh()", "{}.detach()"]).format(x.name)
        if way == "wider" and x.small and x.proper:  # x is stretched
            return self.parameter(1, *(self.number(2, 3) if n == 1 else n for n in x.shape[1:]))
        return self.parameter(*self.narrow_shape(x))

    def safe(self, x: Value) -> str:
        """A tensor that broadcasts with x and is not near zero."""
        return self.pick(["({0} * {0} + 0.5)", "({0}.abs() + 0.5)", "F.softplus({0}).add(0.2)"]).format(self.other(x))

    def distinct(self, x: Value) -> str:
        """x, or x plus constants where two of its values are equal in some sample, or may be."""
        if not x.random and all(_are_distinct(run) for run in x.runs):
            return x.name
        shape = [1 if slope else n for n, slope in zip(x.shape, x.slopes, strict=True)]
        return f"({x.name} + {self.constant(*shape)})"

    # -- growing ------------------------------------------------------------------------------------------------------

    def grow(self) -> None:
        """Another statement, or none where torch refuses it or its values are not moderate."""
        x = self.value()
        op = self.pick([op for op in OPS if op.when(x) for _ in range(op.weight)])
        before = len(self.init), len(self.parameters), dict(self.modules), self.stream
        self.random = False
        written = op.write(self, x)
        expression, count = written if isinstance(written, tuple) else (written, 1)
        if not self.emit(expression, count, x):
            lines, parameters, self.modules, self.stream = before
            del self.init[lines:], self.parameters[parameters:]

    def emit(self, expression: str, count: int, x: Value) -> bool:
        names = [f"v{len(self.values) + k}" for k in range(count)]
        line = f"{', '.join(names)} = {expression}"
        results = []
        for environment in self.environments:
            try:
                with torch.no_grad():
                    result = eval(expression, globals(), environment)
            except (RuntimeError, ValueError, IndexError):
                return False  # a maximum over no samples, a batch norm over one
            results.append(result if count > 1 else (result,))
        values = [tuple(runs) for runs in zip(*results, strict=True)]
        if not all(_is_moderate(run, runs[0]) for runs in values for run in runs):
            return False
        if not all(_grows_evenly(*runs, self.batch) for runs in values):
            return False
        self.body.append(line)
        read = frozenset(v.name for v in self.values if _mentions(expression, v.name))
        random = self.random or any(v.random for v in self.values if v.name in read)
        self.used |= read
        for name, runs in zip(names, values, strict=True):
            for environment, run in zip(self.environments, runs, strict=True):
                environment[name] = run
            self.values.append(Value(name, runs, random, read))
        largest = max((run.abs().max().item() for runs in values for run in runs if run.numel()), default=0)
        if count == 1 and largest > LARGEST:
            self.emit(f"{names[0]} * {self.pick([0.1, 0.01]) if largest < 200 else 0.001}", 1, self.values[-1])
        return True


def _mentions(expression: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){name}\b", expression) is not None


def _broadcast(v: Value, x: Value) -> bool:
    try:
        for a, b in zip(v.runs[:2], x.runs[:2], strict=True):
            if torch.broadcast_shapes(a.shape, b.shape).numel() > MOST_VALUES:
                return False
    except RuntimeError:
        return False
    return True


def _are_distinct(run: torch.Tensor) -> bool:
    in_order = run.flatten().sort().values
    return bool((in_order.diff() > 1e-6).all())


def _is_moderate(run: Any, probe: Any) -> bool:
    if not isinstance(run, torch.Tensor) or run.dtype != torch.double:
        return False
    return probe.numel() > 0 and run.numel() <= MOST_VALUES and bool((run.abs() < 2000).all())


def _grows_evenly(one: torch.Tensor, two: torch.Tensor, own: torch.Tensor, batch: int) -> bool:
    """Whether every size grows by as much with every sample; that of a diagonal may be min(batch, 1)."""
    sizes = zip(one.shape, two.shape, own.shape, strict=True)
    return all(c == a + (b - a) * (batch - PROBES[0]) for a, b, c in sizes)


# -- the table of ops -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """What writes an expression of a value x, for these rules.

    write: (grower, x) -> an expression, or an expression and the number of tensors that it makes.
    """

    rules: tuple[str, ...]
    write: Callable[[Grower, Value], Any]
    when: Callable[[Value], bool]
    weight: int


OPS: list[Op] = []


def grows(*rules: str, when: Callable[[Value], bool] = lambda x: True, weight: int = 4) -> Callable:
    """The decorated function writes calls of the ops of these rules for values that fulfil `when`."""

    def register(write: Callable) -> Callable:
        OPS.append(Op(rules, write, when, weight))
        return write

    return register


def forms(rule: str, *templates: str, when: Callable[[Value], bool] = lambda x: True, made: str = "") -> None:
    """The same for ops of x alone: templates in which {x} stands for it, and {m} for the module `made`."""

    def write(g: Grower, x: Value) -> str:
        return g.fill(x, [*templates, *(["{m}({x})"] if made else [])], m=lambda: g.module(made))

    write.__name__ = rule
    grows(rule, when=when, weight=1)(write)


def ndim(*among: int) -> Callable[[Value], bool]:
    return lambda x: x.ndim in among


def proper(*among: int) -> Callable[[Value], bool]:
    """Batch first, and so many dimensions in all."""
    return lambda x: x.proper and x.ndim in among


def wide(x: Value) -> bool:
    """At least two dimensions, the last of which does not depend on the batch."""
    return x.ndim > 1 and x.slopes[-1] == 0


forms("relu", "F.relu({x})", "torch.relu({x})", "{x}.relu()", made="nn.ReLU()")
forms("leaky_relu", "F.leaky_relu({x}, 0.3)", made="nn.LeakyReLU(0.1)")
forms("relu6", "F.relu6({x})", made="nn.ReLU6()")
forms("hardtanh", "F.hardtanh({x}, -0.5, 1.5)", made="nn.Hardtanh()")
forms("sigmoid", "torch.sigmoid({x})", "{x}.sigmoid()", "F.sigmoid({x})", made="nn.Sigmoid()")
forms("tanh", "torch.tanh({x})", "{x}.tanh()", "F.tanh({x})", made="nn.Tanh()")
forms("gelu", "F.gelu({x})", "F.gelu({x}, approximate='tanh')", made="nn.GELU()")
forms("silu", "F.silu({x})", made="nn.SiLU()")
forms("mish", "F.mish({x})", made="nn.Mish()")
forms("elu", "F.elu({x}, 0.5)", made="nn.ELU()")
forms("hardswish", "F.hardswish({x})", made="nn.Hardswish()")
forms("hardsigmoid", "F.hardsigmoid({x})", made="nn.Hardsigmoid()")
forms("softplus", "F.softplus({x})", "F.softplus({x}, 2.0, 1.0)", made="nn.Softplus()")
forms("celu", "F.celu({x}, 0.5)", "torch.celu({x})", made="nn.CELU()")
forms("selu", "F.selu({x})", "torch.selu({x})", made="nn.SELU()")
forms("logsigmoid", "F.logsigmoid({x})", made="nn.LogSigmoid()")
forms("softsign", "F.softsign({x})", made="nn.Softsign()")
forms("tanhshrink", "F.tanhshrink({x})", made="nn.Tanhshrink()")
forms("hardshrink", "F.hardshrink({x}, 0.3)", "torch.hardshrink({x})", made="nn.Hardshrink()")
forms("softshrink", "F.softshrink({x}, 0.3)", made="nn.Softshrink()")
forms("threshold", "F.threshold({x}, 0.1, -1.0)", "torch.threshold({x}, 0.2, 0.0)", made="nn.Threshold(0.1, 20)")
forms("exp", "torch.exp({x}.tanh())", "({x} * 0.1).exp()")
forms("expm1", "torch.expm1({x}.tanh())", "(-{x}.abs()).expm1()")
forms("log", "torch.log({x} * {x} + 0.5)", "({x}.abs() + 0.5).log()")
forms("log2", "torch.log2({x} * {x} + 0.5)", "({x}.abs() + 0.5).log2()")
forms("log10", "torch.log10({x} * {x} + 0.5)", "({x}.abs() + 0.5).log10()")
forms("log1p", "torch.log1p({x} * {x})", "{x}.abs().log1p()")
forms("sqrt", "torch.sqrt({x} * {x} + 0.5)", "({x}.abs() + 0.5).sqrt()", "torch.sqrt(1 + {x} ** 2)")
forms("rsqrt", "torch.rsqrt({x} * {x} + 0.5)", "({x}.abs() + 0.5).rsqrt()")
forms("square", "torch.square({x})", "{x}.square()")
forms("reciprocal", "torch.reciprocal({x} * {x} + 0.5)", "({x}.abs() + 0.5).reciprocal()")
forms("abs", "torch.abs({x})", "{x}.abs()", "abs({x})", "torch.absolute({x})")
forms("sin", "torch.sin({x})", "{x}.sin()")
forms("cos", "torch.cos({x})", "{x}.cos()")
forms("tan", "torch.tan({x}.tanh())", "({x} * 0.1).tan()")
forms("asin", "torch.asin({x}.tanh() * 0.9)", "torch.arcsin({x}.sigmoid() * 0.9)")
forms("acos", "torch.acos({x}.tanh() * 0.9)", "torch.arccos({x}.sigmoid() * 0.9)")
forms("atan", "torch.atan({x})", "{x}.atan()", "torch.arctan({x})")
forms("sinh", "torch.sinh({x}.tanh())", "({x} * 0.1).sinh()")
forms("cosh", "torch.cosh({x}.tanh())", "({x} * 0.1).cosh()")
forms("asinh", "torch.asinh({x})", "{x}.arcsinh()")
forms("acosh", "torch.acosh({x} * {x} + 1.5)", "({x}.abs() + 1.5).acosh()")
forms("atanh", "torch.atanh({x}.tanh() * 0.9)", "({x}.sigmoid() * 0.9).arctanh()")
forms("exp2", "torch.exp2({x}.tanh())", "({x} * 0.1).exp2()", "torch.special.exp2({x}.tanh())")
forms("erf", "torch.erf({x})", "{x}.erf()", "torch.special.erf({x})")
forms("erfc", "torch.erfc({x})", "{x}.erfc()")
forms("frac", "torch.frac({x})", "{x}.frac()")
SAFE, SMALL, UNIT = "({x} * {x} + 0.5)", "({x}.tanh() * 0.9)", "({x}.sigmoid() * 0.8 + 0.1)"
forms("lgamma", f"torch.lgamma({SAFE})", f"{SAFE}.lgamma()", f"torch.special.gammaln({SAFE})")
forms("digamma", f"torch.digamma({SAFE})", f"{SAFE}.digamma()", f"torch.special.psi({SAFE})")
forms("polygamma", f"torch.polygamma(1, {SAFE})", f"torch.special.polygamma(2, {SAFE})")
forms("polygamma_method", f"{SAFE}.polygamma(1)")
forms("mvlgamma", f"torch.mvlgamma({SAFE} + 1, 2)")
forms("ndtr", "torch.special.ndtr({x})")
forms("log_ndtr", "torch.special.log_ndtr({x})")
forms("ndtri", f"torch.special.ndtri({UNIT})")
forms("erfinv", f"torch.erfinv({SMALL})", f"{SMALL}.erfinv()")
forms("erfcx", f"torch.special.erfcx({SMALL})")
forms("entr", f"torch.special.entr({SAFE})")
forms("logit", f"torch.logit({UNIT})", f"{UNIT}.logit(1e-3)", "torch.special.logit({x}, eps=0.2)")
forms("sinc", "torch.sinc({x})", "{x}.sinc()")
forms("i0", f"torch.i0({SMALL})", "{x}.tanh().i0()")
forms("i0e", "torch.special.i0e({x})")
forms("i1", f"torch.special.i1({SMALL})")
forms("i1e", "torch.special.i1e({x})")
forms("rad2deg", "torch.rad2deg({x} * 0.01)")
forms("deg2rad", "{x}.deg2rad()")
forms("angle", "({x} + torch.angle({x}))")
forms("frexp", "torch.frexp({x})[0]", "{x}.frexp().mantissa")
forms("nan_to_num", "torch.nan_to_num({x})", "{x}.where({x} > 0, torch.inf).nan_to_num(0.5, 2.0, -1.0)")
forms("neg", "-{x}", "torch.neg({x})", "{x}.neg()", "torch.negative({x})")
forms("identity", "F.dropout({x}, 0.5, False)", made="nn.Identity()")
forms("copy", "{x}.clone()", "{x}.contiguous()", "+{x}", "torch.positive({x})")
forms("cast", "{x}.to(torch.double)", "{x}.double()", "{x}.type_as({x})", "{x}.to({x})", "{x}.to({x}.dtype)")
forms("t", "{x}.t()", "torch.t({x})", when=ndim(1, 2))
forms("attribute", "{x}.mT", when=lambda x: x.ndim >= 2)
forms("attribute", "{x}.T", when=ndim(2))
forms("tril", "torch.tril({x}, 1)", "{x}.tril()", when=lambda x: x.ndim >= 2)
forms("triu", "torch.triu({x}, -1)", "{x}.triu()", when=lambda x: x.ndim >= 2)


@grows(when=lambda x: bool(x.free) and x.ndim > 1)
def opened(g, x):
    """Ops without a rule, which PyTorch's decompositions open."""
    dim = g.dim(x, x.free)
    templates = [
        "torch.logaddexp({x}, {other})",
        "torch.xlogy({x}, {safe})",
        "torch.diff({x}, dim={dim})",
        "torch.trapezoid({x}, dim={dim})",
        "torch.cumulative_trapezoid({x}, dx=0.5, dim={dim})",
        "torch.quantile({distinct}, 0.3, dim={dim}, keepdim=True)",
        "torch.renorm({x}, 2, {dim}, 1.5)",
        "F.huber_loss({x}, {x}.tanh(), reduction='none', delta=0.1)",
        "F.smooth_l1_loss({x}, {x}.detach() + 0.5, reduction='none')",
        "F.pairwise_distance({x}, {x} * 0.5 + 1)",
        "torch.div({x}, {safe}, rounding_mode='floor') + {x}",
        "torch.nansum({x}, {dim})",
        "torch.std({x}, dim={dim}, correction=0).where({x}.mean({dim}) > 0, 0.5)",
    ]
    parts = {"other": lambda: g.other(x), "safe": lambda: g.safe(x), "distinct": lambda: g.distinct(x)}
    return g.fill(x, templates, dim=dim, **parts)


@grows("rrelu", weight=1)
def rrelu(g, x):
    g.random = g.train
    return g.fill(x, ["F.rrelu({x}, 0.1, 0.4, self.training)", "{m}({x})"], m=lambda: g.module("nn.RReLU()"))


@grows("softmax", "softmin", "log_softmax", when=lambda x: x.ndim > 0)
def softmax(g, x):
    names = ["softmax", "softmin", "log_softmax"]
    name, dim = g.pick(names), g.dim(x)
    kind = {"softmax": "Softmax", "softmin": "Softmin", "log_softmax": "LogSoftmax"}[name]
    templates = ["F.{name}({x}, {dim})", "F.{name}({x}, dim={dim})", "{m}({x})"]
    if name != "softmin":
        templates += ["torch.{name}({x}, {dim})", "{x}.{name}({dim})", "{x}.{name}(dim={dim})"]
    return g.fill(x, templates, name=name, dim=dim, m=lambda: g.module(f"nn.{kind}({dim})"))


@grows("glu", when=lambda x: any(x.shape[d] % 2 == 0 for d in x.free))
def glu(g, x):
    dim = g.dim(x, [d for d in x.free if x.shape[d] % 2 == 0])
    return g.fill(x, ["F.glu({x}, {dim})", "{m}({x})"], dim=dim, m=lambda: g.module(f"nn.GLU({dim})"))


@grows("prelu", when=lambda x: x.ndim > 1 and x.slopes[1] == 0)
def prelu(g, x):
    count = g.pick([1, x.shape[1]])
    return g.fill(
        x,
        ["F.prelu({x}, {p})", "torch.prelu({x}, {p})", "{m}({x})"],
        p=lambda: g.parameter(count),
        m=lambda: g.module(f"nn.PReLU({count})"),
    )


# -- arithmetic


@grows("add", "sub", "mul")
def arithmetic(g, x):
    name, sign = g.pick([("add", "+"), ("sub", "-"), ("mul", "*")])
    templates = ["{x} {sign} {o}", "{o} {sign} {x}", "torch.{name}({x}, {o})", "{x}.{name}({o})", "{x} {sign} 1.5"]
    templates += ["2 {sign} {x}", "torch.{name}({o}, {x})"]
    templates += ["torch.{name}({x}, {o}, alpha=-0.5)", "{x}.{name}({o}, alpha=2)"] if name != "mul" else []
    return g.fill(x, templates, name=name, sign=sign, o=lambda: g.other(x))


@grows("div")
def div(g, x):
    templates = ["{x} / {s}", "{o} / ({x} * {x} + 0.5)", "{x} / 3", "2 / ({x}.abs() + 0.5)"]
    templates += ["torch.div({x}, {s})", "{x}.div({s})", "torch.true_divide({x}, {s})"]
    return g.fill(x, templates, o=lambda: g.other(x), s=lambda: g.safe(x))


@grows("rsub")
def rsub(g, x):
    return g.fill(x, ["torch.rsub({x}, {o})", "torch.rsub({x}, {o}, alpha=2)"], o=lambda: g.other(x))


@grows("addcmul", "addcdiv")
def addc(g, x):
    templates = ["torch.addcmul({x}, {o}, {s})", "{x}.addcmul({o}, {s}, value=0.5)"]
    templates += ["torch.addcmul({o}, {x}, {s}, value=2)", "torch.addcmul({o}, {x}, {x})"]
    templates += ["torch.addcdiv({x}, {o}, {s})", "{x}.addcdiv({o}, {s}, value=-0.5)", "torch.addcdiv({o}, {x}, {s})"]
    return g.fill(x, templates, o=lambda: g.like(x), s=lambda: g.safe(x))


@grows("lerp")
def lerp(g, x):
    templates = ["torch.lerp({x}, {o}, 0.3)", "{x}.lerp({o}, {w})", "torch.lerp({o}, {x}, {w})"]
    return g.fill(x, templates, o=lambda: g.like(x), w=lambda: g.parameter(*g.narrow_shape(x)))


@grows("pow")
def power(g, x):
    templates = [
        "{x} ** 2",
        "{x}.pow(3)",
        "torch.pow({x}, 0)",
        "{x} ** 1",
        "({x} * {x} + 0.5) ** -0.5",
        "2 ** {x}.tanh()",
    ]
    templates += [
        "torch.pow({x}.abs() + 0.5, {p})",
        "torch.pow({s}, {x}.tanh())",
        "{x}.pow(2.0)",
        "torch.relu({x}) ** 2",
    ]
    return g.fill(x, templates, p=lambda: g.parameter(*g.narrow_shape(x)), s=lambda: g.safe(x))


@grows("clamp", "clamp_min", "clamp_max")
def clamp(g, x):
    templates = ["torch.clamp({x}, -0.5, 0.7)", "{x}.clamp(min=0)", "torch.clip({x}, max=0.5)", "{x}.clip({p}, {p})"]
    templates += ["torch.clamp({x}, {p})", "{x}.clamp(max={p})", "{x}.clamp_min(0.1)", "torch.clamp_min({x}, {p})"]
    templates += ["{x}.clamp_max(0.1)", "torch.clamp_max({x}, {p})"]
    return g.fill(x, templates, p=lambda: g.parameter(*g.narrow_shape(x)))


@grows("maximum", "minimum", "max", "min")
def greater(g, x):
    templates = ["torch.{k}imum({x}, {p})", "torch.{k}imum({p}, {x})", "torch.{k}({x}, {p})", "{x}.{k}(other={p})"]
    templates += ["torch.{k}imum({x}, 0.5 * {x} + {c})"]
    parts = {"p": lambda: g.parameter(*g.narrow_shape(x)), "c": lambda: g.constant(*g.narrow_shape(x))}
    return g.fill(x, templates, k=g.pick(["max", "min"]), **parts)


@grows(
    *("atan2", "hypot", "fmax", "fmin", "remainder", "rmod", "fmod", "copysign", "ldexp", "logaddexp", "logaddexp2"),
    *("xlogy", "xlog1py", "zeta"),
)
def of_two(g, x):
    templates = ["torch.atan2({x}, {s})", "torch.hypot({x}, {s})", "torch.hypot({s}, {x})", "{x}.copysign({o})"]
    templates += ["torch.remainder({x}, {s})", "{x} % 0.7", "torch.fmod({x}, {s})", "torch.fmod({x}, -0.7)"]
    templates += ["{s}.__rmod__({x})", "torch.fmax({x}, {o})", "torch.fmin({o}, {x})", "torch.copysign({x}, -1)"]
    templates += ["torch.logaddexp({x}, {o})", "torch.logaddexp2({o}, {x})", "torch.ldexp({x}, {o}.tanh())"]
    templates += ["torch.xlogy({x}, {s})", "torch.xlogy(2, {s})", "torch.special.xlog1py({x}, {s})"]
    templates += ["torch.special.zeta(2.5, {s} + 1)"]
    return g.fill(x, templates, o=lambda: g.other(x), s=lambda: g.safe(x))


@grows("cosine_similarity", when=lambda x: x.ndim > 1)
def cosine_similarity(g, x):
    return g.fill(
        x, ["F.cosine_similarity({x}, {o}, {d})"], o=lambda: g.pick([g.like(x), f"({g.like(x)} + 1)"]), d=g.dim(x)
    )


# -- linear maps


@grows("linear", when=wide)
def linear(g, x):
    n, m = x.shape[-1], g.number(1, 4)
    parts = {"w": lambda: g.parameter(m, n), "b": lambda: g.parameter(m)}
    templates = ["F.linear({x}, {w})", "F.linear({x}, {w}, {b})", "{m}({x})", "{m}({x})", "{n}({x})"]
    made = f"nn.Linear({n}, {m})"
    normed = f"parametrizations.weight_norm({made})"
    return g.fill(x, templates, m=lambda: g.module(made), n=lambda: g.module(normed), **parts)


def _windowed(g, x, largest=3, half_padded=False):
    """Kernel, stride, padding, dilation, and the sizes of the map."""
    sizes = x.shape[2:]
    kernel = tuple(g.number(1, min(largest, n)) for n in sizes)
    stride = tuple(g.number(1, 3) for _ in sizes)
    padding = tuple(g.number(0, k // 2 if half_padded else 2) for k in kernel)
    dilation = tuple(
        1 if d * (k - 1) + 1 > n else d
        for d, k, n in ((g.number(1, 2), k, n) for k, n in zip(kernel, sizes, strict=True))
    )
    return kernel, stride, padding, dilation


@grows("convolution", when=proper(3, 4, 5))
def convolution(g, x):
    n, channels = x.ndim - 2, x.shape[1]
    kernel, stride, padding, dilation = _windowed(g, x)
    groups = g.pick([1, 1, *(k for k in (2, 3) if channels % k == 0)])
    m = groups * g.number(1, 2)
    if g.pick([False, False, False, True]):
        stride, padding = (1,) * n, "'same'"
    options = f"{stride}, {padding}, {dilation}, {groups}"
    templates = ["F.conv{n}d({x}, {w}, None, {o})", "torch.conv{n}d({x}, {w}, {b}, {o})", "{m}({x})", "{m}({x})"]
    parts = {"w": lambda: g.parameter(m, channels // groups, *kernel), "b": lambda: g.parameter(m)}
    bias = g.pick([True, False])
    made = f"nn.Conv{n}d({channels}, {m}, {kernel}, {options}, bias={bias})"
    return g.fill(x, templates, n=n, o=options, m=lambda: g.module(made), **parts)


@grows("transposed_convolution", when=lambda x: proper(3, 4, 5)(x) and x.small)
def transposed_convolution(g, x):
    n, channels = x.ndim - 2, x.shape[1]
    kernel, stride, _, dilation = _windowed(g, x)
    padding = tuple(min(1, d * (k - 1) // 2) for d, k in zip(dilation, kernel, strict=True))
    rest = tuple(g.number(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
    groups = g.pick([1, 1, *(k for k in (2, 3) if channels % k == 0)])
    m = g.number(1, 2)
    options = f"{stride}, {padding}, {rest}, {groups}"
    templates = ["F.conv_transpose{n}d({x}, {w}, None, {o}, {d})", "{m}({x})"]
    parts = {"w": lambda: g.parameter(channels, m, *kernel)}
    made = f"nn.ConvTranspose{n}d({channels}, {groups * m}, {kernel}, {options}, dilation={dilation})"
    return g.fill(x, templates, n=n, o=options, d=dilation, m=lambda: g.module(made), **parts)


@grows("matmul", when=wide)
def matmul(g, x):
    n, k = x.shape[-1], g.number(1, 3)
    templates = ["{x} @ {w}", "torch.matmul({x}, {w})", "{x}.matmul({v})", "{x} @ {x}.transpose(-1, -2)"]
    if x.slopes[-2] == 0 and x.ndim > 2:
        templates += ["{u} @ {x}", "torch.matmul({u}, {x}.softmax(-1))", "{row} @ {x}"]
    return g.fill(
        x,
        templates,
        w=lambda: g.parameter(n, k),
        v=lambda: g.parameter(n),
        u=lambda: g.parameter(k, x.shape[-2]),
        row=lambda: g.parameter(x.shape[-2]),
    )


@grows("mm", "mv", "addmm", when=lambda x: x.ndim == 2 and x.slopes[1] == 0)
def mm(g, x):
    n, k = x.shape[1], g.number(1, 3)
    templates = ["torch.mm({x}, {w})", "{x}.mm({w})", "torch.mv({x}, {v})", "{x}.mv({v})", "torch.mm({x}, {x}.t())"]
    templates += ["torch.addmm({b}, {x}, {w})", "torch.addmm({b}, {x}, {w}, beta=0.5, alpha=2)"]
    b = lambda: g.pick([g.parameter(k), g.parameter(1, k), g.parameter(1)])  # noqa: E731
    return g.fill(x, templates, w=lambda: g.parameter(n, k), v=lambda: g.parameter(n), b=b)


@grows("mm", "baddbmm", when=proper(3))
def bmm(g, x):
    templates = ["torch.bmm({x}, {x}.transpose(1, 2))", "{x}.transpose(1, 2).bmm({o})"]
    templates += ["torch.baddbmm({p}, {x}, {o}.transpose(1, 2), alpha=0.5)", "{p}.baddbmm({x}, {x}.mT, beta=2)"]
    n = x.shape[1]
    added = lambda: f"{g.parameter(1, n, n)}.expand({x.name}.shape[0], -1, -1)"  # noqa: E731
    return g.fill(x, templates, o=lambda: g.like(x), p=added)


@grows("matmul", "outer", when=lambda x: x.ndim >= 1)
def of_vectors(g, x):
    vector = x.name if x.ndim == 1 else f"{x.name}.flatten(1).mean(1)"
    templates = ["torch.outer({v}, {p})", "torch.outer({v}, {v}.sin())", "{v}.outer({p})", "torch.ger({v}, {p})"]
    templates += ["torch.dot({f}, {f}.tanh())", "{f} @ {f}"]
    return g.fill(x, templates, v=vector, f=f"{x.name}.flatten()", p=lambda: g.parameter(g.number(1, 3)))


@grows("einsum", when=proper(2, 3, 4))
def einsum(g, x):
    n, k = x.shape[-1], g.number(1, 3)
    templates = ["torch.einsum('...i,ij->...j', {x}, {w})", "torch.einsum('...i,...i', {x}, {o})"]
    templates += ["torch.einsum('...i,...i->...i', {x}, {o})", "torch.einsum('b...->b', {x})"]
    if x.ndim == 3:
        templates += ["torch.einsum('bij,bkj->bik', {x}, {o})", "torch.einsum('bij->bji', {x})"]
        templates += ["torch.einsum('bij,jk,bil->bkl', {x}, {w}, {o})", "torch.einsum('bij,wj->biw', {x}, {one})"]
    if x.ndim == 2:
        templates += ["torch.einsum('bi,ij->bj', {x}, {w})", "torch.einsum('bi,ci->bc', {x}, {x})"]
        templates += ["torch.einsum('bi,bj->bij', {x}, {o})"]
    parts = {"w": lambda: g.parameter(n, k), "o": lambda: g.like(x), "one": lambda: g.parameter(k, 1)}
    return g.fill(x, templates, **parts)


@grows("bilinear", "tensordot", when=wide)
def products(g, x):
    n, m = x.shape[-1], g.number(1, 3)
    d = g.dim(x, x.free)
    templates = ["F.bilinear({x}, {o}, {w}, {b})", "F.bilinear({x}, {x}.sin(), {w})", "{m}({x}, {o})"]
    templates += ["torch.tensordot({x}, {v}, 1)", "torch.tensordot({x}, {u}, dims=([{d}], [1]))"]
    parts = {"w": lambda: g.parameter(m, n, n), "b": lambda: g.parameter(m), "v": lambda: g.parameter(n, m)}
    parts |= {"u": lambda: g.parameter(m, x.shape[d]), "m": lambda: g.module(f"nn.Bilinear({n}, {n}, {m})")}
    return g.fill(x, templates, d=d, o=lambda: g.like(x), **parts)


@grows("attention", when=proper(3, 4))
def attention(g, x):
    n, width = x.shape[-2:]
    templates = ["{f}({x}, {x}, {x})", "{f}({x}, {o}, {x}.sin(), scale=0.7)", "{f}({x}, {x}, {x}, is_causal=True)"]
    templates += ["{f}({x}, {o}, {o}, {mask})", "{f}({x}, {x}, {x}, {seen} > -1)", "{f}({x}, {x}, {x}, {seen} > 0)"]
    templates += ["{f}({x}[..., :2, :], {x}, {o})", "{f}({x}, {x}[..., :1, :], {x}[..., :1, :])"]
    if x.ndim == 3:
        heads = g.pick([k for k in (1, 2, 3) if width % k == 0])
        drop, bias, first = g.pick([0.0, 0.3]), g.pick([True, False]), g.pick([False, False, True])
        more = g.pick(["", "", ", add_bias_kv=True", ", add_zero_attn=True", ", add_bias_kv=True, add_zero_attn=True"])
        module = f"nn.MultiheadAttention({width}, {heads}, {drop}, {bias}{more}, batch_first=True)"
        layer = f"nn.TransformerEncoderLayer({width}, {heads}, 4, {drop}, batch_first=True, norm_first={first})"
        templates += ["{m}({x}, {o}, {x})[0]", "{m}({x}, {x}, {x}, need_weights=False)[0]", "{layer}({x})"]
        g.random = drop > 0
        parts = {"m": lambda: g.module(module), "layer": lambda: g.module(layer)}
    else:
        parts = {}
    return g.fill(
        x,
        templates,
        f="F.scaled_dot_product_attention",
        o=lambda: g.like(x),
        mask=lambda: g.parameter(*g.pick([(n, n), (1, n), (n, 1)])),
        seen=lambda: g.constant(n, n),
        **parts,
    )


# -- dropout


@grows("dropout", "mul")
def dropout(g, x):
    g.random = g.train
    templates = ["F.dropout({x}, 0.3, self.training)", "{m}({x})", "torch.dropout({x}, 0.5, self.training)"]
    templates += ["F.alpha_dropout({x}, 0.4, self.training)"]
    if x.ndim > 1:
        templates += [
            "stochastic_depth({x}, 0.4, 'row', self.training)",
            "stochastic_depth({x}, 0.4, 'batch', self.training)",
        ]
    if x.ndim == 4 and x.proper:
        templates += ["F.dropout2d({x}, 0.4, self.training)", "{m2}({x})"]
    return g.fill(x, templates, m=lambda: g.module("nn.Dropout(0.2)"), m2=lambda: g.module("nn.Dropout2d(0.4)"))


# -- norms


def _eps(g) -> float:
    return g.pick([0.1, 0.01, 1e-5])


@grows("batch_norm", when=lambda x: x.proper and x.ndim > 1)
def batch_norm(g, x):
    c, eps = x.shape[1], _eps(g)
    templates = ["F.batch_norm({x}, None, None, {p}, {p}, True, eps={eps})"]
    if x.ndim < 6:
        kind = {2: 1, 3: 1, 4: 2, 5: 3}[x.ndim]
        options = g.pick(["", ", affine=False", ", track_running_stats=False", ", momentum=None"])
        made = f"nn.BatchNorm{kind}d({c}, {eps}{options})"
        templates += ["{m}({x})"] * 3
    return g.fill(x, templates, m=lambda: g.module(made), p=lambda: g.parameter(c), eps=eps)


@grows("layer_norm", "rms_norm", when=wide)
def layer_norm(g, x):
    last = 2 if x.ndim > 2 and x.slopes[-2] == 0 and g.pick([True, False]) else 1
    shape, eps = x.shape[-last:], _eps(g)
    templates = ["F.layer_norm({x}, {s}, {p}, {p}, {eps})", "F.layer_norm({x}, {s})", "{m}({x})", "{m}({x})"]
    templates += ["F.rms_norm({x}, {s}, {p}, {eps})", "{r}({x})"]
    made, rms = f"nn.LayerNorm({shape}, {eps})", f"nn.RMSNorm({shape}, {eps})"
    return g.fill(
        x, templates, s=shape, eps=eps, p=lambda: g.parameter(*shape), m=lambda: g.module(made), r=lambda: g.module(rms)
    )


@grows("group_norm", "instance_norm", "local_response_norm", when=proper(3, 4, 5))
def group_norm(g, x):
    c, eps, n = x.shape[1], _eps(g), x.ndim - 2
    groups = g.pick([k for k in (1, 2, 3) if c % k == 0])
    templates = [
        "F.group_norm({x}, {g}, {p}, {p}, {eps})",
        "{m}({x})",
        "{m}({x})",
        "F.local_response_norm({x}, 3, 0.5)",
    ]
    made = f"nn.GroupNorm({groups}, {c}, {eps})"
    templates += ["{lrn}({x})"]
    if math.prod(x.shape[2:]) > 1:
        templates += ["F.instance_norm({x}, eps={eps})", "{i}({x})", "{i}({x})"]
    instance = (
        f"nn.InstanceNorm{n}d({c}, {eps}, affine={g.pick([True, False])}, track_running_stats={g.pick([False, True])})"
    )
    return g.fill(
        x,
        templates,
        g=groups,
        eps=eps,
        p=lambda: g.parameter(c),
        m=lambda: g.module(made),
        i=lambda: g.module(instance),
        lrn=lambda: g.module("nn.LocalResponseNorm(2, 0.5)"),
    )


@grows("normalize", when=lambda x: x.ndim > 1)
def normalize(g, x):
    return g.fill(
        x,
        ["F.normalize({x}, dim={d})", "F.normalize({x}, 3.0, {d}, 0.1)", "F.normalize({x}, p=1, dim={d})"],
        d=g.dim(x),
    )


# -- pooling and resizing


@grows("avg_pool", "max_pool", when=proper(3, 4, 5))
def pool(g, x):
    n = x.ndim - 2
    kernel, stride, padding, dilation = _windowed(g, x, half_padded=True)
    ceil = g.pick([True, False])
    if g.pick([True, False]):
        divisor = f", divisor_override={g.number(1, 3)}" if n > 1 and g.pick([True, False, False]) else ""
        options = f"{kernel}, {stride}, {padding}, {ceil}, {g.pick([True, False])}{divisor}"
        return g.fill(
            x,
            ["F.avg_pool{n}d({x}, {o})", "{m}({x})"],
            n=n,
            o=options,
            m=lambda: g.module(f"nn.AvgPool{n}d({options})"),
        )
    options = f"{kernel}, {stride}, {padding}, {dilation}"
    templates = ["F.max_pool{n}d({d}, {o}, {c})", "torch.max_pool{n}d({d}, {o}, {c})", "{m}({d})"]
    made = f"nn.MaxPool{n}d({options}, ceil_mode={ceil})"
    return g.fill(x, templates, n=n, d=g.distinct(x), o=options, c=ceil, m=lambda: g.module(made))


@grows("max_pool_with_positions", "max_unpool1d", "max_unpool2d", "max_unpool3d", when=proper(3, 4, 5))
def pool_and_back(g, x):
    n, options = x.ndim - 2, f"{g.number(1, 2)}, {g.number(1, 2)}"
    templates = ["F.max_pool{n}d({v}, {o}, return_indices=True)[0]"]
    pooled = "F.max_pool{n}d({v}, {o}, return_indices=True)"
    templates += [f"F.max_unpool{{n}}d({pooled}[0], {pooled}[1], {{o}}, output_size={{v}}.shape[2:])"]
    return g.fill(x, templates, n=n, v=g.distinct(x), o=options)


@grows("adaptive_max_pool_with_positions", "fractional_max_pool", when=proper(4, 5))
def pool_to_size(g, x):
    n, size = x.ndim - 2, tuple(g.number(1, max(m - 1, 1)) for m in x.shape[2:])
    pool = g.pick(["adaptive", "fractional"])
    if pool == "fractional":
        g.random = True
        return f"F.fractional_max_pool{n}d({g.distinct(x)}, {g.pick([1, 2])}, {size})"
    return f"F.adaptive_max_pool{n}d({g.distinct(x)}, {size}, return_indices=True)[0]"


@grows("adaptive_avg_pool", "adaptive_max_pool", when=proper(3, 4, 5))
def adaptive_pool(g, x):
    n = x.ndim - 2
    size = g.pick([1, tuple(g.number(1, 4) for _ in range(n))])
    if g.pick([True, False]):
        return g.fill(
            x,
            ["F.adaptive_avg_pool{n}d({x}, {s})", "{m}({x})"],
            n=n,
            s=size,
            m=lambda: g.module(f"nn.AdaptiveAvgPool{n}d({size})"),
        )
    return g.fill(
        x,
        ["F.adaptive_max_pool{n}d({d}, {s})", "{m}({d})"],
        n=n,
        s=size,
        d=g.distinct(x),
        m=lambda: g.module(f"nn.AdaptiveMaxPool{n}d({size})"),
    )


@grows("interpolate", when=lambda x: proper(3, 4, 5)(x) and x.small)
def interpolate(g, x):
    n = x.ndim - 2
    smooth = {1: ["linear"], 2: ["bilinear", "bicubic"], 3: ["trilinear"]}[n]
    mode = g.pick(["nearest", "nearest-exact", "area", *smooth, *smooth])
    corners = f", align_corners={g.pick([True, False])}" if mode in smooth else ""
    size = tuple(g.number(1, 5) for _ in range(n))
    if corners.endswith("False") and n == 2 and g.pick([True, False, False]):
        corners += ", antialias=True"
    templates = ["F.interpolate({x}, {s}, mode='{mode}'{c})", "F.interpolate({x}, scale_factor={f}, mode='{mode}'{c})"]
    return g.fill(x, templates, s=size, mode=mode, c=corners, f=g.pick([1.7, 2, 1]))


@grows("grid_sample", "affine_grid", when=proper(4))
def sampled(g, x):
    turned = f"{g.parameter(1, 2, 3)} + 0.3 * {x.name}.mean((1, 2, 3)).sin()[:, None, None]"
    corners, size = g.pick([True, False]), f"[{x.name}.shape[0], 1, {g.number(1, 4)}, {g.number(1, 4)}]"
    grids = [f"F.affine_grid({turned}, {size}, {corners})"]
    grids += [f"torch.stack([{x.name}[:, 0].tanh() * 1.2, {x.name}[:, -1].sin() * 1.1], -1)"]
    mode, padding = g.pick(["bilinear", "bilinear", "nearest"]), g.pick(["zeros", "border"])
    return g.fill(
        x, ["F.grid_sample({x}, {grid}, '{m}', '{p}', {c})"], grid=g.pick(grids), m=mode, p=padding, c=corners
    )


# -- reductions


@grows("mean", "sum", when=lambda x: x.ndim > 0)
def mean(g, x):
    templates = [
        "{x}.{k}({d})",
        "torch.{k}({x}, {d}, keepdim=True)",
        "{x}.{k}(dim={ds})",
        "{x}.{k}({ds}, True)",
        "{x}.{k}()",
    ]
    return g.fill(x, templates, k=g.pick(["mean", "sum"]), d=lambda: g.dim(x), ds=lambda: g.dims(x))


@grows("amax", "max", "min", "median", "topk", "sort", "kthvalue", "mode", when=lambda x: x.ndim > 0)
def extremes(g, x):
    dim = g.dim(x, [d for d in range(x.ndim) if x.slopes[d] == 0] or range(x.ndim))
    if x.slopes[dim] != 0:
        return f"{g.distinct(x)}.amax({dim}, keepdim=True)"
    templates = [
        "torch.a{k}({v}, {d})",
        "{v}.a{k}({d}, keepdim=True)",
        "{v}.{k}({d})[0]",
        "{v}.{k}(dim={d}, keepdim=True).values",
    ]
    templates += [
        "torch.{k}({v}, {d}).values",
        "torch.sort({v}, {d}).values",
        "{v}.sort({d}, descending=True)[0]",
        "{v}.{k}()",
    ]
    templates += [
        "{v}.topk(1, {d})[0]",
        "torch.topk({v}, {n}, {d}, largest=False).values",
        "{v}.gather({d}, {v}.argsort({d}))",
    ]
    templates += ["torch.kthvalue({v}, {n}, {d}).values", "{v}.mode({d}, True)[0]"]
    templates += ["torch.median({v}, {d}).values", "{v}.median(dim={d}, keepdim=True)[0]"]
    return g.fill(x, templates, v=g.distinct(x), k=g.pick(["max", "min"]), d=dim, n=max(1, x.shape[dim] - 1))


@grows("var", "std", "var_mean", "std_mean", when=lambda x: x.ndim > 0 and any(x.shape[d] > 1 for d in x.free))
def moments(g, x):
    templates = [
        "{x}.{k}({d})",
        "torch.{k}({x}, {d}, unbiased=False, keepdim=True)",
        "torch.{k}({x}, {d}, correction=0)",
    ]
    templates += [
        "torch.{k}_mean({x}, {d})[0]",
        "torch.{k}_mean({x}, {d}, keepdim=True)[0] + {x}",
        "torch.{k}_mean({x}, {d}, correction=0)[1]",
    ]
    if g.pick([True, False]) and all(s == 0 for s in x.slopes):
        templates = ["torch.{k}({x})", "{x}.{k}(False)"]
    k = g.pick(["var", "std"]) if _are_distinct(x.runs[0]) and not x.random else "var"
    return g.fill(x, templates, k=k, d=g.dim(x, [d for d in x.free if x.shape[d] > 1]))


def squares(x: Value) -> bool:
    """Small square matrices whose sizes do not depend on the batch."""
    return x.ndim >= 2 and x.slopes[-2:] == (0, 0) and 1 < x.shape[-1] == x.shape[-2] < 5 and x.small


@grows(
    *("inv", "inv_ex", "pinv", "det", "det_with_factors", "logdet", "slogdet", "matrix_exp", "cholesky_inverse"),
    *("solve", "solve_ex", "solve_triangular", "triangular_solve", "cholesky_solve", "cholesky", "cholesky_ex"),
    *("lu", "lu_factor", "lu_factor_ex", "lu_unpack", "lu_solve", "lu_solve_of", "polar"),
    *(["matrix_sqrth"] if hasattr(torch.linalg, "matrix_sqrth") else []),
    when=squares,
)
def of_squares(g, x):
    n = x.shape[-1]
    regular, definite = (
        f"({x.name}.tanh() + {n} * torch.eye({n}))",
        f"({x.name}.tanh() @ {x.name}.tanh().mT + torch.eye({n}))",
    )
    templates = [
        "torch.linalg.inv({r})",
        "torch.linalg.inv_ex({r})[0]",
        "torch.linalg.pinv({r})",
        "torch.linalg.det({r})",
    ]
    templates += ["torch._linalg_det({r})[0]", "torch.logdet({d})", "torch.linalg.slogdet({r}).logabsdet"]
    templates += ["torch.linalg.matrix_exp({x}.tanh())", "torch.cholesky_inverse({r})", "torch.linalg.solve({r}, {w})"]
    templates += ["torch.linalg.solve_ex({r}, {w}, left=False)[0]", "torch.cholesky_solve({x}, {r})"]
    templates += ["torch.linalg.solve_triangular({r}, {w}, upper=True)", "torch.triangular_solve({x}, {r}, False)[0]"]
    templates += ["torch.linalg.cholesky({d})", "torch.linalg.cholesky_ex({d}).L", "torch.linalg.lu({r})[2]"]
    templates += ["torch.linalg.lu_factor({r})[0]", "torch.linalg.lu_factor_ex({r}).LU"]
    templates += ["torch.lu_unpack({x}, torch.linalg.lu_factor({r})[1]).U"]
    templates += ["torch.linalg.lu_solve({r}, torch.linalg.lu_factor({r})[1], {x})"]
    templates += ["torch.lu_solve({x}, {r}, torch.linalg.lu_factor({r})[1])"]
    templates += ["torch.linalg.polar({r}).H"] if hasattr(torch.linalg, "polar") else []
    templates += ["torch.linalg.matrix_sqrth({d})"] if hasattr(torch.linalg, "matrix_sqrth") else []
    return g.fill(x, templates, r=regular, d=definite, w=lambda: g.parameter(n, n))


@grows(
    *("qr", "svd", "svd_of", "svdvals", "svd_with_options", "eigh", "eigvalsh", "householder_product", "ormqr"),
    *("addbmm", "cross", "cross_of"),
    when=lambda x: x.ndim >= 2 and x.slopes[-2:] == (0, 0) and x.small,
)
def factors(g, x):
    n = min(x.shape[-2:])
    v = f"({x.name} + {g.constant(*x.shape[-2:])} + 2 * torch.eye({x.shape[-2]}, {x.shape[-1]}))"
    spread = f"({x.name}[..., :{n}, :{n}].tanh() * 0.3 + torch.arange({n}).diag())"
    templates = [
        "torch.linalg.qr({v})[1].abs()",
        "torch.linalg.svdvals({v})",
        "torch.linalg.svd({v}, full_matrices=False)[1]",
    ]
    templates += ["{v}.svd()[1]", "torch._linalg_svd({v})[1]", "torch.linalg.eigvalsh({s})"]
    templates += ["torch.linalg.eigh({s}).eigenvalues", "torch.ormqr({x}, {x}[..., 0, :{n}] * 0.3, {x})"]
    templates += ["torch.linalg.householder_product({x}[..., :{n}], {x}[..., 0, :{n}] * 0.3)"]
    if x.shape[-1] == 3:
        templates += ["torch.linalg.cross({x}, {x}.sin())", "torch.cross({x}, {x}.cos(), -1)"]
    if x.ndim == 3 and x.slopes[0] == 0:
        templates += ["torch.addbmm({x}[0] @ {x}[0].mT, {x}, {x}.mT, beta=0.5)"]
    return g.fill(x, templates, v=v, s=spread, n=n)


@grows("cdist", when=lambda x: x.ndim > 1 and x.slopes[-1] == 0 and x.small)
def cdist(g, x):
    p = g.pick([2.0, 1.0, 3.0])
    templates = ["torch.cdist({x}, {p}, {n})", "torch.cdist({x}, {o}.sin(), p={n})", "torch.cdist({x}, {x})"]
    return g.fill(x, templates, n=p, o=lambda: g.like(x), p=lambda: g.parameter(g.number(1, 3), x.shape[-1]))


@grows("vector_norm", "linalg_norm", "norm", when=lambda x: x.ndim > 0)
def norms(g, x):
    templates = ["torch.linalg.vector_norm({x}, {p}, {d})", "torch.linalg.vector_norm({x}, dim={ds}, keepdim=True)"]
    templates += ["torch.linalg.norm({x}, dim={d})", "torch.linalg.norm({x}, {p}, {d}, True)", "{x}.norm()"]
    templates += ["{x}.norm(dim={d}, keepdim=True)", "torch.norm({x}, p=2, dim={ds})", "{x}.norm(1, {d})"]
    p = g.pick([2, 1, 3, 2.5, "math.inf"] if all(map(_are_distinct, x.runs)) and not x.random else [2, 1, 3])
    return g.fill(x, templates, p=p, d=g.dim(x), ds=g.dims(x))


@grows("logsumexp", "cumsum", "prod", "cumprod", "logcumsumexp", "cummax", when=lambda x: x.ndim > 0)
def accumulations(g, x):
    templates = [
        "torch.logsumexp({x}, {ds})",
        "{x}.logsumexp({d}, True)",
        "torch.cumsum({x}, {d})",
        "{x}.cumsum(dim={d})",
    ]
    if x.free:
        templates += ["{x}.prod({f})", "torch.prod({x}, {f}, keepdim=True)", "torch.cumprod({x}, {f})"]
        templates += ["({x} + 1).cumprod(dim={f})", "torch.logcumsumexp({x}, {f})"]
        templates += ["torch.cummax({x}, {f}).values", "{x}.cummin({f})[0]"]
    if x.runs[-1].numel() < 30:
        templates += ["{x} * torch.prod({x})", "torch.relu({x} + 1).prod()"]
    return g.fill(x, templates, d=g.dim(x), ds=g.dims(x), f=lambda: g.dim(x, x.free))


# -- indexing


def _slice(g, n):
    """A slice that takes something of n positions."""
    start, step = g.number(0, n - 1), g.pick([1, 1, 2])
    stop = g.number(start + 1, n + 1)
    from_end = g.pick([True, False])
    text = (
        f"{start - n if from_end else start or ''}:{stop - n if from_end and stop < n else '' if stop >= n else stop}"
    )
    return text if step == 1 else f"{text}:{step}"


@grows("getitem", when=lambda x: x.ndim > 0 and bool(x.free))
def getitem(g, x):
    entries = []
    ways = ["all", "all", "slice", "slice", "number", "none", "list"]
    lists = 0
    for n, slope in zip(x.shape, x.slopes, strict=True):
        way = g.pick(ways) if slope == 0 else "all"
        if way == "list" and lists:
            way = "slice"
        lists += way == "list"
        if way == "none":
            entries.append("None")
        position = g.number(-n, n - 1)
        choice = {"slice": lambda n=n: _slice(g, n), "number": lambda p=position: str(p)}
        choice["list"] = lambda n=n, p=position: g.pick(
            ["[0, {}]", "torch.tensor([[{}, 0]])", "torch.tensor([0, {}, 0])"]
        ).format(p)
        entries.append(choice.get(way, lambda: ":")())
    if g.pick([False, False, True]) and entries[-1] == ":" and len(entries) > 1:
        entries[-1] = "..."
    return f"{x.name}[{', '.join(entries)}]"


@grows("narrow", "index_select", "take_along_dim", "gather", when=lambda x: any(x.shape[d] > 1 for d in x.free))
def positions(g, x):
    dim = g.dim(x, [d for d in x.free if x.shape[d] > 1])
    n = x.shape[dim]
    start, index = g.number(0, n - 1), [g.number(0, n - 1) for _ in range(g.number(1, 3))]
    templates = ["torch.narrow({x}, {d}, {s}, {l})", "{x}.narrow({d}, {s} - {n}, 1)", "torch.select({x}, {d}, {s})"]
    templates += [
        "{x}.select({d}, -1)",
        "{x}.index_select({d}, torch.tensor({i}))",
        "{x}.narrow({d}, 0, {x}.shape[{d}] - 1)",
    ]
    templates += ["torch.take_along_dim({v}, {v}.argmax({d}, keepdim=True), {d})"]
    templates += ["torch.gather({x}, {d}, ({x} > 0).long())"]
    parts = {"l": lambda: g.number(1, n - start), "v": lambda: g.distinct(x)}
    return g.fill(x, templates, d=dim, s=start, n=n, i=index, **parts)


@grows("embedding", when=lambda x: x.proper and x.ndim < 4)
def embedding(g, x):
    width = g.number(1, 3)
    ids = f"({x.name} > 0).long()"
    templates = ["F.embedding({i}, {p})", "F.embedding({i}, {p}, padding_idx=0)", "{m}({i})"]
    if g.ids is not None:
        ids = g.ids.name
    made = f"nn.Embedding(5, {width}{g.pick(['', ', padding_idx=1'])})"
    return g.fill(x, templates, i=ids, p=lambda: g.parameter(5, width), m=lambda: g.module(made))


@grows("where", "tensor_where", "masked_fill")
def where(g, x):
    templates = ["torch.where({x} > 0, {x}, {o})", "torch.where({c} > 0, {o}, {x})", "{x}.where({c} > 0.2, 0.5)"]
    templates += [
        "{x}.where({x} > 0.1, {o})",
        "{x}.masked_fill({c} > 0, -1.0)",
        "torch.masked_fill({x}, {x} > 0.3, 0.3)",
    ]
    templates += ["torch.where({x} > 0, 0.5, {x})", "{x}.masked_fill({x} < 0, {scalar})"]
    parts = {"o": lambda: g.other(x), "c": lambda: g.constant(*g.narrow_shape(x)), "scalar": lambda: g.parameter()}
    return g.fill(x, templates, **parts)


@grows("diagonal", "windows", "slice_scatter", "select_scatter", when=lambda x: x.ndim > 1 and bool(x.free))
def parts_of(g, x):
    dim = g.dim(x, x.free)
    n = x.shape[dim]
    size = g.number(1, n)
    templates = ["{x}.unfold({d}, {size}, {step})", "{x}.select_scatter({x}.select({d}, 0).sin(), {d}, -1)"]
    templates += ["torch.slice_scatter({x}, {o}.narrow({d}, 0, {size}), {d}, {rest})", "torch.diagonal({x}, 0, 0, 1)"]
    templates += ["{x}.diagonal(dim1=-1, dim2={first})"]
    return g.fill(
        x, templates, d=dim, size=size, step=g.number(1, 2), rest=n - size, o=lambda: g.like(x), first=x.ndim - 2
    )


@grows(
    "scatter",
    "scatter_add",
    "index_copy",
    "index_add",
    "index_fill",
    when=lambda x: any(x.shape[d] > 1 for d in x.free),
)
def scatter(g, x):
    dim = g.dim(x, [d for d in x.free if x.shape[d] > 1])
    index = g.draw(st.permutations(range(x.shape[dim])))[: g.number(1, x.shape[dim])]
    templates = ["{x}.scatter({d}, {v}.argsort({d}), {o})", "torch.scatter({x}, {d}, ({x} > 0).long(), 0.5)"]
    templates += ["torch.scatter_add({x}, {d}, ({x} > 0).long(), {o})", "{x}.index_fill({d}, {i}, 0.5)"]
    templates += ["torch.zeros_like({x}).scatter_add_({d}, ({x} > 0).long(), {o})", "{x}.index_fill({d}, {i}, {p})"]
    templates += ["{x}.index_copy({d}, {i}, {part})", "torch.index_add({x}, {d}, {i}, {part})"]
    templates += ["{x}.index_add({d}, {i}, {part}, alpha=-2)"]
    parts = {"i": f"torch.tensor({index})", "o": lambda: g.like(x), "v": lambda: g.distinct(x)}
    part = lambda: f"{g.like(x)}.narrow({dim}, 0, {len(index)})"  # noqa: E731
    return g.fill(x, templates, d=dim, part=part, p=lambda: g.parameter(), **parts)


@grows(
    "scatter_reduce",
    "index_reduce",
    "index",
    "index_put",
    when=lambda x: any(x.shape[d] > 1 for d in x.free),
)
def combined(g, x):
    dim = g.pick([d for d in x.free if x.shape[d] > 1])
    n = x.shape[dim]
    index = [g.number(0, n - 1) for _ in range(g.number(1, n))]
    how, tail, every = g.pick(["mean", "prod", "amax", "amin"]), ", include_self=False", "None, " * dim
    templates = ["torch.scatter_reduce({v}, {d}, ({o} > 0).long(), {v} * 0.7, '{how}'{t})"]
    templates += ["{x}.scatter_reduce({d}, ({x} > 0).long(), {o}, 'sum')"]
    templates += ["{v}.index_reduce({d}, torch.tensor({i}), {v}.narrow({d}, 0, {k}) * 0.7, '{how}'{t})"]
    templates += ["torch.ops.aten.index.Tensor({x}, [{every}torch.tensor({i})])"]
    templates += ["torch.ops.aten.index_put.default({x}, [{every}torch.tensor({i})], {p}, {accumulate})"]
    parts = {"i": index, "k": len(index), "o": lambda: g.like(x), "every": every, "p": lambda: g.parameter()}
    parts |= {"how": how, "t": g.pick(["", tail]), "v": lambda: g.distinct(x), "accumulate": g.pick([True, False])}
    return g.fill(x, templates, d=dim, **parts)


@grows("take", "put_flat", "masked_scatter", "as_strided", "as_strided_scatter", when=lambda x: math.prod(x.shape) > 3)
def in_the_flat_tensor(g, x):
    count = g.number(1, 3)
    index = g.draw(st.permutations(range(-2, 2)))[:count]
    templates = ["torch.take({x}, torch.tensor({i}))", "torch.put({x}, torch.tensor({i}), {p})"]
    templates += ["{x}.put(torch.tensor({i}), {p}, accumulate=True)", "{x}.masked_scatter({x} > 0, {o})"]
    templates += ["{x}.contiguous().as_strided((2, 2), (1, {step}), 1 - {step} % 2)"]
    templates += ["{x}.detach().as_strided_scatter({p}, ({k},), (1,), 1)"]
    return g.fill(
        x, templates, i=index, k=count, step=g.number(1, 2), p=lambda: g.parameter(count), o=lambda: g.like(x)
    )


@grows("diagonal_scatter", "diag_embed", "diag", "diagflat", "trace", when=wide)
def diagonals(g, x):
    n, k = x.shape[-1], g.number(-1, 1)
    templates = ["{x}.diag_embed({k})", "{x} * torch.trace({q})", "{x} * torch.diag({q})", "{x} @ torch.diag({p})"]
    templates += ["{x} * torch.diagflat({p}, {k}).sum(0)[:{n}]"]
    templates += ["{x}.diag_embed().diagonal_scatter({x}.sin(), dim1=-2, dim2=-1)"]
    return g.fill(x, templates, n=n, k=k, p=lambda: g.parameter(n), q=lambda: g.parameter(n, n))


forms("sgn", "{x} * {x}.sgn()")
forms("real", "torch.real({x})", "{x}.real")
forms("resolved", "{x}.resolve_conj()", "torch.resolve_neg({x})")


@grows(
    *("complex", "polar", "conj", "view_as_real", "view_as_complex", "imag", "fft", "fft_of_real", "fft_to_real"),
    when=lambda x: x.ndim > 1 and x.slopes[-1] == 0,
)
def of_complex_numbers(g, x):
    made = ["torch.complex({x}, {o})", "torch.polar({x}, {o})", "torch.view_as_complex(torch.stack([{x}, {o}], -1))"]
    made += ["torch.fft.fft({x})", "torch.fft.rfft({x})", "torch.fft.ifft(torch.complex({x}, {o}), dim=-1)"]
    changed = ["{0}", "{0}.conj()", "{0} * {x}.sum(-1, keepdim=True)", "({0} * 0.3).sin()", "{0} * {0}.conj()"]
    back = ["torch.view_as_real({0})", "{0}.imag", "torch.imag({0})", "torch.fft.irfft({0}, n=4)", "{0}.real"]
    z = g.pick(changed).replace("{0}", g.pick(made))
    return g.fill(x, [each.replace("{0}", f"({z})") for each in back], o=lambda: g.like(x))


@grows("put", when=lambda x: x.proper and x.ndim > 1)
def put(g, x):
    templates = ["written({x}, {x}.flatten(1).sum(1).reshape(-1{ones}))", "written({x}, {p})", "halved({x}, {p})"]
    return g.fill(x, templates, ones=", 1" * (x.ndim - 2), p=lambda: g.parameter(1))


# -- reshaping


@grows("reshape", when=lambda x: x.ndim > 0)
def reshape(g, x):
    templates = ["{x}.unsqueeze({new})", "torch.unsqueeze({x}, {new})", "{x}.flatten()", "{x}.ravel()"]
    if x.ndim > 1:
        templates += ["{x}.flatten(0, 1)", "torch.flatten({x}, -2)"]
    if x.proper:
        templates += ["{x}.flatten(1)", "{x}.reshape({x}.shape[0], -1)", "{x}.contiguous().view({x}.size(0), -1, 1)"]
        templates += ["{x}.reshape(-1)", "{x}.flatten(1).reshape_as({x})", "{m}({x})"] if x.ndim > 1 else []
        n = math.prod(x.shape[1:])
        factor = g.pick([k for k in range(1, n + 1) if n % k == 0])
        templates += [
            "{x}.reshape(-1, {k}, {r})",
            "torch.reshape({x}, ({x}.shape[0], {k}, {r}))",
            "{x}.contiguous().view(-1, {r})",
        ]
        more = {"k": factor, "r": n // factor}
    else:
        more = {}
    composite = [d for d in x.free if x.shape[d] in (4, 6, 8, 9)]
    if composite:
        templates += [
            "{x}.unflatten({c}, (2, -1))"
            if all(x.shape[d] % 2 == 0 for d in composite)
            else "{x}.unflatten({c}, (-1, 1))"
        ]
    ones = [d for d in range(x.ndim) if x.slopes[d] == 0]
    if ones:
        templates += ["{x}.squeeze({o})"]
    return g.fill(
        x,
        templates,
        new=lambda: g.number(-x.ndim - 1, x.ndim),
        c=lambda: g.dim(x, composite),
        o=lambda: g.dim(x, ones),
        m=lambda: g.module("nn.Flatten()"),
        **more,
    )


@grows("permute", "swap", "movedim", "flip", "roll", "rot90", when=lambda x: x.ndim > 1)
def permute(g, x):
    order = tuple(g.draw(st.permutations(range(x.ndim))))
    within = (0, *(g.draw(st.permutations(range(1, x.ndim)))))
    templates = [
        "{x}.permute{order}",
        "torch.permute({x}, {within})",
        "{x}.permute({within})",
        "{x}.transpose({a}, {b})",
    ]
    templates += [
        "torch.swapaxes({x}, {a}, {b})",
        "{x}.movedim({a}, {b})",
        "torch.moveaxis({x}, {a}, {b})",
        "{x}.swapdims({a}, {b})",
    ]
    templates += [
        "{x}.flip({a})",
        "torch.flip({x}, {ds})",
        "{x}.roll(1, {a})",
        "torch.roll({x}, shifts=(2, -1), dims=({a}, {b}))",
    ]
    templates += ["{x}.roll(2)", "torch.rot90({x}, 1, ({p}, {q}))", "{x}.rot90(2, ({p}, {q}))"]
    templates += ["torch.flipud({x})", "torch.fliplr({x})"]
    p, q = g.draw(st.permutations(range(x.ndim)))[:2]
    return g.fill(x, templates, order=order, within=within, a=g.dim(x), b=g.dim(x), ds=lambda: g.dims(x), p=p, q=q)


@grows("pixel_unshuffle", "pixel_shuffle", "channel_shuffle", "unfold", "fold", when=proper(4))
def of_maps(g, x):
    _, c, h, w = x.shape
    kernel, stride, padding, dilation = _windowed(g, x)
    window = f"{kernel}, {dilation}, {padding}, {stride}"
    fold = f"F.fold(F.unfold({x.name}, {window}), ({h}, {w}), {window})"
    templates = ["F.unfold({x}, {k}, {d}, {p}, {s})", fold, "{u}({x})"]
    templates += (
        ["F.pixel_shuffle({x}, 2)", "{ps}({x})"] if c % 4 == 0 else ["F.pixel_shuffle({x}.repeat(1, 4, 1, 1), 2)"]
    )
    templates += ["F.pixel_unshuffle({x}, 2)", "torch.pixel_unshuffle({x}, 2)"] if h % 2 == w % 2 == 0 else []
    templates += ["F.channel_shuffle({x}, {g})"] if c > 1 else []
    groups = g.pick([k for k in (2, 3, 5, 7, c) if c % k == 0])
    unfold = f"nn.Unfold({kernel}, {dilation}, {padding}, {stride})"
    parts = {"u": lambda: g.module(unfold), "ps": lambda: g.module("nn.PixelShuffle(2)")}
    return g.fill(x, templates, k=kernel, d=dilation, p=padding, s=stride, g=groups, **parts)


@grows("pad", when=lambda x: x.ndim > 1 and x.slopes[-1] == 0)
def pad(g, x):
    n = x.shape[-1]
    a, b = g.number(0, 2), g.number(-1, 2)
    b = b if n + b > 0 and a + b + n > 0 else 0
    templates = ["F.pad({x}, ({a}, {b}))", "F.pad({x}, ({a}, {b}), value=0.5)"]
    if proper(3)(x):
        inside, around = min(a, n - 1), min(max(b, 0), n - 1)
        templates += [
            f"F.pad({{x}}, ({inside}, {around}), 'reflect')",
            f"F.pad({{x}}, ({a}, {max(b, 0)}), 'replicate')",
        ]
        templates += [f"F.pad({{x}}, ({inside}, {around}), 'circular')"]
    if proper(4)(x):
        templates += [
            "F.pad({x}, ({a}, 1, 0, 2), mode='replicate')",
            "{m}({x})",
            "F.pad({x}, (1, 0, {a}, {b}))" if x.shape[-2] + b > 0 else "F.pad({x}, (1, 1))",
        ]
    return g.fill(x, templates, a=a, b=b, m=lambda: g.module("nn.ZeroPad2d((1, 0, 0, 1))"))


@grows("cat", "stack", when=lambda x: x.ndim > 0 and x.small)
def cat(g, x):
    templates = ["torch.cat([{x}, {o}], {d})", "torch.cat(({x}, {o}, {x}), dim={d})", "torch.stack([{x}, {o}], {n})"]
    templates += ["torch.concat([{x}, {o}], {d})", "torch.stack(({o}, {x}, {o}), dim={n})"]
    if x.proper:
        templates += ["torch.cat([{p}, {x}])"]
        templates += ["torch.cat([{q}.expand({x}.shape[0], {minus}), {x}], 1)"] if x.ndim > 1 else []
    return g.fill(
        x,
        templates,
        o=lambda: g.like(x),
        d=g.dim(x),
        n=lambda: g.number(-1, x.ndim),
        p=lambda: g.parameter(g.number(1, 2), *x.shape[1:]),
        q=lambda: g.parameter(1, g.number(1, 2), *x.shape[2:]),
        minus=", ".join(["-1"] * (x.ndim - 1)),
    )


@grows("split", "tensor_split", "unbind", when=lambda x: any(1 < x.shape[d] < 5 for d in x.free))
def split(g, x):
    dim = g.dim(x, [d for d in x.free if 1 < x.shape[d] < 5])
    n = x.shape[dim]
    first = g.number(1, n - 1)
    templates = [
        ("torch.chunk({x}, 2, {d})", 2),
        ("{x}.split([{first}, {rest}], {d})", 2),
        ("torch.split({x}, 1, dim={d})", n),
        ("{x}.tensor_split(2, dim={d})", 2),
        ("torch.tensor_split({x}, ({first},), {d})", 2),
        ("{x}.split_with_sizes([{first}, {rest}], {d})", 2),
        ("torch.unbind({x}, {d})", n),
        ("{x}.unbind({d})[0] * {x}.unbind({d})[-1]", 1),
    ]
    template, count = g.pick(templates)
    return template.format(x=x.name, d=dim, first=first, rest=n - first), count


@grows("expand", "expand_as", "repeat", "repeat_interleave", when=lambda x: x.ndim > 0 and x.small)
def expand(g, x):
    minus = ", ".join(["-1"] * x.ndim)
    sizes = ", ".join(str(g.number(1, 2)) if d in x.free else "1" for d in range(x.ndim))
    templates = [
        "{x}.unsqueeze(0).expand(2, {minus})",
        "{x}.repeat({sizes})",
        "{x}.repeat(2, {sizes})",
        "{x}.tile((2,))",
    ]
    templates += [
        "{x}.repeat_interleave(2, {d})",
        "torch.repeat_interleave({x}, 2, dim={d})",
        "torch.tile({x}, ({sizes},))",
    ]
    templates += ["torch.broadcast_to({x}, (2, {minus}))"]
    templates += ["{x}.mean({f}, keepdim=True).expand_as({x})"] if x.free else []
    templates += ["{p}.expand({x}.shape[0], {rest})"] if x.proper and x.ndim > 1 else []
    return g.fill(
        x,
        templates,
        minus=minus,
        sizes=sizes,
        d=g.dim(x),
        f=lambda: g.dim(x, x.free),
        p=lambda: g.parameter(1, *x.shape[1:]),
        rest=", ".join(["-1"] * (x.ndim - 1)),
    )


# -- constants: no counter neuron passes


@grows()
def steps(g, x):
    templates = ["{x} * {v}.sign()", "{x} + torch.zeros_like({x})", "{x} * torch.floor({v})", "{x} - {x}.detach()"]
    templates += ["{x} + {v}.round()", "{x} + torch.ones_like({x}) * {x}", "{x} + ({v} > 0).double()"]
    return g.fill(x, templates, v=lambda: g.distinct(x))


@grows()
def of_parameters(g, x):
    """A value that does not depend on the input."""
    return g.fill(x, ["{p} * 2", "torch.tanh({p})", "F.relu({p})"], p=lambda: g.parameter(*g.narrow_shape(x)))


@grows()
def in_place(g, x):
    """On memory that nothing else reads."""
    templates = ["F.relu({x} + 0.1, inplace=True)", "({x} * 2).relu_()", "({x} + 1).mul_({c})", "{m}({x} - 0.5)"]
    return g.fill(x, templates, c=lambda: g.constant(*g.narrow_shape(x)), m=lambda: g.module("nn.ReLU(inplace=True)"))


@grows("linear", "layer_norm", when=lambda x: x.ndim > 0)
def read_by_hand(g, x):
    """A module, and its parameters beside it."""
    n, m = x.shape[-1], g.number(1, 4)
    linear = f"nn.Linear({n}, {m})"
    made = g.pick([linear, linear, f"parametrizations.weight_norm({linear})", f"nn.LayerNorm({n})"])
    name = g.module(made)
    if made.startswith("nn.LayerNorm"):
        templates = ["{m}({x}) * {m}.weight", "{m}({x} * {m}.weight) + {m}.bias", "{x} * {m}.bias + {m}.weight"]
    else:
        templates = ["{m}({x}) * F.linear({x}, {m}.weight)", "F.linear({x}, {m}.weight, {m}.bias) + {m}({x})"]
        templates += ["F.linear({m}({x}), {m}.weight.t())", "{m}({x}) @ {m}.weight", "{x} @ {m}.weight.t() + {m}.bias"]
    return g.pick(templates).format(x=x.name, m=name)


@grows(when=lambda x: x.ndim > 0)
def called_with_other_attributes(g, x):
    """A module of which each call has attributes of its own."""
    c = x.shape[-1]
    kinds = {
        "nn.LeakyReLU()": "negative_slope={n}",
        "nn.ELU()": "alpha={n}",
        "nn.Softplus()": "beta={n}",
        f"nn.LayerNorm({c})": "eps={n}",
        "nn.Dropout()": "p={n}",
    }
    if x.proper and x.ndim == 4:
        kinds[f"nn.BatchNorm2d({x.shape[1]})"] = "momentum={n}, eps={n}"
        kinds[f"nn.Conv2d({x.shape[1]}, 2, 3)"] = "dilation=({k}, {k}), padding=({k}, {k})"
        kinds[f"nn.Conv2d({x.shape[1]}, 2, 3, 1, 1)"] = "stride=({k}, {k})"
    made = g.pick(kinds)
    g.random = g.train and made == "nn.Dropout()"
    attributes = kinds[made].format(n=g.pick([0.1, 0.3, 0.5]), k=g.number(1, 2))
    return f"changed({g.module(made, changing=True)}, {attributes})({x.name})"


# -- whole models -----------------------------------------------------------------------------------------------------


@st.composite
def sizes(draw):
    """The size of an input without its batch; maps are the most frequent."""
    dims = draw(st.sampled_from([1, 2, 3, 3, 3, 4]))
    return tuple(draw(st.lists(st.integers(1, {1: 6, 2: 5, 3: 5, 4: 3}[dims]), min_size=dims, max_size=dims)))


@st.composite
def cases(draw, headed=None, inputs=(1, 1, 1, 2), most=9):
    """A `Case`.

    headed: whether the model ends in a linear layer that every path crosses; None: either.
    inputs: how many inputs there may be; most: how many statements.
    """
    layouts = st.sampled_from(["plain", "plain", "transposed", "sliced"])
    count = draw(st.sampled_from(inputs))
    given = [
        Input("xyz"[k], draw(sizes()), draw(layouts), draw(st.sampled_from([True, True, False]))) for k in range(count)
    ]
    if len(inputs) > 1 and draw(st.sampled_from([False, False, False, True])):
        given.append(Input("ids", (draw(st.integers(1, 3)),), "ids", False))
    batch = draw(st.sampled_from([2, 3, 3, 4, 1, 0]))
    g = Grower(draw, tuple(given), draw(st.integers(0, 999)), draw(st.booleans()), batch)
    while len(g.body) < most and (len(g.body) < 2 or draw(st.integers(0, 11))):
        g.grow()
    headed = draw(st.booleans()) if headed is None else headed
    _return(g, headed)
    if g.train:
        g.body = _read(g.body)
    links = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), options), max_size=3))
    random = any(v.random for v in g.values)
    made = tuple(g.init), tuple(g.body)
    return Case(g.inputs, *made, g.seed, g.train, batch, headed, random, tuple(links), draw(st.integers(1, 3)))


options = st.fixed_dictionaries(
    {},
    optional={
        "order": st.just("resize-norm-squash"),
        "norm": st.just("channel"),
        "resize": st.just("area"),
        "activation": st.just("none"),
        "mode": st.just("add"),
    },
)


def _return(g: Grower, headed: bool) -> None:
    """A return statement: one value, or several in a structure; or the logits of a head."""
    unread = [v.name for v in g.values if v.name not in g.used and v.name.startswith("v")]
    last = g.values[-1]
    if headed:
        top = next((v for v in reversed(g.values) if v.proper), g.values[0])
        n = math.prod(top.shape[1:])
        flat = f"{top.name}.flatten(1)" if top.ndim > 1 else f"{top.name}.unsqueeze(1)"
        g.add(f"self.head = nn.Sequential(nn.Linear({n}, 4), nn.ReLU(), nn.Linear(4, 3))")
        g.body.append(f"return self.head({flat})")
        return
    kind = g.pick(["one", "tuple", "dict", "list", "all"])
    chosen = (
        [*(unread or [last.name])] if kind == "all" else [last.name, *[g.value().name for _ in range(g.number(0, 2))]]
    )
    if kind == "one":
        g.body.append(f"return {last.name}")
    elif kind == "dict":
        g.body.append("return {" + ", ".join(f"'out{i or ''}': {name}" for i, name in enumerate(chosen)) + "}")
    elif kind == "list":
        g.body.append(f"return [{', '.join(chosen)}]")
    else:
        g.body.append(f"return {', '.join(chosen)},")


def _read(body: list[str]) -> list[str]:
    """The statements whose values are read: others may draw masks, and batch norms among them count the batch."""
    kept = body[-1:]
    for line in reversed(body[:-1]):
        if any(_mentions(later, name) for later in kept for name in line.partition(" = ")[0].split(", ")):
            kept.insert(0, line)
    return kept


COVERED = {rule for op in OPS for rule in op.rules}
"""The names of the rules that the table has."""
