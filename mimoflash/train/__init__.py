"""Training: losses, the optimizer step, and the stages pre-training and supervised fine-tuning."""

from mimoflash.train.heads import HeadsSettings, train_heads
from mimoflash.train.losses import LossOutput, language_model_loss
from mimoflash.train.stage import StageResult, StageSettings, train_stage
from mimoflash.train.trainer import Trainer

__all__ = [
    "HeadsSettings", "LossOutput", "StageResult", "StageSettings", "Trainer", "language_model_loss", "train_heads",
    "train_stage",
]
