"""What `bench decode` and `bench prefill` share: sides opened on one subject, run in turn; the result's fields."""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mimoflash.benchmarks.pairs import Side, compare, described, machine, run_in_turn, scratch_folder
from mimoflash.benchmarks.peers import SETTINGS, Stream, accept_length, check_peer
from mimoflash.benchmarks.subject import CONTEXT, GGUF_TYPES, SPARE, Subject, gguf_file, open_subject, published_folder

F16_CACHE = "peer, f16 cache"  # llama.cpp's default, a second figure where both sides have float32

Batches = list[list[Stream]]
Rate = Callable[[Batches], float]


@dataclass(frozen=True)
class Task:
    """What is asked of both sides: `streams` prompts at once, `tokens` new ones each. `contexts`: positions of random
    prompts, one after the other; none: a model's own prompts, or short random ones."""

    shape: str
    peer: str | None
    dtype: str  # of the weights
    streams: int
    contexts: Sequence[int]
    speculate: int
    tokens: int
    pairs: int
    prompts: Path | None = None
    served: bool = False  # ours answers by HTTP; the peer is the same engine without

    def check(self) -> None:
        """ValueError, with what is possible, for values out of range and what the peer cannot do."""
        if self.dtype not in GGUF_TYPES:
            raise ValueError(f"--dtype {self.dtype}: it must be one of {', '.join(GGUF_TYPES)}")
        given = [("streams", self.streams), ("tokens", self.tokens), ("pairs", self.pairs)]
        for name, value in [*given, *(("context", context) for context in self.contexts)]:
            if value < 1:
                raise ValueError(f"--{name} is {value}: it must be at least 1")
        if not 0 <= self.speculate <= 3:
            raise ValueError(f"--speculate is {self.speculate}: it must be 0 (none) to 3 drafted tokens")
        check_peer(self.peer, self.dtype, self.speculate)


@dataclass(frozen=True)
class Opened:
    """The task's sides, ready to run."""

    task: Task
    subject: Subject
    sides: dict[str, Side]

    def run(self, name: str, batches: Sequence[Sequence[Sequence[int]]], tokens: int) -> Batches:
        answers = [self.sides[name].ask(prompts=batch, tokens=tokens) for batch in batches]
        return [[Stream(**stream) for stream in answer["streams"]] for answer in answers]

    def compare(
        self, rate: Rate, context: int | None, say: Callable[[str], None], *, read: bool = False
    ) -> dict[str, Any]:
        """The result at this context, said as it comes. With `read`, a read-only loop's bytes a second too: the median
        of those after each of our turns."""
        reads: list[float] = []

        def measure(name: str, pair: int) -> dict[str, Any]:
            batches = self.run(name, self.subject.batches(self.task.streams, context, pair), self.task.tokens)
            if read and name == "ours":
                reads.append(self.sides["ours"].ask()["bytes_per_second"])
            return {"rate": rate(batches), "batches": batches}

        if context is not None:
            say(f"context {context:,}")
        results = run_in_turn({name: partial(measure, name) for name in self.sides}, self.task.pairs, say, "tok/s")
        result = compare(results["ours"], results.get("peer", [])) | self._described(results)
        say(described(result, "the engine itself" if self.task.served else self.task.peer))
        if F16_CACHE in results:
            result["peer_f16_cache"] = compare(results["ours"], results[F16_CACHE])
            say(f"  {result['peer_f16_cache']['ratio']:.2f} x {self.task.peer} with a float16 cache")
        return result | ({"read_bytes_per_second": statistics.median(reads)} if read else {})

    def _described(self, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        lengths = {name: accept_length(b for pair in done for b in pair["batches"]) for name, done in results.items()}
        return {
            "unit": "tokens/s", "shape": self.task.shape, "dtype": self.task.dtype, "streams": self.task.streams,
            "context": round(mean_prompt(results["ours"])), "tokens": self.task.tokens,
            "speculate": self.task.speculate, "accept_length": lengths["ours"],
            "peer_name": self.task.peer, "peer_accept_length": lengths.get("peer"),
            "peer_settings": SETTINGS[self.task.peer] if self.task.peer else None, "machine": machine(),
        }


def default_dtype(shape: str) -> str:
    """float32; for the embedded model, which is stored in four bits, int4."""
    return "int4" if shape == "smol" else "float32"


def mean_prompt(done: list[dict[str, Any]]) -> float:
    return statistics.mean(stream.prompt for pair in done for batch in pair["batches"] for stream in batch)


@contextlib.contextmanager
def open_sides(task: Task) -> Iterator[Opened]:
    """Writes the weights for both sides and starts them; each has run once when it is given out."""
    task.check()
    with scratch_folder() as scratch, contextlib.ExitStack() as stack:
        longest = max(task.contexts, default=None)
        subject = open_subject(
            task.shape, scratch, context=longest, tokens=task.tokens, drafts=task.speculate, prompts=task.prompts
        )
        settings = {
            "threads": torch.get_num_threads(), "dtype": task.dtype, "streams": task.streams,
            "speculate": task.speculate, "decodes": task.tokens > 1, "endless": subject.prompts is None,
            "source": subject.source,
            "positions": max(map(len, subject.prompts or [[0] * (longest or CONTEXT)])) + task.tokens + SPARE,
        }
        sides = {"ours": settings | {"side": "ours"}}
        if task.served:
            sides = {"ours": settings | {"side": "served"}, "peer": settings | {"side": "ours"}}
        elif task.peer == "llama.cpp":
            file = str(gguf_file(subject, task.dtype, scratch))
            exact = task.dtype == "float32"
            sides["peer"] = settings | {"side": task.peer, "file": file, "float32_cache": exact}
            if exact:
                sides[F16_CACHE] = sides["peer"] | {"float32_cache": False}
        elif task.peer:
            sides["peer"] = settings | {"side": task.peer, "source": str(published_folder(subject, scratch))}
        started = {
            name: stack.enter_context(Side("mimoflash.benchmarks.peers", **one)) for name, one in sides.items()
        }
        opened = Opened(task, subject, started)
        for name in started:
            opened.run(name, subject.batches(task.streams, CONTEXT, seed=-1)[:1], min(task.tokens, 8))
        yield opened
