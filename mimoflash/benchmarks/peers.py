"""The sides that generate: our engine, llama.cpp's server, transformers; each in a process of its own.

All of them do the same: `run(prompts, tokens)` continues all prompts at once, greedily, and tells when.
"""

import importlib.util
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch

from mimoflash.benchmarks.pairs import answer_requests
from mimoflash.engine import Engine, SamplingParams
from mimoflash.engine.request import Event, NewTokens
from mimoflash.kernels import native
from mimoflash.models import find_model, open_model
from mimoflash.text import load_tokenizer

PEERS = {"llama.cpp": "xllamacpp", "transformers": "transformers"}  # and the package that it comes in
SETTINGS = {
    "llama.cpp": "xllamacpp's server, a slot a stream, continuous batching, the same threads, flash attention auto, "
                 "but off where it decodes from a float32 cache",
    "transformers": "AutoModelForCausalLM.generate, one batch, its own cache, the same threads",
}


@dataclass(frozen=True)
class Stream:
    """One request. Seconds from the moment when all were sent; `passes`: of the model after the first token."""

    prompt: int
    tokens: int
    first: float
    last: float
    passes: float


def decode_rate(batches: Iterable[Sequence[Stream]]) -> float:
    """Tokens a second after the first, all streams of a batch together, from the first that decodes to the last.

    Of many streams the first decode while the last prompts are still read, which counts: give them 96 tokens or more.
    """
    batches = list(batches)
    seconds = sum(max(s.last for s in batch) - min(s.first for s in batch) for batch in batches)
    if not seconds:
        raise ValueError("every answer ended with its first token: give other --prompts, or a --context")
    return sum(s.tokens - 1 for batch in batches for s in batch) / seconds


def prefill_rate(batches: Iterable[Sequence[Stream]]) -> float:
    """Prompt tokens a second until every stream has its first token."""
    batches = list(batches)
    return sum(s.prompt for b in batches for s in b) / sum(max(s.first for s in b) for b in batches)


def accept_length(batches: Iterable[Sequence[Stream]]) -> float | None:
    """Mean tokens a pass of the model; None where none was run."""
    streams = [s for batch in batches for s in batch]
    passes = sum(s.passes for s in streams)
    return sum(s.tokens - 1 for s in streams) / passes if passes else None


def check_peer(peer: str | None, dtype: str, speculate: int) -> None:
    """ValueError for what the peer cannot do, ImportError where it is not installed."""
    if peer is None:
        return
    if peer not in PEERS:
        raise ValueError(f"--peer {peer}: it must be one of {', '.join(PEERS)}")
    if peer == "transformers" and dtype not in ("float32", "bf16"):
        raise ValueError(f"--peer transformers runs float32 and bf16 here, not {dtype}: --peer llama.cpp has all four")
    if peer == "transformers" and speculate:
        raise ValueError("transformers runs no MTP layers: --speculate 0, or --peer llama.cpp")
    if importlib.util.find_spec(PEERS[peer]) is None:
        raise ImportError(f"--peer {peer} needs {PEERS[peer]}: pip install -e '.[peers]'")


class Runner(Protocol):
    def run(self, prompts: list[list[int]], tokens: int) -> list[Stream]:
        """Continues all prompts at once, each by at most so many tokens."""


class Ours:
    def __init__(self, s: dict[str, Any]):
        model = open_model(s["source"], dtype="bf16" if s["dtype"] == "bf16" else "float32")
        tokenizer = None if s["endless"] else load_tokenizer(find_model(s["source"]))
        self.endless = s["endless"]
        self.engine = Engine(
            model, tokenizer, speculate=s["speculate"], dtype=s["dtype"], max_running=s["streams"]
        )

    def run(self, prompts: list[list[int]], tokens: int) -> list[Stream]:
        params = SamplingParams(max_tokens=tokens, ignore_stop_tokens=self.endless)
        stamps: list[list[float]] = [[] for _ in prompts]  # of each stream's passes

        def sink(stream: int, event: Event) -> None:
            if isinstance(event, NewTokens):
                stamps[stream].append(time.perf_counter() - begin)

        begin = time.perf_counter()
        requests = [self.engine.submit(p, params, sink=partial(sink, i)) for i, p in enumerate(prompts)]
        while self.engine.step():
            pass
        return [
            Stream(r.prompt_tokens, r.generated, times[0], times[-1], len(times) - 1)
            for r, times in zip(requests, stamps, strict=True)
        ]


class LlamaCpp:
    def __init__(self, s: dict[str, Any]):
        import xllamacpp as x

        p = x.CommonParams()
        p.model.path, p.n_parallel, p.verbosity = s["file"], s["streams"], 0
        p.n_ctx = s["streams"] * (-(-s["positions"] // 256) * 256)
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = s["threads"]
        p.cache_ram_mib = p.n_ctx_checkpoints = 0  # no copies of the cache for requests to come
        if s["float32_cache"]:
            p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
            if s["decodes"]:  # with flash attention, 0.5 to 0.6 x as fast; prefill is 1.5 x as fast with it
                p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if s["speculate"]:
            p.speculative.types = [x.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
            p.speculative.draft.n_max = s["speculate"]
        self.endless, self.server = s["endless"], x.Server(p)

    def run(self, prompts: list[list[int]], tokens: int) -> list[Stream]:
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as threads:  # the server releases Python's lock
            return list(threads.map(lambda prompt: self._request(prompt, tokens, begin), prompts))

    def _request(self, prompt: list[int], tokens: int, begin: float) -> Stream:
        answer = self.server.handle_completions(
            {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": self.endless,
             "cache_prompt": False}
        )
        last = time.perf_counter() - begin
        if "timings" not in answer:
            raise ValueError(f"llama.cpp answered {answer}")
        timings = answer["timings"]
        count, seconds = timings["predicted_n"], timings["predicted_ms"] / 1e3  # of the tokens after the first
        passes = count - 1 - timings.get("draft_n_accepted", 0)
        return Stream(len(prompt), count, last - (seconds if count > 1 else 0.0), last, passes)


class Transformers:
    def __init__(self, s: dict[str, Any]):
        import transformers

        kind = torch.bfloat16 if s["dtype"] == "bf16" else torch.float32
        self.model = transformers.AutoModelForCausalLM.from_pretrained(s["source"], dtype=kind).eval()
        self.stop = None if s["endless"] else self.model.generation_config.eos_token_id

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], tokens: int) -> list[Stream]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        stamps: list[float] = []

        def stamp(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            stamps.append(time.perf_counter() - begin)
            return torch.zeros(len(ids), dtype=torch.bool)

        begin = time.perf_counter()
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_cache=True, stopping_criteria=[stamp],
            eos_token_id=self.stop, pad_token_id=0,
        )
        counts = [self._length(row) for row in out[:, width:].tolist()]
        return [
            Stream(len(prompt), n, stamps[0], stamps[n - 1], n - 1) for prompt, n in zip(prompts, counts, strict=True)
        ]

    def _length(self, tokens: list[int]) -> int:
        stops = {self.stop} if isinstance(self.stop, int) else set(self.stop or ())
        return next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))


RUNNERS: dict[str, Callable[[dict[str, Any]], Runner]] = {
    "ours": Ours, "llama.cpp": LlamaCpp, "transformers": Transformers,
}


def read_rate(seconds: float = 1.0, size: int = 1 << 30) -> float:
    """Bytes a second of a read-only loop with torch's threads over memory much larger than the caches: the best run of
    the compiled loop's, where there is one, and of torch.sum's."""
    memory, kernels, threads = torch.ones(size // 4), native.library(), torch.get_num_threads()
    loops: list[Callable[[], object]] = [memory.sum]
    if kernels is not None:
        loops.append(lambda: kernels.mf_read(memory.data_ptr(), memory.nbytes, threads))
    best, end = math.inf, time.perf_counter() + seconds
    for loop in itertools.cycle(loops):
        begin = time.perf_counter()
        loop()
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() > end:
            return memory.nbytes / best
    raise AssertionError("the cycle does not end")


def _runner(side: str) -> Callable[[dict[str, Any]], Runner]:
    if side == "served":
        from mimoflash.benchmarks.serving import Served  # which is one of ours

        return Served
    return RUNNERS[side]


def _open_side(settings: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    torch.set_num_threads(settings["threads"])
    runner = _runner(settings["side"])(settings)

    def answer(prompts: list[list[int]] | None = None, tokens: int = 0) -> dict[str, Any]:
        if prompts is None:
            return {"bytes_per_second": read_rate()}
        return {"streams": [asdict(stream) for stream in runner.run(prompts, tokens)]}

    return answer


if __name__ == "__main__":
    answer_requests(_open_side)
