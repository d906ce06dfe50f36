"""fxfeedback: feedback and instruction for any torchvision model, by rewriting its torch.fx graph."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from fxfeedback import errors
from fxfeedback.errors import Error
from fxfeedback.version import __version__

if TYPE_CHECKING:
    from fxfeedback import composites, lrm_steering, models, rules, runtime, text
    from fxfeedback.butd import BUTD, to_butd
    from fxfeedback.deploy.learner import export_learner
    from fxfeedback.drawing.draw import draw
    from fxfeedback.export import export
    from fxfeedback.feedback import Connection, FeedbackModel, Readout, Steering, add_feedback
    from fxfeedback.instructed.check_rule import check_rule
    from fxfeedback.lrm.choosing import suggest_connections
    from fxfeedback.lrm.comparing import compare_passes
    from fxfeedback.lrm.naming import node_names
    from fxfeedback.prediction import Predicted, Prediction, PredictiveModel, add_prediction
    from fxfeedback.prototypes.prototypes import Prototypes
    from fxfeedback.storage.published import load_lrm_steering
    from fxfeedback.storage.save_load import load, save
    from fxfeedback.text.prior import TextPrior

# Where each name comes from. They are imported when they are first used, so that fxfeedback.runtime needs no torch.
_HOMES = {
    "butd": ["BUTD", "to_butd"],
    "deploy.learner": ["export_learner"],
    "drawing.draw": ["draw"],
    "export": ["export"],
    "feedback": ["Connection", "FeedbackModel", "Readout", "Steering", "add_feedback"],
    "instructed.check_rule": ["check_rule"],
    "prototypes.prototypes": ["Prototypes"],
    "prediction": ["Predicted", "Prediction", "PredictiveModel", "add_prediction"],
    "lrm.comparing": ["compare_passes"],
    "lrm.choosing": ["suggest_connections"],
    "lrm.naming": ["node_names"],
    "storage.published": ["load_lrm_steering"],
    "storage.save_load": ["load", "save"],
    "text.prior": ["TextPrior"],
}
_MODULES = ["composites", "lrm_steering", "models", "rules", "runtime", "text"]

__all__ = [
    "BUTD",
    "Connection",
    "Error",
    "FeedbackModel",
    "Predicted",
    "Prediction",
    "PredictiveModel",
    "Prototypes",
    "Readout",
    "Steering",
    "TextPrior",
    "__version__",
    "add_feedback",
    "add_prediction",
    "check_rule",
    "compare_passes",
    "composites",
    "draw",
    "errors",
    "export",
    "export_learner",
    "load",
    "load_lrm_steering",
    "lrm_steering",
    "models",
    "node_names",
    "rules",
    "runtime",
    "save",
    "suggest_connections",
    "text",
    "to_butd",
]


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is not None:
        value = getattr(importlib.import_module(f"fxfeedback.{home}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fxfeedback.{name}")
    else:
        raise AttributeError(f"module 'fxfeedback' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(types.ModuleType):
    """Importing a submodule sets it as an attribute; `export`, called like its function, remains the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, types.ModuleType) and name == "export":
            value = value.export
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
