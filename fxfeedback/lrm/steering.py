"""What replaces or continues the sources' signals in a call: steering, and the state of an earlier call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from fxfeedback.errors import InputError, NodeNameError, OptionError
from fxfeedback.graph.channels import channel_dim
from fxfeedback.graph.nodes import name_of, spec_of
from fxfeedback.graph.specs import Spec
from fxfeedback.tracing.waiting import moved
from fxfeedback.tracing.wrapper import not_finite

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Steering:
    """What a source passes on instead of its own activation: alpha * activation + (1 - alpha) * its signal.

    activation: shaped like the source's, or with batch 1. strength: factor on the connection's scales, one number or
    (negative, positive).
    """

    source: str
    activation: torch.Tensor
    strength: float | Sequence[float] | torch.Tensor = 1.0
    alpha: float | torch.Tensor = 1.0


class Source(NamedTuple):
    """What is known of a source's value: its name, its spec, and where its channels are."""

    name: str
    spec: Spec
    channels: int

    @classmethod
    def of(cls, node: fx.Node) -> "Source":
        """Of a node with a spec."""
        return cls(name_of(node), spec_of(node), channel_dim(node))

    def check_state(self, value: torch.Tensor, batch: int) -> None:
        """A signal has the source's dimensions, channels and batch; its map may have another size.

        Raises:
            InputError: it does not have these.
        """
        shape, sizes = tuple(value.shape), self.spec.sizes
        samples = (1, batch * self.spec.per_sample[0])
        if len(shape) != len(sizes) or shape[0] not in samples or shape[self.channels] != sizes[self.channels]:
            raise InputError(f"the state of {self.name!r} has shape ({self._shape()}), not {shape}; batch: {batch}")

    def check_activation(self, name: str, activation: torch.Tensor, batch: int, exact: bool) -> None:
        """A steering activation is shaped like its source; at another input size only its channels are known.

        Raises:
            InputError: it is not.
        """
        shape, sizes = tuple(activation.shape), self.spec.sizes
        fits = len(shape) == len(sizes) and shape[0] in (1, batch) and shape[self.channels] == sizes[self.channels]
        if fits and exact:
            fits = all(n is None or n == m for n, m in zip(sizes[1:], shape[1:], strict=True))
        if not fits:
            wanted = f"takes an activation of shape ({self._shape()})"
            raise InputError(f"steering {name!r} {wanted}, not {shape}; batch: 1 or {batch}")

    def _shape(self) -> str:
        return ", ".join("batch" if n is None else str(n) for n in self.spec.sizes)


def read_state(given: Any) -> State:
    """Name -> signal, as an earlier call returned it; none for None.

    Raises:
        InputError: it is something else.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(value, torch.Tensor) for value in given.values()):
        raise InputError("state= maps names of sources to tensors: give what unroll returned")
    return dict(given)


def read_steering(given: Any) -> list[Steering]:
    """One or several steerings, as objects or dicts.

    Raises:
        OptionError: one is something else.
    """
    several = [given] if isinstance(given, (Steering, Mapping, str)) else list(given or ())
    return [one if isinstance(one, Steering) else _read(one) for one in several]


def _read(given: Any) -> Steering:
    try:
        return Steering(**given)
    except TypeError as error:
        raise OptionError(
            f"{given!r} is not a steering ({error}): give a Steering, or a dict with its arguments"
        ) from None


def check_sources(sources: Mapping[str, Any], state: Sequence[str], steered: Sequence[tuple[str, str]]) -> None:
    """Refuse a state or a steering of a node that is not a source.

    Args:
        sources: by node name.
        state: names of nodes.
        steered: pairs (name as the user gave it, name of the node).

    Raises:
        NodeNameError: a node that is not a source.
        OptionError: a source that is steered twice.
    """
    nodes = [node for _, node in steered]
    for given, names in (("the state", state), ("the steering", nodes)):
        for name in (name for name in names if name not in sources):
            raise NodeNameError(f"{given} has {name!r}, which is not a source; sources: {', '.join(sources)}")
    if len(set(nodes)) < len(nodes):
        raise OptionError(
            f"a source is steered twice, in {', '.join(name for name, _ in steered)}: give each one steering"
        )


def steering_tensors(
    given: Steering, source: Source, batch: int, exact: bool, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(activation, alpha, strength) as the graph takes them.

    Args:
        given: what the user asks for.
        source: the node that is steered.
        batch: of the call.
        exact: whether the call has the example's size, so that the source's size is known.
        like: gives dtype and device.

    Raises:
        InputError: a shape that does not fit, or values that are not finite numbers.
    """
    activation, strength, alpha = (_tensor(given, what, like) for what in ("activation", "strength", "alpha"))
    source.check_activation(given.source, activation, batch, exact)
    if strength.numel() not in (1, 2) or alpha.numel() != 1:
        raise InputError(f"steering {given.source!r}: strength is one number or two (negative, positive), alpha is one")
    return activation, alpha.reshape(()), strength.reshape(-1).expand(2)


def _tensor(given: Steering, what: str, like: torch.Tensor) -> torch.Tensor:
    """The activation, strength or alpha of a steering in our dtype, on our device."""
    value = getattr(given, what)
    try:
        tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, dtype=like.dtype)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"steering {given.source!r}: {what}={value!r} is not a number or a tensor") from None
    made = moved(tensor, value, like.device).to(like.dtype)
    if not_finite(tensor) or not_finite(made):
        raise InputError(
            f"steering {given.source!r}: {what} has values that are not finite (NaN, or too large for {like.dtype})"
        )
    return made
