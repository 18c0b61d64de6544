"""The server under load: many streams at once, of which some are given up, then twice as many as it takes in."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np

from mimoflash.benchmarks.generation import default_dtype
from mimoflash.benchmarks.pairs import Side, answer_requests, machine, scratch_folder, write_results
from mimoflash.benchmarks.serving import events_in, post_completion, server_of
from mimoflash.benchmarks.subject import CONTEXT, SEED, open_subject
from mimoflash.engine import Engine, SamplingParams
from mimoflash.models import open_model

QUESTIONS = 64  # that differ; the streams ask them again and again
RUNNING = 64  # at a time, as in `mimoflash serve`: the others wait
GIVEN_UP = 0.2  # of the streams


def bench_load(
    shape: str, *, dtype: str | None, streams: int, seconds: float, tokens: int, json_file: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """For `seconds` so many streams at once: every answer is compared with the engine's own. Then twice the capacity at
    a time: what is over it has to be refused. The server's capacity is a quarter more than the streams, 16 at least.

    Raises ValueError where an answer was wrong, one within the capacity refused, or memory of the cache not given back.
    """
    for name, value in (("streams", streams), ("seconds", seconds), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"--{name} is {value}: it must be at least 1")
    dtype = dtype or default_dtype(shape)
    capacity = streams + max(streams // 4, 16)  # those given up may not be let go of yet
    with scratch_folder() as scratch:
        subject = open_subject(shape, scratch, context=CONTEXT, tokens=tokens)
        model = open_model(subject.source, dtype="bf16" if dtype == "bf16" else "float32")
        engine = Engine(model, subject.tokenizer, dtype=dtype, max_running=RUNNING, share_prefixes=True)
        steps: list[float] = []
        with server_of(engine, capacity) as port, Side("mimoflash.benchmarks.load", side="client") as client:
            questions = _questions(subject.config.vocab_size, tokens)
            answers = _answers(engine, questions)
            engine.core.step = _timed(engine.core.step, steps)  # type: ignore[method-assign]
            asked: dict[str, Any] = {"port": port, "questions": questions, "answers": answers}
            begin = time.perf_counter()
            steady = client.ask(**asked, streams=streams, seconds=seconds)
            took = time.perf_counter() - begin
            of_steps = [float(np.quantile(steps, q)) for q in (0.5, 0.99)]
            crowd = client.ask(**asked, streams=2 * capacity, seconds=0)
            left = _bytes_left(engine)
    result = {
        "shape": shape, "dtype": dtype, "streams": streams, "capacity": capacity, "seconds": took, "steady": steady,
        "tokens_per_second": steady["tokens"] / took, "step_median": of_steps[0], "step_p99": of_steps[1],
        "crowd": crowd, "bytes_left": left, "machine": machine(),
    }
    say(f"{streams} streams, {took:.0f} s: {steady['right']:,} answers right, {steady['wrong']} wrong, "
        f"{steady['refused']} refused, {steady['given up']:,} given up; {result['tokens_per_second']:,.0f} tokens/s")
    say(f"  a step takes {1e3 * of_steps[0]:.1f} ms (median), {1e3 * of_steps[1]:.1f} ms (99th percentile): "
        f"{of_steps[1] / of_steps[0]:.1f} x")
    say(f"{2 * capacity} at once, capacity {capacity}: {crowd['right']} answers right, {crowd['wrong']} wrong, "
        f"{crowd['refused']} refused with Retry-After")
    say(f"  {left} bytes of the cache not given back")
    write_results([result], json_file)
    _check(result)
    return result


def _questions(vocabulary: int, tokens: int) -> list[dict[str, Any]]:
    """Prompts and answers of all lengths; half of them begin alike."""
    chance = random.Random(SEED)
    common = [chance.randrange(vocabulary) for _ in range(CONTEXT // 2)]
    return [
        {
            "prompt": common * (i % 2) + [chance.randrange(vocabulary) for _ in range(chance.randint(1, CONTEXT // 2))],
            "max_tokens": chance.randint(max(1, tokens // 2), tokens), "temperature": float(i % 3 > 0), "top_p": 1.0,
            "seed": i, "ignore_eos": True,
        }
        for i in range(QUESTIONS)
    ]


def _answers(engine: Engine, questions: list[dict[str, Any]]) -> list[str]:
    """The engine's own, one at a time."""
    assert engine.tokenizer is not None, "the server needs one, too"
    found = []
    for question in questions:
        params = SamplingParams(
            max_tokens=question["max_tokens"], temperature=question["temperature"], seed=question["seed"],
            ignore_stop_tokens=True,
        )
        (output,) = engine.generate([question["prompt"]], params)
        tokens = [token for token in output.tokens if token not in engine.tokenizer.stop_ids]
        found.append(engine.tokenizer.decode(tokens, skip_special=True))
    return found


def _timed(step: Callable[[], bool], seconds: list[float]) -> Callable[[], bool]:
    def timed() -> bool:
        begin = time.perf_counter()
        has_run = step()
        if has_run:
            seconds.append(time.perf_counter() - begin)
        return has_run

    return timed


def _bytes_left(engine: Engine) -> int:
    """Of the cache, once nothing runs and nothing is kept for a next turn."""
    end = time.monotonic() + 10
    while (stats := engine.stats())["running"] + stats["waiting"] and time.monotonic() < end:
        time.sleep(0.05)
    while engine.core.scheduler.drop_kept():
        pass
    return sum(engine.stats()["cache_used_bytes"].values())


def _check(result: Mapping[str, Any]) -> None:
    steady, crowd = result["steady"], result["crowd"]
    faults = {
        "answers were not the engine's own": steady["wrong"] + crowd["wrong"],
        "requests within the capacity were refused": steady["refused"],
        "requests within the capacity were refused as more came": max(0, result["capacity"] - crowd["right"]),
        "times as many requests as the capacity were all taken in": 0 if crowd["refused"] else 2,
        "bytes of the cache were not given back": result["bytes_left"],
    }
    if found := [f"{count:,} {words}" for words, count in faults.items() if count]:
        raise ValueError("the server failed: " + "; ".join(found))


# -- the client -------------------------------------------------------------------------------------------------------


async def _load(
    port: int, questions: list[dict[str, Any]], answers: list[str], streams: int, seconds: float
) -> dict[str, int]:
    """Each stream asks until the time is over, once at least. Those that ask once are not given up."""
    count: Counter[str] = Counter({"right": 0, "wrong": 0, "refused": 0, "given up": 0, "tokens": 0})
    end = time.monotonic() + seconds

    async def ask_on(number: int) -> None:
        chance = random.Random(number)
        while True:
            which = chance.randrange(len(questions))
            gives_up = seconds > 0 and chance.random() < GIVEN_UP
            count.update(await _ask(port, questions[which], answers[which], chance.randint(1, 3) if gives_up else None))
            if time.monotonic() > end:
                return

    await asyncio.gather(*(ask_on(number) for number in range(streams)))
    return dict(count)


async def _ask(port: int, question: dict[str, Any], answer: str, most_parts: int | None) -> dict[str, int]:
    """How it went; the connection is closed after `most_parts`."""
    parts: list[bytes] = []
    async with aclosing(post_completion(port, {**question, "stream": True})) as coming:
        async for part in coming:
            parts.append(part)
            if len(parts) == most_parts and not parts[0].startswith(b"HTTP/1.1 429"):
                return {"given up": 1}
    head = parts[0] if parts else b""
    if head.startswith(b"HTTP/1.1 429") and b"retry-after:" in head.lower():
        return {"refused": 1}
    events = map(json.loads, events_in(parts))
    text = "".join(event["choices"][0]["text"] for event in events if event.get("choices"))
    return {"right" if text == answer else "wrong": 1, "tokens": question["max_tokens"]}


def _open_client(settings: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    return lambda **asked: asyncio.run(_load(**asked))


if __name__ == "__main__":
    answer_requests(_open_client)
