"""Tests on a GPU: `make test-gpu`. In `make test` their small cases run on the CPU."""

import os
from pathlib import Path

import pytest
import torch

from the_device import DEVICE, ON_GPU

collect_ignore = [] if os.environ.get("DEVICE") else ["test_suite_on_device.py"]  # the suite's own tests once more


def pytest_configure(config):
    if ON_GPU and not torch.cuda.is_available():
        pytest.exit(f"nothing was tested: torch {torch.__version__} finds no GPU here", returncode=0)


def pytest_collection_modifyitems(config, items):
    """The large cases are for a GPU: on the CPU the suite's own tests have them."""
    here = Path(__file__).parent
    large = [item for item in items if here in item.path.parents and item.get_closest_marker("long")]
    left_out = [] if ON_GPU else large
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(autouse=True)
def exact_products():
    """Without TF32, in which torch's convolutions are by default, a GPU's float32 has ten bits."""
    if not ON_GPU:  # where torch's own tests, of which the suite imports some, have made the flags constant
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.cuda.synchronize(DEVICE)  # what fails late is this test's
    torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The processes that share the GPU share the cores, too."""
    if ON_GPU:
        torch.set_num_threads(1)
