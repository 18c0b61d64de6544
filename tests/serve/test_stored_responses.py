"""Responses that are kept to go on from; requests that cannot be answered."""

import asyncio
import json
import socket
import sqlite3
import time
from contextlib import closing

import httpx
import openai
import pytest
from openai.types.responses.response_item_list import ResponseItemList
from scripted import ScriptedEngine, served
from test_responses import ASK, PATCH, WEATHER, client, post, streamed

from mimoflash.serve import ServerSettings, respond


def rows(path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT count(*) FROM responses").fetchone()[0]


def test_a_conversation_goes_on_after_a_restart(scripted_server, tokenizer, tmp_path):
    settings = ServerSettings(store=str(tmp_path / "r.db"))
    with served({"scripted": ScriptedEngine(tokenizer, lambda _: "Fine.")}, settings) as url:
        ask = {"model": "scripted", "instructions": "Be kind.", "input": "How are you?"}
        first = client(url).responses.create(**ask)
    assert [path.name for path in tmp_path.iterdir()] == ["r.db"]  # it was closed
    again = client(scripted_server("Bye.", settings=settings))
    assert again.responses.retrieve(first.id) == first
    second = again.responses.create(model="scripted", input="And now?", previous_response_id=first.id)
    again.responses.delete(first.id)
    third = again.responses.create(model="scripted", input="And then?", previous_response_id=second.id)
    assert (second.previous_response_id, third.previous_response_id) == (first.id, second.id)
    (two, _), (three, _) = scripted_server.engine.asked
    before = "<|im_start|>user\nHow are you?<|im_end|><|im_start|>assistant\n<think></think>Fine.<|im_end|>"
    assert f"{before}<|im_start|>user\nAnd now?<|im_end|>" in two
    assert f"{before}<|im_start|>user\nAnd now?<|im_end|><|im_start|>assistant\n<think></think>Bye.<|im_end|>" in three
    assert "Be kind." not in two  # instructions are not carried over


def test_an_end_that_is_streamed_can_be_gone_on_from(scripted_server):
    url = scripted_server("Fine.")
    final = streamed(url)[-1]["response"]
    assert httpx.get(f"{url}/v1/responses/{final['id']}").json() == final
    assert post(url, previous_response_id=final["id"]).status_code == 200


def test_a_deleted_response_is_gone(scripted_server):
    api = client(scripted_server("Fine.")).responses
    made = api.create(**ASK)
    api.delete(made.id)
    for ask in (api.retrieve, api.delete, api.input_items.list):
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            ask(made.id)


def test_what_is_not_to_be_stored_is_not(scripted_server):
    api = client(scripted_server("Fine.")).responses
    made = api.create(**ASK, store=False)
    with pytest.raises(openai.NotFoundError):
        api.retrieve(made.id)
    with pytest.raises(openai.NotFoundError) as raised:
        api.create(**ASK, previous_response_id=made.id)
    assert (raised.value.param, raised.value.code) == ("previous_response_id", "previous_response_not_found")


def test_input_items_are_listed_in_pages(scripted_server):
    url = scripted_server("Fine.")
    calls = [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
             {"type": "function_call_output", "call_id": "c", "output": "1"},
             {"type": "custom_tool_call", "call_id": "d", "name": "p", "input": "x"},
             {"type": "custom_tool_call_output", "call_id": "d", "output": "2"}]
    first = post(url, input=[{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}, *calls])
    second = post(url, input="Three.", previous_response_id=first.json()["id"]).json()
    path = f"{url}/v1/responses/{second['id']}/input_items"
    page = httpx.get(path, params={"order": "asc", "limit": 100}).json()
    ResponseItemList.model_validate(page)
    items = page["data"]
    assert [item["type"] for item in items] == ["message"] * 2 + [call["type"] for call in calls] + ["message"] * 2
    assert [items[n]["content"][0]["text"] for n in (0, 1, 6, 7)] == ["One.", "Two.", "Fine.", "Three."]
    assert [items[n]["content"][0]["type"] for n in (0, 1)] == ["input_text", "output_text"]
    assert len({item["id"] for item in items}) == 8
    listed = client(url).responses.input_items.list(second["id"], limit=3)
    assert [item.id for item in listed] == [item["id"] for item in reversed(items)]  # the client turns the pages
    assert httpx.get(path, params={"after": "nobody"}).json()["error"]["param"] == "after"
    assert httpx.get(path, params={"limit": 0}).json()["error"]["param"] == "limit"


def test_an_item_can_be_referred_to_by_the_id_it_got_here(scripted_server):
    url = scripted_server("<think>Hm.</think>Fine.")
    own = {"id": "msg_1", "role": "user", "content": "Mine."}
    made = post(url, input=[own, {"role": "user", "content": "Hello."}], reasoning={"effort": "low"}).json()
    items = httpx.get(f"{url}/v1/responses/{made['id']}/input_items?order=asc").json()["data"]
    assert items[0]["id"] == "msg_1"
    ids = [items[1]["id"], *(item["id"] for item in made["output"])]
    post(url, input=[{"type": "item_reference", "id": id} for id in ids]).raise_for_status()
    assert "user\nHello.<|im_end|><|im_start|>assistant\n<think>Hm.</think>Fine." in scripted_server.engine.asked[1][0]
    refused = post(url, input=[{"type": "item_reference", "id": "msg_1"}])  # anybody may have called theirs so
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "item_not_found")


def soon(holds) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_whose_client_went_away_is_not_stored(scripted_server, tmp_path, stream):
    path = tmp_path / "r.db"
    url = scripted_server("one two three four five six", cut=1, seconds=2, settings=ServerSettings(store=str(path)))
    engine, body = scripted_server.engine, json.dumps(ASK | {"stream": stream})
    head = f"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        soon(lambda: engine.running)
    soon(lambda: not engine.running)
    assert rows(path) == 0
    engine.seconds = 0
    post(url)
    assert rows(path) == 1


def test_a_model_that_fails_in_the_middle_says_so(scripted_server, tmp_path):
    path = tmp_path / "r.db"
    url = scripted_server("one two three four", cut=1, settings=ServerSettings(store=str(path)))
    events = scripted_server.engine.events

    async def failing(*args, **more):
        count = 0
        async for event in events(*args, **more):
            if (count := count + 1) == 4:
                raise RuntimeError("weights on fire")
            yield event

    scripted_server.engine.events = failing
    told = streamed(url)
    assert told[-1]["type"] == "response.failed"
    assert told[-1]["response"]["status"] == "failed"
    assert told[-1]["response"]["error"] == {"code": "server_error", "message": "the server failed: see its log"}
    with pytest.raises(openai.InternalServerError, match="see its log"):
        client(url).responses.create(**ASK)
    assert rows(path) == 0


def test_a_failure_before_the_first_event_is_an_error_event(scripted_server, monkeypatch):
    monkeypatch.setattr(respond, "HEADER_SECONDS", 0.05)
    url = scripted_server("one")

    async def failing(*args, **more):
        await asyncio.sleep(0.3)  # the header has been sent by then
        raise ValueError("the prompt has 9 tokens; the model's context leaves no room for an answer")
        yield

    scripted_server.engine.events = failing
    with pytest.raises(openai.APIError, match="leaves no room") as raised:
        list(client(url).responses.create(**ASK, stream=True))
    assert raised.value.code == "context_length_exceeded"
    (event,) = streamed(url)
    assert (event["type"], event["code"], event["param"]) == ("error", "context_length_exceeded", "input")


OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "1"}
IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}
NONSENSE = {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}


@pytest.mark.parametrize(("change", "status", "param", "words"), [
    ({"model": "other"}, 404, "model", "other"),
    ({"input": []}, 400, "input", "at least 1"),
    ({"input": 5}, 400, "input", ""),
    ({"input": [{"role": "user"}]}, 400, "input.0", ""),
    ({"input": [{"role": "chief", "content": "x"}]}, 400, "input.0", "user"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, 400, "input.0", "web_search_call"),
    ({"input": [IMAGE]}, 400, "input.0", "input_image"),
    ({"input": [OUTPUT]}, 400, "input", "'c'"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]}, 400, "input", "'f'"),
    ({"input": "x" * 9000}, 400, "input", "leaves no room"),
    ({"previous_response_id": "resp_x"}, 404, "previous_response_id", "resp_x"),
    ({"background": True}, 400, "background", "background"),
    ({"conversation": "conv_x"}, 400, "conversation", "conversation"),
    ({"prompt": {"id": "x"}}, 400, "prompt", "prompt"),
    ({"temperature": 3}, 400, "temperature", ""),
    ({"top_p": 0}, 400, "top_p", ""),
    ({"max_output_tokens": 0}, 400, "max_output_tokens", ""),
    ({"top_logprobs": 21}, 400, "top_logprobs", ""),
    ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata", ""),
    ({"truncation": "sometimes"}, 400, "truncation", ""),
    ({"reasoning": {"effort": "some"}}, 400, "reasoning.effort", ""),
    ({"tools": [{"type": "mcp", "server_label": "x"}]}, 400, "tools.0", "mcp"),
    ({"tools": [{"type": "function", "name": "a b"}]}, 400, "tools.0.function.name", ""),
    ({"tools": [WEATHER, WEATHER]}, 400, "tools", "get_weather"),
    ({"tool_choice": "required"}, 400, "tool_choice", "no tools"),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, 400, "tool_choice", "no tools"),
    ({"tools": [PATCH], "tool_choice": {"type": "function", "name": "f"}}, 400, "tool_choice", "patch"),
    ({"tools": [PATCH], "tool_choice": {"type": "file_search"}}, 400, "tool_choice", "file_search"),
    ({"tools": [PATCH], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [
        {"type": "function", "name": "f"}]}}, 400, "tool_choice", "patch"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text.format.json_schema.schema", "required"),
    ({"text": {"format": NONSENSE}}, 400, "text.format", ""),
])
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_named(tiny_server, monkeypatch, change, status, param, words, stream):
    monkeypatch.setattr(respond, "HEADER_SECONDS", 60)  # on a busy machine too
    response = post(tiny_server, **{"model": "tiny", "input": "Hi", "max_output_tokens": 4, "stream": stream} | change)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert words in error["message"]
    assert error["message"]


@pytest.mark.parametrize("parameters", ['{"minimum": NaN}', '{"title": "\\ud800"}'])
def test_what_could_not_be_told_again_is_refused(scripted_server, parameters):
    url, tool = scripted_server("Yes."), f'{{"type": "function", "name": "f", "parameters": {parameters}}}'
    body = f'{{"model": "scripted", "input": "x", "tools": [{tool}]}}'
    response = httpx.post(f"{url}/v1/responses", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools.0.function.parameters"


def test_a_stored_response_comes_whole_only(scripted_server):
    url = scripted_server("Yes.")
    made = post(url).json()
    refused = httpx.get(f"{url}/v1/responses/{made['id']}?stream=true")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")
