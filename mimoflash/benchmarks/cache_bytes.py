"""Memory of the hybrid cache: what a sequence takes of it, beside the formula and beside a cache of global layers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mimoflash.benchmarks.pairs import machine, write_results
from mimoflash.benchmarks.subject import shape_file
from mimoflash.config import GLOBAL, ModelConfig
from mimoflash.engine import HybridCache
from mimoflash.engine.cache import PAGE

LENGTHS = tuple(1024 << i for i in range(9))  # 1,024 to 262,144


def bench_cache(
    shape: str, *, json_file: Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """What one sequence takes of the engine's cache in bfloat16 at 1,024 to 262,144 positions. `shape`: one that comes
    along, `flash` (the published model's), or a config.json. Raises ValueError for another."""
    config = ModelConfig.flash() if shape == "flash" else ModelConfig.load(shape_file(shape))
    rows = [measured(config, length) for length in LENGTHS]
    say(f"{shape}: cache of a sequence in bfloat16, MB")
    say("positions      global      window         all     formula  all global       ratio")
    for row in rows:
        sizes = "".join(f"{row[key] / 1e6:12,.2f}" for key in ("global", "window", "bytes", "formula", "all_global"))
        say(f"{row['positions']:9,}{sizes}{row['ratio']:10.2f} x")
    result = {"shape": shape, "dtype": "bf16", "unit": "bytes", "lengths": rows, "machine": machine()}
    write_results([result], json_file)
    return result


def measured(
    config: ModelConfig, positions: int, *, drafts: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Bytes of the pages and rings that a sequence of so many positions has in the engine's cache, by kind of layer.

    `formula`: `ModelConfig.kv_bytes`. `all_global`: the same measured for a model whose layers are all like its global
    ones; `ratio`: how many times as much that is. The memory is reserved, not touched: it need not be there.
    """
    taken = _taken(config, positions, drafts, dtype)
    shape = config.attention(GLOBAL)
    every = replace(
        config, layer_types=(GLOBAL,) * config.layers, num_nextn_predict_layers=0, num_key_value_heads=shape.kv_heads
    )
    whole = sum(_taken(every, positions, 0, dtype).values())
    size = sum(taken.values())
    return {
        "positions": positions, "bytes": size, **taken, "all_global": whole, "ratio": whole / size,
        "formula": config.kv_bytes(positions, bytes_per_value=dtype.itemsize, mtp_layers=drafts),
    }


def _taken(config: ModelConfig, positions: int, drafts: int, dtype: torch.dtype) -> dict[str, int]:
    config = replace(config, max_position_embeddings=max(positions, config.max_position_embeddings))
    cache = HybridCache(config, slots=1, pages=-(-positions // PAGE), drafts=drafts, dtype=dtype)
    slot = cache.take_slot()
    assert slot is not None
    assert cache.reserve(slot, positions), "the cache was made for this sequence"
    return {kind: cache.used_bytes(kind) for kind in ("global", "window", "mtp")}


def cache_line(
    config: ModelConfig, positions: int, drafts: int, weights: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Says and gives what `measured` finds for the engine's cache beside weights of this type."""
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    row = measured(config, positions, drafts=drafts, dtype=dtype)
    parts = ", ".join(f"{kind} {row[kind] / 1e6:,.2f}" for kind in ("global", "window", "mtp") if row[kind])
    say(
        f"  cache of a stream at {positions:,} positions: {row['bytes'] / 1e6:,.2f} MB ({parts}); formula "
        f"{row['formula'] / 1e6:,.2f}; all layers global {row['all_global'] / 1e6:,.2f}, {row['ratio']:.2f} x"
    )
    return row
