"""A request from its submission to its output."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimoflash.engine.cache import RingSnapshot
from mimoflash.engine.params import SamplingParams
from mimoflash.engine.sampling import RowState

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
Routes = NDArray[np.integer[Any]]  # uint8, or int16 where there are more than 256 experts
TopLogprobs = tuple[tuple[int, float], ...]
PromptLogprob = tuple[float, TopLogprobs] | None  # None for the first token: nothing comes before it


@dataclass
class Output:
    """A finished request.

    `tokens`: generated ids, the end token included. `logprobs` (natural) of each under the model, `sampling_logprobs`
    under what it was sampled from, `top_logprobs` the (token, logprob) pairs asked for. `routes` (positions run, MoE
    layers, experts per token): prompt and all generated tokens but the last. `accept_length`: mean tokens gained by a
    verification of drafts, 1.0 without any. `cached_tokens`: of the prompt, those kept from an earlier turn.
    `error` says why finish_reason is "error". `prompt_logprobs`, where asked for: each prompt token's logprob under the
    model and the (token, logprob) pairs of the likeliest in its place; only the first ones where the request ended
    before its prompt had run.
    """

    tokens: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    routes: Tensor
    finish_reason: FinishReason
    accept_length: float
    prompt_tokens: int
    cached_tokens: int
    error: str | None = None
    prompt_logprobs: list[PromptLogprob] | None = None


class NewTokens(NamedTuple):
    """Tokens of one step: several where drafts were right. Fields as in Output; `start` is the place of the first one
    among all that the request has generated."""

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    start: int = 0


Event = NewTokens | Output


@dataclass(eq=False, repr=False)
class Request:
    """`text` is the prompt and what has been generated; its first `run` positions are in the cache while there is a
    slot. `deadline` is a time.monotonic(); `limit` is the most tokens that may be generated. `sink` takes the events.
    Preemption takes the slot; the rest stays. `settled`: so many generated tokens are known with all that belongs to
    them, and so the request ends after them; it is set in one go, so that an interrupt comes before or after it. `sent`
    of them have gone to the sink. What `prompt_logprobs` holds is known for good.
    """

    text: list[int]
    prompt_tokens: int
    params: SamplingParams
    state: RowState
    limit: int
    routes: Routes  # (0 until it runs, then its whole length; MoE layers; K), the first `routed` of them known
    priority: int = 0
    deadline: float | None = None
    sink: Callable[[Event], None] | None = None
    arrival: int = 0
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprob] = field(default_factory=lambda: [None])  # more only where asked for
    settled: tuple[int, FinishReason | None] = (0, None)
    sent: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    slot: int = -1
    run: int = 0
    routed: int = 0
    cached_tokens: int = 0
    verifications: int = 0
    gained: int = 0  # tokens, by verifications
    snapshot: RingSnapshot | None = None  # of the prompt's end
    keys: list[bytes] = field(default_factory=list)  # of the prompt's blocks, where prefixes are shared
    is_cancelled: bool = False  # asked for; finish_reason says that it is done

    @property
    def order(self) -> tuple[int, int]:
        """Who comes first: the higher priority, then the earlier arrival."""
        return -self.priority, self.arrival

    @property
    def pending(self) -> int:
        """Tokens that have not run: one while decoding, more while the prompt is read."""
        return len(self.text) - self.run

    @property
    def generated(self) -> int:
        return len(self.text) - self.prompt_tokens

    @property
    def is_unscored(self) -> bool:
        """Log-probabilities of its prompt are asked for and not all known: it has to run from its start."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_tokens

    @property
    def settled_tokens(self) -> list[int]:
        """Those that are generated for good: whatever happens, others only follow them."""
        return self.text[self.prompt_tokens : self.prompt_tokens + self.settled[0]]

    def unsettle(self) -> None:
        """What is known only in part is taken back."""
        count, _ = self.settled
        del self.text[self.prompt_tokens + count :], self.logprobs[count:], self.sampling_logprobs[count:]
        del self.top_logprobs[count:]
        self.routed = min(self.routed, len(self.text))

    def output(self) -> Output:
        assert self.finish_reason is not None, "only a finished request has an output"
        return Output(
            tokens=self.text[self.prompt_tokens :],
            logprobs=self.logprobs,
            sampling_logprobs=self.sampling_logprobs,
            top_logprobs=self.top_logprobs,
            routes=torch.from_numpy(self.routes[: min(self.routed, len(self.text) - 1)].copy()),
            finish_reason=self.finish_reason,
            accept_length=self.gained / self.verifications if self.verifications else 1.0,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            error=self.error,
            prompt_logprobs=None if self.params.prompt_logprobs is None else self.prompt_logprobs,
        )
