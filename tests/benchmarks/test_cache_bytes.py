"""What the cache takes, by the tensors that are made."""

import json

import pytest
import torch

from mimoflash.benchmarks.cache_bytes import LENGTHS, bench_cache, measured
from mimoflash.config import ModelConfig
from mimoflash.engine import HybridCache


def test_the_published_shape_saves_what_the_report_says(tmp_path):
    result = bench_cache("flash", json_file=tmp_path / "cache.json", say=lambda _: None)
    assert json.loads((tmp_path / "cache.json").read_text()) == result
    rows = result["lengths"]
    assert [row["positions"] for row in rows] == list(LENGTHS) == [2**i for i in range(10, 19)]
    assert all(abs(row["bytes"] / row["formula"] - 1) < 0.02 for row in rows)
    assert len({row["window"] for row in rows}) == 1
    # 39 layers x 8 heads x (192 + 128) x 129 positions, 9 x 4 x (192 + 128), 48 x 4 x (192 + 128); 2 bytes
    assert rows[-1]["window"] == 39 * 8 * 320 * 129 * 2
    assert rows[-1]["global"] == 9 * 4 * 320 * 262_144 * 2
    assert rows[-1]["all_global"] == 48 * 4 * 320 * 262_144 * 2
    assert round(rows[-1]["ratio"], 1) == 5.3


@pytest.mark.parametrize("drafts", [0, 2])
def test_what_is_counted_is_what_is_allocated(drafts):
    config = ModelConfig.tiny(num_nextn_predict_layers=2)
    cache = HybridCache(config, slots=1, pages=16, drafts=drafts, dtype=torch.float32)
    row = measured(config, 1024, drafts=drafts, dtype=torch.float32)
    assert row["bytes"] == sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.k, layer.v))
    assert row["bytes"] == row["global"] + row["window"] + row["mtp"]
    assert (row["mtp"] > 0) == (drafts > 0)


def test_an_unknown_shape_names_the_known_ones():
    with pytest.raises(ValueError, match="nano, small"):
        bench_cache("huge", say=lambda _: None)
