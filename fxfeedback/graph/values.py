"""What rules compute on while a graph is built: proxies that know their shapes, and BU values that do not exist yet."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from fxfeedback.errors import RuleError
from fxfeedback.graph.nodes import identifier, name_of, specs_of, tell
from fxfeedback.graph.specs import EXAMPLE_BATCH, Spec


class Emitter(fx.Tracer):
    """Turns the tensor code of rules into nodes of one graph. `batch` is the run-time batch size as a proxy."""

    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Module()
        self.graph = fx.Graph(tracer_cls=fx.Tracer)
        self.batch: Any = None
        self.prefix: str | None = None
        self.entries: dict[str, Any] = {}

    @contextmanager
    def named(self, prefix: str, **entries: Any) -> Iterator[None]:
        """Name the calls that are made in the meantime, and say `entries` of them (see `nodes.tell`)."""
        before = self.prefix, self.entries
        self.prefix, self.entries = prefix, entries
        yield
        self.prefix, self.entries = before

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, *rest: Any
    ) -> "Value":
        if self.prefix and kind in ("call_function", "call_method"):
            name = self.prefix
        value: Value = super().create_proxy(kind, target, args, kwargs, name, *rest)  # type: ignore[assignment]
        if kind.startswith("call"):
            tell(value.node, **self.entries)
        return value

    def proxy(self, node: fx.Node) -> "Value":
        return Value(node, self)

    def size(self, spec: Spec, dim: int) -> Any:
        """Size of one dimension: an int, or for a batch dimension a proxy."""
        slope = spec.per_sample[dim]
        if not slope:
            return spec.shape[dim]
        size = self.batch if slope == 1 else self.batch * slope
        constant = spec.shape[dim] - slope * EXAMPLE_BATCH
        return size + constant if constant else size

    def sizes(self, spec: Spec) -> list[Any]:
        """Sizes of all dimensions."""
        return [self.size(spec, dim) for dim in range(len(spec.shape))]

    def placeholder(self, name: str, spec: Any = None) -> "Value":
        value = self.create_proxy("placeholder", name, (), {})
        value.spec = spec
        return value

    def attribute(self, name: str, spec: Any = None) -> "Value":
        """The parameter or buffer `name`; one node however often it is used."""
        for node in self.graph.find_nodes(op="get_attr", target=name):
            return self.proxy(node)
        value = self.create_proxy("get_attr", name, (), {}, identifier(name))
        value.spec = spec
        return value


class Value(fx.Proxy):
    """A proxy that knows its shape as far as tracing knows it."""

    has_value = True

    @property
    def spec(self) -> Any:
        return specs_of(self.node)

    @spec.setter
    def spec(self, spec: Any) -> None:
        tell(self.node, spec=spec)

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.tracer.sizes(self.spec))

    @property
    def ndim(self) -> int:
        return len(self.spec.shape)

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        if isinstance(self.spec, tuple) and isinstance(index, int):
            part.spec = self.spec[index]
        return part


class Unknown:
    """A BU value in the instruction pass: it has a shape, but does not exist yet."""

    has_value = False

    def __init__(self, emitter: Emitter, node: fx.Node, spec: Any = None) -> None:
        self.emitter, self.node, self.spec = emitter, node, spec or specs_of(node)

    def __getitem__(self, index: Any) -> "Unknown":
        """One of several outputs."""
        if not isinstance(self.spec, tuple):
            return self.__getattr__("__getitem__")
        return Unknown(self.emitter, self.node, self.spec[index])

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.emitter.sizes(self.spec))

    @property
    def ndim(self) -> int:
        return len(self.spec.shape)

    def __getattr__(self, name: str) -> Any:
        raise RuleError(
            f"a rule asked for .{name} of the BU value {name_of(self.node)!r} in the instruction pass, where "
            "no BU value exists yet: give the rule roles(instruct=..., error=...)"
        )


def batch_size(values: Iterable[Value]) -> Any:
    """The batch size at run time, from the first of `values` that has a batch dimension, or None."""
    for value in values:
        for dim, slope in enumerate(value.spec.per_sample):
            if slope == 1 and value.spec.shape[dim] == EXAMPLE_BATCH:
                return fx.Proxy.__getattr__(value, "shape")[dim]
    return None
