"""Decode speed: tokens after the first, one stream or many, beside a peer on the same weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mimoflash.benchmarks.cache_bytes import cache_line
from mimoflash.benchmarks.generation import Task, default_dtype, open_sides
from mimoflash.benchmarks.pairs import write_results
from mimoflash.benchmarks.peers import decode_rate
from mimoflash.config import ModelConfig


def bench_decode(
    shape: str, *, peer: str | None, dtype: str | None, streams: int, contexts: Sequence[int], speculate: int,
    tokens: int, pairs: int, prompts: Path | None = None, served: bool = False, json_file: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Decodes `tokens` tokens, `streams` at once, by our engine and the peer, `pairs` times in turn; a result for each
    of `contexts`, one where there is none.

    `shape`: one that comes along, a config.json (random weights from a fixed seed), or a model. `dtype`: of the
    weights; None: float32, for the embedded model int4. `contexts`: positions of random prompts; none: the model's own
    questions (or `prompts`, a file), which each side answers until its end token. In float32 the read bandwidth is
    measured between the pairs, and the share of it that one stream uses. `served`: ours answers by HTTP, and is
    compared with the same engine without. Raises ValueError for what cannot be measured,
    with what can; ImportError where the peer is not installed.
    """
    dtype = dtype or default_dtype(shape)
    task = Task(shape, peer, dtype, streams, contexts, speculate, tokens, pairs, prompts, served)
    if tokens < 2:
        raise ValueError(f"--tokens is {tokens}: decoding is what comes after the first one, so at least 2 are needed")
    results: list[dict[str, Any]] = []
    with open_sides(task) as opened:
        config = opened.subject.config
        own: list[int | None] = [None]
        for context in contexts or own:
            read = streams == 1 and not (speculate or served) and dtype == "float32"
            result = opened.compare(decode_rate, context, say, read=read)
            if speculate:
                say(f"  accept length {_length(result['accept_length'])}; {_length(result['peer_accept_length'])}")
            if read:
                result |= _bandwidth(config, result, say)
            result["cache"] = cache_line(config, result["context"] + tokens, speculate, dtype, say)
            if read and results:
                result["growth"] = _growth(results[0], result, say)
            results.append(result)
    write_results(results, json_file)
    return results


def _length(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _bandwidth(config: ModelConfig, result: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The share of a read-only loop's bandwidth that decoding in float32 uses, counting the bytes that a token needs:
    active weights without the embedding, and the cache."""
    weights = (config.count_parameters()["active"] - config.hidden_size) * 4
    cache = config.kv_bytes(result["context"] + result["tokens"] // 2, bytes_per_value=4)
    read = result["read_bytes_per_second"]
    share = result["ours"] * (weights + cache) / read
    say(f"  {(weights + cache) / 1e6:,.1f} MB a token: {share:.0%} of the {read / 1e9:.1f} GB/s of a read-only loop")
    return {"weight_bytes_per_token": weights, "cache_bytes_per_token": cache, "bandwidth_share": share}


def _growth(short: dict[str, Any], long: dict[str, Any], say: Callable[[str], None]) -> float:
    """How much longer a step takes at the longer context, in units of the time that the read-only loop needs for the
    bytes of the cache that are more."""
    more = (long["cache_bytes_per_token"] - short["cache_bytes_per_token"]) / long["read_bytes_per_second"]
    longer = 1 / long["ours"] - 1 / short["ours"]
    say(
        f"  a step takes {longer * 1e3:.2f} ms longer than at {short['context']:,}: {longer / more:.2f} x the time to "
        "read what the cache has more"
    )
    return longer / more
