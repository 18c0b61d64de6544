import os
import signal

import pytest
import torch
from hypothesis import settings

settings.register_profile("mimoflash", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("mimoflash")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def interruptible():
    """Shells start what runs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
