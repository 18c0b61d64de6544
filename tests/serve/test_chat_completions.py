"""Chat completions through OpenAI's own client, against scripted answers and a random model."""

import json

import httpx
import openai
import pytest

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "The weather of a city.",
        "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n<parameter=days>2</parameter>\n</function>\n"
    "</tool_call>"
)
USER = [{"role": "user", "content": "How is the weather?"}]


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def streamed(chunks):
    """The message that the deltas add up to, the finish reason and the usage."""
    message, reason, usage = {"content": "", "reasoning_content": "", "tool_calls": {}}, None, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            message["content"] += choice.delta.content or ""
            message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                assert isinstance(call.index, int)
                known = message["tool_calls"].setdefault(call.index, {"name": "", "arguments": ""})
                known["name"] += call.function.name or ""
                known["arguments"] += call.function.arguments or ""
    return message, reason, usage


@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
def test_reasoning_content_and_calls_come_apart_however_they_are_cut(scripted_server, cut):
    url = scripted_server(f"<think>Paris, I guess.</think>Let me see.{CALL}", cut=cut)
    ask = {"model": "scripted", "messages": USER, "tools": [WEATHER], "reasoning_effort": "high"}
    whole = client(url).chat.completions.create(**ask)
    message = whole.choices[0].message
    assert (message.content, message.reasoning_content) == ("Let me see.", "Paris, I guess.")
    assert message.tool_calls[0].function.name == "get_weather"
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris", "days": 2}
    assert whole.choices[0].finish_reason == "tool_calls"
    told, reason, usage = streamed(
        client(url).chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    )
    assert told["content"] == message.content
    assert told["reasoning_content"] == message.reasoning_content
    assert told["tool_calls"][0]["arguments"] == message.tool_calls[0].function.arguments
    assert reason == "tool_calls"
    assert usage == whole.usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


def test_what_a_client_sends_back_stands_in_the_prompt(scripted_server):
    url = scripted_server("It is sunny.")
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    messages = [
        {"role": "developer", "content": "Be brief."}, *USER,
        {"role": "assistant", "content": None, "reasoning_content": "Ask the tool.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "21 degrees"}]},
    ]
    answer = client(url).chat.completions.create(model="scripted", messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "It is sunny."
    prompt, params = scripted_server.engine.asked[0]
    assert "<|im_start|>system\nBe brief." in prompt
    assert "<think>Ask the tool.</think><tool_call>\n<function=get_weather>\n<parameter=city>Paris</para" in prompt
    assert "<tool_response>\n21 degrees\n</tool_response>" in prompt
    assert prompt.endswith("<|im_start|>assistant\n<think></think>")
    assert (params.temperature, params.top_p) == (0.8, 0.95)


@pytest.mark.parametrize(("asked", "end"), [
    ({}, "<think></think>"),
    ({"reasoning_effort": "none"}, "<think></think>"),
    ({"reasoning_effort": "low"}, ""),
    ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, ""),
    ({"reasoning_effort": "low", "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
     "<think></think>"),
])
def test_thinking_is_off_unless_it_is_asked_for(scripted_server, asked, end):
    client(scripted_server("Yes.")).chat.completions.create(model="scripted", messages=USER, **asked)
    assert scripted_server.engine.asked[0][0].endswith(f"<|im_start|>assistant\n{end}")


def test_without_parallel_calls_nothing_follows_the_first(scripted_server):
    url = scripted_server(CALL + CALL, cut=1)
    ask = {"model": "scripted", "messages": USER, "tools": [WEATHER]}
    both = client(url).chat.completions.create(**ask).choices[0].message.tool_calls
    assert len({call.id for call in both}) == 2
    (only,) = client(url).chat.completions.create(**ask, parallel_tool_calls=False).choices[0].message.tool_calls
    assert json.loads(only.function.arguments)["city"] == "Paris"
    url = scripted_server(f"<think>so </tool_call> ends</think>A </tool_call> here.{CALL}{CALL}")
    ask |= {"parallel_tool_calls": False, "reasoning_effort": "low"}
    message = client(url).chat.completions.create(**ask).choices[0].message
    assert message.content == "A </tool_call> here."
    assert len(message.tool_calls) == 1


def test_tools_that_are_not_to_be_called_are_not_shown(scripted_server):
    url = scripted_server("No.")
    client(url).chat.completions.create(model="scripted", messages=USER, tools=[WEATHER], tool_choice="none")
    assert "get_weather" not in scripted_server.engine.asked[0][0]


@pytest.mark.parametrize("cut", [1, 4])
def test_a_stop_string_is_not_part_of_the_answer(scripted_server, cut):
    url = scripted_server("one two three four", cut=cut)
    ask = {"model": "scripted", "messages": USER, "stop": [" three", "nothing"]}
    whole = client(url).chat.completions.create(**ask).choices[0]
    assert (whole.message.content, whole.finish_reason) == ("one two", "stop")
    assert streamed(client(url).chat.completions.create(**ask, stream=True))[0]["content"] == "one two"


def test_an_answer_that_is_cut_off_is_gone_on_with(scripted_server):
    url = scripted_server("one two three", cut=1)
    first = client(url).chat.completions.create(model="scripted", messages=USER, max_tokens=4).choices[0]
    assert first.finish_reason == "length"
    begun = {"role": "assistant", "content": first.message.content}
    client(url).chat.completions.create(
        model="scripted", messages=[*USER, begun], extra_body={"continue_final_message": True}
    )
    assert scripted_server.engine.asked[1][0].endswith(f"<think></think>{first.message.content}")


@pytest.mark.parametrize(("begun", "end"), [
    ({"content": "", "reasoning_content": "Let me"}, "<think>Let me"),
    ({"content": "It is", "reasoning_content": "Sun."}, "<think>Sun.</think>It is"),
    ({"content": "It is"}, "<think></think>It is"),
])
def test_it_is_gone_on_where_it_was_cut_off(scripted_server, begun, end):
    url = scripted_server(" fine")
    messages = [*USER, {"role": "assistant", **begun}]
    ask = {"model": "scripted", "messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    httpx.post(f"{url}/v1/chat/completions", json=ask).raise_for_status()
    assert scripted_server.engine.asked[0][0].endswith(f"<|im_start|>assistant\n{end}")


LAMP = {  # nothing in it that a random model could go on with for ever
    "type": "function",
    "function": {
        "name": "set_lamp",
        "parameters": {
            "type": "object", "properties": {"room": {"enum": ["hall", "attic"]}, "on": {"type": "boolean"}},
            "required": ["room", "on"],
        },
    },
}


def test_a_random_model_calls_what_it_has_to(tiny_server):
    """The grammar's work: names, types and form are right whatever the weights are."""
    ask = {"model": "tiny", "messages": USER, "tools": [LAMP, WEATHER], "max_tokens": 400, "temperature": 1.0}
    named = {"type": "function", "function": {"name": "set_lamp"}}
    for seed in range(6):
        chosen = client(tiny_server).chat.completions.create(**ask, seed=seed, tool_choice=named).choices[0]
        assert chosen.finish_reason == "tool_calls"
        (call,) = chosen.message.tool_calls  # exactly one, as with OpenAI
        assert call.function.name == "set_lamp"
        arguments = json.loads(call.function.arguments)
        assert arguments["room"] in ("hall", "attic")
        assert isinstance(arguments["on"], bool)
    only_lamp = ask | {"tools": [LAMP], "tool_choice": "required"}
    chosen = client(tiny_server).chat.completions.create(**only_lamp, seed=0).choices[0]
    assert chosen.message.tool_calls
    assert {call.function.name for call in chosen.message.tool_calls} == {"set_lamp"}


def test_a_random_model_writes_the_json_that_is_asked_for(tiny_server):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}, "ok": {"type": "boolean"}},
              "required": ["n", "ok"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    finished = 0
    for seed in range(3):
        answer = client(tiny_server).chat.completions.create(
            model="tiny", messages=USER, response_format=form, seed=seed, max_tokens=200
        ).choices[0]
        if answer.finish_reason == "stop":
            finished += 1
            value = json.loads(answer.message.content)
            assert value["n"] in (1, 2)
            assert isinstance(value["ok"], bool)
    assert finished


def test_the_same_seed_says_the_same_and_n_answers_differ(tiny_server):
    ask = {"model": "tiny", "messages": USER, "max_tokens": 12, "temperature": 1.0, "seed": 7}
    one, again = (client(tiny_server).chat.completions.create(**ask, n=3) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    assert one.usage.completion_tokens <= 36
    assert one.usage.prompt_tokens == client(tiny_server).chat.completions.create(**ask).usage.prompt_tokens


def test_logprobs_are_those_of_the_engine(tiny_server, tiny_engine):
    answer = client(tiny_server).chat.completions.create(
        model="tiny", messages=USER, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    ).choices[0]
    for token in answer.logprobs.content:
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token
        assert token.logprob == pytest.approx(max(other.logprob for other in token.top_logprobs), abs=1e-6)
        assert [other.logprob for other in token.top_logprobs] == sorted(
            (other.logprob for other in token.top_logprobs), reverse=True
        )
    assert "".join(token.token for token in answer.logprobs.content) == answer.message.content


@pytest.mark.parametrize(("change", "status", "param"), [
    ({"model": "other"}, 404, "model"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0"),
    ({"messages": [{"role": "chief", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, None),
    ({"temperature": 3}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 0}, 400, "n"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
    ({"stop": [""]}, 400, "stop"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools.0.function.name"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}, 400, None),
    ({"continue_final_message": True}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "messages"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"\ud800": 1}}}]}, 400, "messages"),
    *(
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}],
          "tool_choice": "required"}, 400, "tools")
        for parameters in (
            {"properties": {"x": {"type": 5}}}, {"properties": {"x": {"enum": 5}}}, {"properties": {"x": {"anyOf": 5}}},
            {"properties": {"x": {"$ref": "#/properties/x"}}},
            {"properties": {"x": {"anyOf": [{"$ref": "#/properties/x"}, {"type": "integer"}]}}},
        )
    ),
])
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_named(tiny_server, change, status, param, stream):
    ask = {"model": "tiny", "messages": USER, "max_tokens": 4, "stream": stream} | change
    response = httpx.post(
        f"{tiny_server}/v1/chat/completions", content=json.dumps(ask), headers={"content-type": "application/json"}
    )
    assert response.status_code == status
    error = response.json()["error"]
    assert error["message"]
    if param is not None:
        assert error["param"].startswith(param)


def test_a_body_that_is_no_json_is_an_error_of_the_client(tiny_server):
    for body in (b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"{}"):
        response = httpx.post(
            f"{tiny_server}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_model_that_fails_in_the_middle_says_so_in_the_stream(scripted_server):
    url = scripted_server("one two three four five six seven eight", cut=1, seconds=0.2)
    engine = scripted_server.engine
    events = engine.events

    async def failing(*args, **more):
        async for count, event in aenumerate(events(*args, **more)):
            if count == 5:
                raise RuntimeError("weights on fire")
            yield event

    engine.events = failing
    with pytest.raises(openai.APIError, match="see its log"):
        streamed(client(url).chat.completions.create(model="scripted", messages=USER, stream=True))
    with pytest.raises(openai.InternalServerError, match="see its log"):
        client(url).chat.completions.create(model="scripted", messages=USER)


async def aenumerate(items):
    count = 0
    async for item in items:
        yield count, item
        count += 1
