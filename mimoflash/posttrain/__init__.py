"""Post-training: playing the world's tasks with the engine, and letting a model talk with itself."""

from mimoflash.posttrain.conversations import ConversationSettings, read_conversations, write_conversations
from mimoflash.posttrain.rollout import Rollout, play_tasks

__all__ = ["ConversationSettings", "Rollout", "play_tasks", "read_conversations", "write_conversations"]
