"""The load on the server: it finds what it looks for."""

import json

import pytest

from mimoflash.benchmarks import load
from mimoflash.config import ModelConfig
from mimoflash.serve.gate import Gate


@pytest.fixture
def run(tmp_path):
    ModelConfig.tiny(initializer_range=0.3).save(tmp_path / "config.json")

    def go(**changes):
        settings = {"dtype": None, "streams": 8, "seconds": 1, "tokens": 16, "json_file": tmp_path / "load.json"}
        return load.bench_load(str(tmp_path / "config.json"), **settings | changes)

    return go


def test_a_load_is_answered_right_and_what_is_over_the_capacity_refused(run, tmp_path):
    result = run()
    steady, crowd = result["steady"], result["crowd"]
    assert (steady["wrong"], steady["refused"], crowd["wrong"], result["bytes_left"]) == (0, 0, 0, 0)
    assert steady["right"] >= 8 * (1 - load.GIVEN_UP) / 2
    assert steady["given up"] > 0
    assert crowd["right"] >= result["capacity"] == 24
    assert crowd["right"] + crowd["refused"] == 48
    assert 0 < result["step_median"] <= result["step_p99"]
    assert json.loads((tmp_path / "load.json").read_text()) == result


def test_a_wrong_answer_is_found(run, monkeypatch):
    answers = load._answers
    monkeypatch.setattr(load, "_answers", lambda *of: [f"{answer}?" for answer in answers(*of)])
    with pytest.raises(ValueError, match="answers were not the engine's own"):
        run(seconds=2)


def test_a_gate_that_is_always_open_is_found(run, monkeypatch):
    init = Gate.__init__
    monkeypatch.setattr(Gate, "__init__", lambda self, capacity: init(self, 1000))
    with pytest.raises(ValueError, match="2 times as many requests as the capacity were all taken in"):
        run()


@pytest.mark.parametrize("name", ["streams", "seconds", "tokens"])
def test_nothing_is_no_load(run, name):
    with pytest.raises(ValueError, match=f"--{name} is 0"):
        run(**{name: 0})
