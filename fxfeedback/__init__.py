"""fxfeedback: feedback and instruction for any torchvision model, by rewriting its torch.fx graph."""

from fxfeedback import errors, rules
from fxfeedback.butd import BUTD, to_butd
from fxfeedback.check_rule import check_rule
from fxfeedback.errors import Error
from fxfeedback.feedback import Connection, FeedbackModel, Steering, add_feedback
from fxfeedback.trace import node_names
from fxfeedback.version import __version__

__all__ = [
    "BUTD",
    "Connection",
    "Error",
    "FeedbackModel",
    "Steering",
    "__version__",
    "add_feedback",
    "check_rule",
    "errors",
    "node_names",
    "rules",
    "to_butd",
]
