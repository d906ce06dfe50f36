"""fxfeedback: feedback and instruction for any torchvision model, by rewriting its torch.fx graph."""

from fxfeedback import errors, models, rules
from fxfeedback.butd import BUTD, to_butd
from fxfeedback.check_rule import check_rule
from fxfeedback.errors import Error
from fxfeedback.feedback import Connection, FeedbackModel, Readout, Steering, add_feedback
from fxfeedback.names import node_names
from fxfeedback.published import load_lrm_steering
from fxfeedback.storage import load, save
from fxfeedback.version import __version__

__all__ = [
    "BUTD",
    "Connection",
    "Error",
    "FeedbackModel",
    "Readout",
    "Steering",
    "__version__",
    "add_feedback",
    "check_rule",
    "errors",
    "load",
    "load_lrm_steering",
    "models",
    "node_names",
    "rules",
    "save",
    "to_butd",
]
