"""Everything that a picture of a model shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxfeedback.butd import BUTD
from fxfeedback.drawing.boxes import Box, in_boxes, open_at_first
from fxfeedback.drawing.effects import Effect, Map, read_effects
from fxfeedback.drawing.network import converted, read_network
from fxfeedback.drawing.parts import Network
from fxfeedback.drawing.plan import Plan, make_plan
from fxfeedback.drawing.tasks import Active, active_units
from fxfeedback.errors import OptionError
from fxfeedback.feedback import FeedbackModel
from fxfeedback.tracing.modes import eval_mode


@dataclass
class Drawing:
    """All that is drawn.

    tasks, active: their names, and what they open, by node. n_tasks: how many there are. image, effects: an input, and
    what connections do to it.
    """

    plan: Plan
    tasks: list[str] = field(default_factory=list)
    active: dict[str, Active] = field(default_factory=dict)
    n_tasks: int = 0
    image: Map | None = None
    effects: list[Effect] = field(default_factory=list)

    @property
    def network(self) -> Network:
        """The network."""
        return self.plan.network

    def active_in(self, box: Box) -> Active | None:
        """The counts of all sites in a box."""
        found = [self.active[node.name] for node in box.nodes if node.name in self.active]
        return sum(found[1:], found[0]) if found else None


def read_drawing(
    model: nn.Module,
    x: Any = None,
    tasks: Any = None,
    depth: int | None = None,
    input_size: Sequence[int] | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
) -> tuple[Drawing, set[Box]]:
    """What is drawn of a model, and which boxes are open; the arguments are those of `draw`."""
    model = converted(model)
    if x is not None and not isinstance(model, FeedbackModel):
        raise OptionError("x= is for a model that add_feedback returned: it shows what connections do to an image")
    if tasks is not None and not isinstance(model, BUTD):
        raise OptionError("tasks= is for a network that to_butd returned")
    with torch.no_grad(), eval_mode(model):
        network = read_network(model, input_size, example_inputs)
        root = in_boxes(network)
        drawing = Drawing(make_plan(network, root))
        if isinstance(model, BUTD):
            drawing.tasks, drawing.active = active_units(model, network, tasks)
            drawing.n_tasks = max(model.options.n_tasks or 0, len(drawing.tasks))
        if isinstance(model, FeedbackModel) and x is not None:
            drawing.image, drawing.effects = read_effects(model, network, x)
    return drawing, open_at_first(root, network, depth)
