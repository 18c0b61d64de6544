"""Several engines on Ray behind one server: its API is that of one. Engines here write what a script says, and who
they are."""

import json
import os
import random
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from scripted import ScriptedEngine, served

from mimoflash.serve import ServerSettings, run_server

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "Who are you?"}]}
LONG = {"model": "scripted", "messages": [{"role": "user", "content": "At length."}]}  # a minute


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "mimoflash.serve.replicas", raising=False)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[ray\]'"):
        run_server({"a": "a"}, lambda _: None, ServerSettings(), port=0, replicas=2)


class Opener:
    """Opens in the replica's process."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, place):
        if place == "broken":
            raise ValueError("its file is broken")
        words = " ".join(f"word{i}" for i in range(1500))
        script = lambda prompt: f"{os.getpid()} {words if 'At length' in prompt else ''}"  # noqa: E731
        return ScriptedEngine(self.tokenizer, script, seconds=0.03)


@pytest.fixture(scope="module")
def on_ray(tokenizer):
    """Opens by two replicas."""
    pytest.importorskip("ray")
    from mimoflash.serve.replicas import on_ray

    with pytest.MonkeyPatch.context() as patch:
        here = Path(__file__).parent
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here, here.parent, *sys.path))))  # for the replicas
        patch.delenv("RAY_ADDRESS", raising=False)
        with on_ray(Opener(tokenizer), 2, 2) as open_engine:
            yield open_engine


@pytest.fixture(scope="module")
def engine(on_ray):
    engine = on_ray("scripted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "close", lambda: None)  # a server's end would end it
        yield engine


def post(url, body=CHAT, timeout=30):
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=timeout)


def said(answer):
    return answer.json()["choices"][0]["message"]["content"]


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def running(url):
    return int(float(httpx.get(f"{url}/metrics").text.partition('engine_running{model="scripted"} ')[2].split()[0]))


def test_streams_run_side_by_side_in_all_replicas_and_come_as_they_are_written(engine):
    ask = {**LONG, "stream": True, "max_tokens": 300}

    def read(url, came):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=ask, timeout=30) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text = json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                    came.append((time.monotonic(), text))

    with served({"scripted": engine}) as url:
        streams = [[], []]
        threads = [threading.Thread(target=read, args=(url, came)) for came in streams]
        for thread, came in zip(threads, streams, strict=True):
            thread.start()
            until(lambda came=came: came)
        until(lambda: running(url) == 2)
        for thread in threads:
            thread.join()
    texts = ["".join(text for _, text in came) for came in streams]
    assert len({text.split()[0] for text in texts}) == 2  # processes
    assert all(" word0 word1 word2 " in text for text in texts)
    for came in streams:
        gaps = [after - before for (before, _), (after, _) in pairwise(came)]
        assert len(came) > 20
        assert max(gaps) < 0.5 * (came[-1][0] - came[0][0])  # not all of it at the end


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_with_its_client(engine, stream):
    with served({"scripted": engine}, ServerSettings(capacity=1)) as url:
        for _ in range(2):  # more than there is room for: it has to come back each time
            if stream:
                with httpx.stream("POST", f"{url}/v1/chat/completions", json={**LONG, "stream": True}) as answer:
                    lines = answer.iter_lines()
                    next(lines)
                    assert running(url) == 1
            else:
                with pytest.raises(httpx.ReadTimeout):
                    post(url, LONG, timeout=0.5)
            until(lambda: running(url) == 0)


def test_errors_are_those_of_one_engine(engine, on_ray):
    with served({"scripted": engine}, ServerSettings(capacity=1)) as url:
        too_long = post(url, {**CHAT, "messages": [{"role": "user", "content": "many words " * 20_000}]})
        assert too_long.status_code == 400
        assert too_long.json()["error"]["code"] == "context_length_exceeded"
        thread = threading.Thread(target=post, args=(url, {**LONG, "max_tokens": 200}))
        thread.start()
        until(lambda: running(url) == 1)
        busy = post(url)
        assert busy.status_code == 429
        assert int(busy.headers["retry-after"]) >= 1
        thread.join()
    with pytest.raises(ValueError, match="ValueError: its file is broken"):
        on_ray("broken")


def who(url, turns):
    """Who answers a conversation of so many turns that begins as no other does."""
    messages, replicas = [{"role": "user", "content": f"{random.random()} " + "It begins so. " * 20}], []
    for turn in range(turns):
        replicas.append(said(post(url, {**CHAT, "messages": messages})))
        messages += [{"role": "assistant", "content": replicas[-1]}, {"role": "user", "content": f"Turn {turn}."}]
    return replicas


def test_a_conversation_stays_with_the_replica_that_knows_it(engine):
    with served({"scripted": engine}) as url:
        conversations = [set(who(url, 2)) for _ in range(16)]
        assert all(len(replicas) == 1 for replicas in conversations)
        assert len(set().union(*conversations)) == 2


def test_a_dead_replica_is_replaced(engine):
    with served({"scripted": engine}) as url:
        dead = who(url, 1)
        os.kill(int(dead[0]), signal.SIGKILL)
        until(lambda: post(url).status_code == 200)
        assert httpx.get(f"{url}/metrics").status_code == 200
        until(lambda: len({*who(url, 1), *who(url, 1), *who(url, 1)} - {*dead}) == 2, seconds=60)
