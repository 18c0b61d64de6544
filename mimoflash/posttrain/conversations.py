"""Conversations that a model writes with itself: data for what has to follow it, without any text from elsewhere.

Given the chat template up to where the user speaks, a chat model writes what a user would say (Magpie, arXiv
2406.08464), and then answers it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mimoflash.data import ShardReader, ShardWriter
from mimoflash.data.dedup import identity_hash
from mimoflash.engine import Engine, SamplingParams
from mimoflash.text import Tokenizer, render_chat
from mimoflash.train.settings import check_least

_USER = "\x00"  # stands for what the user says, where a template is cut


@dataclass(frozen=True)
class ConversationSettings:
    """`parts` shards of `conversations` each, of at most `turns` turns of each side. The user's words are drawn at
    `user_temperature`; of the answers `greedy_share` are greedy, the others drawn at `temperature` and `top_p`.
    `held_out` of the conversations, by hash of the user's first words, are kept from training."""

    parts: int
    conversations: int = 512
    turns: int = 2
    user_tokens: int = 96
    answer_tokens: int = 256
    user_temperature: float = 1.0
    temperature: float = 0.8
    top_p: float = 0.95
    greedy_share: float = 0.6
    held_out: float = 0.03

    def __post_init__(self) -> None:
        check_least(self, 1, "parts", "conversations", "turns", "user_tokens", "answer_tokens")
        if not 0 <= self.greedy_share <= 1:
            raise ValueError(f"greedy_share is {self.greedy_share}: a share from 0 to 1 is needed")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}: a share between 0 and 1 is needed")


@dataclass
class Conversation:
    """`tokens` as the model saw and wrote them, which render as `text`; `mask`: what it wrote as the assistant. It goes
    on while it is `open`."""

    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    open: bool = True

    @property
    def identity(self) -> int:
        return identity_hash(self.messages[0]["content"])


def write_conversations(
    engine: Engine, tokenizer: Tokenizer, settings: ConversationSettings, folder: Path, seed: int,
    say: Callable[[str], None],
) -> None:
    """Writes `train-0000.shard`, `held_out-0000.shard` and so on; parts that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    known: set[int] = set()
    for part in range(settings.parts):
        files = {split: folder / f"{split}-{part:04}.shard" for split in ("train", "held_out")}
        if not all(file.exists() for file in files.values()):
            _write_part(engine, tokenizer, settings, files, (seed, part), known)
            say(f"  part {part + 1} of {settings.parts}")
        for file in files.values():
            known |= set(ShardReader(file).identities.tolist())


def read_conversations(folder: Path, split: str) -> list[ShardReader]:
    """The shards of "train" or "held_out", in order."""
    return [ShardReader(file) for file in sorted(folder.glob(f"{split}-*.shard"))]


def _write_part(
    engine: Engine, tokenizer: Tokenizer, settings: ConversationSettings, files: dict[str, Path],
    seed: tuple[int, int], known: set[int],
) -> None:
    temporary = {split: file.with_suffix(".tmp") for split, file in files.items()}
    writers = {split: ShardWriter(file, tokenizer.vocab_size) for split, file in temporary.items()}
    for conversation in converse(engine, tokenizer, settings, seed):
        identity = conversation.identity
        if identity in known:
            continue
        known.add(identity)
        split = "held_out" if identity < settings.held_out * 2**64 else "train"
        tokens, mask = np.array(conversation.tokens), np.array(conversation.mask)
        writers[split].add(tokens, mask, identity=identity, conversation=True)
    for split, writer in writers.items():
        writer.close()
        temporary[split].replace(files[split])


def converse(
    engine: Engine, tokenizer: Tokenizer, settings: ConversationSettings, seed: tuple[int, int]
) -> list[Conversation]:
    """One part's conversations: all of them take a turn, then all that are still open the next one."""
    random = np.random.default_rng(seed)
    conversations = [Conversation() for _ in range(settings.conversations)]
    for _ in range(settings.turns):
        going = [c for c in conversations if c.open]
        _ask(engine, tokenizer, settings, going, random)
        _answer(engine, tokenizer, settings, [c for c in going if c.open], random)
    return [c for c in conversations if any(c.mask)]


def _ask(
    engine: Engine, tokenizer: Tokenizer, settings: ConversationSettings, conversations: list[Conversation],
    random: np.random.Generator,
) -> None:
    """The model writes what the user says next; a conversation in which it says nothing, or does not end, closes."""
    prompts = []
    for conversation in conversations:
        said = [*conversation.messages, {"role": "user", "content": _USER}]
        before, found, _ = render_chat(tokenizer, said, generation_prompt=False).partition(_USER)
        if not found:
            raise ValueError("the chat template does not render what the user says as it is: it cannot be used here")
        if (new := _new_part(conversation, before)) is not None:
            prompts.append(conversation.tokens + tokenizer.encode(new))
    conversations = [c for c in conversations if c.open]
    params = [
        SamplingParams(max_tokens=settings.user_tokens, temperature=settings.user_temperature, seed=number)
        for number in random.integers(2**31, size=len(conversations)).tolist()
    ]
    for conversation, output in zip(conversations, engine.generate(prompts, params), strict=True):
        said_now = tokenizer.decode(output.tokens, skip_special=True).strip()
        conversation.open = output.finish_reason == "stop" and bool(said_now)
        if conversation.open:
            conversation.messages.append({"role": "user", "content": said_now})


def _answer(
    engine: Engine, tokenizer: Tokenizer, settings: ConversationSettings, conversations: list[Conversation],
    random: np.random.Generator,
) -> None:
    """The model answers. What the user said is tokenised as a user's text is, what the model writes never again; an
    answer that is cut off closes its conversation."""
    for conversation in conversations:
        text = render_chat(tokenizer, conversation.messages)
        if (new := _new_part(conversation, text)) is None:
            conversation.messages.pop()
            continue
        _extend(conversation, tokenizer.encode(new), own=False)
        conversation.text = text
    conversations = [c for c in conversations if c.open]
    greedy = random.random(len(conversations)) < settings.greedy_share
    params = [
        SamplingParams(
            max_tokens=settings.answer_tokens, temperature=0.0 if is_greedy else settings.temperature,
            top_p=settings.top_p, seed=number,
        )
        for is_greedy, number in zip(greedy, random.integers(2**31, size=len(conversations)).tolist(), strict=True)
    ]
    outputs = engine.generate([c.tokens for c in conversations], params)
    for conversation, output in zip(conversations, outputs, strict=True):
        _extend(conversation, output.tokens, own=True)
        conversation.text += tokenizer.decode(output.tokens)
        answer = {"role": "assistant", "content": tokenizer.decode(output.tokens, skip_special=True)}
        conversation.messages.append(answer)
        rendered = render_chat(tokenizer, conversation.messages, generation_prompt=False)
        conversation.open = output.finish_reason == "stop" and rendered.startswith(conversation.text)


def _new_part(conversation: Conversation, rendered: str) -> str | None:
    """What the rendered messages have after the conversation's text. None where they do not begin with it, since a
    template may write an earlier turn otherwise once another follows (without its reasoning): then the conversation
    closes."""
    conversation.open = rendered.startswith(conversation.text)
    return rendered[len(conversation.text) :] if conversation.open else None


def _extend(conversation: Conversation, tokens: Sequence[int], *, own: bool) -> None:
    conversation.tokens += tokens
    conversation.mask += [own] * len(tokens)
