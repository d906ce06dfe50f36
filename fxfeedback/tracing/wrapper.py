"""What every module that fxfeedback returns has in common: it holds a model's tensors as its own, and traces it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import fx, nn

from fxfeedback.errors import InputError, OptionError
from fxfeedback.graph.specs import at_batch, sizes_of
from fxfeedback.tracing.arguments import Form, arguments_of, bind, example_form
from fxfeedback.tracing.doors import check_door, door_of
from fxfeedback.tracing.fingerprint import Cache, refuse_hooks
from fxfeedback.tracing.kept_graphs import KeepsGraphs
from fxfeedback.tracing.saved import without_prefixes
from fxfeedback.tracing.share import share
from fxfeedback.tracing.waiting import at_hand
from fxfeedback.tracing.while_tracing import is_rewritten


class Wrapper(KeepsGraphs):
    """A module with the parameters, buffers and submodules of a user's model, under their own names.

    The user's model is neither changed nor kept: `_net` is a copy of its modules that shares its tensors. Graphs made
    from it are kept in `_cache`, by the modules' fingerprint and whatever else they depend on.
    """

    OPTIONS: tuple[str, ...] = ()
    """Names of the call's arguments that are not the model's own."""
    _net: nn.Module
    _root: nn.Module
    _door: str | None = None  # by which the model is traced

    def __init__(
        self, model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any], door: str | None = None
    ) -> None:
        super().__init__()
        check_door(door)
        vars(self)["_door"] = door
        net = share(model)
        self._form, examples = example_form(net, example_inputs)
        self._examples = stand_ins(examples)
        by_name = isinstance(example_inputs, Mapping) and len(example_inputs) == len(examples)
        names = {id(x): name for name, x in example_inputs.items()} if by_name else {}  # type: ignore[union-attr]
        self._example_names = [names[id(x)] for x in examples] if by_name else []
        taken = sorted(set() if isinstance(net, Wrapper) else arguments_of(net) & set(self.OPTIONS))
        if taken:
            raise OptionError(
                f"{type(net).__name__}.forward has an argument {taken[0]!r}, which is an option of the call here: "
                "rename it, or wrap the model in a module of yours whose forward has other names"
            )
        taken = [name for name in self.OWN if hasattr(net, name)]
        if taken:
            raise OptionError(f"the model's attribute {taken[0]!r} has a name that fxfeedback needs: rename it")
        refuse_hooks("", net)
        self._parameters, self._buffers, self._modules = net._parameters, net._buffers, dict(net._modules)
        self._non_persistent_buffers_set = net._non_persistent_buffers_set
        root = nn.Module()
        root._parameters, root._buffers, root._modules = self._parameters, self._buffers, self._modules
        vars(root).update((name, value) for name, value in vars(net).items() if isinstance(value, torch.Tensor))
        object.__setattr__(self, "_net", net)  # as attributes only, or their tensors would count twice
        object.__setattr__(self, "_root", root)
        self._children = dict(net._modules)  # as they were when the two last agreed
        self._cache = Cache()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_net" not in self.__dict__:
                raise
            return getattr(self._net, name)  # what the model's own code may ask for, as backbone.out_channels

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_models(name) and not isinstance(value, (nn.Module, nn.Parameter)):
            setattr(self._net, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_models(name):
            delattr(self._net, name)
        else:
            super().__delattr__(name)

    def _is_models(self, name: str) -> bool:
        """Whether an attribute is one of the model's, which its code may read, and not ours."""
        ours = (
            {**self._parameters, **self._buffers, **self._modules, **self.__dict__} if "_net" in self.__dict__ else ()
        )
        return bool(ours) and not (name.startswith("_") or name in ours or hasattr(type(self), name))

    def _bind(
        self, args: Sequence[Any], named: Mapping[str, Any], tensors: Any = torch.Tensor
    ) -> tuple[Form, list[Any]]:
        """The form and the inputs of a call with the model's own arguments."""
        try:
            form, inputs = bind(self._net, args, named, tensors)
        except InputError as error:
            n, given = len(self._examples), len([x for x in (*args, *named.values()) if isinstance(x, torch.Tensor)])
            raise InputError(
                f"the model takes {n} inputs, not {given} inputs: {error}" if n != given else str(error)
            ) from None
        if not any(isinstance(x, fx.Proxy) or x.ndim for x in inputs):
            raise InputError(
                f"the model takes {len(self._examples)} inputs, not 0 inputs: give the call a tensor with a batch"
            )
        return form, inputs

    def _called(self, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[Form | None, list[torch.Tensor]]:
        """As `_bind`; None for the form of the example."""
        usual = not named and len(args) == len(self._examples) and self._form.is_positional
        if usual and all(isinstance(x, torch.Tensor) for x in args):
            return None, list(args)
        form, inputs = self._bind(args, named)
        return (None if form == self._form else form), inputs

    def _stand_ins(self) -> list[torch.Tensor]:
        """Tensors without data like the example inputs, in our present dtype."""
        like = self._like()
        return [x.to(like.dtype) if x.is_floating_point() else x for x in self._examples]

    def _like(self) -> torch.Tensor:
        """A tensor of our dtype, on our device."""
        examples = (x.dtype for x in self._examples if x.is_floating_point())
        empty = torch.empty(0, dtype=next(examples, torch.get_default_dtype()))
        return next((p for p in self.parameters() if p.is_floating_point()), empty)

    @property
    def door(self) -> str:
        """By which door the model was traced in its present mode: "fx" or "export"."""
        sizes = sizes_of(self._stand_ins())
        module: Any = self._graph(sizes, None).owning_module
        return door_of(module)

    def _fetch(self, name: str) -> torch.Tensor:
        """The parameter or buffer `name`, computed anew where it is parametrized."""
        path, _, leaf = name.rpartition(".")
        return getattr(self._root.get_submodule(path) if path else self._net, leaf)

    @property
    def training(self) -> bool:
        """The model's own mode: its code reads and sets it on `_net`."""
        return self._net.training if "_net" in self.__dict__ else True

    @training.setter
    def training(self, mode: bool) -> None:
        if "_net" in self.__dict__:
            self._net.training = mode

    def train(self, mode: bool = True, *args: Any, **named: Any) -> Self:
        """As the model's own train, which may keep batch norms frozen or take more arguments."""
        self._net.train(mode, *args, **named)
        return self._switch_own(mode)

    def eval(self) -> Self:
        """As the model's own eval, which may keep dropout on."""
        self._net.eval()
        return self._switch_own(False)

    def _switch_own(self, mode: bool) -> Self:
        for name in self.OWN:
            if name in self._modules:
                self.get_submodule(name).train(mode)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module.load_state_dict; takes arrays as well, as `fxfeedback.runtime.Learner.state_dict` returns.

        Names may begin with what torch.compile and DistributedDataParallel put before them.
        """
        state_dict = without_prefixes(state_dict, self)
        if any(hasattr(value, "__array_interface__") for value in state_dict.values()):
            state_dict = {name: torch.as_tensor(value) for name, value in state_dict.items()}
        return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """As nn.Module._apply; buffers keep their identity, as parameters do, so that the user's model follows."""
        before = [(module._buffers, dict(module._buffers)) for module in self.modules()]
        super()._apply(fn, recurse)
        for buffers, kept in before:
            for name, old in kept.items():
                new = buffers[name]
                if old is not None and new is not None and torch._has_compatible_shallow_copy_type(old, new):
                    old.data = new
                    buffers[name] = old
        self._cache.clear()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": Cache()}


# -- what the rest of the package asks of a wrapper: functions, as a method would hide a name of the user's model ------


class Example(NamedTuple):
    """The example call that a wrapper was made with.

    form: its arguments. inputs: its tensors, without data and with batch 1. names: of these tensors, where they were
    given by name.
    """

    form: Form
    inputs: list[torch.Tensor]
    names: list[str]


def example_of(wrapper: Wrapper) -> Example:
    """The example as it was given, in the dtypes that it had then."""
    return Example(wrapper._form, wrapper._examples, wrapper._example_names)


def stand_ins_of(wrapper: Wrapper) -> list[torch.Tensor]:
    """Tensors without data like the example inputs, with batch 1, in the wrapper's present dtype."""
    return wrapper._stand_ins()


def wanted_door_of(wrapper: Wrapper) -> str | None:
    """The door by which the model is to be traced; None: it is not said."""
    return wrapper._door


def want_door(wrapper: Wrapper, door: str | None) -> None:
    """Let further graphs of the model be made by this door; None: by torch.export where torch.fx cannot."""
    vars(wrapper)["_door"] = door


def net_of(wrapper: Wrapper) -> nn.Module:
    """The user's model: a copy of its modules, with the wrapper's tensors and modes."""
    return wrapper._net


def bind_of(wrapper: Wrapper, args: Sequence[Any], named: Mapping[str, Any], tensors: Any) -> tuple[Form, list[Any]]:
    """The form and the inputs of a call with the model's own arguments; `tensors`: the classes of these."""
    return wrapper._bind(args, named, tensors)


def root_of(wrapper: Wrapper) -> nn.Module:
    """A plain module with the wrapper's tensors and modules: what graphs are made on."""
    return wrapper._root


def fetch_of(wrapper: Wrapper) -> Callable[[str], torch.Tensor]:
    """Qualified name -> parameter or buffer, computed anew where it is parametrized."""
    return wrapper._fetch


def like_of(wrapper: Wrapper) -> torch.Tensor:
    """A tensor of the wrapper's dtype, on its device."""
    return wrapper._like()


def call_as_example(
    wrapper: Wrapper, inputs: Sequence[torch.Tensor], *more: Any, method: str = "__call__", **options: Any
) -> Any:
    """Call a wrapper, or a method that takes the same, in the form of its example, with these inputs and `more`."""
    args, named = wrapper._form.fill(inputs)
    return getattr(wrapper, method)(*args, *more, **named, **options)


def not_finite(tensor: torch.Tensor) -> bool:
    """Whether the tensor has NaN or infinite values, as far as can be seen.

    Looking would wait for a GPU; torch.compile and torch.func.vmap cannot look.
    """
    return not is_rewritten() and at_hand(tensor) and not bool(tensor.isfinite().all())


def stand_ins(example_inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One-sample tensors without data, of the examples' sizes and dtypes."""
    return [at_batch(1, x) for x in example_inputs]


def innermost(module: nn.Module) -> nn.Module:
    """The user's model in a network of ours, also where that was made of another; other modules as they are."""
    return innermost(module._net) if isinstance(module, Wrapper) else module
