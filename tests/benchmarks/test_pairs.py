"""Sides in turn, and what is made of their figures."""

import statistics
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimoflash.benchmarks.pairs import Side, answer_requests, compare, described, machine, run_in_turn
from mimoflash.kernels import native

rates = st.floats(0.1, 1e4)


@given(st.lists(st.tuples(rates, rates), min_size=1, max_size=9))
def test_the_ratio_is_the_median_over_pairs(pairs):
    result = compare([{"rate": a} for a, _ in pairs], [{"rate": b} for _, b in pairs])
    ratios = sorted(a / b for a, b in pairs)
    assert result["ratio"] == statistics.median(ratios)
    assert result["spread"] == [ratios[0], ratios[-1]]
    assert result["ours"] == statistics.median(a for a, _ in pairs)
    assert result["peer"] == statistics.median(b for _, b in pairs)


def test_without_a_peer_there_is_no_ratio():
    result = compare([{"rate": 2.0}, {"rate": 4.0}], [])
    assert result == {"ours": 3.0, "peer": None, "ratio": None, "spread": None}
    assert described(result | {"unit": "tokens/s"}, None) == "median: 3.0 tokens/s"


def test_sides_take_turns_and_the_first_changes():
    order, lines = [], []

    def measure(name):
        def one(pair):
            order.append((name, pair))
            return {"rate": {"ours": 3.0, "peer": 2.0}[name], "pair": pair}

        return one

    results = run_in_turn({"ours": measure("ours"), "peer": measure("peer")}, 3, lines.append, "tok/s")
    assert order == [("ours", 0), ("peer", 0), ("peer", 1), ("ours", 1), ("ours", 2), ("peer", 2)]
    assert [one["pair"] for one in results["peer"]] == [0, 1, 2]
    assert len(lines) == 3
    assert "ratio 1.50" in lines[0]


def test_the_machine_is_named():
    assert machine()["processor"]
    assert machine()["threads"] >= 1
    assert (machine()["kernels"] is None) == (not native.available())


# -- processes; this file is also the module that they run ------------------------------------------------------------


@pytest.fixture
def open_side(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return lambda **settings: Side(Path(__file__).stem, **settings)


def test_a_side_answers_and_what_it_prints_is_not_an_answer(open_side):
    with open_side(side="echo") as side:
        assert side.ask(x=1) == {"settings": {"side": "echo"}, "x": 1}
        assert side.ask(x=2)["x"] == 2
    assert side.process.returncode == 0


def test_a_side_that_waits_uses_no_processor(open_side):
    with open_side(side="spinner") as side:
        begin = side.ask()["cpu"]
        time.sleep(1.5)
        assert side.ask()["cpu"] - begin < 0.15


def test_a_side_that_fails_says_why(open_side):
    failure = r"(?s)the broken side failed:.*no such luck"
    with open_side(side="broken") as side, pytest.raises(ValueError, match=failure):
        side.ask(x=1)


def _open(settings):
    print("a library's greeting")
    if settings["side"] == "broken":
        raise ValueError("no such luck")
    if settings["side"] == "spinner":
        import torch

        def work():  # torch's threads spin for a while after it
            torch.ones(512, 512) @ torch.ones(512, 512)
            time.sleep(0.1)
            return {"cpu": time.process_time()}

        return work
    return lambda **request: {"settings": settings} | request


if __name__ == "__main__" and len(sys.argv) == 2:
    answer_requests(_open)
