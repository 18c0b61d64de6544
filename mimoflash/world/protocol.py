"""What a task is: the protocol that questions, tool use and games share, and which tasks are held out.

A domain makes tasks, each a pure function of its seed. An environment plays one task: `reset` gives the conversation
so far, `step` takes the assistant's message and answers with observations and a reward. The world speaks in messages
and tool calls in OpenAI's form and knows no model.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Any, Literal, Protocol

Message = dict[str, Any]  # {"role", "content", "reasoning_content"?, "tool_calls"?}
Tool = dict[str, Any]  # {"type": "function", "function": {"name", "description", "parameters": JSON schema}}
Split = Literal["train", "held_out"]

HELD_OUT_ONE_IN = 10
_BROKEN_LIMIT = 100
_SEARCH_LIMIT = 100_000  # consecutive seeds without a task of the split: there is none


@dataclass(frozen=True)
class Step:
    """What follows an assistant's message: messages to append, a reward (1.0 passes), and whether the task is over."""

    observation: list[Message]
    reward: float
    done: bool
    info: dict[str, Any]


@dataclass(frozen=True)
class Demonstration:
    """A full, correct episode: replayed through the domain's environment with the same seed it earns 1.0."""

    messages: list[Message]
    tools: list[Tool]

    def without_reasoning(self) -> "Demonstration":
        """The same episode as a non-thinking sample."""
        kept = [{key: value for key, value in m.items() if key != "reasoning_content"} for m in self.messages]
        return replace(self, messages=kept)

    def hasty(self) -> "Demonstration":
        """The last answer without the work that leads to it, neither reasoning nor calls, by somebody who might have
        thought. It need not earn anything: who has called no tool can only guess what it returns."""
        asked = list(takewhile(lambda message: message["role"] != "assistant", self.messages))
        answer = {"role": "assistant", "reasoning_content": "", "content": self.messages[-1]["content"]}
        return replace(self, messages=[*asked, answer])


class Environment(Protocol):
    """Plays one task at a time; single questions, tool use and games differ only in how many steps they take."""

    def reset(self, seed: int) -> tuple[list[Message], list[Tool]]:
        """Begin the task of this seed: the messages so far and the tools on offer ([] if none)."""
        ...

    def step(self, message: Message) -> Step:
        """Take the assistant's message (content, reasoning_content, tool_calls)."""
        ...

    def close(self) -> None:
        """Give back what the environment holds."""
        ...


class Domain(Protocol):
    """A family of tasks, with a verifier (in its environment) and demonstrations."""

    @property
    def name(self) -> str: ...

    @property
    def chance(self) -> float:
        """Pass rate of a random guesser, whom each domain's docstring describes."""
        ...

    def environment(self) -> Environment: ...

    def demonstration(self, seed: int) -> Demonstration: ...


def task_id(messages: list[Message]) -> str:
    """Identity of a task: a hash of what the user says before the assistant's first message.

    A system message, the tools on offer and the rest of the episode do not change it.
    """
    digest = hashlib.sha256()
    for message in messages:
        if message["role"] == "assistant":
            break
        if message["role"] == "user":
            digest.update(str(message.get("content")).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def is_held_out(messages: list[Message]) -> bool:
    """Whether the task belongs to the tenth that no training sees.

    Decided by the task's text alone: a task cannot be in both splits, however the seeds fall.
    """
    return int(task_id(messages)[:12], 16) % HELD_OUT_ONE_IN == 0


def seeds(domain: Domain, split: Split, start: int = 0) -> Iterator[int]:
    """The seeds from `start` on, without end, whose task falls in the split; those that break the environment's reset
    are no tasks.

    Raises ValueError for another split, where the domain has no task in it, and where many seeds in a row break.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"seeds: split is {split!r}; it must be 'train' or 'held_out'")
    return _seeds_of(domain, split == "held_out", start)


def _seeds_of(domain: Domain, held_out: bool, start: int) -> Iterator[int]:
    environment = domain.environment()
    last, broken = start, 0
    for seed in count(start):
        try:
            messages, _ = environment.reset(seed)
        except Exception as error:
            broken += 1
            if broken == _BROKEN_LIMIT:
                message = f"{domain.name}: {broken} seeds in a row break its reset, the last by {error!r}"
                raise ValueError(message) from None
            continue
        broken = 0
        if is_held_out(messages) == held_out:
            last = seed
            yield seed
        elif seed - last >= _SEARCH_LIMIT:
            split = "held-out" if held_out else "training"
            raise ValueError(
                f"seeds: no {split} task of {domain.name} in {_SEARCH_LIMIT:,} seeds; its options must make more tasks"
            )


def check_levels(option: str, levels: Sequence[int], lowest: int, highest: int) -> None:
    """Raise ValueError unless `levels` is a list of whole numbers in that range, with at least one entry."""
    numbers = isinstance(levels, list | tuple) and all(type(level) is int for level in levels)
    if not numbers or not levels or min(levels) < lowest or max(levels) > highest:
        raise ValueError(
            f"{option} is {levels!r}; give a list of whole numbers from {lowest} to {highest}, such as "
            f"[{lowest}, {lowest + 1}]: tasks draw from it evenly"
        )
