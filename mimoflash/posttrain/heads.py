"""MTP layers for a finished model, from end to end: training on what it has written, and what they gain."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mimoflash.checkpoint import HEADS, save_heads
from mimoflash.data import HiddenRows
from mimoflash.engine import Engine, SamplingParams
from mimoflash.engine.speculation import replay_speculation
from mimoflash.model import Transformer
from mimoflash.posttrain.conversations import read_conversations
from mimoflash.text import Tokenizer
from mimoflash.train import HeadsSettings, train_heads
from mimoflash.train.heads_start import add_heads, draft_vocabulary, remember_hidden


def make_heads(
    model: Transformer, place: Path, conversations: Path, settings: HeadsSettings, folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Trains MTP layers for `model`, read from the file `place`, on the conversations in a folder, and writes them to
    `folder`; layers that the model has are trained on, and more are added. Returns how it went."""
    rows = {}
    for split in ("train", "held_out"):
        shards = read_conversations(conversations, split)
        hidden = [remember_hidden(model, shard, shard.path.with_suffix(".npy")) for shard in shards]
        rows[split] = HiddenRows(
            shards, hidden, settings.sequence_length, seed=settings.seed, prompt_weight=settings.prompt_weight
        )
    train = rows["train"]
    torch.manual_seed(settings.seed)
    add_heads(model, train.shards, train.hidden, settings)
    vocabulary = draft_vocabulary(train.shards, settings.draft_tokens, model.config.vocab_size)
    model.model.mtp.draft_tokens = vocabulary.to(model.lm_head.weight.device)
    counted = model.config.count_parameters()
    say(f"  {counted['mtp']:,} parameters in {settings.layers} MTP layers, which draft {len(vocabulary):,} tokens")
    result = train_heads(model, train, rows["held_out"], settings, folder)
    save_heads(model, folder / HEADS, place)
    return {"training": result, "parameters": counted}


def measure_heads(
    model: Transformer, tokenizer: Tokenizer, conversations: Path, *, prompts: int, max_tokens: int
) -> dict[str, Any]:
    """What the MTP layers gain on the first questions of held-out conversations, answered greedily: the tokens of a
    step, and the share of the steps in which draft 1, 2, .. counted. Raises ValueError where there is no such
    question."""
    questions = [
        tokens[: mask.argmax()].tolist()
        for shard in read_conversations(conversations, "held_out")
        for tokens, mask in map(shard.document, range(len(shard)))
    ][:prompts]
    if not questions:
        raise ValueError(f"{conversations} has no held-out conversation: generate more, or hold out a larger share")
    answers = Engine(model, tokenizer).generate(questions, SamplingParams(max_tokens=max_tokens))
    gains = [
        gain
        for question, answer in zip(questions, answers, strict=True)
        for gain in replay_speculation(model, question, answer.tokens, model.model.mtp.draft_tokens)
    ]
    assert gains, "an answer has one token at least"
    layers = model.config.num_nextn_predict_layers
    accepted = [sum(gain > k for gain in gains) / len(gains) for k in range(1, layers + 1)]
    return {"prompts": len(questions), "accept_length": sum(gains) / len(gains), "accepted": accepted}
