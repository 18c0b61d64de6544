"""Models with random weights in every tensor, norms, sinks and correction biases included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mimoflash.config import ModelConfig
from mimoflash.model import Transformer


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    def make(seed: int = 0, **changes: Any) -> Transformer:
        torch.manual_seed(seed)
        model = Transformer(ModelConfig.tiny(**changes)).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "norm" in name or "sink" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for buffer in model.buffers():
            buffer.copy_(torch.randn_like(buffer) * 0.1)
        return model

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(1))
