"""Every exception that fxfeedback raises on purpose. Each says what to do; catch `Error` for all of them."""


class Error(Exception):
    """Base class of fxfeedback's exceptions; its message is written for the user."""


class TraceError(Error, RuntimeError):
    """torch.fx cannot trace the model, or the model does not run on the example input."""


class NodeNameError(Error, ValueError):
    """A name that no node of the model has, or one that cannot be used where it was given."""


class RuleError(Error, NotImplementedError):
    """An op of the model has no rule, or its rule does not cover the way it is called."""


class OptionError(Error, ValueError):
    """An option, or a combination of options, that makes no sense."""


class InputError(Error, ValueError):
    """An input or an instruction of the wrong shape, dtype or range."""


class GradientError(Error, RuntimeError):
    """A derivative that autograd was asked for and that would not be right."""


class ExportError(Error, RuntimeError):
    """An op of the model has no ONNX form, or the model cannot be exported as it was asked for."""


class CheckpointError(Error, ValueError):
    """A checkpoint that cannot be read, or whose tensors are not the model's."""


class ActivationWarning(UserWarning):
    """A connection's default activation rectifies a value in some passes that is not rectified in the others."""


class HeavyWarning(UserWarning):
    """A connection's block has more than a tenth of the model's parameters."""


class SizeWarning(UserWarning):
    """A connection's block has parameters of a size that follows from an input size that nobody gave."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__
