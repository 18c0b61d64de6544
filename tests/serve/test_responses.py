"""Responses through OpenAI's own client, against scripted answers and a random model."""

import json
from typing import Literal

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from mimoflash.serve.responses_input import chat_messages
from mimoflash.serve.responses_schema import ToldResponse

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "get_weather", "description": "Of a city.", "parameters": CITY, "strict": True}
PATCH = {"type": "custom", "name": "patch", "description": "Changes files.",
         "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}}
CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n<parameter=days>2</parameter>\n</function>\n"
    "</tool_call>"
)
ASK = {"model": "scripted", "input": "How is the weather?"}
EVENTS = pydantic.TypeAdapter(ResponseStreamEvent)


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def post(url: str, **ask) -> httpx.Response:
    return httpx.post(f"{url}/v1/responses", json=ASK | ask, timeout=60)


def streamed(url: str, **ask) -> list[dict]:
    """The events, each of the form that the official client knows."""
    frames = post(url, stream=True, **ask).text.strip().split("\n\n")
    events = []
    for frame in frames:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENTS.validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def added_up(events: list[dict]) -> list[dict]:
    """The output that the events tell of, put together from the smallest of them; larger ones must agree."""
    output = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(output)
            assert event["item"]["status"] == "in_progress"
            output.append(event["item"] | {"text": ""})
        elif "output_index" in event:
            item = output[event["output_index"]]
            assert event.get("item_id", item["id"]) == item["id"]
            if kind.endswith(".delta"):
                item["text"] += event["delta"]
            elif kind.endswith("part.done"):
                assert event["part"]["text"] == item["text"]
            elif kind == "output_item.done":
                output[event["output_index"]] = event["item"]
                assert item["text"] == said(event["item"])
            elif kind.endswith(".done"):
                assert next(event[name] for name in ("text", "arguments", "input") if name in event) == item["text"]
    return output


def said(item: dict) -> str:
    (part,) = item.get("content") or item.get("summary") or [{"text": item.get("arguments", item.get("input"))}]
    return part["text"]


def plain(response: dict) -> dict:
    """Without what differs from one time to the next."""
    kept = {key: value for key, value in response.items() if key not in ("id", "created_at", "completed_at")}
    return kept | {"output": [item | {"id": item["id"].split("_")[0]} for item in response["output"]]}


@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
@pytest.mark.parametrize("summary", [None, "auto"])
def test_events_add_up_to_the_response_however_they_are_cut(scripted_server, cut, summary):
    url = scripted_server(f"<think>Paris, I guess.</think>Let me see.{CALL}{CALL} Wait.", cut=cut)
    ask = {"tools": [WEATHER], "reasoning": {"effort": "high", "summary": summary}, "metadata": {"a": "b"}}
    whole = post(url, **ask).json()
    Response.model_validate(whole)
    ToldResponse.model_validate(whole)
    reasoning, message, one, two, last = whole["output"]
    part = "summary" if summary else "content"
    assert [part["text"] for part in reasoning[part]] == ["Paris, I guess."]
    assert [message["content"][0]["text"], last["content"][0]["text"]] == ["Let me see.", " Wait."]
    assert json.loads(one["arguments"]) == json.loads(two["arguments"]) == {"city": "Paris", "days": 2}
    assert one["call_id"] != two["call_id"]
    assert (whole["status"], whole["metadata"]) == ("completed", {"a": "b"})
    usage = whole["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]

    events = streamed(url, **ask)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == "response.completed"
    final = events[-1]["response"]
    assert added_up(events) == final["output"]
    assert plain(final) == plain(whole)
    assert events[0]["response"]["id"] == final["id"]


def test_the_official_client_streams_and_collects(scripted_server):
    url = scripted_server(f"<think>Hm.</think>See.{CALL}", cut=2)
    ask = ASK | {"tools": [WEATHER], "reasoning": {"effort": "low"}}
    whole = client(url).responses.create(**ask)
    assert whole.output_text == "See."
    text = [event.delta for event in client(url).responses.create(**ask, stream=True) if "text.delta" in event.type]
    assert "".join(text) == "Hm.See."
    with client(url).responses.stream(**ask) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.reasoning_text.delta", "response.function_call_arguments.delta"} <= kinds
    assert final.output_text == "See."
    assert final.output[-1].parsed_arguments == {"city": "Paris", "days": 2}


def tool_script(prompt: str) -> str:
    return "It is sunny." if "<tool_response>" in prompt else f"<think>Ask.</think>{CALL}"


@pytest.mark.parametrize("stateful", [True, False])
def test_a_tool_is_called_and_its_result_answered(scripted_server, stateful):
    """By the id of the response before, or with all items sent again: the model reads the same."""
    url = scripted_server(tool_script)
    ask = {"model": "scripted", "tools": [WEATHER], "reasoning": {"effort": "high"}, "store": stateful}
    begin = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "How is the weather?"}]
    first = client(url).responses.create(**ask, input=begin)
    call = first.output[-1]
    result = [{"type": "function_call_output", "call_id": call.call_id, "output": [
        {"type": "input_text", "text": "21 degrees"}, {"type": "input_image", "image_url": "data:"},
    ]}]
    if stateful:
        answer = client(url).responses.create(**ask, input=result, previous_response_id=first.id)
    else:
        answer = client(url).responses.create(**ask, input=[*begin, *first.output, *result])
    assert answer.output_text == "It is sunny."
    prompt = scripted_server.engine.asked[1][0]
    assert "<|im_start|>system\nBe brief." in prompt
    assert f"<think>Ask.</think>{CALL}<|im_end|>" in prompt
    assert "<tool_response>\n21 degrees[image left out: only text can be read here]\n</tool_response>" in prompt


THOUGHT = [{"type": "reasoning_text", "text": "Ask the tool."}]


@pytest.mark.parametrize("item", [
    {"content": THOUGHT, "summary": []},
    {"content": THOUGHT, "summary": [{"type": "summary_text", "text": "In short."}]},
    {"summary": [{"type": "summary_text", "text": "Ask the tool."}], "encrypted_content": "abc"},
])
def test_reasoning_goes_back_into_the_turn_it_belongs_to(scripted_server, item):
    url = scripted_server("Well.")
    call = {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": '{"city": "Paris", "days": 2}'}
    more = [{"type": "reasoning", "summary": [], "encrypted_content": "x"}, {"type": "reasoning", **item}, call,
            {"type": "function_call_output", "call_id": "c", "output": "21"}, {"type": "reasoning", **item},
            {"role": "assistant", "content": "Sunny."}, {"role": "assistant", "content": "Warm."}]
    client(url).responses.create(**ASK | {"input": [{"role": "user", "content": "Weather?"}, *more]}, tools=[WEATHER])
    prompt = scripted_server.engine.asked[0][0]
    turn = "<|im_start|>assistant\n<think>Ask the tool.</think>"
    assert prompt.count(turn) == 2
    assert f"{turn}{CALL}<|im_end|>" in prompt
    assert f"{turn}Sunny.<|im_end|><|im_start|>assistant\n<think></think>Warm.<|im_end|>" in prompt


def test_reasoning_between_calls_begins_another_turn():
    items = [
        item for name in "ab" for item in (
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": name}]},
            {"type": "function_call", "call_id": name, "name": "f", "arguments": "{}"},
        )
    ]
    turns = chat_messages(items)
    assert [(turn["reasoning_content"], len(turn["tool_calls"])) for turn in turns] == [("a", 1), ("b", 1)]


@pytest.mark.parametrize(("reasoning", "end"), [
    (None, "<think></think>"), ({"summary": "auto"}, "<think></think>"), ({"effort": "none"}, "<think></think>"),
    ({"effort": "minimal"}, ""), ({"effort": "xhigh"}, ""),
])
def test_effort_other_than_none_is_thinking(scripted_server, reasoning, end):
    post(scripted_server("Yes."), reasoning=reasoning)
    assert scripted_server.engine.asked[0][0].endswith(f"<|im_start|>assistant\n{end}")


def test_tools_of_other_kinds(scripted_server):
    """Free text is a function's only parameter, a namespace stands before the name, hosted tools are left out."""
    url = scripted_server(
        "<tool_call>\n<function=patch>\n<parameter=input>say \"hi\"\n</parameter>\n</function>\n</tool_call>"
        + CALL.replace("get_weather", "mcp__w.get_weather") + CALL.replace("get_weather", "nobody")
    )
    ask = {"tools": [PATCH, {"type": "namespace", "name": "mcp__w", "tools": [WEATHER]}, {"type": "web_search"}]}
    events = streamed(url, **ask)
    custom, spaced, unknown = output = events[-1]["response"]["output"]
    assert added_up(events) == output
    assert (custom["type"], custom["name"], custom["input"]) == ("custom_tool_call", "patch", 'say "hi"\n')
    assert (spaced["type"], spaced["name"], spaced["namespace"]) == ("function_call", "get_weather", "mcp__w")
    assert (unknown["name"], "namespace" in unknown) == ("nobody", False)
    prompt = scripted_server.engine.asked[0][0]
    description = "Changes files.\n\nIts input follows this grammar (lark):\nstart: /.+/"
    assert f"<name>patch</name>\n<description>{description}</description>" in prompt
    assert "web_search" not in prompt
    results = [{"type": f"{kind}_output", "call_id": item["call_id"], "output": kind}
               for item in output[:2] for kind in [item["type"].removesuffix("_call") + "_call"]]
    post(url, input=[{"role": "user", "content": "Go."}, *output, *results], **ask).raise_for_status()
    prompt = scripted_server.engine.asked[1][0]
    assert "<function=patch>\n<parameter=input>say \"hi\"\n</parameter>" in prompt
    assert "<function=mcp__w.get_weather>" in prompt
    assert "<tool_response>\ncustom_tool_call\n</tool_response>\n<tool_response>\nfunction_call\n" in prompt


def test_only_allowed_tools_are_shown(scripted_server):
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]}
    url = scripted_server("No.")
    post(url, tools=[WEATHER, PATCH], tool_choice=choice).raise_for_status()
    post(url, tools=[WEATHER, PATCH], tool_choice="none").raise_for_status()
    (some, _), (none, _) = scripted_server.engine.asked
    assert "<name>get_weather" in some
    assert "<name>patch" not in some
    assert "# Tools" not in none


def test_without_parallel_calls_nothing_follows_the_first(scripted_server):
    url = scripted_server(CALL + CALL)
    for asked in ({"parallel_tool_calls": False}, {"tool_choice": {"type": "function", "name": "get_weather"}}):
        assert len(post(url, tools=[WEATHER], **asked).json()["output"]) == 1


@pytest.mark.parametrize("text", ["one two three four", f"<think>one two three four</think>Five.{CALL}"])
def test_an_answer_that_is_cut_off_is_incomplete(scripted_server, text):
    url = scripted_server(text, cut=1)
    ask = {"max_output_tokens": 9, "reasoning": {"effort": "low"}}
    whole, events = post(url, **ask).json(), streamed(url, **ask)
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert whole["output"][-1]["status"] == "incomplete"
    assert whole["usage"]["output_tokens"] == 9
    assert events[-1]["type"] == "response.incomplete"
    assert plain(events[-1]["response"]) == plain(whole)


@pytest.mark.parametrize("text", ["", "<think>Nothing to say.</think>"])
def test_an_empty_answer_is_a_message(scripted_server, text):
    events = streamed(scripted_server(text), reasoning={"effort": "low"})
    output = events[-1]["response"]["output"]
    assert output[-1]["content"][0]["text"] == ""
    assert [item["type"] for item in output] == (["reasoning", "message"] if text else ["message"])
    assert added_up(events) == output


@pytest.mark.parametrize("asked", [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}])
def test_logprobs_are_told_where_they_are_asked_for(scripted_server, asked):
    events = streamed(scripted_server("one two", cut=1), **asked)
    told = events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert "".join(token["token"] for token in told) == "one two"
    assert {len(token["top_logprobs"]) for token in told} == {asked.get("top_logprobs", 0)}
    assert [token for event in events if event["type"].endswith("text.delta") for token in event["logprobs"]] == told


@pytest.mark.parametrize("old", ["user", "assistant"])
def test_the_oldest_turns_go_where_the_context_is_too_small(scripted_server, old):
    url = scripted_server("Yes.")
    turns = [{"role": ("user", old)[n % 2], "content": f"<turn {n}>" + "?!#" * 1000} for n in range(40)]
    ask = {"input": [{"role": "system", "content": "Be brief."}, *turns], "instructions": "Be kind."}
    refused = post(url, **ask)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert refused.json()["error"]["param"] == "input"
    post(url, **ask, truncation="auto").raise_for_status()
    ((prompt, _),) = scripted_server.engine.asked
    assert "system\nBe kind.<|im_end|><|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n<turn " in prompt
    kept = [n for n in range(40) if f"<turn {n}>" in prompt]
    assert kept == list(range(40 - len(kept), 40))
    size = len(scripted_server.engine.tokenizer.encode(prompt))
    step = 2 if old == "assistant" else 1
    assert 7 / 8 - step / 8 < size / 32_768 <= 7 / 8


# -- a random model: the grammar's work -------------------------------------------------------------------------------


def test_what_format_is_asked_for(scripted_server):
    url = scripted_server("{}")
    schema = {"type": "json_schema", "name": "x", "schema": CITY, "strict": True}
    for asked in ({"type": "text"}, {"type": "json_object"}, schema):
        told = post(url, text={"format": asked, "verbosity": "low"}).json()
        Response.model_validate(told)
        assert told["text"] == {"format": asked}
    plain, *constrained = (params.grammar for _, params in scripted_server.engine.asked)
    assert plain is None
    assert None not in constrained


class Answer(pydantic.BaseModel):
    n: Literal[1, 2]
    ok: bool


def test_a_random_model_writes_what_is_parsed(tiny_server):
    for temperature in (0, 1, 1):
        try:
            answer = client(tiny_server).responses.parse(
                model="tiny", input="Hi", text_format=Answer, temperature=temperature, max_output_tokens=300
            )
        except pydantic.ValidationError:
            continue  # spaces without an end are in form
        assert isinstance(answer.output_parsed, Answer)
        return
    raise AssertionError("no answer came to its end")


@pytest.mark.parametrize("choice", [
    "required", {"type": "function", "name": "get_weather"},
    {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
])
def test_a_random_model_calls_what_it_has_to(tiny_server, choice):
    ask = {"tools": [WEATHER], "tool_choice": choice, "max_output_tokens": 300}
    answer = client(tiny_server).responses.create(model="tiny", input="Hi", **ask)
    if answer.status == "completed":
        assert answer.output[0].name == "get_weather"
        assert isinstance(json.loads(answer.output[0].arguments)["city"], str)
    else:
        assert answer.output[0].content[0].text.startswith("<tool_call>")
