"""A server under load and faults: keys, limits, clients that go away, several models, its log and metrics, its end."""

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from scripted import ScriptedEngine, served

from mimoflash.checkpoint import save_model
from mimoflash.serve import ServerSettings, named, respond, run_server
from mimoflash.serve.observe import JsonLines

USER = [{"role": "user", "content": "my secret is 4711"}]
CHAT = {"model": "scripted", "messages": USER}
SERVE = [sys.executable, "-m", "mimoflash.cli", "serve", "--port", "0"]
LONG = " ".join(f"word{i}" for i in range(200))


def post(url, body=CHAT, **more):
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30, **more)


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def test_a_key_is_asked_for_by_all_but_the_health_check(scripted_server):
    url = scripted_server("Yes.", settings=ServerSettings(api_keys=["first", "second"]))
    assert httpx.get(f"{url}/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": "firs"}, {"Authorization": "first2"}):
        refused = post(url, headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/metrics", headers=headers).status_code == 401
    for headers in ({"Authorization": "Bearer first"}, {"x-api-key": "second"}):
        assert post(url, headers=headers).status_code == 200


def test_other_sites_may_call_only_where_they_are_named(scripted_server):
    site = {"Origin": "https://site.example", "Access-Control-Request-Method": "POST"}
    url = scripted_server("Yes.")
    assert "access-control-allow-origin" not in httpx.options(f"{url}/v1/chat/completions", headers=site).headers
    url = scripted_server("Yes.", settings=ServerSettings(api_keys=["k"], origins=["https://site.example"]))
    allowed = httpx.options(f"{url}/v1/chat/completions", headers=site)  # browsers ask without a key
    assert allowed.headers["access-control-allow-origin"] == "https://site.example"
    refused = post(url, headers={"Origin": "https://site.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://site.example"  # so that the page can read why
    other = httpx.options(f"{url}/v1/chat/completions", headers=site | {"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(scripted_server, chunked):
    url = scripted_server("Yes.", settings=ServerSettings(body_bytes=2000))
    body = json.dumps({**CHAT, "user": "x" * 3000}).encode()
    content = iter([body[:1500], body[1500:]]) if chunked else body
    response = httpx.post(
        f"{url}/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    assert "2,000 bytes" in response.json()["error"]["message"]
    assert post(url).status_code == 200


def test_what_is_over_the_capacity_is_told_to_come_again(scripted_server):
    url = scripted_server(LONG, seconds=0.01, settings=ServerSettings(capacity=3))
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(post(url))) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: scripted_server.engine.running == 3)
    refused = post(url)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    for thread in threads:
        thread.join()
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == [LONG] * 3
    assert post(url, {**CHAT, "n": 4}).json()["error"]["param"] == "n"
    assert post(url, {**CHAT, "n": 3}).status_code == 200  # all room is there again


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_with_its_client(scripted_server, stream):
    url = scripted_server(LONG, seconds=0.05, settings=ServerSettings(capacity=2))
    ask = {**CHAT, "n": 2, "stream": stream}
    for _ in range(3):  # more than there is room for: it has to come back each time
        if stream:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=ask) as answer:
                next(answer.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=0.5)
        until(lambda: scripted_server.engine.running == 0)
    assert "mimoflash_answers_under_way 0.0" in httpx.get(f"{url}/metrics").text


def test_a_failure_is_told_and_logged_with_the_requests_id(scripted_server, caplog):
    url = scripted_server("Yes.", settings=ServerSettings(origins=["https://site.example"]))
    scripted_server.engine.events = lambda *_, **__: 1 // 0
    answer = post(url, headers={"x-request-id": "mine", "Origin": "https://site.example"})
    assert answer.headers["access-control-allow-origin"] == "https://site.example"
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
    assert answer.json()["error"]["message"] == "the server failed: see its log"
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == "request mine failed"
    assert "ZeroDivisionError" in JsonLines().format(record)
    assert 'mimoflash_requests_total{path="/v1/chat/completions",status="500"} 1.0' in httpx.get(f"{url}/metrics").text


def test_a_silence_is_broken_by_pings(scripted_server, monkeypatch):
    monkeypatch.setattr(respond, "PING_SECONDS", 0.1)
    url = scripted_server("one two three", seconds=0.35)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    pings = [i for i, line in enumerate(lines) if line.startswith(":")]
    assert len(pings) >= 3
    assert max(pings) < len(lines) - 1, "none after the end"
    told = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    assert "".join(delta.get("content", "") for delta in told) == "one two three"


def test_a_ping_that_comes_too_late_is_nobodys_error():
    """It may have waited beside the last frame, for a reader who took his time."""
    told = []

    async def late():
        raise RuntimeError("response already completed")

    async def run():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        ping = asyncio.ensure_future(late())
        await asyncio.sleep(0)
        await respond._ended(ping)
        del ping
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(run())
    assert told == []


def test_models_are_loaded_when_they_are_asked_for_and_go_when_others_need_the_room(tokenizer):
    opened, closed = [], []

    class Engine(ScriptedEngine):
        def close(self):
            closed.append(self.script(""))

    engines = {name: Engine(tokenizer, lambda _, name=name: name) for name in "abc"}

    class Opening(dict):
        def __getitem__(self, name):
            opened.append(name)
            if name == "broken":
                raise ValueError("its file is broken")
            return super().__getitem__(name)

    with served(Opening(engines | {"broken": None}), ServerSettings(most_loaded=2)) as url:
        listed = httpx.get(f"{url}/v1/models").json()["data"]
        assert [card["id"] for card in listed] == ["a", "b", "c", "broken"]
        assert opened == []
        for name in "aabac":
            answer = post(url, {**CHAT, "model": name}).json()
            assert answer["choices"][0]["message"]["content"] == name
        assert (opened, closed) == (["a", "b", "c"], ["b"])  # the one not used for the longest
        assert httpx.get(f"{url}/v1/models/c").json()["context_length"] == 32_768
        failed = post(url, {**CHAT, "model": "broken"})
        assert failed.status_code == 500
        assert "its file is broken" in failed.json()["error"]["message"]
        assert httpx.get(f"{url}/v1/models/d").json()["error"]["code"] == "model_not_found"


def test_names_of_models():
    assert named(["a=x/y", "smol"]) == {"a": "x/y", "smol": "smol"}
    for wrong in (["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(ValueError, match=r"MODEL|two models"):
            named(wrong)


def test_each_request_has_an_id_and_a_line_of_log_without_its_text(scripted_server, caplog):
    url = scripted_server("my answer is 0815")
    with caplog.at_level(logging.INFO, "mimoflash.serve"):
        given = post(url, headers={"x-request-id": "mine-1"}).headers["x-request-id"]
        made = post(url).headers["x-request-id"]
        until(lambda: len([r for r in caplog.records if r.name == "mimoflash.serve"]) >= 2)
    assert given == "mine-1"
    assert made.startswith("req_")
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == "mimoflash.serve"]
    told = next(line for line in lines if line["request"] == "mine-1")
    assert told["path"] == "/v1/chat/completions"
    assert told["status"] == 200
    assert told["prompt_tokens"] > 0
    assert told["completion_tokens"] > 0
    assert "4711" not in json.dumps(lines)
    assert "0815" not in json.dumps(lines)


def test_metrics_count_what_was_answered(scripted_server):
    url = scripted_server("<think>hm</think>Yes.")
    used = post(url, {**CHAT, "reasoning_effort": "low"}).json()["usage"]
    post(url, {"model": "scripted"})
    httpx.get(f"{url}/made/up/{'x' * 50}")
    until(lambda: 'path="other",status="404"' in httpx.get(f"{url}/metrics").text)
    text = httpx.get(f"{url}/metrics").text
    assert 'mimoflash_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
    assert 'mimoflash_requests_total{path="/v1/chat/completions",status="400"} 1.0' in text
    assert f'mimoflash_tokens_total{{kind="prompt"}} {used["prompt_tokens"]}.0' in text
    assert f'mimoflash_tokens_total{{kind="completion"}} {used["completion_tokens"]}.0' in text
    assert "made" not in text


@contextmanager
def serving(tiny_engine, tokenizer, folder, **environment):
    """A server as a process of its own, and its address."""
    save_model(tiny_engine.model, folder / "model", dtype="float32", tokenizer=tokenizer)
    command = [*SERVE, f"tiny={folder / 'model'}", "--log-json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        url = None
        while url is None:
            line = process.stderr.readline()
            assert line, "it ended before it served"
            words = json.loads(line)["message"].split()
            url = next((word for word in words if word.startswith("http://")), None)
        try:
            yield process, url
        finally:
            process.kill()


def test_what_is_under_way_is_finished_before_the_server_ends(tiny_engine, tokenizer, tmp_path):
    with serving(tiny_engine, tokenizer, tmp_path) as (process, url):
        bias = {str(token): -100 for token in tokenizer.stop_ids}
        ask = {"model": "tiny", "messages": USER, "max_tokens": 300, "stream": True, "logit_bias": bias}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=ask, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(timeout=20) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_traces_go_where_they_are_asked_for_and_hold_no_text(tiny_engine, tokenizer, tmp_path):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    came = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            came.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    where = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
    }
    with serving(tiny_engine, tokenizer, tmp_path, **where) as (process, url):
        post(url, {"model": "tiny", "messages": USER, "max_tokens": 3})
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
    collector.shutdown()
    collector.server_close()
    traces = b"".join(body for path, body in came if path == "/v1/traces")
    assert b"/v1/chat/completions" in traces
    assert b"gen_ai.usage.output_tokens" in traces
    assert not any(b"4711" in body for _, body in came)


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere/at/all"], "nowhere/at/all"), (["a=smol", "a=smol"], "two models are called a"),
    (["smol", "--api-key", ""], "an API key is empty"),
])
def test_servers_that_cannot_be_are_named_before_they_start(arguments, message):
    done = subprocess.run([*SERVE, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_named_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf":{port}: Address already in use; give another --host or --port"):
            run_server({"a": "a"}, lambda _: pytest.fail("it was loaded"), ServerSettings(), port=port)
