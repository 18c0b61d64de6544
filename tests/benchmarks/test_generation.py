"""Decode and prefill beside the peers: everything runs, and the figures are what they say."""

import importlib.util
import json
import math

import pytest

from mimoflash.benchmarks import generation, peers
from mimoflash.benchmarks.decode import bench_decode
from mimoflash.benchmarks.peers import LlamaCpp, Ours, Stream, Transformers, accept_length, decode_rate, prefill_rate
from mimoflash.benchmarks.prefill import bench_prefill
from mimoflash.benchmarks.subject import gguf_file, open_subject

OPTIONS = dict(peer=None, dtype="float32", streams=1, contexts=[], speculate=0, tokens=4, pairs=1)


def test_rates_count_what_follows_the_first_token():
    one = [Stream(prompt=100, tokens=11, first=0.5, last=2.5, passes=10)]
    assert decode_rate([one]) == 5.0  # ten tokens in two seconds
    assert prefill_rate([one]) == 200.0
    two = [Stream(10, 5, 0.5, 1.5, 4), Stream(10, 7, 1.0, 2.5, 3)]  # together: ten tokens in two seconds
    assert decode_rate([two]) == 5.0
    assert prefill_rate([two]) == 20.0
    assert decode_rate([one, two]) == 5.0
    assert accept_length([one, two]) == 20 / 17
    with pytest.raises(ValueError, match="ended with its first token"):
        decode_rate([[Stream(5, 1, 0.5, 0.5, 0)]])
    assert accept_length([[Stream(5, 1, 0.5, 0.5, 0)]]) is None


@pytest.fixture(scope="module")
def settings(shape, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("weights")
    subject = open_subject(shape, scratch, context=None, tokens=16)
    return {
        "threads": 1, "dtype": "float32", "streams": 3, "speculate": 0, "decodes": True, "endless": True,
        "source": subject.source, "positions": 96, "float32_cache": True,
        "file": str(gguf_file(subject, "float32", scratch)),
    }


@pytest.mark.parametrize("side", [Ours, LlamaCpp, Transformers])
def test_every_side_does_what_is_asked(settings, side):
    if side in (LlamaCpp, Transformers):
        pytest.importorskip({LlamaCpp: "xllamacpp", Transformers: "transformers"}[side])
    streams = side(settings).run([[5, 6, 7], [8, 9], [7, 8, 9, 10]], 12)
    assert [s.prompt for s in streams] == [3, 2, 4]
    assert all(s.tokens == 12 and s.passes == 11 and 0 < s.first < s.last for s in streams)


@pytest.mark.parametrize(
    ("changes", "flash", "cache"),
    [
        ({}, "DISABLED", "F32"), ({"decodes": False}, "AUTO", "F32"), ({"float32_cache": False}, "AUTO", "F16"),
    ],
)
def test_llama_cpp_runs_with_what_is_fastest_for_it(settings, monkeypatch, changes, flash, cache):
    xllamacpp = pytest.importorskip("xllamacpp")
    given = []
    monkeypatch.setattr(xllamacpp, "Server", given.append)
    LlamaCpp(settings | changes)
    assert given[0].flash_attn_type == getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
    assert given[0].cache_type_k == given[0].cache_type_v == getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache}")


@pytest.mark.parametrize("side", [Ours, LlamaCpp])
def test_passes_tell_how_many_drafts_were_right(settings, side):
    pytest.importorskip("xllamacpp")
    (stream,) = side(settings | {"speculate": 2, "streams": 1}).run([[5, 6, 7]], 40)
    assert stream.tokens == 40
    assert 13 <= stream.passes <= 39  # one to three tokens each


@pytest.mark.parametrize("peer", ["llama.cpp", "transformers"])
def test_decode_beside_a_peer(shape, tmp_path, peer):
    pytest.importorskip(peers.PEERS[peer])
    lines = []
    (result,) = bench_decode(
        shape, **OPTIONS | {"peer": peer, "pairs": 2}, json_file=tmp_path / "out.json", say=lines.append
    )
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert {"ours", "peer", "ratio", "spread", "unit", "shape", "dtype", "streams", "machine"} <= set(result)
    assert result["spread"][0] <= result["ratio"] <= result["spread"][1]
    assert (result["unit"], result["shape"], result["dtype"], result["streams"]) == ("tokens/s", shape, "float32", 1)
    assert (result["context"], result["speculate"], result["accept_length"]) == (64, 0, 1.0)
    needed = result["weight_bytes_per_token"] + result["cache_bytes_per_token"]
    share = result["ours"] * needed / result["read_bytes_per_second"]
    assert result["bandwidth_share"] == pytest.approx(share)
    assert ("peer_f16_cache" in result) == (peer == "llama.cpp")
    assert sum("ratio" in line for line in lines) == 2
    assert any("read-only loop" in line for line in lines)
    assert any("cache of a stream" in line for line in lines)


def test_many_streams_at_a_context(shape):
    (result,) = bench_decode(shape, **OPTIONS | {"streams": 3, "contexts": [200]}, say=lambda _: None)
    assert (result["context"], result["streams"]) == (200, 3)
    assert "bandwidth_share" not in result  # weights are read once for all streams
    assert result["cache"]["positions"] == 204


def test_contexts_are_compared(shape, tmp_path):
    results = bench_decode(
        shape, **OPTIONS | {"contexts": [20, 300]}, json_file=tmp_path / "out.json", say=lambda _: None
    )
    assert json.loads((tmp_path / "out.json").read_text()) == results
    short, long = results
    assert (short["context"], long["context"]) == (20, 300)
    more = long["cache_bytes_per_token"] - short["cache_bytes_per_token"]
    assert more == 2 * (32 + 32) * 280 * 4  # two global layers of one head; the windows were full
    seconds = more / long["read_bytes_per_second"]
    assert long["growth"] == pytest.approx((1 / long["ours"] - 1 / short["ours"]) / seconds)
    assert "growth" not in short


def test_prefill_beside_a_peer(shape, tmp_path):
    pytest.importorskip("xllamacpp")
    (result,) = bench_prefill(
        shape, peer="llama.cpp", dtype="bf16", streams=2, contexts=[40], pairs=1, json_file=tmp_path / "out.json",
        say=lambda _: None,
    )
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert math.isclose(result["ratio"], result["ours"] / result["peer"])
    assert (result["context"], result["dtype"]) == (40, "bf16")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"peer": "vllm"}, "must be one of llama.cpp, transformers"),
        ({"dtype": "fp8"}, "must be one of float32, bf16, int8, int4"),
        ({"streams": 0}, "--streams is 0: it must be at least 1"),
        ({"contexts": [5, 0]}, "--context is 0: it must be at least 1"),
        ({"pairs": 0}, "--pairs is 0"),
        ({"tokens": 1}, "at least 2 are needed"),
        ({"speculate": 4}, "0 .none. to 3"),
        ({"peer": "transformers", "dtype": "int8"}, "float32 and bf16 here, not int8: --peer llama.cpp has all four"),
        ({"peer": "transformers", "speculate": 1}, "runs no MTP layers"),
        ({"shape": "smol", "peer": "transformers"}, "float32 and bf16 here, not int4"),
        ({"shape": "huge"}, "nano, small"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_runs(monkeypatch, shape, wrong, message):
    monkeypatch.setattr(generation, "Side", None)
    with pytest.raises(ValueError, match=message):
        bench_decode(**{"shape": shape} | OPTIONS | {"dtype": None} | wrong)


def test_a_peer_that_is_not_installed_comes_with_the_pip_line(monkeypatch, shape):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"llama.cpp needs xllamacpp: pip install -e '\.\[peers\]'"):
        bench_decode(shape, **OPTIONS | {"peer": "llama.cpp"})
