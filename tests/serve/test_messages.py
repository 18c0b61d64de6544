"""Anthropic's messages through its own client, and over the wire where the client hides what comes."""

import json
from itertools import groupby

import anthropic
import httpx
import pytest

from mimoflash.serve import ServerSettings
from mimoflash.serve.messages_schema import AnsweredMessage, AnthropicError

WEATHER = {
    "name": "get_weather", "description": "The weather of a city.",
    "input_schema": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"],
    },
}
CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n<parameter=days>2</parameter>\n</function>\n"
    "</tool_call>"
)
USER = [{"role": "user", "content": "How is the weather?"}]
ASK = {"model": "scripted", "messages": USER, "max_tokens": 1000}
THINK = {"type": "enabled", "budget_tokens": 1024}


def client(url: str, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)


def post(url: str, **change) -> httpx.Response:
    return httpx.post(f"{url}/v1/messages", json=ASK | change, timeout=30)


def events(url: str, **change) -> list[dict]:
    """Those of a stream, as they come."""
    found = []
    for block in post(url, stream=True, **change).text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def plain(message: anthropic.types.Message) -> dict:
    """What a message says; a streamed one has types of its own."""
    return message.model_dump(mode="json", exclude={"id"}, exclude_none=True, warnings=False)


def prompt(scripted_server, **change) -> str:
    """What the model is shown."""
    answer = post(scripted_server("Yes."), **change)
    assert answer.status_code == 200, answer.text
    return scripted_server.engine.asked[-1][0]


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
def test_thinking_text_and_calls_come_apart_however_they_are_cut(scripted_server, cut):
    url = scripted_server(f"<think>Paris, I guess.</think>Let me see.{CALL}\n{CALL}", cut=cut)
    ask = ASK | {"tools": [WEATHER], "thinking": THINK}
    whole = client(url).messages.create(**ask)
    thinking, text, first, second = whole.content
    assert (thinking.type, thinking.thinking, text.type, text.text) == (
        "thinking", "Paris, I guess.", "text", "Let me see."
    )
    assert thinking.signature  # clients drop a block without one
    for call in (first, second):
        assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris", "days": 2})
    assert first.id != second.id
    assert (whole.stop_reason, whole.stop_sequence) == ("tool_use", None)
    assert (whole.role, whole.model) == ("assistant", "scripted")
    assert 0 < whole.usage.output_tokens_details.thinking_tokens < whole.usage.output_tokens
    with client(url).messages.stream(**ask) as stream:
        told = stream.get_final_message()
    assert plain(told) == plain(whole)


@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
def test_a_stream_has_its_events_in_order(scripted_server, cut):
    url = scripted_server(f"<think>Paris?</think>Let me see.{CALL}", cut=cut)
    found = events(url, tools=[WEATHER], thinking=THINK)
    start, *middle, delta, end = found
    assert start["type"] == "message_start"
    usage = start["message"].pop("usage")
    assert start["message"].pop("id").startswith("msg_")
    assert start["message"] == {
        "type": "message", "role": "assistant", "model": "scripted", "content": [], "stop_reason": None,
        "stop_sequence": None,
    }
    blocks = [list(parts) for _, parts in groupby(middle, key=lambda event: event["index"])]
    assert [parts[0]["index"] for parts in blocks] == [0, 1, 2]
    for parts in blocks:
        first, *deltas, last = (event["type"] for event in parts)
        assert (first, last) == ("content_block_start", "content_block_stop")
        assert deltas
        assert set(deltas) == {"content_block_delta"}
    starts = [parts[0]["content_block"] for parts in blocks]
    assert starts[2].pop("id")
    assert starts == [
        {"type": "thinking", "thinking": "", "signature": ""}, {"type": "text", "text": ""},
        {"type": "tool_use", "name": "get_weather", "input": {}},
    ]
    kinds = [[event["delta"]["type"] for event in parts[1:-1]] for parts in blocks]
    assert kinds[0] == [*["thinking_delta"] * (len(kinds[0]) - 1), "signature_delta"]
    assert set(kinds[1]) == {"text_delta"}
    assert set(kinds[2]) == {"input_json_delta"}
    joined = "".join(event["delta"]["partial_json"] for event in blocks[2][1:-1])
    assert json.loads(joined) == {"city": "Paris", "days": 2}
    assert delta == {
        "type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": delta["usage"],
    }
    assert usage | delta["usage"] == delta["usage"]  # of the prompt nothing else is said at the end
    assert usage["output_tokens"] == 0 < delta["usage"]["output_tokens"]
    assert end == {"type": "message_stop"}


def test_an_answer_of_nothing_has_no_block(scripted_server):
    url = scripted_server("")
    whole = client(url).messages.create(**ASK)
    assert (whole.content, whole.stop_reason) == ([], "end_turn")
    assert [event["type"] for event in events(url)] == ["message_start", "message_delta", "message_stop"]


def test_answers_are_as_documented(scripted_server):
    url = scripted_server(f"<think>hm</think>Yes.{CALL}")
    AnsweredMessage.model_validate(post(url, tools=[WEATHER]).json())
    document = httpx.get(f"{url}/openapi.json").json()
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        for status, response in document["paths"][path]["post"]["responses"].items():
            schema = json.dumps(response["content"]["application/json"]["schema"])
            assert ("AnthropicError" in schema) == (status != "200")
    request = document["components"]["schemas"]["Turn"]["properties"]["content"]
    assert {"string", "array"} <= {kind.get("type") for kind in request["anyOf"]}


@pytest.mark.parametrize(("script", "change", "reason", "stopped_by", "text"), [
    ("one two three four", {}, "end_turn", None, "one two three four"),
    ("one two three four", {"stop_sequences": [" three", "nothing"]}, "stop_sequence", " three", "one two"),
    ("one two three four", {"stop_sequences": ["nothing"]}, "end_turn", None, "one two three four"),
    ("one two three four", {"max_tokens": 3}, "max_tokens", None, None),
    (CALL, {"tools": [WEATHER]}, "tool_use", None, ""),
    (f"{CALL} three", {"tools": [WEATHER], "stop_sequences": ["three"]}, "tool_use", None, None),
])
@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
def test_the_reason_to_stop(scripted_server, script, change, reason, stopped_by, text, cut):
    url = scripted_server(script, cut=cut)
    whole = client(url).messages.create(**ASK | change)
    assert (whole.stop_reason, whole.stop_sequence) == (reason, stopped_by)
    if text is not None:
        assert "".join(block.text for block in whole.content if block.type == "text") == text
    with client(url).messages.stream(**ASK | change) as stream:
        told = stream.get_final_message()
    assert plain(told) == plain(whole)


def test_what_the_cache_had_is_not_counted_as_input(tiny_server):
    messages = [{"role": "user", "content": "What is the weather in Paris? " * 20}]
    ask = {"model": "tiny", "messages": messages, "tools": [WEATHER], "system": "Be brief."}
    counted = client(tiny_server).messages.count_tokens(**ask).input_tokens
    usages = [client(tiny_server).messages.create(**ask, max_tokens=4).usage for _ in range(2)]
    assert usages[1].cache_read_input_tokens > 0
    for usage in usages:
        assert usage.cache_creation_input_tokens == 0
        assert usage.input_tokens > 0
        assert usage.input_tokens + usage.cache_read_input_tokens == counted


# -- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    {}, {"system": "Be brief."}, {"system": [{"type": "text", "text": "Be brief."}]}, {"tools": [WEATHER]},
    {"tools": [WEATHER], "tool_choice": {"type": "none"}}, {"thinking": THINK},
    {"messages": [*USER, {"role": "assistant", "content": "The weather"}]},
])
def test_tokens_are_counted_as_they_are_used(scripted_server, change):
    url = scripted_server("Yes.")
    body = {name: value for name, value in (ASK | change).items() if name != "max_tokens"}
    counted = client(url).messages.count_tokens(**body).input_tokens
    assert client(url).messages.create(**ASK | change).usage.input_tokens == counted
    (start, *_) = events(url, **change)
    assert start["message"]["usage"]["input_tokens"] == counted


def test_a_round_of_tools_stands_in_the_prompt_as_the_model_wrote_it(scripted_server):
    url = scripted_server(lambda text: "Sunny." if "tool_response" in text else f"<think>Ask.</think>Well.{CALL}{CALL}")
    ask = ASK | {"tools": [WEATHER], "thinking": {"type": "adaptive"}}
    first = client(url).messages.create(**ask)
    calls = [block for block in first.content if block.type == "tool_use"]
    results = [
        {"type": "text", "text": "Be quick."},
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": [
            {"type": "text", "text": "21 degrees"}, {"type": "text", "text": "no wind", "cache_control": None},
        ]},
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": "no such city", "is_error": True},
        {"type": "text", "text": "In one word."},
    ]
    history = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = client(url).messages.create(**ask | {"messages": history})
    assert second.content[0].text == "Sunny."
    before, after = (text for text, _ in scripted_server.engine.asked)
    assert after.startswith(before.removesuffix("<|im_start|>assistant\n"))
    assert f"Well.{CALL}{CALL}<|im_end|>" in after
    assert after.endswith(
        "<|im_start|>tool\n<tool_response>\n21 degrees\nno wind\n</tool_response>\n"
        "<tool_response>\nError: no such city\n</tool_response>\n<|im_end|>"
        "<|im_start|>user\nBe quick.\nIn one word.<|im_end|><|im_start|>assistant\n"
    )


def test_thinking_that_comes_back_is_kept(scripted_server):
    url = scripted_server(f"<think>Ask the\ntool.</think>{CALL}", cut=2)
    ask = ASK | {"tools": [WEATHER], "thinking": THINK}
    with client(url).messages.stream(**ask) as stream:
        first = stream.get_final_message()
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id}
    history = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    client(url).messages.create(**ask | {"messages": history})
    before, after = (text for text, _ in scripted_server.engine.asked)
    assert after.startswith(f"{before}<think>Ask the\ntool.</think>{CALL}<|im_end|>")
    assert "<tool_response>\n\n</tool_response>" in after


def test_thinking_that_another_server_has_hidden_says_nothing(scripted_server):
    hidden = [{"type": "redacted_thinking", "data": "c2VjcmV0"}, {"type": "text", "text": "Well."}]
    text = prompt(scripted_server, messages=[*USER, {"role": "assistant", "content": hidden}, *USER])
    assert "<think></think>Well.<|im_end|>" in text
    assert "c2VjcmV0" not in text


@pytest.mark.parametrize(("thinking", "end"), [
    (None, "<think></think>"), ({"type": "disabled"}, "<think></think>"), (THINK, ""), ({"type": "adaptive"}, ""),
])
def test_thinking_is_off_unless_it_is_asked_for(scripted_server, thinking, end):
    assert prompt(scripted_server, thinking=thinking).endswith(f"<|im_start|>assistant\n{end}")


def test_a_system_prompt_is_text_or_blocks(scripted_server):
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
              {"type": "text", "text": "Be kind."}]
    assert "<|im_start|>system\nBe brief.\nBe kind.<|im_end|>" in prompt(scripted_server, system=blocks)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt(scripted_server, system="Be brief.")
    later = [*USER, {"role": "system", "content": "Be kind."}]
    assert "weather?<|im_end|><|im_start|>system\nBe kind.<|im_end|>" in prompt(scripted_server, messages=later)


@pytest.mark.parametrize("as_blocks", [True, False])
def test_what_differs_in_each_request_does_not_stand_before_the_prompt(scripted_server, as_blocks):
    header = "x-anthropic-billing-header: cc_version=2.1.100; cch=eb6c6;"
    parts = [header, "Be brief about x-anthropic-billing-header: yes."]
    system = [{"type": "text", "text": part} for part in parts] if as_blocks else "\n".join(parts)
    assert f"<|im_start|>system\n{parts[1]}<|im_end|>" in prompt(scripted_server, system=system)
    assert "You are a helpful assistant." in prompt(scripted_server, system=header)


def test_turns_of_one_role_are_one_turn(scripted_server):
    call = {"type": "tool_use", "id": "t", "name": "get_weather", "input": {"days": 2}}
    messages = [
        {"role": "user", "content": "One."}, {"role": "user", "content": "Two."},
        {"role": "assistant", "content": "Well."}, {"role": "assistant", "content": [call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "3"}]},
        {"role": "user", "content": "Three."},
    ]
    text = prompt(scripted_server, messages=messages)
    assert "<|im_start|>user\nOne.\nTwo.<|im_end|>" in text
    assert "Well.<tool_call>\n<function=get_weather>\n<parameter=days>2</parameter>\n</function>" in text
    assert text.index("<tool_response>\n3\n") < text.index("<|im_start|>user\nThree.")


@pytest.mark.parametrize("content", ["The answer is", [{"type": "text", "text": "The answer"},
                                                      {"type": "text", "text": " is"}]])
def test_an_answer_that_the_client_has_begun_is_gone_on_with(scripted_server, content):
    text = prompt(scripted_server, messages=[*USER, {"role": "assistant", "content": content}])
    assert text.endswith("<|im_start|>assistant\n<think></think>The answer is")
    answer = client(scripted_server(" 42.")).messages.create(
        **ASK | {"messages": [*USER, {"role": "assistant", "content": content}]}
    )
    assert answer.content[0].text == " 42."  # what was given is not said again


def test_the_choice_of_a_tool(scripted_server):
    url = scripted_server(CALL + CALL, cut=1)
    ask = ASK | {"tools": [WEATHER]}
    for choice, calls in [
        (None, 2), ({"type": "auto"}, 2), ({"type": "auto", "disable_parallel_tool_use": True}, 1),
        ({"type": "any", "disable_parallel_tool_use": True}, 1), ({"type": "tool", "name": "get_weather"}, 2),
    ]:
        answer = post(url, **ask | ({"tool_choice": choice} if choice else {})).json()
        assert [block["type"] for block in answer["content"]] == ["tool_use"] * calls
        grammar = scripted_server.engine.asked[-1][1].grammar
        assert (grammar is not None) == (choice is not None and choice["type"] in ("any", "tool"))
    assert "<name>get_weather</name>\n<description>The weather of a city.</desc" in scripted_server.engine.asked[-1][0]
    post(url, **ask | {"tool_choice": {"type": "none"}})
    assert "get_weather" not in scripted_server.engine.asked[-1][0]


def test_sampling_is_as_asked(scripted_server):
    url = scripted_server("Yes.")
    post(url, temperature=0.5, top_p=0.7, top_k=9, max_tokens=12, stop_sequences=["x"])
    params = scripted_server.engine.asked[-1][1]
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.7, 9, 12)
    assert tuple(params.stop) == ("x",)
    post(url)
    assert scripted_server.engine.asked[-1][1].temperature == 0.8  # the family's


def test_what_is_not_known_is_ignored(scripted_server):
    url = scripted_server("Yes.")
    answer = client(url).beta.messages.create(
        **ASK | {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ]}]},
        betas=["interleaved-thinking-2025-05-14"], metadata={"user_id": "me"}, service_tier="auto",
        extra_body={"context_management": {"edits": []}}, extra_headers={"anthropic-version": "2099-01-01"},
        tools=[WEATHER | {"type": "custom", "cache_control": {"type": "ephemeral"}, "eager_input_streaming": True}],
    )
    assert answer.content[0].text == "Yes."
    nothing = {"name": "f", "input_schema": {"type": "object", "properties": None}}
    assert post(url, tools=[nothing], tool_choice={"type": "any"}).status_code == 200
    assert "<required>None" not in scripted_server.engine.asked.pop()[0]
    assert "cache_control" not in scripted_server.engine.asked[-1][0]


def test_values_of_a_call_come_back_as_they_were(scripted_server):
    value = {"city": "<a href=\"x\">&amp;\n</a> é 雪", "days": 2}
    call = (f"<tool_call>\n<function=get_weather>\n<parameter=city>{value['city']}</parameter>\n"
            "<parameter=days>2</parameter>\n</function>\n</tool_call>")
    url = scripted_server(call, cut=1)
    with client(url).messages.stream(**ASK, tools=[WEATHER]) as stream:
        answer = stream.get_final_message()
    assert answer.content[0].input == value
    history = [*USER, {"role": "assistant", "content": answer.content},
               {"role": "user", "content": [{"type": "tool_result", "tool_use_id": answer.content[0].id}]}]
    client(url).messages.create(**ASK | {"messages": history}, tools=[WEATHER])
    assert call in scripted_server.engine.asked[-1][0]


# -- a random model ---------------------------------------------------------------------------------------------------

PICK = {
    "name": "pick",
    "input_schema": {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}},
        "required": ["city", "sure"],
    },
}


@pytest.mark.parametrize("thinking", [None, THINK])
@pytest.mark.parametrize("stream", [False, True])
def test_a_random_model_calls_what_it_has_to(tiny_server, stream, thinking):
    for choice in ({"type": "any"}, {"type": "tool", "name": "pick"}):
        ask = {
            "model": "tiny", "messages": USER, "max_tokens": 300,
            "tools": [PICK] if choice["type"] == "any" else [WEATHER, PICK],
            "tool_choice": choice | {"disable_parallel_tool_use": thinking is None},
            "thinking": thinking or {"type": "disabled"},
        }
        if stream:
            with client(tiny_server).messages.stream(**ask) as coming:
                answer = coming.get_final_message()
        else:
            answer = client(tiny_server).messages.create(**ask)
        if thinking and answer.stop_reason == "max_tokens":
            continue  # thoughts without an end are in form
        assert answer.stop_reason == "tool_use"
        calls = [block for block in answer.content if block.type == "tool_use"]
        assert len(calls) == 1 or thinking
        for call in calls:
            assert call.name == "pick"
            assert set(call.input) == {"city", "sure"}
            assert call.input["city"] in ("Paris", "Rome")
            assert isinstance(call.input["sure"], bool)


def test_a_random_model_writes_the_json_that_is_asked_for(tiny_server):
    schema = PICK["input_schema"] | {"additionalProperties": False}
    answer = client(tiny_server).messages.create(
        model="tiny", messages=USER, max_tokens=300, output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    value = json.loads(answer.content[0].text)
    assert value["city"] in ("Paris", "Rome")
    assert isinstance(value["sure"], bool)


# -- errors -----------------------------------------------------------------------------------------------------------

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
USE = {"type": "tool_use", "id": "t", "name": "get_weather", "input": {}}


def user(*content):
    return {"messages": [{"role": "user", "content": list(content)}]}


@pytest.mark.parametrize(("change", "status", "words"), [
    ({"model": "other"}, 404, ["model", "'other'", "tiny"]),
    ({"max_tokens": None}, 400, ["max_tokens"]),
    ({"max_tokens": 0}, 400, ["max_tokens"]),
    ({"messages": []}, 400, ["messages"]),
    ({"messages": [{"role": "chief", "content": "x"}]}, 400, ["messages.0.role", "user"]),
    ({"messages": [{"role": "user", "content": []}]}, 400, ["messages.0", "needs content"]),
    ({"messages": [{"role": "user", "content": 5}]}, 400, ["messages.0.content"]),
    (user({"type": "text"}), 400, ["messages.0.content.0.text.text"]),
    (user({"type": "text", "text": "x"}, IMAGE), 400, ["messages.0.content.1", "image"]),
    (user({"type": "document", "source": {}}), 400, ["messages.0.content.0", "document"]),
    (user({"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}), 400,
     ["messages.0.content.0.tool_result.content.0", "image"]),
    ({"system": [IMAGE]}, 400, ["system.0", "image"]),
    (user(USE), 400, ["messages.0", "role user", "tool_use"]),
    ({"messages": [*USER, {"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]}, 400,
     ["messages.1", "role assistant", "tool_result"]),
    ({"messages": [*USER, {"role": "assistant", "content": [USE]}]}, 400, ["messages", "tool_result"]),
    ({"temperature": 1.5}, 400, ["temperature"]),
    ({"temperature": "hot"}, 400, ["temperature"]),
    ({"top_p": 0}, 400, ["top_p"]),
    ({"top_k": -1}, 400, ["top_k"]),
    ({"stop_sequences": [""]}, 400, ["stop_sequences.0"]),
    ({"stop_sequences": "x"}, 400, ["stop_sequences"]),
    ({"thinking": {"type": "always"}}, 400, ["thinking.type"]),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400,
     ["tools.0", "web_search_20250305", "custom"]),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, ["tools.0", "bash_20250124"]),
    ({"tools": [WEATHER | {"name": "a b"}]}, 400, ["tools.0.name"]),
    ({"tools": [{"name": "f"}]}, 400, ["tools.0.input_schema"]),
    ({"tools": [{"name": "f", "input_schema": {"type": "string"}}]}, 400, ["tools.0.input_schema.type"]),
    ({"tool_choice": {"type": "any"}}, 400, ["tool_choice", "no tools"]),
    ({"tool_choice": {"type": "tool", "name": "f"}, "tools": [WEATHER]}, 400, ["tool_choice", "'f'", "get_weather"]),
    ({"tool_choice": {"type": "tool"}, "tools": [WEATHER]}, 400, ["tool_choice", "name is missing"]),
    ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, ["messages", "tokens"]),
])
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_named(tiny_server, change, status, words, stream):
    response = post(tiny_server, **{"model": "tiny", "max_tokens": 4, "stream": stream} | change)
    assert response.status_code == status
    error = AnthropicError.model_validate(response.json()).error
    assert error.type == ("not_found_error" if status == 404 else "invalid_request_error")
    for word in words:
        assert word in error.message


def test_counting_refuses_what_answering_refuses(tiny_server):
    for change in (user(IMAGE), {"model": "other"}, {"tool_choice": {"type": "any"}}, {"messages": []}):
        response = httpx.post(
            f"{tiny_server}/v1/messages/count_tokens", json={"model": "tiny", "messages": USER} | change
        )
        assert response.status_code in (400, 404)
        AnthropicError.model_validate(response.json())


def test_errors_are_those_that_the_client_knows(scripted_server):
    limits = ServerSettings(api_keys=["secret"], capacity=1, body_bytes=2000)
    url = scripted_server("one two three four five", cut=1, seconds=0.05, settings=limits)
    with pytest.raises(anthropic.AuthenticationError):
        client(url).messages.create(**ASK)
    with pytest.raises(anthropic.NotFoundError):
        client(url, "secret").messages.create(**ASK | {"model": "other"})
    with pytest.raises(anthropic.ContentTooLargeError, match="2,000 bytes"):
        client(url, "secret").messages.create(**ASK | {"system": "x" * 3000})
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client(url, "secret").messages.create(**ASK, extra_body={"temperature": 2})
    with client(url, "secret").messages.create(**ASK, stream=True):
        with pytest.raises(anthropic.RateLimitError) as caught:
            client(url, "secret").messages.create(**ASK)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        counted = client(url, "secret").messages.count_tokens(model="scripted", messages=USER)
        assert counted.input_tokens > 0  # nothing is generated: there is room for it


def test_a_model_that_fails_in_the_middle_says_so_in_the_stream(scripted_server):
    url = scripted_server("one two three four five six seven eight", cut=1, seconds=0.2)
    engine = scripted_server.engine
    written = engine.events

    async def failing(*args, **more):
        count = 0
        async for event in written(*args, **more):
            if count == 5:
                raise RuntimeError("weights on fire")
            count += 1
            yield event

    engine.events = failing
    *begun, last = events(url)
    assert begun[0]["type"] == "message_start"
    assert last["error"]["type"] == "api_error"
    AnthropicError.model_validate(last)
    with pytest.raises(anthropic.APIStatusError, match="see its log"), client(url).messages.stream(**ASK) as stream:
        stream.until_done()
    with pytest.raises(anthropic.InternalServerError, match="see its log"):
        client(url).messages.create(**ASK)
