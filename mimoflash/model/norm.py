"""The norm that every layer begins with."""

import torch.nn as nn
from torch import Tensor

from mimoflash.config import ModelConfig
from mimoflash.kernels.norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the hidden size."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, eps=config.rms_norm_eps)
        self.epsilon = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)
