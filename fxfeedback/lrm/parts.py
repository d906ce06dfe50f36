"""A model with connections as two parts, the feedback and the backbone, for whoever trains one of them."""

from torch import nn

from fxfeedback.tracing.wrapper import Wrapper


class TwoParts(Wrapper):
    """A wrapper whose own modules are `modulations`, the connections' blocks."""

    modulations: nn.ModuleDict
    _learned: dict[str, bool]  # of the backbone's parameters, once it was frozen: which had learned before

    def feedback_parameters(self) -> list[nn.Parameter]:
        """The parameters of the connections' blocks."""
        return list(self.modulations.parameters())

    def backbone_parameters(self) -> list[nn.Parameter]:
        """All other parameters: the user's model's."""
        own = set(map(id, self.feedback_parameters()))
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    def freeze_backbone(self, frozen: bool = True) -> None:
        """Let the backbone's parameters not learn; with False those learn again that did before.

        The original model learns as before: this model gets parameters of its own, which share the original's memory
        until one of the two is moved or cast. Make optimizers after the first call. Running statistics are no
        parameters: in training mode batch norms advance as ever, so keep a frozen backbone in evaluation mode.
        """
        if "_learned" not in vars(self):
            own = set(map(id, self.feedback_parameters()))
            learned = {name: p.requires_grad for name, p in self.named_parameters() if id(p) not in own}
            _part(self._net)
            vars(self)["_learned"] = learned
        for name, learned_before in self._learned.items():
            self.get_parameter(name).requires_grad_(learned_before and not frozen)


def _part(net: nn.Module) -> None:
    """Give a module parameters of its own in the memory of those that it has; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                alike = made.setdefault(id(parameter), nn.Parameter(parameter.detach(), parameter.requires_grad))
                module._parameters[name] = alike
