"""Text completions through OpenAI's client, and log-probabilities of prompts as a remote teacher asks for them."""

import httpx
import openai
import pytest
import torch
from scripted import ScriptedEngine, served

from mimoflash.engine import SamplingParams
from mimoflash.text import train_tokenizer


def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_what_follows_is_what_the_engine_says(tiny_server, tiny_engine, tokenizer):
    prompt = tokenizer.encode("What is the weather")
    (output,) = tiny_engine.generate([prompt], SamplingParams(max_tokens=8))
    expected = tokenizer.decode(output.tokens, skip_special=True)
    for given in ("What is the weather", prompt):
        ask = {"model": "tiny", "prompt": given, "max_tokens": 8, "temperature": 0}
        whole = client(tiny_server).completions.create(**ask)
        assert whole.choices[0].text == expected
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), len(output.tokens))
        options = {"include_usage": True}
        chunks = list(client(tiny_server).completions.create(**ask, stream=True, stream_options=options))
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected
        assert chunks[-1].usage == whole.usage
        assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == [
            whole.choices[0].finish_reason
        ]


def test_several_prompts_and_several_answers_to_each(tiny_server):
    ask = {"model": "tiny", "prompt": ["What", "is the"], "n": 2, "max_tokens": 6, "temperature": 1.0, "seed": 3}
    one, again = (client(tiny_server).completions.create(**ask) for _ in range(2))
    assert [choice.index for choice in one.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in one.choices] == [choice.text for choice in again.choices]
    alone = client(tiny_server).completions.create(**ask | {"prompt": "is the", "n": 1})
    assert alone.choices[0].text == one.choices[2].text
    streamed = ["", "", "", ""]
    for chunk in client(tiny_server).completions.create(**ask, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in one.choices]


def logp_of(engine, tokens):
    with torch.no_grad():
        return engine.model(torch.tensor([tokens]))[0].log_softmax(-1)


def test_prompt_logprobs_are_those_of_the_model(tiny_server, tiny_engine, tokenizer):
    tokens = tokenizer.encode("What is the weather in Paris? It is sunny.")
    logp = logp_of(tiny_engine, tokens)
    ask = {"model": "tiny", "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 3}
    (choice,) = httpx.post(f"{tiny_server}/v1/completions", json=ask).json()["choices"]
    first, *places = choice["prompt_logprobs"]
    assert first is None
    assert len(places) == len(tokens) - 1
    for place, found in enumerate(places):
        own = tokens[place + 1]
        assert found[str(own)]["logprob"] == pytest.approx(logp[place, own].item(), abs=1e-4)
        best = logp[place].topk(3)
        ranked = sorted((each["rank"], int(token)) for token, each in found.items() if each["rank"])
        assert [token for _, token in ranked] == best.indices.tolist()


def test_more_of_a_place_than_a_list_can_hold_is_refused(tiny_server):
    ask = {"model": "tiny", "prompt": "What", "prompt_logprobs": 1001}
    answer = httpx.post(f"{tiny_server}/v1/completions", json=ask)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_echo_scores_a_text_without_adding_to_it(tiny_server, tiny_engine, tokenizer):
    """As evaluation harnesses ask."""
    text = "What is the weather"
    tokens = tokenizer.encode(text)
    logp = logp_of(tiny_engine, tokens)
    ask = {"model": "tiny", "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
    (choice,) = client(tiny_server).completions.create(**ask).choices
    assert choice.text == text
    assert "".join(choice.logprobs.tokens) == text
    assert choice.logprobs.token_logprobs[0] is None
    own = [logp[i, token].item() for i, token in enumerate(tokens[1:])]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(own, abs=1e-4)
    assert [text[at:].startswith(token) for at, token in zip(choice.logprobs.text_offset, choice.logprobs.tokens,
                                                             strict=True)] == [True] * len(tokens)


def test_a_middle_is_filled_in_where_the_vocabulary_has_marks_for_it(tokenizer):
    plain = train_tokenizer(["a(b) " * 20], 300)
    marked = train_tokenizer(["a(b) " * 20], 300)
    marked.core.add_special_tokens(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    engines = {"plain": ScriptedEngine(plain, lambda _: "x"), "marked": ScriptedEngine(marked, lambda _: "x")}
    with served(engines) as url:
        with pytest.raises(openai.BadRequestError, match="no tokens to fill in the middle"):
            client(url).completions.create(model="plain", prompt="a(", suffix=")")
        client(url).completions.create(model="marked", prompt="a(", suffix=")")
    assert engines["marked"].asked[0][0] == "<|fim_prefix|>a(<|fim_suffix|>)<|fim_middle|>"


@pytest.mark.parametrize("cut", [1, 5])
def test_stop_strings_end_a_text(scripted_server, cut):
    url = scripted_server("one two three", cut=cut)
    ask = {"model": "scripted", "prompt": "zero", "max_tokens": 100, "stop": " three"}
    assert client(url).completions.create(**ask).choices[0].text == "one two"
    assert "".join(c.choices[0].text for c in client(url).completions.create(**ask, stream=True)) == "one two"


@pytest.mark.parametrize(("change", "param"), [
    ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [10**6]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"), ({"logprobs": 21}, "logprobs"),
    ({"echo": True, "stream": True}, "stream"), ({"prompt": "x" * 9000}, "prompt"), ({"model": "none"}, "model"),
])
def test_completions_that_cannot_be_are_named(tiny_server, change, param):
    ask = {"model": "tiny", "prompt": "What", "max_tokens": 2} | change
    response = httpx.post(f"{tiny_server}/v1/completions", json=ask)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"].startswith(param)
