"""What the OpenAPI document says is so: schemathesis makes requests of it, good and bad, and reads the answers."""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from scripted import ScriptedEngine, served

from mimoflash.text import train_tokenizer

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    response_headers_conformance,
]
EXAMPLES = int(os.environ.get("MIMOFLASH_EXAMPLES", "15"))  # of each operation


@pytest.fixture(scope="module")
def document():
    tokenizer = train_tokenizer(["What is the weather? "] * 20, 300)
    call = "<tool_call>\n<function=f>\n<parameter=x>1</parameter>\n</function>\n</tool_call>"
    engine = ScriptedEngine(tokenizer, lambda _: f"<think>hm</think>Yes.{call}", cut=4)
    with served({"scripted": engine}) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


OPERATIONS = [
    "GET /v1/models", "GET /v1/models/{name}", "GET /health", "GET /metrics", "POST /v1/chat/completions",
    "POST /v1/completions", "POST /v1/messages", "POST /v1/messages/count_tokens", "POST /v1/responses",
    "GET /v1/responses/{id}", "DELETE /v1/responses/{id}", "GET /v1/responses/{id}/input_items",
]


def test_no_operation_is_left_out(document):
    assert sorted(OPERATIONS) == sorted(operation.ok().label for operation in document.get_all_operations())


@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_as_documented(document, label):
    method, path = label.split()

    @given(case=document[path][method].as_strategy())
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    def check(case):
        if isinstance(case.body, dict) and case.body.get("model"):
            case.body["model"] = "scripted"  # else nearly all are about a model that is not there
        case.call_and_validate(checks=CHECKS)

    check()
