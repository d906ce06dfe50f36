"""The published classes of lrm-steering, `LRMNet` and `SteerableLRM`, by their names and with their arguments.

Thin adapters: a `FeedbackModel` whose call also takes what the published call takes, and which keeps its last state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fxfeedback.errors import InputError
from fxfeedback.feedback import FeedbackModel
from fxfeedback.lrm.connections import read_connections
from fxfeedback.tracing.examples import example_for

OURS = {
    "forward_passes": "passes",
    "return_list": "return_all",
    "steering_signals": "steering",
    "first_pass_steering": "steer_first_pass",
}
"""Published argument -> ours."""


class LRMNet(FeedbackModel):
    """A convnet with long-range modulatory connections, called as the published class is.

    It is a `FeedbackModel`: everything that takes one takes it, and its parameters have the network's own names.

    Args:
        network: any model that `add_feedback` takes.
        mod_connections: dicts with source and destination; every destination is rectified after its modulation.
        forward_passes: how many passes a call makes by default.
        return_list: whether a call returns every pass's output, or the last one's.
        img_size: side of the images, or (height, width).
    """

    OPTIONS: tuple[str, ...] = (*FeedbackModel.OPTIONS, *OURS, "drop_state")

    def __init__(
        self,
        network: nn.Module,
        mod_connections: Sequence[Mapping[str, Any]],
        forward_passes: int = 2,
        img_size: int | tuple[int, int] = 224,
        return_list: bool = True,
    ) -> None:
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        channels = example_for(network)[0].shape[1]
        given = read_connections(mod_connections)
        connections = [replace(one, activation="relu" if one.activation == "auto" else one.activation) for one in given]
        example = example_for(network, (channels, *sides))
        super().__init__(network, connections, forward_passes, example, return_list, verify=True)
        vars(self)["_last_state"] = None  # the state of the last call

    def forward(self, *inputs: Any, drop_state: bool = True, **named: Any) -> Any:
        """The outputs of all passes, a list; with return_list=False that of the last.

        Args:
            inputs: the network's own.
            drop_state: start without signals; False: with those that the last call left, as many images as there.
            named: forward_passes, return_list; of a `SteerableLRM` also steering_signals and first_pass_steering; or
                what a `FeedbackModel` takes.

        Raises:
            InputError: an argument by both of its names, or what a `FeedbackModel` refuses.
        """
        for published, ours in OURS.items():
            if published in named:
                if ours in named:
                    raise InputError(f"{published}= and {ours}= are the same: give one")
                named[ours] = named.pop(published)
        options = {name: value for name, value in named.items() if value is not None or name not in OURS.values()}
        options.setdefault("return_all", self.return_all)
        state = None if drop_state else vars(self)["_last_state"]
        outputs, vars(self)["_last_state"] = self.unroll(*inputs, state=state, keep_graph=True, **options)
        return outputs

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last_state": None}  # of a call, and with its gradients


class SteerableLRM(LRMNet):
    """An `LRMNet`, steered by `steering_signals`: dicts with source, activation, strength and alpha.

    Here every network can be steered; the two classes differ in their name and in the order of their arguments.
    """

    def __init__(
        self,
        network: nn.Module,
        mod_connections: Sequence[Mapping[str, Any]],
        forward_passes: int = 2,
        return_list: bool = True,
        img_size: int | tuple[int, int] = 224,
    ) -> None:
        super().__init__(network, mod_connections, forward_passes, img_size, return_list)
