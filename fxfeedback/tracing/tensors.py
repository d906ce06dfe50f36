"""The tensors that an opened graph names: a model's own, parametrized ones among them, and constants of its code."""

import hashlib

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _Orthogonal

from fxfeedback.errors import RuleError
from fxfeedback.graph.nodes import name_of, user_line


class Tensors:
    """By name and by identity.

    owner: the model, on which constants become buffers; root: the traced graph, which has them as well.
    """

    def __init__(self, owner: nn.Module, root: nn.Module) -> None:
        self.owner, self.root = owner, root
        self.by_name = named_tensors(owner) | named_tensors(root)
        # A tied one has its first name, in the owner's order, so that it is one node, called the same in every graph.
        self._names = {id(tensor): name for name, tensor in reversed(self.by_name.items())}
        self._kept: list[torch.Tensor] = []
        for tensor in (read := named_tensors(root)).values():
            if self.name_of(tensor) not in read:
                put(root, self.name_of(tensor), tensor)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._names

    def name_of(self, tensor: torch.Tensor) -> str:
        """The name that the graph reads the tensor by."""
        return self._names[id(tensor)]

    def keep_constant(self, tensor: torch.Tensor) -> None:
        """Make a constant of the user's code a buffer; equal ones are one.

        Raises:
            RuleError: it is not a constant, but computed from a parameter.
        """
        if tensor.requires_grad:
            raise RuleError("a parameter was computed with before the graph could see it")
        content = hashlib.sha1(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:10]
        name = f"_constant_{content}_{'x'.join(map(str, tensor.shape))}"
        for owner in (self.owner, self.root):
            if name not in owner._buffers:
                owner.register_buffer(name, tensor, persistent=False)
        self._names[id(tensor)], self.by_name[name] = name, tensor
        self._kept.append(tensor)  # or its id could become another's


def put(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Give a traced graph a tensor of its model under another of its names."""
    *path, leaf = name.split(".")
    for step in path:
        if step not in root._modules:
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(leaf, tensor)
    else:
        root.register_buffer(leaf, tensor, persistent=False)


class Readings:
    """Which weights of a model have been read, where in training mode each reading is a step of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.steps, self.read = readings_that_step(model), set[nn.Module]()

    def check(self, module: nn.Module, node: fx.Node) -> None:
        """Refuse a second reading, by the call of `module` at `node`.

        Raises:
            RuleError: it is one.
        """
        for made in module.modules():
            if isinstance(made, parametrize.ParametrizationList) and id(made) in self.steps:
                if made in self.read:
                    raise RuleError(
                        f"{name_of(node)!r}{user_line(node)} reads the weight of {self.steps[id(made)]!r} again, and "
                        f"in training mode each reading of a {type(made[0]).__name__.lstrip('_')} is one more step of "
                        "it, where a graph reads once: read it once, or call eval() on that module"
                    )
                self.read.add(made)


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and parametrized tensor by its qualified name; a tied one by all of its names."""
    found: dict[str, torch.Tensor] = {}
    for path, owner in module.named_modules():
        tensors = {**owner._parameters, **owner._buffers}
        if parametrize.is_parametrized(owner):
            tensors.update({name: getattr(owner, name) for name in owner.parametrizations})
        for name, tensor in tensors.items():
            if tensor is not None:
                found[f"{path}.{name}" if path else name] = tensor
    return found


def readings_that_step(model: nn.Module) -> dict[int, str]:
    """The parametrizations of which each reading, in the present modes, is a step: spectral norm's iteration."""
    return {
        id(made): path
        for path, owner in model.named_modules()
        if owner.training and parametrize.is_parametrized(owner)
        for made in owner.parametrizations.values()
        if any(next(m.buffers(), None) is not None and not isinstance(m, _Orthogonal) for m in made)
    }
