"""Playing: the loop between whoever answers and an environment, and the environment of a single question."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mimoflash.world.answers import content_of
from mimoflash.world.functions import Toolbox
from mimoflash.world.protocol import Environment, Message, Step, Tool

Judge = Callable[[str], tuple[float, dict[str, Any]]]  # of an answer's content: the reward and info


@dataclass(frozen=True)
class Episode:
    """What was played: the whole conversation, the sum of the rewards, and whether the environment ended it."""

    messages: list[Message]
    tools: list[Tool]
    reward: float
    turns: int
    done: bool
    info: dict[str, Any]


def play(
    environment: Environment, seed: int, act: Callable[[list[Message], list[Tool]], Message], max_turns: int = 8
) -> Episode:
    """Play the task of `seed`: `act(messages, tools)` gives each of the assistant's messages, at most `max_turns`.

    A broken environment costs its own sample only: an exception in it (or a reward that is not a finite number) ends
    the episode with reward 0 and the error in `info["error"]`. What `act` raises is the caller's own and is not caught.
    """
    messages: list[Message] = []
    tools: list[Tool] = []
    reward, turns, done, info = 0.0, 0, False, {}
    try:
        messages, tools = environment.reset(seed)
        messages = list(messages)
    except Exception as error:
        return Episode([], [], 0.0, 0, True, {"error": _describe(error)})
    while not done and turns < max_turns:
        message = act(messages, tools)
        messages = [*messages, message]
        turns += 1
        try:
            step = environment.step(message)
            if not math.isfinite(step.reward):
                raise ValueError(f"reward is {step.reward}")
            messages = [*messages, *step.observation]
            reward, done, info = reward + step.reward, step.done, dict(step.info)
        except Exception as error:
            reward, done, info = 0.0, True, {"error": _describe(error)}
    return Episode(messages, tools, reward, turns, done, info)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class Question:
    """The environment of a single question: one answer, judged, and the episode is over.

    `ask(seed)` gives the question, as text or as the messages so far, and the judge of its answer. With a toolbox,
    messages that call its tools come before the answer, as many as the player allows.
    """

    def __init__(
        self, ask: Callable[[int], tuple[str | list[Message], Judge]], toolbox: Toolbox | None = None
    ) -> None:
        self._ask = ask
        self._toolbox = toolbox or Toolbox()
        self._seed = 0
        self._judge: Judge | None = None

    def reset(self, seed: int) -> tuple[list[Message], list[Tool]]:
        question, self._judge = self._ask(seed)
        self._seed = seed
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        return messages, self._toolbox.tools

    def step(self, message: Message) -> Step:
        if self._judge is None:
            raise ValueError("Question.step: no question is open; call reset(seed) first")
        if self._toolbox.tools and (results := self._toolbox.answer(message, self._seed)):
            return Step(results, 0.0, False, {})
        judge, self._judge = self._judge, None
        reward, info = judge(content_of(message))
        return Step([], reward, True, info)

    def close(self) -> None:
        self._judge = None
