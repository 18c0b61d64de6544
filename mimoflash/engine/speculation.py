"""How many tokens to draft: by how often drafts are right, and by what drafting and verifying them takes here and now.

Nothing here changes what is generated, only how fast.
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low

import torch
from torch import Tensor

from mimoflash.model import Transformer

# Bounds the price of looking around: a length that seems slower by a factor f is tried again RETRY * (f - 1) steps
# after it was left, for TRIAL steps, so that trying a length costs about TRIAL / RETRY of the tokens, 0.8 %.
RETRY, TRIAL = 1024, 8
SHORTEST_TRIAL = 3  # steps: one alone may have been disturbed

PRIOR_ACCEPTANCE, PRIOR_WEIGHT = 0.7, 4.0  # of a draft, in verifications, before there are any
REMEMBERED = 64  # steps of verifications, about
OUTDATED = 256  # steps: what was seen longer ago counts little against what is seen then
TIMINGS = 15  # their median resists the disturbances of a shared machine


@dataclass
class Acceptance:
    """Of drafts by their position: all that there were, and the chance of the next ones."""

    limit: int
    verifications: int = 0
    drafted: list[int] = field(init=False)
    accepted: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.drafted, self.accepted = [0] * self.limit, [0] * self.limit
        self._right = [PRIOR_ACCEPTANCE * PRIOR_WEIGHT] * self.limit
        self._reached = [PRIOR_WEIGHT] * self.limit
        self._seen = [False] * self.limit

    def record(self, drafted: int, accepted: int) -> None:
        """One sequence's verification: of `drafted` tokens the first `accepted` were right."""
        self.verifications += drafted > 0
        for i in range(drafted):
            self.drafted[i] += 1
            self.accepted[i] += i < accepted
        for i in range(min(drafted, accepted + 1)):  # a draft after a wrong one tells nothing
            self._right[i] += i < accepted
            self._reached[i] += 1
            self._seen[i] = True

    def forget(self) -> None:
        """A step has passed: what was seen weighs less against what will be; what is expected stays."""
        for i, seen in enumerate(self._seen):
            kept = 1 - 1 / (REMEMBERED if seen else OUTDATED)
            kept = max(kept, min(1.0, PRIOR_WEIGHT / self._reached[i]))
            self._right[i] *= kept
            self._reached[i] *= kept
            self._seen[i] = False

    def expected_tokens(self, drafts: int) -> float:
        """Tokens that a verification of so many drafts gains on average, its own included."""
        gained, chance = 1.0, 1.0
        for right, reached in zip(self._right[:drafts], self._reached[:drafts], strict=True):
            chance *= right / reached
            gained += chance
        return gained

    @property
    def mean_length(self) -> float:
        """Tokens gained by a verification so far, 1 without any."""
        return 1 + sum(self.accepted) / self.verifications if self.verifications else 1.0


class Seconds:
    """How long something takes by its size (a whole number from 1 on), learned from noisy measurements.

    Between sizes that were measured it is interpolated. Outside of them it is hoped for the best, so that it gets
    measured: larger ones take no longer than the largest, smaller ones less in proportion.
    """

    def __init__(self) -> None:
        self._timings: dict[int, deque[float]] = {}  # by size
        self._latest: dict[int, int] = {}  # the step of the last
        self._points: list[tuple[int, float]] = []  # (size, median of its timings), sorted

    def record(self, size: int, seconds: float, step: int) -> None:
        size = _rounded(size)
        timings = self._timings.setdefault(size, deque(maxlen=TIMINGS))
        if step - self._latest.get(size, step) > OUTDATED:
            timings.clear()
        timings.append(seconds)
        self._latest[size] = step
        at = bisect_left(self._points, (size, 0.0))
        is_known = at < len(self._points) and self._points[at][0] == size
        self._points[at : at + is_known] = [(size, median_low(timings))]

    def __call__(self, size: int) -> float:
        """0 where nothing has been measured."""
        size = _rounded(size)
        at = bisect_left(self._points, (size, 0.0))
        if at == len(self._points):
            return self._points[-1][1] if self._points else 0.0
        (low, low_seconds), (high, high_seconds) = self._points[at - 1] if at else (0, 0.0), self._points[at]
        return low_seconds + (high_seconds - low_seconds) * (size - low) / (high - low)


def _rounded(size: int) -> int:
    """To three binary digits: sizes near each other share a measurement."""
    unit = 1 << max(size.bit_length() - 3, 0)
    return size // unit * unit


class DraftLength:
    """Chooses how many tokens (0 to `limit`) are drafted for each sequence next: those that gain the most tokens a
    second, with a second look now and then at lengths that seemed worse.

    A step goes: `choose`, draft, `record_drafting`, verify, `record_step`, and `acceptance.record` for each sequence.
    Deterministic given what it is told.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.acceptance = Acceptance(limit)
        self._step_seconds = Seconds()  # by rows
        self._draft_seconds = [Seconds() for _ in range(limit)]  # by sequences, for each length
        self._age = [0] * (limit + 1)  # steps since a length was left
        self._chosen, self._held = limit, 0  # the length in use, for so many steps
        self._step = 0

    def record_step(self, rows: int, seconds: float) -> None:
        """A pass over `rows` tokens that all belong to decoding sequences: one each, and their drafts."""
        self._step_seconds.record(rows, seconds, self._step)

    def record_drafting(self, sequences: int, length: int, seconds: float) -> None:
        """Drafting `length` tokens for each sequence."""
        if length:
            self._draft_seconds[length - 1].record(sequences, seconds, self._step)

    def choose(self, sequences: int) -> int:
        """The drafts for each of so many decoding sequences in the next step."""
        self._step += 1
        self.acceptance.forget()
        scores = [self._rate(sequences, n) * (1 + self._age[n] / RETRY) for n in range(self.limit + 1)]
        best = max(range(self.limit + 1), key=lambda n: (scores[n], n))
        if best != self._chosen and self._held >= SHORTEST_TRIAL:
            self._age[self._chosen] = 0
            self._chosen, self._held = best, 0
        self._held += 1
        if self._held >= TRIAL:
            self._age[self._chosen] = 0
        for n in range(self.limit + 1):
            self._age[n] += n != self._chosen
        return self._chosen

    def _rate(self, sequences: int, drafts: int) -> float:
        """Tokens a second and sequence, as far as is known; infinite where nothing is."""
        seconds = self._step_seconds(sequences * (1 + drafts))
        if drafts:
            seconds += self._draft_seconds[drafts - 1](sequences)
        return self.acceptance.expected_tokens(drafts) / seconds if seconds else math.inf


@torch.inference_mode()
def replay_speculation(
    model: Transformer, prompt: Sequence[int], generated: Sequence[int], draft_tokens: Tensor | None = None
) -> list[int]:
    """Tokens gained at each verification (1 to MTP layers + 1), were `generated` decoded with all MTP layers drafting.

    `generated` is the model's own greedy continuation of `prompt`; `draft_tokens` (D,) are the ids that may be drafted,
    all if not given. A draft counts if it is the token that came and all drafts before it did: then the layer has seen
    the real tokens, so one pass over the whole text shows them all.
    """
    device = model.lm_head.weight.device
    tokens = torch.tensor([[*prompt, *generated]], device=device)
    ids = torch.arange(model.config.vocab_size) if draft_tokens is None else draft_tokens
    ids = ids.to(device)
    drafts = [ids[logits[0][:, ids].argmax(-1)].tolist() for logits in model.mtp_logits(tokens)]
    text, gains = tokens[0].tolist(), []
    place = len(prompt) - 1  # the trunk has run here and named the token at place + 1
    while place + 1 < len(text):
        gained = 1
        while gained <= len(drafts) and place + 1 + gained < len(text):
            if drafts[gained - 1][place] != text[place + 1 + gained]:
                break
            gained += 1
        gains.append(gained)
        place += gained
    return gains
