"""Post-training: playing the world's tasks with the engine, teachers by GRPO, one student of them all by MOPD, and
letting a model talk with itself."""

from mimoflash.posttrain.batch import RolloutBatch, Sample, filter_empty, make_batch
from mimoflash.posttrain.conversations import ConversationSettings, read_conversations, write_conversations
from mimoflash.posttrain.grpo import GRPOSettings, train_grpo
from mimoflash.posttrain.losses import group_advantage, grpo_loss, mopd_loss, reverse_kl_loss, topk_reverse_kl_loss
from mimoflash.posttrain.mopd import MOPDSettings, train_mopd
from mimoflash.posttrain.policy import score, token_logp
from mimoflash.posttrain.rollout import Rollout, play_tasks
from mimoflash.posttrain.teachers import ModelTeacher, RemoteTeacher, Shelf, StoredTeacher, Teacher
from mimoflash.posttrain.training import RolloutSettings, SourceSettings

__all__ = [
    "ConversationSettings",
    "GRPOSettings",
    "MOPDSettings",
    "ModelTeacher",
    "RemoteTeacher",
    "Rollout",
    "RolloutBatch",
    "RolloutSettings",
    "Sample",
    "Shelf",
    "SourceSettings",
    "StoredTeacher",
    "Teacher",
    "filter_empty",
    "group_advantage",
    "grpo_loss",
    "make_batch",
    "mopd_loss",
    "play_tasks",
    "read_conversations",
    "reverse_kl_loss",
    "score",
    "token_logp",
    "topk_reverse_kl_loss",
    "train_grpo",
    "train_mopd",
    "write_conversations",
]
