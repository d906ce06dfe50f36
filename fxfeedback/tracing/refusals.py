"""What no door takes, however the model is traced; and where in its source an exception came from."""

import traceback

from fxfeedback.graph.nodes import is_torchs


class Refusal(ValueError):
    """The model does something that a graph must not hold: another way to trace it would be silently different."""


def line_of(error: BaseException) -> str:
    """' (at FILE:LINE: CODE)' of the model's source where an exception came from, or nothing."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_torchs(frame.filename)]
    return f" (at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
