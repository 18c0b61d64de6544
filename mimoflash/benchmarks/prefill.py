"""Prefill speed: prompt tokens a second until the first new token, beside a peer on the same weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mimoflash.benchmarks.generation import Task, default_dtype, open_sides
from mimoflash.benchmarks.pairs import write_results
from mimoflash.benchmarks.peers import prefill_rate


def bench_prefill(
    shape: str, *, peer: str | None, dtype: str | None, streams: int, contexts: Sequence[int], pairs: int,
    json_file: Path | None = None, say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Runs random prompts of each of `contexts` tokens, `streams` at once, by our engine and the peer, `pairs` times in
    turn. The clock runs from the request to the first token. Errors: see `bench_decode`."""
    dtype = dtype or default_dtype(shape)
    task = Task(shape, peer, dtype, streams, contexts, speculate=0, tokens=1, pairs=pairs)
    with open_sides(task) as opened:
        results = [opened.compare(prefill_rate, context, say) for context in contexts]
    write_results(results, json_file)
    return results
