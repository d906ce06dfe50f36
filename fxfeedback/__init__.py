"""fxfeedback: feedback and instruction for any torchvision model, by rewriting its torch.fx graph."""

from fxfeedback import errors, rules
from fxfeedback.butd import BUTD, to_butd
from fxfeedback.errors import Error
from fxfeedback.version import __version__

__all__ = ["BUTD", "Error", "__version__", "errors", "rules", "to_butd"]
