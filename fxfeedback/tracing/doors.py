"""The two ways from a model to its graph: torch.fx's symbolic tracing, and torch.export."""

from torch import fx

from fxfeedback.errors import OptionError, TraceError
from fxfeedback.tracing.refusals import Refusal

DOORS = ("fx", "export")


def check_door(door: str | None) -> None:
    """Refuse what is not one of `DOORS` or None.

    Raises:
        OptionError: it is something else.
    """
    if door is not None and door not in DOORS:
        raise OptionError(f'door={door!r}: give "fx", "export", or None for torch.fx first and torch.export after it')


def is_final(by_fx: TraceError) -> bool:
    """Whether torch.fx's tracing ended at something that no graph may hold, and not at a limit of its own."""
    return by_fx.__cause__ is None or isinstance(by_fx.__cause__, Refusal)


def both(by_fx: TraceError, by_export: TraceError) -> TraceError:
    """What is said where neither door takes a model."""
    return TraceError(f"{by_fx} Nor does torch.export take it: {by_export}")


def say_door(module: fx.GraphModule, door: str) -> None:
    """Say by which door a graph was made."""
    module.meta["door"] = door


def of_same_door(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module with another graph of the same model, made by the same door."""
    made = fx.GraphModule(module, graph, type(module).__name__)
    say_door(made, door_of(module))
    return made


def door_of(module: fx.GraphModule) -> str:
    """The door by which a graph was made, "fx" or "export"."""
    return module.meta.get("door", "fx")
