"""Many requests at once, some cancelled, in a cache that is too small for them: nothing is lost, mixed up or kept."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from oracles import memory

from mimoflash.config import ModelConfig
from mimoflash.engine import Engine, SamplingParams
from mimoflash.engine.request import NewTokens, Output, Request
from mimoflash.engine.sampling import RowState, Sampler
from mimoflash.model import Transformer
from mimoflash.model.moe import Router

TIE = 1e-4  # logits or router scores so close that rounding may swap them
DRAFTS, SLOTS, PAGES = 2, 12, 24  # twelve requests of up to four pages each want 48

# words so few that random MTP layers are right now and then
CONFIG = ModelConfig.tiny(vocab_size=12, num_nextn_predict_layers=DRAFTS, initializer_range=0.3, eos_token_id=3)


@dataclass
class Soaked:
    """A request of the soak. `patience`: steps after its submission at which it is cancelled."""

    prompt: list[int]
    params: SamplingParams
    patience: int | None
    request: Request | None = None
    streamed: list[int] = field(default_factory=list)
    output: Output | None = None

    def sink(self, event) -> None:
        assert self.output is None, "the output is the last event, once"
        if isinstance(event, NewTokens):
            self.streamed += event.tokens
        else:
            self.output = event


def make_requests(count: int, seed: int) -> list[Soaked]:
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        temperature = rng.choice([0.0, 0.7, 1.0, 1.5])
        params = SamplingParams(
            max_tokens=rng.randint(1, 60), temperature=temperature, top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 5]), min_p=rng.choice([0.0, 0.05]), seed=number,
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]), ignore_stop_tokens=rng.random() < 0.8,
        )
        prompt = [rng.randrange(CONFIG.vocab_size) for _ in range(rng.choice([1, 5, 30, 64, 180]) + rng.randrange(9))]
        requests.append(Soaked(prompt, params, rng.randrange(40) if rng.random() < 0.2 else None))
    return requests


def make_engine(model: Transformer, slots: int = SLOTS, pages: int = PAGES) -> Engine:
    room = memory(slots, pages, DRAFTS, CONFIG)
    return Engine(model, speculate=DRAFTS, max_running=slots, cache_bytes=room)


def run_together(engine: Engine, soaked: list[Soaked], seed: int) -> None:
    """Requests arrive at random, up to 40 unfinished at a time, and lose patience at random."""
    rng = random.Random(seed)
    coming, there = soaked[::-1], []
    while coming or there:
        while coming and len(there) < 40 and rng.random() < 0.7:
            one = coming.pop()
            one.request = engine.submit(one.prompt, one.params, priority=rng.choice([0, 0, 0, 1]), sink=one.sink)
            there.append(one)
        for one in there:
            if one.patience is not None:
                one.patience -= 1
                if one.patience < 0:
                    engine.cancel(one.request)
        engine.step()
        there = [one for one in there if one.output is None]


def routes_of(output: Output, positions: int) -> torch.Tensor:
    """Experts of the first positions (positions, MoE layers, experts), in the order of their numbers."""
    return output.routes[:positions].long().sort(-1).values


def is_the_same(one: Soaked, alone: Output) -> bool:
    """A cancelled answer is the beginning of the one that it would have been."""
    output, tokens, run = one.output, alone.tokens, len(one.output.routes)
    if output.finish_reason == "cancelled":
        tokens = tokens[: len(output.tokens)]
    elif output.finish_reason != alone.finish_reason:
        return False
    return output.tokens == tokens and (not run or torch.equal(routes_of(output, run), routes_of(alone, run)))


@torch.inference_mode()
def is_near_tie(model: Transformer, one: Soaked, alone: Output) -> bool:
    """Whether the two answers part at a choice that rounding decides: of an expert, or of a token."""
    together = one.output
    known = min(len(together.routes), len(alone.routes))
    run = model.trunk(torch.tensor([[*one.prompt, *alone.tokens][:known]]))
    different = (routes_of(together, known) != routes_of(alone, known)).any(-1).nonzero().tolist()
    if different:  # the first position, and its first layer
        place, layer = different[0]
        router = [module for module in model.modules() if isinstance(module, Router)][layer]
        best = (run.routings[layer].scores[place] + router.e_score_correction_bias).sort(descending=True).values
        return bool(best[router.per_token - 1] - best[router.per_token] < TIE)
    pairs = enumerate(zip(together.tokens, alone.tokens, strict=False))
    parted = next((i for i, (a, b) in pairs if a != b), None)
    if parted is None:
        return False
    both = {together.tokens[parted], alone.tokens[parted]}
    logits = model.logits(run.hidden)[0, len(one.prompt) - 1 + parted]
    return {pick(logits, token, one, alone.tokens[:parted]) for token in both} == both


def pick(logits: torch.Tensor, raised: int, one: Soaked, before: list[int]) -> int:
    """What is sampled where one token's logit is higher by a tie's width than the others'."""
    moved = logits.clone()
    moved[raised] += TIE
    state = RowState(one.params, [*one.prompt, *before], CONFIG.vocab_size)
    return Sampler().pick(moved[None], [state])[0][0].token


def soak(count: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = Transformer(CONFIG).eval()
    soaked, engine = make_requests(count, seed), make_engine(model)
    run_together(engine, soaked, seed)
    stats, ties = engine.stats(), 0
    for one in soaked:
        assert one.streamed == one.output.tokens
        (alone,) = make_engine(model, slots=1, pages=8).generate([one.prompt], one.params)
        if not is_the_same(one, alone):
            assert is_near_tie(model, one, alone), f"{one.output.tokens} is {alone.tokens} alone, and there is no tie"
            ties += 1
    cancelled = sum(one.output.finish_reason == "cancelled" for one in soaked)
    print(f"{count} requests, {cancelled} cancelled, {stats['preemptions']} preemptions, {ties} near-ties")
    assert 0.1 * count < cancelled < 0.25 * count
    assert stats["preemptions"] > 0
    assert 0 < sum(stats["accepted"]) < sum(stats["drafted"])
    engine.close()
    cache = engine.runner.cache
    assert (cache.free_slots, cache.free_pages) == (cache.slots, cache.pages)
    assert sum(engine.stats()["cache_used_bytes"].values()) == 0


def test_soak():
    soak(80, seed=1)


@pytest.mark.long
def test_two_thousand_requests():
    soak(2000, seed=2)
