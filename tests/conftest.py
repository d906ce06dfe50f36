"""Which cases are long, and ONNX Runtime for tests: one thread a session, which sleeps while it waits.

By default its threads spin, one on every core; where tests run side by side they take the cores from each other.
"""

import copy
import functools
import gc
import importlib.util
import sys
from collections import Counter

import pytest

if importlib.util.find_spec("onnxruntime"):
    import onnxruntime

    class Options(onnxruntime.SessionOptions):
        """Session options that leave the other cores alone; a test may still set its own."""

        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1
            self.add_session_config_entry("session.intra_op.allow_spinning", "0")

    class Session(onnxruntime.InferenceSession):
        """A session with those options where none are given."""

        def __init__(self, path_or_bytes, sess_options=None, **options) -> None:
            super().__init__(path_or_bytes, Options() if sess_options is None else sess_options, **options)

    onnxruntime.SessionOptions, onnxruntime.InferenceSession = Options, Session


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of the cases of a test marked `one_in(n)` all but every n-th are long; and so are all of a sweep."""
    seen = Counter()
    for item in items:
        if item.get_closest_marker("sweep"):
            item.add_marker(pytest.mark.long)
        test = getattr(item, "function", None)
        n = getattr(test, "one_in", 1)
        if seen[test] % n:
            item.add_marker(pytest.mark.long)
        seen[test] += 1


def pytest_collection_finish():
    """What is imported now stays: looking through it for garbage again and again takes a thirtieth of all the time."""
    gc.freeze()


def pytest_runtest_setup():
    """torch's exporter makes its table of operators for every file, which takes a sixth of an export: here once."""
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry = getattr(registration, "ONNXRegistry", None)
    if registry is None or not hasattr(registry, "from_torchlib") or hasattr(registry, "made_once"):
        return
    registry.made_once = functools.cache(registry.from_torchlib)

    def from_torchlib(*given, **more):
        made = copy.copy(registry.made_once(*given, **more))
        made.functions = {target: list(functions) for target, functions in made.functions.items()}
        return made

    registry.from_torchlib = staticmethod(from_torchlib)
