"""What an engine cannot be, and what it cannot be asked: named, and without a trace in it."""

import dataclasses

import pytest
from oracles import CONFIG

from mimoflash.engine import Engine, SamplingParams
from mimoflash.model import Transformer

pytestmark = pytest.mark.usefixtures("runner")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speculate": 4}, "0 to 3"),
        ({"speculate": -1}, "0 to 3"),
        ({"dtype": "float8"}, "must be one of float32, bf16, int8, int4"),
        ({"dtype": "fp8"}, "on a GPU"),
        ({"max_running": 0}, "max_running is 0"),
        ({"cache_bytes": 1000}, "cache_bytes is 1000"),
    ],
)
def test_what_an_engine_cannot_be_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, **arguments)


def test_what_the_model_or_the_machine_lacks_is_named(model, runner):
    one = Transformer(dataclasses.replace(CONFIG, num_nextn_predict_layers=1))
    with pytest.raises(ValueError, match="the model has 1 MTP layers"):
        Engine(one, speculate=2)
    if runner == "torch":
        with pytest.raises(ValueError, match="needs the compiled CPU kernels"):
            Engine(model, dtype="int8")


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], None, "prompt 0 is empty"),
        ([[1], [128]], None, "prompt 1 has a token outside"),
        ([[1], [-1]], None, "prompt 1 has a token outside"),
        ([[1]], [SamplingParams()] * 2, "2 SamplingParams for 1"),
        ([1, 2, 3], None, "must be a list of prompts"),
        ([[1]], SamplingParams(stop="x"), "need a tokenizer"),
        ([[1] * 1024], None, "prompt 0 has 1024 tokens; the model's context of 1024"),
        ([[1]], SamplingParams(stop_token_ids=[128]), "stop_token_ids names token 128"),
    ],
)
def test_bad_requests_are_named(model, prompts, params, message):
    engine = Engine(model)
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, params)
    assert engine.stats()["waiting"] == 0
