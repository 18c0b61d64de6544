"""LangChain's own standard suite for chat models, run with its OpenAI client against chat completions and Responses."""

import json
import re

import pytest
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from scripted import ScriptedEngine, served

pytestmark = pytest.mark.anyio  # runs the suite's coroutines


def call(name: str, **arguments: str) -> str:
    values = "".join(f"<parameter={key}>{value}</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


JOKE = {"setup": "Why do cats sit on keyboards?", "punchline": "They like the mouse."}
ANSWERS = {  # by what the last turn holds
    "<tool_response>": "It is done.",
    "magic_function(3)": call("magic_function", input="3"),
    "magic_function_no_args()": call("magic_function_no_args"),
    "Hello!": call("magic_function", input="1"),  # only where a tool is forced
    "Pirate greeting": call("greeting_generator", answer_style="Pirate"),
    "3 + 4": call("my_adder_tool", a="3", b="4"),
    "San Francisco": call("get_weather", location="San Francisco, CA"),
    "你好啊集团": call("unicode_customer", customer_name="你好啊集团", description="A Chinese company"),
    "こんにちは株式会社": call("unicode_customer", customer_name="こんにちは株式会社", description="A Japanese one"),
}


def script(prompt: str) -> str:
    *_, turn, assistant = prompt.split("<|im_start|>")
    thought = "" if assistant.endswith("</think>") else "<think>Let me think.</think>"
    if "joke" in turn:
        tool = re.search("<name>(Joke.*)</name>", prompt)
        return thought + (call(tool[1], **JOKE) if tool else json.dumps(JOKE))
    return thought + next((answer for words, answer in ANSWERS.items() if words in turn), "Hello, how are you?")


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def url(tokenizer, anyio_backend):
    """Asynchronous to keep one event loop for all tests: LangChain keeps connections for all of its models."""
    engine = ScriptedEngine(tokenizer, script, obeys=True)
    with served({"scripted": engine, "other": engine}) as url:
        yield url


class TestChatCompletions(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _server(self, url):
        self.url = url

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {"base_url": f"{self.url}/v1", "api_key": "none", "model": "scripted", "stream_usage": True}

    @property
    def model_override_value(self):
        return "other"

    @property
    def supports_json_mode(self):
        return True

    @property
    def supports_anthropic_inputs(self):
        return True

    @property
    def supported_usage_metadata_details(self):
        details = ["reasoning_output", "cache_read_input"]
        return {"invoke": details, "stream": details}

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        message = self._said(stream, reasoning_effort="low")
        assert message.usage_metadata["output_token_details"]["reasoning"] > 0
        return message

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        return self._said(stream)

    def _said(self, stream: bool, **how) -> AIMessage:
        model = ChatOpenAI(**self.chat_model_params, **how)
        if not stream:
            return model.invoke("Hi")
        first, *others = model.stream("Hi")
        return sum(others, first)


class TestStructuredByCalls(TestChatCompletions):
    @property
    def structured_output_kwargs(self):
        return {"method": "function_calling"}


class TestResponses(TestChatCompletions):
    @property
    def chat_model_params(self):
        return {**super().chat_model_params, "use_responses_api": True}
