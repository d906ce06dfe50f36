"""fxfeedback: feedback and instruction for any torchvision model, by rewriting its torch.fx graph."""

from fxfeedback import errors, rules
from fxfeedback.butd import BUTD, to_butd
from fxfeedback.check_rule import check_rule
from fxfeedback.errors import Error
from fxfeedback.trace import node_names
from fxfeedback.version import __version__

__all__ = ["BUTD", "Error", "__version__", "check_rule", "errors", "node_names", "rules", "to_butd"]
