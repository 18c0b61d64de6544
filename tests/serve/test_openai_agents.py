"""OpenAI's agents SDK: its runner executes the tool that a model of ours calls, and the model reads what came of it."""

import asyncio

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
)
from openai.types.shared import Reasoning
from pydantic import BaseModel

CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n<parameter=days>2</parameter>\n</function>\n"
    "</tool_call>"
)
ASKED = "How is the weather?"
CONFIG = RunConfig(tracing_disabled=True)  # traces would go to OpenAI
SETTINGS = ModelSettings(reasoning=Reasoning(effort="low"), include_usage=True)

pytestmark = pytest.mark.parametrize("stream", [False, True])
both = pytest.mark.parametrize("api", [OpenAIChatCompletionsModel, OpenAIResponsesModel])


class Weather(BaseModel):
    degrees: int


def script(prompt: str) -> str:
    return "It is sunny." if "<tool_response>" in prompt else f"<think>Paris, I guess.</think>Let me see.{CALL}"


@function_tool
def get_weather(city: str, days: int) -> str:
    """The weather of a city."""
    return f"{city} has 21 degrees for {days} days"


async def _run(api, url, stream, *, output_type=None, **how):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        agent = Agent(
            "Forecaster", instructions="Be brief.", model=api("scripted", client), model_settings=SETTINGS,
            tools=[get_weather], output_type=output_type,
        )
        if not stream:
            return await Runner.run(agent, ASKED, run_config=CONFIG, **how), None
        run = Runner.run_streamed(agent, ASKED, run_config=CONFIG, **how)
        events = [event.data async for event in run.stream_events() if event.type == "raw_response_event"]
        return run, "".join(event.delta for event in events if event.type == "response.output_text.delta")


def run(*given, **how):
    """The finished run, and the text that was streamed."""
    return asyncio.run(_run(*given, **how))


@both
def test_a_tool_runs_and_its_result_comes_back(scripted_server, api, stream):
    done, told = run(api, scripted_server(script), stream)
    assert done.final_output == "It is sunny."
    assert told in (None, "Let me see.It is sunny.")
    assert [item.type for item in done.new_items] == [
        "reasoning_item", "message_output_item", "tool_call_item", "tool_call_output_item", "message_output_item",
    ]
    usage = done.context_wrapper.usage
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    first, second = (prompt for prompt, _ in scripted_server.engine.asked)
    assert "<|im_start|>system\nBe brief." in first
    assert f"Let me see.{CALL}<|im_end|>" in second
    assert "<tool_response>\nParis has 21 degrees for 2 days\n</tool_response>" in second


@pytest.mark.parametrize("kept", [False, True])
def test_responses_know_the_reasoning_that_came_before(scripted_server, kept, stream):
    """Whether it is sent back or, with the response's id, kept here."""
    run(OpenAIResponsesModel, scripted_server(script), stream, auto_previous_response_id=kept)
    assert f"<think>Paris, I guess.</think>Let me see.{CALL}" in scripted_server.engine.asked[1][0]


@both
def test_a_tool_may_be_called_before_an_answer_of_a_type(scripted_server, api, stream):
    def script(prompt: str) -> str:
        return '{"degrees":21}' if "<tool_response>" in prompt else CALL

    url = scripted_server(script, obeys=True)
    done, _ = run(api, url, stream, output_type=Weather)
    assert done.final_output == Weather(degrees=21)
    assert len(scripted_server.engine.asked) == 2
