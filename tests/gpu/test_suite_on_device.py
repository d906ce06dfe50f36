"""Of the suite's tests those that say nothing of a device, with another default device: parity, steps of learning."""

import pytest
import torch

from test_law import test_both_kinds_of_learning_have_the_same_losses  # noqa: F401
from test_parity_butd import test_agrees_with_the_published_system as test_agrees_with_published_butd  # noqa: F401
from test_parity_lrm import test_agrees_with_the_published_system as test_agrees_with_published_lrm  # noqa: F401
from the_device import DEVICE


@pytest.fixture(autouse=True)
def on_the_device():
    with torch.device(DEVICE):
        yield
