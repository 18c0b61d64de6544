"""Post-training: playing the world's tasks with the engine."""

from mimoflash.posttrain.rollout import Rollout, play_tasks

__all__ = ["Rollout", "play_tasks"]
