"""Instructor gets objects of a type from a random model, so that the grammar does the work.

Its releases up to 1.17.0 want a rich and a jiter that are older than ours and openai's, but work with these: install it
by `pip install --no-deps instructor==1.17.0`, and what it then misses: aiohttp, docstring-parser, tenacity.
"""

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, field_validator

instructor = pytest.importorskip("instructor")
USER = [{"role": "user", "content": "Light the attic."}]


class Lamp(BaseModel):  # nothing in it that a random model could go on with for ever
    room: Literal["hall", "attic"]
    on: bool
    level: Literal[1, 2, 3] = 2


def client(url: str, mode: str):
    given = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return instructor.from_openai(given, mode=instructor.Mode[mode])


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "RESPONSES_TOOLS"])
def test_a_random_model_gives_objects_of_the_type(tiny_server, mode):
    ask = {"model": "tiny", "messages": USER, "response_model": Lamp, "max_retries": 0, "temperature": 1.0}
    for seed in range(3):
        ask |= {"max_output_tokens": 300} if mode == "RESPONSES_TOOLS" else {"max_tokens": 300, "seed": seed}
        assert isinstance(client(tiny_server, mode).create(**ask), Lamp)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_a_random_model_gives_them_bit_by_bit(tiny_server, mode):
    *_, last = client(tiny_server, mode).create_partial(
        model="tiny", messages=USER, response_model=Lamp, max_retries=0, max_tokens=300, seed=0
    )
    assert Lamp.model_validate(last.model_dump())


class Name(BaseModel):
    name: str

    @field_validator("name")
    @classmethod
    def _is_short(cls, name: str) -> str:
        if " " in name:
            raise ValueError("the first name is enough")
        return name


def as_call(name: str) -> str:
    return f"<tool_call>\n<function=Name>\n<parameter=name>{name}</parameter>\n</function>\n</tool_call>"


def as_json(name: str) -> str:
    return json.dumps({"name": name})


@pytest.mark.parametrize(("mode", "written"), [
    ("TOOLS", as_call), ("RESPONSES_TOOLS", as_call), ("JSON", as_json), ("JSON_SCHEMA", as_json),
])
def test_what_is_refused_is_asked_for_again(scripted_server, mode, written):
    """With the answer that was refused, and why: what no grammar knows."""

    def script(prompt: str) -> str:
        return written("Ada" if "the first name is enough" in prompt else "Ada Lovelace")

    url = scripted_server(script, obeys=True)
    assert client(url, mode).create(model="scripted", messages=USER, response_model=Name, max_retries=1).name == "Ada"
    _, second = (prompt for prompt, _ in scripted_server.engine.asked)
    assert "Ada Lovelace" in second
