"""canitoolcall: its probe of a server, and its collection of what models write in XML, through our parser."""

import re
from itertools import pairwise

import pytest
from canitoolcall.fixtures import load_fixtures
from canitoolcall.probe import probe
from canitoolcall.pytest_plugin import assert_conforms
from canitoolcall.results import ParsedToolCall, ParseResult
from hypothesis import given
from hypothesis import strategies as st

from mimoflash.text import ChatParser

FIXTURES = {fixture.id.split("/")[1]: fixture for fixture in load_fixtures(families=["qwen3-xml"])}
KEPT_AS_WRITTEN = {  # malformed, so that it is text, with the calls that follow it
    # no <tool_call>
    "llamacpp-coder-bare-function": [], "bug-coder-missing-tool-call-opener": [],
    "llamacpp-coder-bare-function-parallel": [("special_function_with_opt", '{"arg1": 1, "arg2": 2}')],
    # no </parameter>
    "bug-missing-close-parameter-before-function": [],
    "vllm-coder-missing-close-parameter": [
        ("get_current_weather", r'{"city": "Dallas\n<parameter=state>\nTX", "unit": "fahrenheit"}'),
    ],
    "q38-truncated-at-tool-call-open": [],
    "q38-marker-in-arguments": [],  # a value ends at the first </parameter>
}
ANSWERS = {  # by what the conversation holds: the function's name and its arguments, or text
    "temp_c": "It is 18 degrees and clear.",
    "17 + 25": "42",
    "and in Tokyo": [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Tokyo", "unit": "c"})],
    "Paris": [("get_weather", {"city": "Paris"})],
    "Lisbon": [("get_weather", {"city": "Lisbon"})],
    "Design review": [("create_event", {
        "title": "Design review", "start": "2026-10-01T15:00:00Z", "location": '{"city": "Berlin", "room": "4.12"}',
        "attendees": '[{"name": "Ana", "email": "ana@example.com"}, {"name": "Bo", "email": "bo@example.com"}]',
    })],
    "Grüße": [("save_note", {"title": "Grüße aus Zürich", "body": "Café ☕ in 東京 — naïve résumé 🚀"})],
    "on the server": [("get_server_time", {})],
    "9.11": [("record_answer", {"answer": "9.9"})],
}


def call(name: str, arguments: dict[str, str]) -> str:
    values = "".join(f"<parameter={key}>{value}</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def script(prompt: str) -> str:
    conversation = prompt.split("<|im_start|>user")[1]
    answer = next(answer for words, answer in ANSWERS.items() if words in conversation)
    return answer if isinstance(answer, str) else "\n".join(call(*each) for each in answer)


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_the_probe_finds_nothing(scripted_server, cut):
    report = probe(f"{scripted_server(script, cut=cut, obeys=True)}/v1", "scripted")
    assert report.summary() == {"pass": 27, "fail": 0, "error": 0, "skip": 0}, report.render_text()  # 9 scenarios
    assert not any(outcome.warnings for outcome in report.outcomes), report.render_text()


def in_our_form(text: str) -> str:
    """Qwen sets a value between line ends that are not part of it; here a value is verbatim."""
    return re.sub(r"(<parameter=[^>\n]+>)\n(.*?)\n(</parameter>)", r"\1\2\3", text, flags=re.DOTALL)


def parsed(fixture, *parts: str) -> ParseResult:
    parser = ChatParser(fixture.tools, fixture.generation_prompt)
    for part in parts:
        parser.feed(part)
    parser.finish()
    message = parser.message
    calls = [ParsedToolCall(each["function"]["name"], each["function"]["arguments"]) for each in message["tool_calls"]]
    return ParseResult(message["content"] or None, message["reasoning_content"] or None, tuple(calls))


@pytest.mark.parametrize("name", FIXTURES)
def test_what_models_write_is_understood(name):
    text = in_our_form(FIXTURES[name].raw_output)
    whole = parsed(FIXTURES[name], text)
    if name in KEPT_AS_WRITTEN:
        assert [(call.name, call.arguments_raw) for call in whole.tool_calls] == KEPT_AS_WRITTEN[name]
        kept = f"{whole.reasoning_content}</think>" if whole.reasoning_content else ""
        kept += whole.content or ""
        assert kept == (text.rpartition("<tool_call>")[0] if whole.tool_calls else text)
    else:
        assert_conforms(FIXTURES[name], whole, soft=True)  # soft: but for space around content and reasoning


@pytest.mark.parametrize("form", [str, in_our_form])
@pytest.mark.parametrize("name", FIXTURES)
def test_it_is_understood_however_it_is_cut(name, form):
    fixture, text = FIXTURES[name], form(FIXTURES[name].raw_output)
    whole = parsed(fixture, text)
    assert parsed(fixture, *text) == whole
    for place in range(len(text)):
        assert parsed(fixture, text[:place], text[place:]) == whole


@given(st.sampled_from(list(FIXTURES.values())), st.data())
def test_it_is_understood_however_often_it_is_cut(fixture, data):
    text = in_our_form(fixture.raw_output)
    places = [0, *sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=40))), len(text)]
    parts = [text[start:end] for start, end in pairwise(places)]
    assert parsed(fixture, *parts) == parsed(fixture, text)
