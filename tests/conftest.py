import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("mimoflash", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("mimoflash")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
