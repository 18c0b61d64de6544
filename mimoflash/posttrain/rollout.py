"""Playing tasks with the engine: a rollout is a coroutine, and many of them run side by side."""

import asyncio
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from mimoflash.engine import Engine, Output, SamplingParams
from mimoflash.posttrain.background import Background
from mimoflash.posttrain.threads import Threads
from mimoflash.text import Tokenizer, parse_chat, render_chat
from mimoflash.world import Domain, Environment, Message, Step, Tool

Result = TypeVar("Result")

_threads = Threads()  # environments'


@dataclass(frozen=True)
class Task:
    """What is to be played: the task of this seed in a domain, with sampling that is this rollout's own. `max_turns`
    end it; so does an environment that takes longer than `timeout` seconds to answer."""

    domain: str
    seed: int
    params: SamplingParams
    max_turns: int = 4
    thinking: bool = True
    timeout: float | None = None
    priority: int = 0


@dataclass
class Rollout:
    """One played task. `tokens` are the ids that the model saw and wrote, never tokenised again; `turns` holds the
    places (start, end) in them of what it wrote.

    `logprobs` (natural, under the model) and `sampling_logprobs` (under what it was sampled from) have an entry for
    each of the tokens, 0 for those that the model did not write. `routes` (positions, MoE layers, experts per token)
    are those by which each position ran when what follows it was sampled: from the first one on, up to the last token
    that the model wrote, which has not run.
    """

    seed: int
    messages: list[Message] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    routes: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0, dtype=torch.uint8))
    reward: float = 0.0
    done: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    text: str = ""  # what `tokens` renders, as the template gives it
    versions: tuple[int, int] = (0, 0)  # of the weights, when it began and when it ended

    def see(self, tokens: list[int]) -> None:
        """Adds tokens that the model did not write."""
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.sampling_logprobs += [0.0] * len(tokens)

    def write(self, output: Output) -> None:
        """Adds a turn: what the model wrote after the tokens so far."""
        self.turns.append((len(self.tokens), len(self.tokens) + len(output.tokens)))
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.sampling_logprobs += output.sampling_logprobs
        # earlier turns keep theirs: positions that had to run again may have been routed otherwise by a rounding
        known = len(self.routes)
        self.routes = torch.cat([self.routes, output.routes[known:]]) if known else output.routes


def play_tasks(
    engine: Engine, domain: Domain, seeds: Sequence[int], params: SamplingParams, *, max_turns: int = 4,
    thinking: bool = True, timeout: float | None = None,
) -> list[Rollout]:
    """One rollout a seed, all of them side by side; a task ends by its environment, or after `max_turns`. As `play`."""
    tasks = [
        Task(domain.name, seed, own_sampling(params, place, seed), max_turns, thinking, timeout)
        for place, seed in enumerate(seeds)
    ]

    async def all_of_them() -> list[Rollout]:
        return await asyncio.gather(*(play(engine, domain, task) for task in tasks))

    with Background() as background:
        return background.run(all_of_them())


async def play(engine: Engine, domain: Domain, task: Task) -> Rollout:
    """An exception in an environment costs its own rollout only: reward 0, and the error in `info`; so does a chat
    template that changes earlier turns, since it could not go on from its own tokens. Raises ValueError for an engine
    without a tokenizer or without room for the prompt, RuntimeError where a pass of the model fails."""
    rollout, tokenizer = Rollout(task.seed), tokenizer_of(engine)
    environment: Environment | None = None
    try:
        with _foreign(rollout):
            environment = await in_thread(domain.environment, timeout=task.timeout)
            messages, rollout.tools = await in_thread(environment.reset, task.seed, timeout=task.timeout)
            _begin(rollout, messages, tokenizer, task.thinking)
        for turn in range(task.max_turns):
            if rollout.done or not _has_room(rollout, engine):
                break
            params = own_sampling(task.params, turn)
            output = await engine.answer(rollout.tokens, params, priority=task.priority)
            if output.error is not None:
                raise RuntimeError(output.error)
            rollout.write(output)
            message = parse_chat(tokenizer.decode(output.tokens, skip_special=True), rollout.tools, rollout.text)
            rollout.messages.append(message)
            with _foreign(rollout):
                assert environment is not None
                step = await in_thread(environment.step, message, timeout=task.timeout)
                _advance(rollout, step, tokenizer, task.thinking, is_cut_off=output.finish_reason != "stop")
    finally:
        if environment is not None:
            with suppress(Exception):  # what has been played stays
                await in_thread(environment.close, timeout=task.timeout)
    return rollout


@contextmanager
def _foreign(rollout: Rollout) -> Iterator[None]:
    """What happens in here is an environment's: its errors end the rollout."""
    try:
        yield
    except Exception as error:
        rollout.reward, rollout.done = 0.0, True
        rollout.info = {"error": f"{type(error).__name__}: {error}"}


def tokenizer_of(engine: Engine) -> Tokenizer:
    """Raises ValueError where the engine has none."""
    if engine.tokenizer is None:
        raise ValueError("tasks are played in text: give the engine a tokenizer, Engine(model, tokenizer)")
    return engine.tokenizer


def own_sampling(params: SamplingParams, *place: int | str) -> SamplingParams:
    """Whatever stands at this place draws for itself, and the same each time."""
    if params.seed is None:
        return params
    digest = hashlib.blake2b(repr((params.seed, *place)).encode(), digest_size=8).digest()
    return replace(params, seed=int.from_bytes(digest, "little"))


async def in_thread(call: Callable[..., Result], *args: Any, timeout: float | None) -> Result:
    """In another thread, which may hang without keeping the process from its end. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if future.done():  # nobody waits any more
            return
        future.set_result(result) if error is None else future.set_exception(error)

    def run() -> None:
        result: Any = None
        failure: Exception | None = None
        try:
            result = call(*args)
        except Exception as error:
            failure = RuntimeError(repr(error)) if isinstance(error, StopIteration) else error  # no future may hold it
        except BaseException as error:  # it would end this thread alone
            failure = RuntimeError(repr(error))
        with suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(settle, result, failure)

    _threads.start(run)
    try:
        async with asyncio.timeout(timeout) as limit:
            return await future
    except TimeoutError:
        if limit.expired():
            raise TimeoutError(f"no answer within {timeout} s") from None
        raise  # its own


def _begin(rollout: Rollout, messages: Sequence[Message], tokenizer: Tokenizer, thinking: bool) -> None:
    rollout.messages = list(messages)
    rollout.text = render_chat(tokenizer, rollout.messages, rollout.tools, enable_thinking=thinking)
    rollout.see(tokenizer.encode(rollout.text))


def _has_room(rollout: Rollout, engine: Engine) -> bool:
    """Whoever fills the context keeps what was earned: to ramble is worse than to come to an end, not an accident."""
    if len(rollout.tokens) < engine.model.config.max_position_embeddings:
        return True
    rollout.info |= {"truncated": f"{len(rollout.tokens)} tokens fill the model's context"}
    return False


def _advance(rollout: Rollout, step: Step, tokenizer: Tokenizer, thinking: bool, *, is_cut_off: bool) -> None:
    """By what the environment answered; after a message that was cut off there is no end token to go on from."""
    if not math.isfinite(step.reward):
        raise ValueError(f"reward is {step.reward}")
    rollout.reward += float(step.reward)
    rollout.info = dict(step.info)
    rollout.done = bool(step.done) or is_cut_off
    if rollout.done:
        return
    before = render_chat(tokenizer, rollout.messages, rollout.tools, generation_prompt=False, enable_thinking=thinking)
    rollout.messages.extend(step.observation)
    rollout.text = render_chat(tokenizer, rollout.messages, rollout.tools, enable_thinking=thinking)
    if not rollout.text.startswith(before):
        raise ValueError("the chat template writes earlier turns otherwise once messages follow: it cannot go on")
    rollout.see(tokenizer.encode(rollout.text[len(before) :]))
