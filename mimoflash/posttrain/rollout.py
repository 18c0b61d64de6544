"""Playing tasks of a domain with the engine, many at a time."""

import hashlib
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mimoflash.engine import Engine, Output, SamplingParams
from mimoflash.text import Tokenizer, parse_chat, render_chat
from mimoflash.world import Domain, Environment, Message, Tool


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
    engine: Engine, tokenizer: Tokenizer, domain: Domain, seeds: Sequence[int], params: SamplingParams, *,
    max_turns: int = 4, thinking: bool = True,
) -> list[Rollout]:
    """One rollout a seed, all of them side by side; a task ends by its environment, or after `max_turns`.

    An exception in an environment costs its own rollout only: reward 0, and the error in `info`. Raises ValueError
    where the chat template changes earlier turns, so that a rollout could not go on from its own tokens.
    """
    rollouts = [Rollout(seed) for seed in seeds]
    environments = [domain.environment() for _ in seeds]
    context = engine.model.config.max_position_embeddings
    try:
        for rollout, environment in zip(rollouts, environments, strict=True):
            _begin(rollout, environment, tokenizer, thinking)
        for turn in range(max_turns):
            for rollout in rollouts:
                if not rollout.done and len(rollout.tokens) >= context:
                    _broken(rollout, ValueError(f"{len(rollout.tokens)} tokens fill the model's context of {context}"))
            going = [i for i, rollout in enumerate(rollouts) if not rollout.done]
            if not going:
                break
            each = [_params_of(params, i, rollouts[i].seed, turn) for i in going]
            outputs = engine.generate([rollouts[i].tokens for i in going], each)
            for i, output in zip(going, outputs, strict=True):
                _advance(rollouts[i], environments[i], output, tokenizer, thinking)
    finally:
        for environment in environments:
            with suppress(Exception):  # what has been played stays
                environment.close()
    return rollouts


def _params_of(params: SamplingParams, *place: int) -> SamplingParams:
    """Each rollout and turn draws for itself, and the same each time."""
    if params.seed is None:
        return params
    digest = hashlib.blake2b(repr((params.seed, *place)).encode(), digest_size=8).digest()
    return replace(params, seed=int.from_bytes(digest, "little"))


def _begin(rollout: Rollout, environment: Environment, tokenizer: Tokenizer, thinking: bool) -> None:
    try:
        messages, rollout.tools = environment.reset(rollout.seed)
    except Exception as error:  # an environment is foreign code
        _broken(rollout, error)
        return
    rollout.messages = list(messages)
    rollout.text = render_chat(tokenizer, rollout.messages, rollout.tools, enable_thinking=thinking)
    rollout.see(tokenizer.encode(rollout.text))


def _advance(
    rollout: Rollout, environment: Environment, output: Output, tokenizer: Tokenizer, thinking: bool
) -> None:
    rollout.write(output)
    message = parse_chat(tokenizer.decode(output.tokens, skip_special=True), rollout.tools, rollout.text)
    rollout.messages.append(message)
    try:
        step = environment.step(message)
        if not math.isfinite(step.reward):
            raise ValueError(f"reward is {step.reward}")
    except Exception as error:
        _broken(rollout, error)
        return
    rollout.reward += step.reward
    rollout.info = dict(step.info)
    rollout.done = step.done or output.finish_reason != "stop"  # cut off: there is no end token to go on from
    if rollout.done:
        return
    before = render_chat(tokenizer, rollout.messages, rollout.tools, generation_prompt=False, enable_thinking=thinking)
    rollout.messages.extend(step.observation)
    rollout.text = render_chat(tokenizer, rollout.messages, rollout.tools, enable_thinking=thinking)
    if not rollout.text.startswith(before):
        changed = "the chat template writes earlier turns otherwise once messages follow: it cannot go on"
        _broken(rollout, ValueError(changed))
        return
    rollout.see(tokenizer.encode(rollout.text[len(before) :]))


def _broken(rollout: Rollout, error: Exception) -> None:
    rollout.reward, rollout.done = 0.0, True
    rollout.info = {"error": f"{type(error).__name__}: {error}"}
