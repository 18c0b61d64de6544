"""Training: losses, the optimizer step, and the stages pre-training and supervised fine-tuning."""

from mimoflash.train.heads import HeadsSettings, train_heads
from mimoflash.train.lora import add_lora, lora_state, merge_lora, merged_state, read_lora, save_lora, using_lora
from mimoflash.train.losses import LossOutput, language_model_loss
from mimoflash.train.stage import StageResult, StageSettings, train_stage
from mimoflash.train.trainer import Trainer

__all__ = [
    "HeadsSettings", "LossOutput", "StageResult", "StageSettings", "Trainer", "add_lora", "language_model_loss",
    "lora_state", "merge_lora", "merged_state", "read_lora", "save_lora", "train_heads", "train_stage", "using_lora",
]
