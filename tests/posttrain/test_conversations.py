"""Conversations that a model writes with itself: as the template has them, each once, the held-out ones apart."""

from dataclasses import replace

import numpy as np
import pytest

from mimoflash.data.dedup import identity_hash
from mimoflash.engine import Engine
from mimoflash.posttrain import ConversationSettings, conversations, read_conversations, write_conversations
from mimoflash.posttrain.conversations import converse
from mimoflash.text import render_chat

SETTINGS = ConversationSettings(
    parts=2, conversations=24, turns=2, user_tokens=150, answer_tokens=40, held_out=0.4, greedy_share=0.5
)


@pytest.fixture
def engine(talker, tokenizer):
    return Engine(talker, tokenizer)


def test_a_conversation_is_what_the_template_renders(engine, tokenizer):
    conversations = converse(engine, tokenizer, replace(SETTINGS, answer_tokens=300), (0, 0))
    assert any(len(c.messages) == 4 for c in conversations)
    for c in conversations:
        assert [m["role"] for m in c.messages] == ["user", "assistant"] * (len(c.messages) // 2)
        rendered = render_chat(tokenizer, c.messages, generation_prompt=False)
        if c.open:
            assert rendered.startswith(c.text)
        answers = "".join(m["content"] for m in c.messages if m["role"] == "assistant")
        own = [token for token, is_own in zip(c.tokens, c.mask, strict=True) if is_own]
        assert tokenizer.decode(own, skip_special=True) == answers
        first = c.mask.index(True)
        assert c.tokens[:first] == tokenizer.encode(render_chat(tokenizer, c.messages[:1]))


def test_greedy_answers_are_the_models_own(engine, tokenizer, talker):
    import torch

    for c in converse(engine, tokenizer, replace(SETTINGS, greedy_share=1.0, turns=1), (0, 0)):
        logits = talker(torch.tensor([c.tokens]))[0]
        best = logits.max(-1).values[:-1]
        taken = logits[:-1].gather(1, torch.tensor(c.tokens)[1:, None])[:, 0]
        own = torch.tensor(c.mask)[1:]
        assert (best - taken)[own].max() < 1e-4


@pytest.mark.parametrize("answering", [False, True])
def test_a_template_that_writes_earlier_turns_otherwise_closes_the_conversation(
    answering, engine, tokenizer, monkeypatch
):
    """As many do with reasoning. What the model saw must not be mixed with what would be rendered; be that noticed when
    the user is asked for the second time, or when the model answers then."""

    def rendered(tokenizer, messages, generation_prompt=True):
        text = render_chat(tokenizer, messages, generation_prompt=generation_prompt)
        return text.replace("<", "[") if len(messages) == 3 and generation_prompt == answering else text

    monkeypatch.setattr(conversations, "render_chat", rendered)
    written = converse(engine, tokenizer, replace(SETTINGS, answer_tokens=300), (0, 0))
    assert written
    for c in written:
        assert [m["role"] for m in c.messages] == ["user", "assistant"]
        assert not c.open
        first = c.mask.index(True)
        assert c.tokens[:first] == tokenizer.encode(render_chat(tokenizer, c.messages[:1]))
        assert all(c.mask[first:])


def test_a_template_that_changes_what_is_said_is_refused(engine, tokenizer, monkeypatch):
    monkeypatch.setattr(conversations, "render_chat", lambda *_, **__: "nothing of it")
    with pytest.raises(ValueError, match="does not render what the user says"):
        converse(engine, tokenizer, SETTINGS, (0, 0))


def test_parts_are_kept_and_nothing_is_there_twice(engine, tokenizer, tmp_path):
    said = []
    write_conversations(engine, tokenizer, SETTINGS, tmp_path, 0, said.append)
    assert len(said) == 2
    train, held_out = (read_conversations(tmp_path, split) for split in ("train", "held_out"))
    hashes = [np.concatenate([shard.identities for shard in shards]) for shards in (train, held_out)]
    everything = np.concatenate(hashes)
    assert len(set(everything.tolist())) == len(everything) > 4
    assert (hashes[0] >= 0.4 * 2**64).all()
    assert (hashes[1] < 0.4 * 2**64).all()
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "train-0001.shard").unlink()  # as if broken off within the second part
    write_conversations(engine, tokenizer, SETTINGS, tmp_path, 0, said.append)
    assert len(said) == 3
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == whole


def test_who_it_is_does_not_depend_on_white_space(engine, tokenizer):
    for c in converse(engine, tokenizer, SETTINGS, (0, 0)):
        assert c.identity == identity_hash("  " + c.messages[0]["content"] + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"parts": 0}, "parts is 0"), ({"greedy_share": 1.5}, "greedy_share is 1.5"), ({"held_out": 0}, "held_out is 0")],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ConversationSettings(**{"parts": 1} | change)
