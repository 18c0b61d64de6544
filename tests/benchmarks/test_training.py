import json

import pytest

from mimoflash.benchmarks.training import bench_training
from mimoflash.config import ModelConfig


def test_both_sides_run_and_the_figures_are_written(tmp_path):
    pytest.importorskip("transformers")
    ModelConfig.tiny().save(tmp_path / "tiny.json")
    lines: list[str] = []
    result = bench_training(
        str(tmp_path / "tiny.json"), peer="transformers", batch=2, length=32, pairs=1,
        json_file=tmp_path / "out.json", say=lines.append,
    )
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert result["ratio"] == pytest.approx(result["ours"] / result["peer"])
    assert result["spread"][0] <= result["ratio"] <= result["spread"][1]
    assert result["unit"] == "tokens/s"
    assert 0 < result["mfu"] < 1
    assert len(lines) == 2


def test_an_unknown_shape_names_the_known_ones():
    with pytest.raises(ValueError, match="nano, small"):
        bench_training("huge", peer=None, batch=1, length=8, pairs=1, json_file=None)
